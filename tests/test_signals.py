"""The signals behind the seam: what each file of the table must offer, and the formulas against independent ones."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

from perceptiongpt.configuration_perceptiongpt import PerceptionGPTConfig, PerceptionGPTMaskConfig
from perceptiongpt.data.schema import row_features
from perceptiongpt.geometry_perceptiongpt import encode_rle
from perceptiongpt.signal_box_perceptiongpt import BoxDecoder, box_iou_and_giou
from perceptiongpt.signal_mask_perceptiongpt import (
    MaskDecoder,
    MaskEncoder,
    TwoWayTransformer,
    dice_loss,
    sine_position_table,
)
from perceptiongpt.signals_perceptiongpt import SIGNALS
from rows import MASK_SIZE, tiny_config, tiny_model


TOLERANCE = 1e-5


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(dim=1).values
    return corners.flatten(1)


def random_masks(count: int, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(count, MASK_SIZE, MASK_SIZE, generator=torch.Generator().manual_seed(seed))
    return (noise > torch.linspace(0.2, 0.9, count)[:, None, None]).to(torch.uint8)


def random_points(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))


HEIGHT, WIDTH = 60, 100
SQUARE = np.zeros((HEIGHT, WIDTH), dtype=bool)
SQUARE[10:40, 20:70] = True
# A new signal: one line in each of these. Values on the square; one in pixels of an image, as a user gives it and as it
# is stored; what is refused.
RANDOM_VALUES = {"box": random_boxes, "mask": random_masks, "point": random_points}
USER_VALUES = {"box": [10, 20.5, 50, 45], "mask": SQUARE, "point": [33.25, 7]}
STORED_VALUES = {"box": [10, 20.5, 50, 45], "mask": encode_rle(SQUARE), "point": [33.25, 7]}
OVERHANGING_VALUES = {"box": [-0.5, 20.0, 50.0, 60.5], "point": [100.5, -1.0]}
REFUSED_VALUES = {
    "box": [[1, 2, 3], [1, 2, 3, float("nan")], [5, 5, 1, 9], [1, 2, 3, 70], "tight", None],
    "mask": [np.zeros((HEIGHT, WIDTH), dtype=bool), SQUARE.T, {"size": [60, 100], "counts": "?"}],
    "point": [[1], [1, 2, 3], ["a", 2], [float("inf"), 3], [101.5, 3], [3, 62], 7],
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def decode(model, name, states):
    config = model.config
    pictures = torch.randn(
        2, config.mask_grid**2, config.vision_config.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    index = torch.arange(len(states)) % 3 - 1  # also no picture at all
    return SIGNALS[name].decode(model.model, states, pictures, index)


def random_states(model, count: int) -> torch.Tensor:
    width = model.config.text_config.hidden_size
    return torch.randn(count, width, generator=torch.Generator().manual_seed(2))


# ---- every signal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNALS)
def test_encode_gives_one_embedding_a_value(model, name):
    values = RANDOM_VALUES[name](6)
    embeddings = SIGNALS[name].encode(model.model, values)
    assert embeddings.shape == (6, model.config.text_config.hidden_size) and embeddings.dtype == torch.float32
    distances = torch.cdist(embeddings, embeddings) + 1e3 * torch.eye(6)
    assert distances.min() > 1e-3 * embeddings.norm(dim=1).mean()
    alone = torch.cat([SIGNALS[name].encode(model.model, value[None]) for value in values])
    torch.testing.assert_close(embeddings, alone, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", SIGNALS)
def test_decode_gives_one_value_a_state(model, name):
    states = random_states(model, 6)
    predictions, iou = decode(model, name, states)
    assert predictions.shape == RANDOM_VALUES[name](6).shape and predictions.dtype == torch.float32
    assert iou.shape == (6,) and iou.dtype == torch.float32 and ((iou > 0) & (iou < 1)).all()
    empty, no_iou = decode(model, name, states[:0])
    assert empty.shape[0] == no_iou.shape[0] == 0


@pytest.mark.parametrize("name", SIGNALS)
def test_losses_are_per_item(model, name):
    predictions, iou = (part.detach() for part in decode(model, name, random_states(model, 6)))
    targets = RANDOM_VALUES[name](6)
    losses = SIGNALS[name].loss(model.config, predictions, iou, targets)
    for index in range(6):
        item = slice(index, index + 1)
        alone = SIGNALS[name].loss(model.config, predictions[item], iou[item], targets[item])
        for together, single in zip(losses, alone, strict=True):
            assert together.shape == (6,)
            torch.testing.assert_close(together[item], single, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", SIGNALS)
def test_every_parameter_of_a_signal_gets_a_gradient(name):
    model = tiny_model()
    predictions, iou = decode(model, name, random_states(model, 6))
    signal_loss, iou_loss = SIGNALS[name].loss(model.config, predictions, iou, RANDOM_VALUES[name](6))
    (signal_loss.sum() + iou_loss.sum()).backward()
    SIGNALS[name].encode(model.model, RANDOM_VALUES[name](6)).square().sum().backward()
    built = SIGNALS[name].build_modules(model.config, 0.02)
    parameters = [
        (f"{part}.{key}", parameter)
        for part in built
        for key, parameter in getattr(model.model, part).named_parameters()
    ]
    # A softmax does not feel what is added to all its scores: the key biases of an attention over the picture.
    silent = [key for key, parameter in parameters if parameter.grad is None or not parameter.grad.abs().max() > 0]
    assert parameters and all(key.endswith("k_proj.bias") for key in silent)


@pytest.mark.parametrize("name", SIGNALS)
def test_the_predicted_quality_teaches_only_itself(model, name):
    states = random_states(model, 3)
    predictions, iou = (part.detach().requires_grad_() for part in decode(model, name, states))
    _, iou_loss = SIGNALS[name].loss(model.config, predictions, iou, RANDOM_VALUES[name](3))
    iou_loss.sum().backward()
    assert predictions.grad is None and iou.grad.abs().min() > 0


@pytest.mark.parametrize("name", SIGNALS)
def test_padding_is_harmless(model, name):
    values = SIGNALS[name].pad(model.config, 2, 3, torch.device("cpu"))
    given = RANDOM_VALUES[name](6)
    assert values.shape == (2, 3, *given.shape[1:]) and values.dtype == given.dtype
    predictions, iou = decode(model, name, random_states(model, 6))
    losses = SIGNALS[name].loss(model.config, predictions, iou, values.flatten(0, 1))
    embeddings = SIGNALS[name].encode(model.model, values.flatten(0, 1))
    assert all(part.isfinite().all() for part in (*losses, embeddings))


def test_names_are_unique():
    names = [
        name
        for signal in SIGNALS.values()
        for name in (
            signal.name,
            *signal.input_names,
            *signal.prediction_names,
            *signal.result_names[1:],
            signal.score_name,
            signal.count_name,
            signal.loss_name,
            signal.config_key,
        )
    ]
    assert len(names) == len(set(names))
    assert [name for name, signal in SIGNALS.items() if name != signal.name] == []
    assert [name for name, signal in SIGNALS.items() if signal.fed_back] == ["box"]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_users_value_goes_in_and_comes_out(name):
    """Parsed onto the square and presented again it is what it was, but for the grid of a mask."""
    signal = SIGNALS[name]
    values = signal.empty(1, 2, MASK_SIZE)
    values[0, 1] = signal.parse(USER_VALUES[name], HEIGHT, WIDTH, MASK_SIZE)
    assert not values[0, 0].any() and values.dtype == RANDOM_VALUES[name](1).numpy().dtype
    as_predicted = torch.from_numpy(values[0]).float() - (0.5 if name == "mask" else 0)
    together, each = signal.present(as_predicted, (HEIGHT, WIDTH), "bool")
    assert len(together) == len(each) == 2
    if name == "mask":
        wrong = np.asarray(each[1]) != SQUARE
        assert wrong.sum() < 0.15 * SQUARE.sum()
        assert signal.present(as_predicted, None, "bool")[0].shape == (2, MASK_SIZE, MASK_SIZE)
    else:
        assert each[1] == pytest.approx(USER_VALUES[name], abs=1e-4)
        torch.testing.assert_close(together[1], torch.tensor(each[1]))
        torch.testing.assert_close(signal.present(as_predicted, None, None)[0], as_predicted)
    nothing, no_one = signal.present(as_predicted[:0], (HEIGHT, WIDTH), "rle")
    assert len(nothing) == len(no_one) == 0


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED_VALUES.items() for value in values]
)
def test_a_value_that_cannot_be_is_refused(name, value):
    with pytest.raises(ValueError, match=name if name != "mask" else "(?i)mask|RLE"):
        SIGNALS[name].parse(value, HEIGHT, WIDTH, MASK_SIZE)


@pytest.mark.parametrize("name", SIGNALS)
def test_stored_values_are_checked(name):
    signal = SIGNALS[name]
    value, clipped = signal.check_column(STORED_VALUES[name], HEIGHT, WIDTH)
    assert value == STORED_VALUES[name] and not clipped
    assert signal.check_column(STORED_VALUES[name], math.inf, math.inf) == (value, False)
    if name in OVERHANGING_VALUES:
        value, clipped = signal.check_column(OVERHANGING_VALUES[name], HEIGHT, WIDTH)
        assert clipped and max(abs(a - b) for a, b in zip(value, OVERHANGING_VALUES[name], strict=True)) <= 1
        assert signal.check_column(value, HEIGHT, WIDTH) == (value, False)
    with pytest.raises(ValueError, match="size|outside"):
        signal.check_column(STORED_VALUES[name], 5, 5)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_has_a_column(name):
    (stored,) = Dataset.from_dict(
        {"a": [[STORED_VALUES[name], None]]}, Features({"a": row_features()[SIGNALS[name].plural]})
    )
    assert stored["a"] == [STORED_VALUES[name], None]


def test_results_are_named_and_scored():
    fields = {}
    for signal in SIGNALS.values():
        values, iou, probability = torch.rand(2, 3, 4), torch.rand(2, 3), torch.rand(2, 3)
        result = signal.to_result(values, iou, probability)
        assert not fields.keys() & result.keys()
        assert any(torch.equal(part, values) for part in result.values())
        assert any(torch.equal(part, probability * iou) for part in result.values())
        fields |= result
    names = ["boxes", "object_scores", "mask_logits", "object_mask_scores", "points", "object_point_scores"]
    assert list(fields) == names


def test_no_batch_norm(model):
    """It would make a batch differ from its rows, and accumulation from one batch."""
    names = {type(module).__name__ for module in model.modules()}
    assert "GroupNorm" in names and not [name for name in names if "BatchNorm" in name]


# ---- boxes -----------------------------------------------------------------------------------------------------------


def exact_iou_and_giou(box, other) -> tuple[float, float]:
    """In exact fractions. Where nothing has an area, nothing is missing: the quotients are 0."""
    a, b = ([Fraction(float(value)) for value in one] for one in (box, other))

    def area(x0, y0, x1, y1):
        return max(x1 - x0, 0) * max(y1 - y0, 0)

    overlap = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    hull = area(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    union = area(*a) + area(*b) - overlap
    iou = overlap / union if union else Fraction(0)
    return float(iou), float(iou - (hull - union) / hull if hull else iou)


DEGENERATE_BOXES = torch.tensor(
    [
        [0.0, 0.0, 1.0, 1.0],
        [0.2, 0.2, 0.6, 0.6],
        [0.6, 0.2, 0.8, 0.6],  # touches the one before
        [0.3, 0.3, 0.4, 0.4],  # inside
        [0.9, 0.9, 1.0, 1.0],
        [0.5, 0.0, 0.5, 1.0],  # a line
        [0.5, 0.5, 0.5, 0.5],  # a point
        [0.1, 0.1, 0.1001, 0.9],
    ]
)


def test_giou_equals_exact_arithmetic():
    first = torch.cat([random_boxes(300, 1), DEGENERATE_BOXES.repeat_interleave(len(DEGENERATE_BOXES), 0)])
    second = torch.cat([random_boxes(300, 2), DEGENERATE_BOXES.repeat(len(DEGENERATE_BOXES), 1)])
    expected = torch.tensor([exact_iou_and_giou(*pair) for pair in zip(first.tolist(), second.tolist(), strict=True)])
    iou, giou = box_iou_and_giou(first, second)
    torch.testing.assert_close(iou, expected[:, 0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(giou, expected[:, 1], atol=TOLERANCE, rtol=0)


def test_giou_equals_the_librarys():
    from transformers.loss.loss_for_object_detection import generalized_box_iou

    first, second = random_boxes(200, 1), random_boxes(200, 2)
    expected = generalized_box_iou(first, second).diagonal()
    torch.testing.assert_close(box_iou_and_giou(first, second)[1], expected, atol=TOLERANCE, rtol=0)


def test_box_loss_of_each_box(model):
    config = model.config.box_config
    predictions, targets, iou = random_boxes(9, 3), random_boxes(9, 4), torch.rand(9)
    loss, iou_loss = SIGNALS["box"].loss(model.config, predictions, iou, targets)
    for index in range(9):
        exact_iou, giou = exact_iou_and_giou(predictions[index].tolist(), targets[index].tolist())
        l1 = sum(abs(a - b) for a, b in zip(predictions[index].tolist(), targets[index].tolist(), strict=True))
        assert abs(loss[index] - config.l1_weight * l1 - config.giou_weight * (1 - giou)) < TOLERANCE
        assert abs(iou_loss[index] - config.iou_weight * (float(iou[index]) - exact_iou) ** 2) < TOLERANCE


def assert_valid(boxes):
    x0, y0, x1, y1 = boxes.unbind(-1)
    assert boxes.dtype == torch.float32 and boxes.isfinite().all()
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x0 < x1).all() and (y0 < y1).all()
    assert (x1 <= 1).all() and (y1 <= 1).all()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(-30, 30),
    st.sampled_from([0.0, 1.0, 100.0]),
    st.sampled_from(["dense", "one_hot", "constant"]),
)
def test_boxes_are_valid_for_any_state(model, seed, exponent, weight_scale, kind):
    generator = torch.Generator().manual_seed(seed)
    width = model.config.text_config.hidden_size
    states = torch.randn(8, width, generator=generator)
    if kind == "one_hot":
        states = torch.eye(width)[:8] * states.sign()
    elif kind == "constant":
        states = torch.ones(8, width)
    states = states * 10.0**exponent
    decoder = BoxDecoder(model.config.box_config, width)
    for parameter in decoder.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = weight_scale * noise / parameter.shape[-1] ** 0.5
    assert_valid(decoder(states)[0])
    assert_valid(decoder(torch.zeros(2, width))[0])


@pytest.mark.parametrize("side", [-12.0, -4.0, 0.0, 8.0, 20.0, 60.0])
@pytest.mark.parametrize("place", [-60.0, -8.0, 0.0, 8.0, 20.0, 60.0])
def test_boxes_at_the_border_keep_a_gradient(model, side, place):
    """Every corner of what the last layer can say: smallest, largest, pressed against either border."""
    width = model.config.text_config.hidden_size
    decoder = BoxDecoder(model.config.box_config, width)
    nn.init.zeros_(decoder.linear_3.weight)
    decoder.linear_3.bias.data = torch.tensor([side, side, place, place, 0.0])
    boxes, _ = decoder(torch.randn(1, width))
    assert_valid(boxes)
    # One coordinate at a time: what moves it must not be lost in float32, whichever border the others are at.
    gradients = torch.stack(
        [torch.autograd.grad(boxes[0, i], decoder.linear_3.bias, retain_graph=True)[0] for i in range(4)]
    )
    assert gradients.isfinite().all()
    for axis in (0, 1):
        both_ends = gradients[[axis, axis + 2]].abs().amax(0)
        assert both_ends[axis] > 0  # the size
        assert both_ends[axis + 2] > 0 or side == 60.0 == abs(place)  # the place: none is left beside a full square


def test_boxes_are_never_rounded(model):
    """A rounded coordinate has no gradient, takes few values, and hides small moves."""
    boxes = random_boxes(4).requires_grad_()
    embeddings = SIGNALS["box"].encode(model.model, boxes)
    assert torch.autograd.grad(embeddings.square().mul(torch.rand_like(embeddings)).sum(), boxes)[0].abs().min() > 0
    moved = SIGNALS["box"].encode(model.model, boxes + 1e-5)
    assert ((moved - embeddings).abs().amax(1) > 0).all()
    predictions, _ = decode(model, "box", random_states(model, 500))
    assert len(predictions[:, 0].unique()) == 500
    assert ((predictions * 1000).frac() - 0.5).abs().max() > 0.45 and (predictions * 1000 % 1).std() > 0.2


# ---- points ----------------------------------------------------------------------------------------------------------


def test_point_loss_of_each_point(model):
    config = model.config.point_config
    predictions, targets, score = random_points(9, 3), random_points(9, 4), torch.rand(9)
    loss, score_loss = SIGNALS["point"].loss(model.config, predictions, score, targets)
    for index in range(9):
        x, y = (predictions[index] - targets[index]).tolist()
        assert loss[index].item() == pytest.approx(config.l1_weight * (abs(x) + abs(y)), abs=TOLERANCE)
        deserved = math.exp(-math.hypot(x, y) / config.score_scale)
        expected = config.score_weight * (score[index].item() - deserved) ** 2
        assert score_loss[index].item() == pytest.approx(expected, abs=TOLERANCE)


def test_points_lie_in_the_square_for_any_state(model):
    states = random_states(model, 64) * torch.logspace(-30, 30, 64)[:, None]
    points, score = decode(model, "point", states)
    assert points.dtype == torch.float32 and points.isfinite().all() and score.isfinite().all()
    assert (points >= 0).all() and (points <= 1).all()


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_dice_and_cross_entropy_of_each_mask():
    logits = 3 * torch.randn(5, MASK_SIZE, MASK_SIZE, generator=torch.Generator().manual_seed(5))
    targets = random_masks(5)
    targets[0] = 0
    p, t = 1 / (1 + np.exp(-logits.double().numpy())), targets.double().numpy()
    bce = [-(t[i] * np.log(p[i]) + (1 - t[i]) * np.log(1 - p[i])).mean() for i in range(5)]
    dice = [1 - (2 * (p[i] * t[i]).sum() + 1) / (p[i].sum() + t[i].sum() + 1) for i in range(5)]
    hits = [((p[i] > 0.5) & (t[i] > 0)).sum() / ((p[i] > 0.5) | (t[i] > 0)).sum() for i in range(5)]
    for term, expected in (("bce", bce), ("dice", dice)):
        weights = {"bce_weight": 0.0, "dice_weight": 0.0, f"{term}_weight": 1.0}
        config = tiny_config()
        for name, weight in weights.items():
            setattr(config.mask_config, name, weight)
        loss, iou_loss = SIGNALS["mask"].loss(config, logits, torch.full((5,), 0.3), targets)
        torch.testing.assert_close(loss.double(), torch.tensor(expected), atol=TOLERANCE, rtol=0)
        expected_iou = config.mask_config.iou_weight * (0.3 - torch.tensor(hits)) ** 2
        torch.testing.assert_close(iou_loss.double(), expected_iou, atol=TOLERANCE, rtol=0)


def test_dice_is_not_one_over_the_batch():
    """A small object that is missed must not drown in a large one that is found."""
    targets = torch.zeros(2, MASK_SIZE, MASK_SIZE)
    targets[0], targets[1, :2, :2] = 1, 1
    logits = torch.full_like(targets, -50.0)
    logits[0] = 50.0
    losses = dice_loss(logits, targets)
    assert losses[0] < 0.01 and losses[1] > 0.79
    as_one = dice_loss(logits.reshape(1, -1, MASK_SIZE), targets.reshape(1, -1, MASK_SIZE))
    assert as_one < 0.01 < losses.mean()


@pytest.mark.parametrize("layers", [2, 3])
def test_two_way_transformer_equals_segment_anythings(layers):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "mlp_dim": 48}
    config = SamMaskDecoderConfig(**sizes, attention_downsample_rate=2)
    config._attn_implementation = "eager"
    theirs = SamTwoWayTransformer(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = TwoWayTransformer(config)
    ours.load_state_dict(theirs.state_dict())
    tokens, image, positions = torch.randn(3, 2, 32), torch.randn(3, 32, 5, 6), torch.randn(3, 32, 5, 6)
    with torch.no_grad():
        expected = theirs(
            point_embeddings=tokens[:, None],
            image_embeddings=image,
            image_positional_embeddings=positions,
            attention_similarity=None,
        )
        got = ours(tokens, image.flatten(2).transpose(1, 2), positions.flatten(2).transpose(1, 2))
    for one, other in zip(got, expected, strict=False):
        torch.testing.assert_close(one, other.squeeze(1), atol=TOLERANCE, rtol=TOLERANCE)


def test_every_pixel_of_a_mask_can_be_seen(model):
    """Single pixels over the whole square: never the embedding of an empty mask, and never that of another pixel."""
    masks = torch.zeros(65, MASK_SIZE, MASK_SIZE, dtype=torch.uint8)
    for index in range(64):
        masks[index + 1, index // 8 * 4 + index % 3, index % 8 * 4 + index % 4] = 1
    embeddings = SIGNALS["mask"].encode(model.model, masks)
    distances = torch.cdist(embeddings, embeddings) + 1e3 * torch.eye(65)
    assert distances.min() > 1e-3 * embeddings.norm(dim=1).mean()


def test_a_moved_mask_has_another_embedding(model):
    masks = torch.zeros(9, MASK_SIZE, MASK_SIZE, dtype=torch.uint8)
    for index in range(9):
        top, left = 8 * (index // 3), 8 * (index % 3)
        masks[index, top : top + 12, left : left + 12] = 1
    embeddings = SIGNALS["mask"].encode(model.model, masks)
    distances = torch.cdist(embeddings, embeddings) + 1e3 * torch.eye(9)
    assert distances.min() > 0.05 * embeddings.norm(dim=1).mean()


def test_the_mask_encoder_reads_where_a_mask_lies():
    """Far from the border only the position of what was found tells: a mean over the feature map would forget it."""
    torch.manual_seed(0)
    encoder = MaskEncoder(PerceptionGPTMaskConfig(size=192), 48, 0.02)
    masks = torch.zeros(9, 192, 192)
    for index in range(9):
        top, left = 64 + 16 * (index // 3), 64 + 16 * (index % 3)
        masks[index, top : top + 24, left : left + 24] = 1
    with torch.no_grad():
        embeddings = encoder(masks)
    distances = torch.cdist(embeddings, embeddings) + 1e3 * torch.eye(9)
    assert distances.min() > 0.02 * embeddings.norm(dim=1).mean()


@pytest.mark.parametrize("width", [32, 30])
def test_positions_run_over_the_right_axes(width):
    """Cell r * grid + c carries r in the first half of its width, c in the second."""
    grid, half = 5, 2 * (width // 4)
    table = sine_position_table(grid, width).reshape(grid, grid, width)
    of_row, of_column = table[..., :half], table[..., half : 2 * half]
    assert torch.equal(of_row, of_row[:, :1].expand_as(of_row))
    assert torch.equal(of_column, of_column[:1].expand_as(of_column))
    assert torch.equal(of_row[:, 0], of_column[0])
    lines = of_row[:, 0]
    assert (torch.cdist(lines, lines) + torch.eye(grid)).min() > 0.5
    assert not table[..., 2 * half :].any()
    # A grid twice as fine has each coarse cell's position between those of its two halves.
    fine = sine_position_table(2 * grid, width).reshape(2 * grid, 2 * grid, width)[:, 0, :half]
    nearest = torch.cdist(lines, fine).argsort(dim=1)[:, :2].sort(dim=1).values
    assert nearest.tolist() == [[2 * cell, 2 * cell + 1] for cell in range(grid)]


def test_the_mask_decoder_knows_rows_from_columns(model):
    """Features that differ in one cell change the logits there first: neither transposed nor mirrored."""
    decoder, config = model.model.mask_decoder, model.config
    states = random_states(model, 1)
    features = torch.randn(
        1, config.mask_grid**2, config.vision_config.hidden_size, generator=torch.Generator().manual_seed(3)
    )
    cell = MASK_SIZE // config.mask_grid
    for row, column in ((0, 2), (3, 1)):
        changed = features.clone()
        changed[0, row * config.mask_grid + column] *= -1
        with torch.no_grad():
            first, second = (decoder(states, one, torch.tensor([0]))[0][0] for one in (features, changed))
        change = (first - second).abs().reshape(config.mask_grid, cell, config.mask_grid, cell).mean((1, 3))
        assert change.argmax() == row * config.mask_grid + column


@pytest.mark.parametrize("grid", range(7, 38))
def test_mask_logits_are_fine_enough_for_every_patch_grid(grid):
    config = PerceptionGPTConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 14 * grid, "patch_size": 14},
        mask_config={"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16, "upscale_channels": 2},
    )
    decoder = MaskDecoder(config.mask_config, config.mask_grid, 8, 8)
    with torch.no_grad():
        logits, _ = decoder(torch.randn(1, 8), torch.randn(1, grid**2, 8), torch.tensor([0]))
    assert logits.shape == (1, config.mask_config.size, config.mask_config.size)
    assert 128 <= config.mask_config.size < 256 and config.mask_config.size % grid == 0
