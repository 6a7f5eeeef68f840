"""Tiny models that look again, and what they answered as the input of one forward. No test lives here."""

import torch
from transformers import LogitsProcessor

from perceptiongpt.look_geometry_perceptiongpt import crop_frame, crop_pixel_values
from rows import IMAGE, VIS, batch_and_singles, tiny_model, unlike_rows


LOOK, LOOK_END, LOOK_PAD, REENC = 104, 105, 106, 107
LOOK_TOKENS = 4
STATS = torch.tensor([[0.5, 0.45, 0.4], [0.25, 0.3, 0.35]])
# What each of the five rows writes; 0 leaves it to the model, and a look's end follows by itself.
SCRIPT = (
    (VIS, LOOK, 0, VIS, 8, 9),
    (9, 7, VIS, LOOK, 0, VIS),
    (VIS, LOOK, 0, VIS, LOOK, 0, VIS, 6),
    (4, VIS, LOOK, 4, 5),  # there is no image to look at
    (6, 7, 8, VIS, 9, 10),
)


def looking_model(**kwargs):
    """A random model that looks, whose crops differ from each other by far more than the tolerance."""
    settings = {"look_max": 2, "look_tokens": LOOK_TOKENS, "look_min_side": 8, "look_margin": 1.2}
    return tiny_model(**{**settings, **kwargs})


def original_images(count: int) -> list[torch.Tensor]:
    """Originals of unlike sizes."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(90, 120), (64, 200), (150, 100), (80, 80), (40, 130)]
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes[:count]]


def looking_batch(padding: int = 0) -> tuple[dict, list[dict]]:
    """The five rows of `unlike_rows` with their originals as one batch, and each by itself."""
    batch, singles = batch_and_singles(padding)
    images = original_images(5)
    counts = [row["images"] for row in unlike_rows()[:5]]
    starts = [sum(counts[:index]) for index in range(5)]
    for inputs, own in zip(
        [batch, *singles], [images, *(images[s : s + n] for s, n in zip(starts, counts))], strict=True
    ):
        inputs |= {"look_images": own, "look_image_stats": STATS}
    return batch, singles


class Scripted(LogitsProcessor):
    """Makes each row write what its script says, as likely as the logits of the model allow."""

    def __init__(self, prompt_length: int, scripts=SCRIPT, repeat: int = 1, start: int = 0):
        self.start = prompt_length - start
        self.scripts = [script for script in scripts for _ in range(repeat)]

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.start
        scores = scores.clone()
        scores[:, [2, IMAGE, VIS, LOOK, REENC]] = -1e4
        for row, script in enumerate(self.scripts):
            if step < len(script) and script[step]:
                scores[row, script[step]] = 1e4
        return scores


def run(model, inputs, scripts=SCRIPT, **kwargs):
    kwargs = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | kwargs
    kwargs.setdefault("logits_processor", [Scripted(inputs["input_ids"].shape[1], scripts)])
    return model.generate(**inputs, **kwargs)


def teacher_forced(model, inputs, output, pixels=None) -> tuple[dict, list[list[int]]]:
    """
    What `generate` returned as the input of `forward`, right-padded: each row's tokens with the pads of its looks, the
    crops that it chose, and the boxes that it decoded.

    Args:
        pixels (`Callable`, *optional*): changes the pixels of a crop.

    Returns:
        the inputs, and for each row where its tokens went.
    """
    rows, places, crops, frames, slots = [], [], [], [], []
    images = (inputs["input_ids"] == IMAGE).sum(1) // model.config.image_seq_length
    last = images.cumsum(0) - 1
    for index, sequence in enumerate(output.sequences.tolist()):
        looks = dict(zip(output.look_positions[index].tolist(), output.look_crops[index].tolist(), strict=True))
        start = int((inputs["attention_mask"][index] == 0).sum())
        ids, place, own_frames = [], [], []
        for position in range(start, len(sequence)):
            place.append(len(ids))
            ids.append(sequence[position])
            if sequence[position] == REENC:
                ids += [REENC] * model.config.reenc_queries
            if position in looks and any(looks[position]):
                ids += [LOOK_PAD] * model.config.look_tokens
                image = inputs["look_images"][int(last[index])]
                crop = crop_pixel_values(image, looks[position], model.config.image_size, *STATS)
                crops.append(crop if pixels is None else pixels(crop))
                own_frames.append(crop_frame(looks[position], *image.shape[1:]))
        prompt_slots = int((inputs["input_ids"][index] == VIS).sum())
        row = {name: inputs[name][index, :prompt_slots] for name in ("boxes", "masks", "points")}
        row |= {f"{name}_valid": inputs[f"{name}_valid"][index, :prompt_slots] for name in row}
        number = int(output.object_valid[index].sum())
        row["boxes"] = torch.cat([row["boxes"], output.boxes[index, :number]])
        for name in ("masks", "points"):
            values = row[name]
            row[name] = torch.cat([values, values.new_zeros(number, *values.shape[1:])])
            row[f"{name}_valid"] = torch.cat([row[f"{name}_valid"], torch.zeros(number, dtype=torch.bool)])
        row["boxes_valid"] = torch.cat([row["boxes_valid"], torch.ones(number, dtype=torch.bool)])
        rows.append(torch.tensor(ids))
        places.append(place)
        frames.append(torch.tensor(own_frames).reshape(-1, 4))
        slots.append(row)
    pad = torch.nn.utils.rnn.pad_sequence
    forward = {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "look_frames": pad(frames, batch_first=True),
        "pixel_values": inputs.get("pixel_values"),
        **{name: pad([row[name] for row in slots], batch_first=True) for name in slots[0]},
    }
    if crops:
        forward["look_pixel_values"] = torch.stack(crops)
    return forward, places
