"""The signal modules of a model, and the three ways in which they run: values in, values out, and back in."""

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .signal_perceptiongpt import SignalEmbeddingNorm
from .signals_perceptiongpt import SIGNALS
from .slots_perceptiongpt import several_processes


class SignalModulesMixin:
    """
    What `PerceptionGPTModel` does with its signals.

    Attributes:
        signals (`dict[str, Signal]`): those of the checkpoint, in the order in which they run.
    """

    def add_signal_modules(self, config, embedding_rms: float) -> list[nn.Module]:
        """Makes the modules of the checkpoint's signals attributes of the model; returns them and all their parts."""
        self.signals = {name: SIGNALS[name] for name in config.signals}
        self._signal_module_names = []
        for signal in self.signals.values():
            for name, module in signal.build_modules(config, embedding_rms).items():
                # Before any weight is there: what is offloaded to the disk is read in the dtype that is set here.
                setattr(self, name, module.float())
                self._signal_module_names.append(name)
        modules = self.signal_modules().values()
        # Coordinates stay float32 whatever the rest is loaded in.
        self._keep_in_fp32_modules_strict = self._signal_module_names
        # What quantizers leave out; they compare whole names, in a model with a head as well.
        prefixed = [f"{self.base_model_prefix}.{name}" for name in self._signal_module_names]
        self._keep_in_fp32_modules = [*self._signal_module_names, *prefixed]
        self._no_split_modules = [*self._no_split_modules, *(type(module).__name__ for module in modules)]
        return [part for module in modules for part in module.modules()]

    def signal_modules(self) -> dict[str, nn.Module]:
        """The modules of the checkpoint's signals by attribute name."""
        return {name: getattr(self, name) for name in self._signal_module_names}

    def first_embedding_norm(self) -> SignalEmbeddingNorm:
        """The norm of the first signal, whose scale the others start at."""
        parts = (part for module in self.signal_modules().values() for part in module.modules())
        return next(part for part in parts if isinstance(part, SignalEmbeddingNorm))

    def encode_signals(self, values: dict, read: dict) -> torch.Tensor:
        """
        Embeddings of `<vis>` slots: the mean over the signals that are read.

        Args:
            values (`dict[str, torch.Tensor]`): by signal name, of shape `(batch_size, K, ...)` or `(1, 1, ...)`.
            read (`dict[str, torch.Tensor]`): by signal name, bool of shape `(batch_size, K)` or `(1, 1)`.

        Returns:
            `torch.Tensor` of shape `(batch_size, K, hidden_size)`, float32, of no meaning where nothing is read.
        """
        total, count = 0, 0
        # Outside autocast: bfloat16 coordinates would fall into bins.
        with maybe_autocast(next(iter(values.values())).device.type, enabled=False):
            chosen = self.chosen_slots(read)
            for name, value in values.items():
                if name not in chosen:
                    embeddings = self.signals[name].encode(self, value.flatten(0, 1))
                else:
                    width, index = self.config.text_config.hidden_size, chosen[name]
                    embeddings = torch.zeros(read[name].numel(), width, device=value.device)
                    if len(index):
                        encoded = self.signals[name].encode(self, value.flatten(0, 1)[index])
                        embeddings = embeddings.index_copy(0, index, encoded)
                embeddings = embeddings.unflatten(0, value.shape[:2])
                weight = read[name][..., None].to(embeddings)
                total, count = total + weight * embeddings, count + weight
            return total / count.clamp(min=1)

    def chosen_slots(self, needed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        The slots that a training step runs signals for where that is costly: those that read an image.

        Args:
            needed (`dict[str, torch.Tensor]`): by signal name, bool of shape `(batch_size, K)`.

        Returns:
            by signal name indices into the flat `(batch_size, K)`; signals that are not in it run for all slots. At
            least one slot where several processes must agree; nothing in a compiled graph, whose shapes are fixed.
        """
        if not self.training or torch.compiler.is_compiling():
            return {}
        costly = [name for name in needed if self.signals[name].reads_image]
        chosen = {name: needed[name].flatten().nonzero()[:, 0] for name in costly}
        at_least = 1 if several_processes() else 0
        return {name: index if len(index) else index.new_zeros(at_least) for name, index in chosen.items()}

    def decode_signals(
        self,
        states: torch.Tensor,
        image_features: torch.Tensor,
        image_index: torch.Tensor,
        names=None,
        every_signal: bool = False,
        chosen: dict | None = None,
    ) -> dict:
        """
        Decodes final-norm hidden states, each the one that predicts a `<vis>`.

        Args:
            states (`torch.Tensor` of shape `(N, hidden_size)`)
            image_features (`torch.Tensor` of shape `(images, mask_cells, feature_size)`)
            image_index (`torch.Tensor` of shape `(N,)`, int64): the image each state speaks of, -1 for none.
            names (`Iterable[str]`, *optional*): the signals to decode; by default all.
            every_signal (`bool`): whether the other signals are decoded, too, from the first state alone.
            chosen (`dict[str, torch.Tensor]`, *optional*): of [`chosen_slots`].

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: by signal name the values `(N, ...)` and their predicted
            quality `(N,)`.
        """
        decoded, chosen = {}, chosen or {}
        with maybe_autocast(states.device.type, enabled=False):
            for name, signal in self.signals.items():
                if names is None or name in names:
                    index = chosen.get(name)
                    own = (states, image_index) if index is None else (states[index], image_index[index])
                    decoded[name] = signal.decode(self, own[0], image_features, own[1])
                elif every_signal:
                    decoded[name] = signal.decode(self, states[:1], image_features, image_index[:1])
        return decoded

    def feed_back(self, states: torch.Tensor, frames: torch.Tensor | None = None) -> torch.Tensor:
        """
        Closes the loop: states `(rows, hidden_size)` to the values they decode to, and those to the embeddings, of the
        same shape, that the language model reads as the `<vis>` just emitted. The table says which signals are fed
        back: the box alone, unless another one says so. `frames` `(rows, 4)` are those of the crops that the states are
        decoded in, by default the image's own square, on which values are read.
        """
        with maybe_autocast(states.device.type, enabled=False):
            fed_back = [signal for signal in self.signals.values() if signal.fed_back]
            embeddings = []
            for signal in fed_back:
                values, _ = signal.decode(self, states, None, None)
                embeddings.append(
                    signal.encode(self, values if frames is None else signal.out_of_frame(values, frames))
                )
            return sum(embeddings) / len(embeddings)
