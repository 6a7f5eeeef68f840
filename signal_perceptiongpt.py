"""
What a signal is: the base class of everything that a `<vis>` can carry, and the layers that signals share.

Model, processor, pipeline and data know a signal by the attributes and methods of [`Signal`] alone.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig


class Signal:
    """
    One kind of signal. A subclass sets the attributes, implements the methods without a body here, and gets a line in
    `signals_perceptiongpt.py`.

    A *value* is what the model reads and predicts, on the padded square; `N` values are a tensor of shape `(N, ...)`.
    A *quality* in 0..1 is predicted beside each value: how good the model expects it to be. The modules that the
    methods run are attributes of the model, and their parameters are used in the modules' own `forward` alone.

    Attributes:
        name (`str`): names the signal in the table, in content items, in results and, with `_config`, in the config.
        plural (`str`):
            The keyword of its values in `forward`, `generate` and the processor, next to `<plural>_valid` and
            `<plural>_read`; also the column of its values in data.
        config_class (`type[PreTrainedConfig]`): its sub-config: sizes of its modules and weights of its loss.
        prediction_names (`tuple[str, str]`): names of values and qualities in the output of `forward`.
        result_names (`tuple[str, str]`): names of values and scores in the output of `generate`.
        score_name (`str`): name of the score in an object of `post_process_generation`.
        column (`list` or `dict`):
            Type of one value in data: the names of Arrow types in lists and dicts, as in `["float64"]`.
        fed_back (`bool`): whether the value decoded from an emitted `<vis>` is what the model reads next.
        stays_float32 (`bool`): whether values are coordinates, which no cast of a batch may touch.
        takes_noise (`bool`): whether `forward` takes `<plural>_noise`, added to the values that are read.
        reads_image (`bool`):
            Whether decoding needs the features of an image. That is costly: a training step runs such a signal only for
            the slots that are read or learned.
        drawn_as (`str`, *optional*): how `drawing.py` draws a value: `"mask"`, `"box"`, `"dot"` or not at all.
    """

    name: str
    plural: str
    config_class: type[PreTrainedConfig]
    prediction_names: tuple[str, str]
    result_names: tuple[str, str]
    score_name: str
    column: list | dict
    fed_back = False
    stays_float32 = True
    takes_noise = False
    reads_image = False
    drawn_as: str | None = None

    # ---- names that follow from the attributes -----------------------------------------------------------------------

    @property
    def config_key(self) -> str:
        """Name of its sub-config in the config."""
        return f"{self.name}_config"

    @property
    def valid_name(self) -> str:
        """Keyword of the bool tensor that says which values are known."""
        return f"{self.plural}_valid"

    @property
    def read_name(self) -> str:
        """Keyword of the bool tensor that says which values enter the embedding of their `<vis>`."""
        return f"{self.plural}_read"

    @property
    def noise_name(self) -> str:
        """Keyword of the noise, where the signal takes one."""
        return f"{self.plural}_noise"

    @property
    def input_names(self) -> tuple[str, ...]:
        """All keywords that the signal has in `forward`."""
        noise = (self.noise_name,) if self.takes_noise else ()
        return (self.plural, self.valid_name, self.read_name, *noise)

    @property
    def float32_names(self) -> tuple[str, ...]:
        """The keywords whose tensors stay float32."""
        if not self.stays_float32:
            return ()
        return (self.plural, self.noise_name) if self.takes_noise else (self.plural,)

    @property
    def count_name(self) -> str:
        """Keyword of the number of supervised values that the loss is divided by."""
        return f"num_{self.plural}_in_batch"

    @property
    def loss_name(self) -> str:
        """Name of its loss in the output of `forward`."""
        return f"loss_{self.name}"

    # ---- in the model ------------------------------------------------------------------------------------------------

    def complete_config(self, config) -> None:
        """Fills in what the signal's sub-config leaves open, from the `PerceptionGPTConfig` that it is part of."""

    def build_modules(self, config, embedding_rms: float) -> dict[str, nn.Module]:
        """
        Makes the modules of the signal.

        Args:
            config (`PerceptionGPTConfig`): of the whole model.
            embedding_rms (`float`): root mean square of the entries of a token embedding.

        Returns:
            `dict[str, nn.Module]`: by the attribute names that they get on the model.
        """
        raise NotImplementedError

    def encode(self, model, values: torch.Tensor) -> torch.Tensor:
        """Values `(N, ...)` to float32 embeddings `(N, hidden_size)`."""
        raise NotImplementedError

    def decode(self, model, states: torch.Tensor, image_features: torch.Tensor, image_index: torch.Tensor):
        """
        Reads values from hidden states.

        Args:
            states (`torch.Tensor` of shape `(N, hidden_size)`): final-norm states, each of which predicts a `<vis>`.
            image_features (`torch.Tensor` of shape `(images, cells, vision_hidden_size)`): of the mask mixture.
            image_index (`torch.Tensor` of shape `(N,)`, int64): the image of each state, -1 for none.

        Returns:
            float32 values of shape `(N, ...)` and their predicted quality of shape `(N,)` in 0..1.
        """
        raise NotImplementedError

    def loss(self, config, predictions: torch.Tensor, quality: torch.Tensor, targets: torch.Tensor):
        """
        The loss of each value by itself; the model sums over all that are supervised.

        Args:
            predictions, quality: what [`decode`] returned.
            targets (`torch.Tensor` of shape `(N, ...)`)

        Returns:
            two tensors of shape `(N,)`, weighted by the config: the loss of the value, and that of its predicted
            quality, whose gradient does not reach the value.
        """
        raise NotImplementedError

    def pad(self, config, batch_size: int, slots: int, device) -> torch.Tensor:
        """Values that say nothing and on which every formula is finite, `(batch_size, slots, ...)`."""
        raise NotImplementedError

    def into_frame(self, values: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """
        Values of the image's square as they lie in the frames of crops, see [`crop_frame`]. What is no coordinate, such
        as a grid, stays as it is.

        Args:
            values (`torch.Tensor` of shape `(..., n)`), frames (`torch.Tensor` of shape `(..., 4)`)
        """
        return values

    def out_of_frame(self, values: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """The inverse of [`into_frame`]."""
        return values

    def to_result(self, values: torch.Tensor, quality: torch.Tensor, probability: torch.Tensor) -> dict:
        """What `generate` adds to its output: values `(S, K, ...)`, and p(`<vis>`) x quality, `(S, K)`, as scores."""
        values_name, scores_name = self.result_names
        return {values_name: values, scores_name: probability * quality}

    # ---- what users and data hold ------------------------------------------------------------------------------------

    def default_target(self, item: dict):
        """The value of an assistant's content item that gives none; `None` where nothing follows from the others."""
        return None

    def complete(self, value, item: dict, height: int, width: int):
        """A value that says only how it follows from the other values of its content item, worked out."""
        return value

    def parse(self, value, height: int, width: int, mask_size: int):
        """
        A user's value on the padded square.

        Args:
            value: in pixels of a `(height, width)` image.
            mask_size (`int`): side of grids over the square, `config.mask_config.size`.

        Returns:
            `np.ndarray` of the shape and dtype of one value of [`empty`].

        Raises:
            ValueError: the value is malformed or lies outside the image.
        """
        raise NotImplementedError

    def empty(self, batch_size: int, slots: int, mask_size: int):
        """`np.ndarray` of zeros that the processor writes parsed values to, `(batch_size, slots, ...)`."""
        raise NotImplementedError

    def present(
        self, values: torch.Tensor, size: tuple[int, int] | None, mask_format: str | None, frames=None
    ) -> tuple:
        """
        Predicted values for the user.

        Args:
            values (`torch.Tensor` of shape `(N, ...)`): from the output of `generate`.
            size (*optional*): (height, width) of the original image; without, values stay on the square.
            mask_format (`str`, *optional*): as in `post_process_generation`.
            frames (`torch.Tensor` of shape `(N, 4)`, *optional*):
                The frames that grids lie on; by default the square itself. Coordinates come on the square.

        Returns:
            all values together, and a list of one value per object.
        """
        raise NotImplementedError

    def check_column(self, value, height: float, width: float) -> tuple:
        """
        Checks a stored value against the size of its image, which is infinite where it is not known.

        Returns:
            the value as it is to be stored, and whether it had to be clipped to the image.

        Raises:
            ValueError: the value is malformed or lies outside the image.
        """
        raise NotImplementedError

    def draw_noise(self, values: torch.Tensor, generator, share: float) -> torch.Tensor:
        """
        Noise of a training step for values that stand in for predictions; only for signals that take noise.

        Args:
            values (`torch.Tensor` of shape `(K, ...)`): the values with noise must be valid, too.
            generator (`np.random.Generator`)
            share (`float`): standard deviation, as a share of the object's size.
        """
        raise NotImplementedError


# ---- layers that signals share ---------------------------------------------------------------------------------------


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever the dtype its weights were cast to."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden_states.float(), self.weight.float(), bias)


class SignalEmbeddingNorm(nn.Module):
    """
    Scales a signal's embedding to the length that the language model's own token embeddings have.

    Args:
        hidden_size (`int`): width of the language model.
        root_mean_square (`float`): root mean square of the entries of a token embedding.
    """

    def __init__(self, hidden_size: int, root_mean_square: float):
        super().__init__()
        self.initial_value = root_mean_square
        self.weight = nn.Parameter(torch.full((hidden_size,), root_mean_square))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), eps=1e-6)


def normalize_states(states: torch.Tensor) -> torch.Tensor:
    """Hidden states `(..., hidden)` of any finite size in float32, with mean 0 and variance 1."""
    # Their squares stay finite, and with them whatever is decoded.
    states = states.float().clamp(-1e15, 1e15)
    return F.layer_norm(states, states.shape[-1:])


class CoordinateEncoder(nn.Module):
    """
    Three-layer MLP from coordinates to the embedding of a `<vis>` (paper, section 3.1).

    Args:
        num_coordinates (`int`): how many make up one value.
        hidden_size (`int`): width of the two hidden layers.
        text_hidden_size (`int`): width of the language model.
        embedding_rms (`float`): root mean square of the entries of a token embedding.
    """

    def __init__(self, num_coordinates: int, hidden_size: int, text_hidden_size: int, embedding_rms: float):
        super().__init__()
        self.linear_1 = Float32Linear(num_coordinates, hidden_size)
        self.linear_2 = Float32Linear(hidden_size, hidden_size)
        self.linear_3 = Float32Linear(hidden_size, text_hidden_size)
        self.norm = SignalEmbeddingNorm(text_hidden_size, embedding_rms)

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        """`coordinates` `(..., num_coordinates)` in 0..1 to float32 embeddings `(..., text_hidden_size)`."""
        hidden_states = F.gelu(self.linear_1(coordinates.float() * 2 - 1))
        hidden_states = F.gelu(self.linear_2(hidden_states))
        return self.norm(self.linear_3(hidden_states))


class StateMLP(nn.Module):
    """Three-layer MLP from a final-norm hidden state of any size to `num_outputs` float32 numbers."""

    def __init__(self, text_hidden_size: int, hidden_size: int, num_outputs: int):
        super().__init__()
        self.linear_1 = Float32Linear(text_hidden_size, hidden_size)
        self.linear_2 = Float32Linear(hidden_size, hidden_size)
        self.linear_3 = Float32Linear(hidden_size, num_outputs)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`states` `(..., text_hidden_size)` to `(..., num_outputs)`."""
        hidden_states = F.gelu(self.linear_1(normalize_states(states)))
        hidden_states = F.gelu(self.linear_2(hidden_states))
        return self.linear_3(hidden_states)
