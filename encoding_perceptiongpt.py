"""The signal modules of a model, and the three ways in which they run: values in, values out, and back in."""

from contextlib import nullcontext

import torch
from torch import nn

from .signal_perceptiongpt import SignalEmbeddingNorm
from .signals_perceptiongpt import SIGNALS
from .slots_perceptiongpt import several_processes


def without_autocast(device: torch.device):
    """A context in which autocast is off; entering `torch.autocast` where it is off anyway takes as long as a layer."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


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
                setattr(self, name, module)
                self._signal_module_names.append(name)
        modules = self.signal_modules().values()
        # Coordinates stay float32 whatever the rest is loaded in.
        self._keep_in_fp32_modules_strict = self._signal_module_names
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
        with without_autocast(next(iter(values.values())).device):
            for name, value in values.items():
                chosen = self.chosen_slots(name, read[name])
                if chosen is None:
                    embeddings = self.signals[name].encode(self, value.flatten(0, 1))
                else:
                    width = self.config.text_config.hidden_size
                    embeddings = torch.zeros(read[name].numel(), width, device=value.device)
                    if len(chosen):
                        encoded = self.signals[name].encode(self, value.flatten(0, 1)[chosen])
                        embeddings = embeddings.index_copy(0, chosen, encoded)
                embeddings = embeddings.unflatten(0, value.shape[:2])
                weight = read[name][..., None].to(embeddings)
                total, count = total + weight * embeddings, count + weight
            return total / count.clamp(min=1)

    def chosen_slots(self, name: str, needed: torch.Tensor) -> torch.Tensor | None:
        """
        The slots of a costly signal that a training step runs for: indices into the flat `needed` `(batch_size, K)`,
        `None` for all. At least one where several processes must agree; all in a compiled graph, of fixed shapes.
        """
        if not self.training or not self.signals[name].is_costly or torch.compiler.is_compiling():
            return None
        chosen = needed.flatten().nonzero()[:, 0]
        return chosen.new_zeros(1) if several_processes() and not len(chosen) else chosen

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
            chosen (`dict[str, torch.Tensor]`, *optional*): by signal name indices of the states that count; by default
                all do.

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: by signal name the values `(N, ...)` and their predicted
            quality `(N,)`.
        """
        decoded = {}
        with without_autocast(states.device):
            for name, signal in self.signals.items():
                if names is None or name in names:
                    index = (chosen or {}).get(name)
                    if index is None:
                        decoded[name] = signal.decode(self, states, image_features, image_index)
                    else:
                        decoded[name] = signal.decode(self, states[index], image_features, image_index[index])
                elif every_signal:
                    decoded[name] = signal.decode(self, states[:1], image_features, image_index[:1])
        return decoded

    def feed_back(self, states: torch.Tensor) -> torch.Tensor:
        """
        Closes the loop: states `(rows, hidden_size)` to the values they decode to, and those to the embeddings, of the
        same shape, that the language model reads as the `<vis>` just emitted. The table says which signals are fed
        back: the box alone, unless another one says so.
        """
        with without_autocast(states.device):
            fed_back = [signal for signal in self.signals.values() if signal.fed_back]
            embeddings = [signal.encode(self, signal.decode(self, states, None, None)[0]) for signal in fed_back]
            return sum(embeddings) / len(embeddings)
