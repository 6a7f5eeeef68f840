"""The stage `dense`: a vision tower learns what lies in each cell of an image before a language model reads it.

A fresh tower, or one that was trained for something else, learns slowly from answers alone. Here every cell that an
object covers is scored on the words of the object's phrase, on the object's box, and on which of 4 x 4 parts of the
cell the object covers. The labels come from rows with masks (`training/cells.py`): `data.train` is what it is for joint
training, and rows without masks teach nothing. In `scenes`, the task `spotting_caption` names all objects.

The tower, its stage maps, the mixtures, the position table, the projector and the box decoder train; the decoder reads
cells as it later reads states. The heads that score words and parts are in the stage's checkpoints, to resume from, and
not in the model that it leaves. Its projector is changed last: cells get the size of word embeddings, and their common
mean is taken away, which every layer of a language model would add to all tokens anew until nothing else can be told
apart. Where all word embeddings agree in an entry (`training/language_model.py`), cells get its negative.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from perceptiongpt.data.schema import describe_row, row_images
from perceptiongpt.signal_box_perceptiongpt import BoxDecoder, PerceptionGPTBoxConfig, box_iou_and_giou
from perceptiongpt.signals_perceptiongpt import SIGNALS
from perceptiongpt.training.adapters import (
    model_dtype,
    print_parameter_table,
    round_saved_model,
    unreached_tower_parameters,
)
from perceptiongpt.training.cells import BITS, cell_labels, objects_of_rows
from perceptiongpt.training.curves import plot_losses
from perceptiongpt.training.datasets import load_mixture, load_train_rows, pack_rows
from perceptiongpt.training.trainer import PerceptionTrainer, training_arguments


DEFAULTS = {
    "words_weight": 1.0,
    "box_weight": 1.0,
    "bits_weight": 1.0,
    "tower_rate": 0.3,  # the learning rate of the tower, as a share of that of the rest
    "rows_per_image": 16,  # the most rows about one image that its labels are made from
}
MOMENTUM = 0.02  # of the running moments of the cells
AGREED = 0.9  # share of embeddings that have the same number in an entry
LARGEST_LOGIT = 20.0  # at first, of a cell that lies in the direction of one token
LOSSES = ("loss_words", "loss_box", "loss_bits")
TRAINED = (
    "vision_tower",
    "vision_stages",
    "language_mixture",
    "mask_mixture",
    "position_table",
    "multi_modal_projector",
    "box_decoder",
)


class DenseCollator:
    """Collate lists of rows of the schema, each about one image, into a batch of images with labels of their cells.

    Args:
        processor: a `PerceptionGPTProcessor`.
        config: the model's config.
        pack: the most rows about one image that make an item of the data (`DEFAULTS["rows_per_image"]`).
        seed: of how a data set's rows are grouped.

    Returns (from a call):
        `pixel_values` (B, 3, S, S); `owner` (B, image_grid^2) and `mask_owner` (B, mask_grid^2), the index of the
        object in each cell or -1; `bits` (B, mask_grid^2, BITS^2) bool; `words` (B, objects, tokens), token ids, -1
        for none; `object_boxes` (B, objects, 4).
    """

    length = None  # items have no length: a mixture refuses `token_budget`

    def __init__(self, processor, config, pack: int = DEFAULTS["rows_per_image"], seed: int = 0):
        self.processor, self.config, self.pack, self.seed = processor, config, pack, seed

    def set_epoch(self, epoch: int) -> None:
        """Nothing is drawn here."""

    def word_ids(self, words: Sequence[str]) -> list[int]:
        """The tokens of words as they stand inside a sentence, each once."""
        tokenizer = self.processor.tokenizer
        before = tokenizer("a", add_special_tokens=False).input_ids
        ids = [tokenizer(f"a {word}", add_special_tokens=False).input_ids[len(before) :] for word in words]
        return list(dict.fromkeys(token for tokens in ids for token in tokens))

    def __call__(self, items: Sequence[list[dict]]) -> dict[str, torch.Tensor]:
        images = []
        for first, *_ in items:
            if len(row_images(first)) != 1:
                raise ValueError(f"{describe_row(first)}: the stage dense reads rows about one image")
            images += row_images(first)
        batch = {"pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"]}
        objects = [objects_of_rows(rows) for rows in items]
        labels = {}
        for grid in {self.config.image_grid, self.config.mask_grid}:
            labels[grid] = [cell_labels([one["mask"] for one in found], grid) for found in objects]
        for name, grid in (("owner", self.config.image_grid), ("mask_owner", self.config.mask_grid)):
            batch[name] = torch.stack([torch.from_numpy(owner.ravel()) for owner, _ in labels[grid]])
        bits = [torch.from_numpy(bits.reshape(-1, BITS * BITS)) for _, bits in labels[self.config.mask_grid]]
        batch["bits"] = torch.stack(bits)
        ids = [[self.word_ids(one["words"]) for one in found] for found in objects]
        most = max(1, *map(len, objects))
        longest = max([1, *(len(tokens) for found in ids for tokens in found)])
        batch["words"] = torch.full((len(items), most, longest), -1)
        batch["object_boxes"] = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(items), most, 1)
        for i, found in enumerate(objects):
            for j, one in enumerate(found):
                batch["words"][i, j, : len(ids[i][j])] = torch.tensor(ids[i][j], dtype=torch.int64)
                batch["object_boxes"][i, j] = torch.tensor(one["box"])
        return batch


class DenseModel(nn.Module):
    """A `PerceptionGPTModel` with heads that score the cells of images.

    Words are scored by how far a cell of the projector lies in the direction of each token's embedding, which stays as
    it is; bits are read from what the mask decoder reads.

    Args:
        model: a `PerceptionGPTForConditionalGeneration`; the parts that train are made float32 and the rest frozen.
        settings: values that replace those of `DEFAULTS`.

    Raises:
        ValueError: the model's masks are decoded from images of their own.
    """

    def __init__(self, model, settings: dict | None = None):
        super().__init__()
        config = model.config
        if config.mask_image_size:
            raise ValueError("the stage dense is not for models with a finer mask path (mask_image_size)")
        self.model, self.config, self.settings = model.model, config, {**DEFAULTS, **(settings or {})}
        self.gain = nn.Parameter(torch.tensor(LARGEST_LOGIT * config.text_config.hidden_size**-0.5))
        if "box" not in config.signals:
            self.box = BoxDecoder(PerceptionGPTBoxConfig(), config.text_config.hidden_size)
        self.bits = nn.Linear(config.feature_size, BITS * BITS)
        self.register_buffer("cells_mean", torch.zeros(config.text_config.hidden_size))
        self.register_buffer("cells_square", torch.ones(()))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))
        unreached = unreached_tower_parameters(model)
        for name, parameter in self.model.named_parameters():
            is_part = name.split(".")[0] in TRAINED
            parameter.requires_grad_(is_part and f"model.{name}" not in unreached)
            if is_part:  # what no loss reaches is run, too, with what comes from the rest
                parameter.data = parameter.data.float()

    def score_words(self, cells: torch.Tensor) -> torch.Tensor:
        """Cells `(n, hidden_size)` to logits `(n, vocabulary)`."""
        embeddings = self.model.get_input_embeddings().weight.detach().float()
        directions = F.normalize(embeddings - embeddings.mean(0), dim=-1)
        return self.gain * (F.layer_norm(cells, cells.shape[-1:]) @ directions.T)

    @torch.no_grad()
    def follow_cells(self, cells: torch.Tensor) -> None:
        """Keep the running mean `(hidden_size,)` and mean square of cells `(images, cells, hidden_size)`."""
        cells = cells.detach().float()
        self.num_batches += 1
        share = (1.0 / self.num_batches).clamp(min=MOMENTUM)
        self.cells_mean.lerp_(cells.mean((0, 1)), share)
        self.cells_square.lerp_(cells.square().mean(), share)

    @torch.no_grad()
    def center_cells(self) -> None:
        """Change the projector so that cells have the size of word embeddings, no common mean, and no mark of words."""
        last, embeddings = self.model.multi_modal_projector.linear_2, self.model.get_input_embeddings().weight.float()
        scale = embeddings.square().mean().sqrt() / (self.cells_square - self.cells_mean.square().mean()).sqrt()
        last.weight.mul_(scale)
        last.bias.sub_(self.cells_mean).mul_(scale)
        usual = embeddings.median(0).values
        agreed = (embeddings == usual).float().mean(0) > AGREED
        last.weight[agreed] = 0.0
        last.bias[agreed] = -usual[agreed]

    def forward(
        self,
        pixel_values: torch.Tensor,
        owner: torch.Tensor,
        mask_owner: torch.Tensor,
        bits: torch.Tensor,
        words: torch.Tensor,
        object_boxes: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
        num_cells_in_batch: torch.Tensor | None = None,
        num_mask_cells_in_batch: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The losses of a batch of `DenseCollator`.

        Args:
            num_items_in_batch, num_cells_in_batch, num_mask_cells_in_batch: cells with words, cells with an object, and
                such cells of the mask grid, in all batches of the step: what the sums are divided by. By default those
                of this batch.

        Returns:
            `loss`, the sum of the weighted terms `LOSSES`; `words_right`, the share of an object's n tokens that are
            among the n likeliest of its cells, `box_iou` and `bits_right`, each a mean over cells.
        """
        counts = [num_items_in_batch, num_cells_in_batch, num_mask_cells_in_batch]
        own_counts = count_cells(owner, mask_owner, words).clamp(min=1)
        named_cells, all_cells, mask_cells = (
            own if given is None else given for own, given in zip(own_counts, counts, strict=True)
        )
        features = self.model.get_image_features(pixel_values, return_dict=True)
        if self.training:
            self.follow_cells(features.pooler_output)
        image, cell = (owner >= 0).nonzero(as_tuple=True)
        held = owner[image, cell]
        owned = mask_owner >= 0
        # Outside autocast, as all signals: bfloat16 coordinates would fall into bins.
        with torch.autocast(pixel_values.device.type, enabled=False):
            cells = features.pooler_output.float()[image, cell]
            tokens = words[image, held]
            logits = self.score_words(cells)
            targets = torch.zeros_like(logits).scatter_add_(1, tokens.clamp(min=0), (tokens >= 0).float())
            shares = targets / targets.sum(1, keepdim=True).clamp(min=1)
            loss_words = -(shares * logits.log_softmax(-1)).sum() / named_cells

            boxes = object_boxes[image, held]
            decode_box = self.model.box_decoder if "box" in self.config.signals else self.box
            predicted, quality = decode_box(cells - self.cells_mean)
            loss_box = sum(SIGNALS["box"].loss(self.config, predicted, quality, boxes)).sum() / all_cells

            bit_logits = self.bits(features.mask_features[:, : owned.shape[1]].float()[owned])
            bits = bits[owned].float()
            loss_bits = F.binary_cross_entropy_with_logits(bit_logits, bits, reduction="none").mean(-1).sum()

        terms = [loss_words, loss_box, loss_bits / mask_cells]
        weights = [self.settings[f"{name.removeprefix('loss_')}_weight"] for name in LOSSES]
        losses = {name: weight * term for name, weight, term in zip(LOSSES, weights, terms, strict=True)}
        with torch.no_grad():
            best = logits.topk(min(tokens.shape[1], logits.shape[1]), dim=-1).indices
            counted = torch.arange(best.shape[1], device=best.device) < targets.sum(1, keepdim=True)
            scores = {
                "words_right": (shares.gather(1, best) * counted).sum() / named_cells,
                "box_iou": box_iou_and_giou(predicted, boxes)[0].sum() / all_cells,
                "bits_right": ((bit_logits > 0) == (bits > 0.5)).float().mean(-1).sum() / mask_cells,
            }
        return {"loss": sum(losses.values()), **losses, **scores}


def count_cells(owner: torch.Tensor, mask_owner: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Cells with words, cells with an object, and such cells of the mask grid in a batch, int64 (3,)."""
    has_words = (words[..., 0] >= 0).gather(1, owner.clamp(min=0))
    return torch.stack([(has_words & (owner >= 0)).sum(), (owner >= 0).sum(), (mask_owner >= 0).sum()])


class DenseTrainer(PerceptionTrainer):
    """Trains a `DenseModel`; each term is over its own count of cells."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rates = {"vision_tower": self.accelerator.unwrap_model(self.model).settings["tower_rate"]}
        self.loss_terms = (*LOSSES, "words_right", "box_iou", "bits_right")
        self._train_sums = torch.zeros(len(self.loss_terms), device=self.args.device)

    def count_targets(self, batches: list[dict]) -> torch.Tensor:
        """Cells in the batches of all processes, as `count_cells` counts them."""
        counts = torch.zeros(3, dtype=torch.int64, device=self.args.device)
        for batch in batches:
            counts += count_cells(batch["owner"], batch["mask_owner"], batch["words"]).to(counts)
        return self.accelerator.reduce(counts, "sum") if self.args.world_size > 1 else counts

    def _count_arguments(self, counts) -> dict:
        return dict(zip(("num_cells_in_batch", "num_mask_cells_in_batch"), counts, strict=True))


def run_stage(recipe: dict, model, processor, output: Path, resume: str | None) -> DenseTrainer:
    """The stage of a recipe; see `training/stages.py`. Nothing is evaluated in it.

    Raises:
        ValueError: the weights are in 4 bit or in pieces over processes; a plain model could not be saved from them.
    """
    args = training_arguments({**recipe, "training": {**recipe["training"], "eval_strategy": "no"}}, output)
    collator = DenseCollator(processor, model.config, recipe["dense"]["rows_per_image"], recipe["collator"]["seed"])
    rows = load_train_rows(recipe)
    if rows is None:
        dataset = load_mixture(recipe, collator, args, resume)
        args.ignore_data_skip = True  # the stream finds its place by itself
    else:
        dataset = pack_rows(rows, collator)
    if recipe["adapter"]["mode"] == "qlora":
        raise ValueError("the stage dense trains no adapter and cannot load the weights in 4 bit: use another mode")
    trainer = DenseTrainer(
        model=DenseModel(model, recipe["dense"]),
        args=args,
        data_collator=collator,
        train_dataset=dataset,
        processing_class=processor,
        compute_dtype=model_dtype(recipe),
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("the stage dense runs in one process or with DDP, not with FSDP or DeepSpeed")
    if trainer.is_world_process_zero():
        print_parameter_table(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()
    trainer.accelerator.unwrap_model(trainer.model).center_cells()
    if trainer.is_world_process_zero():
        model.save_pretrained(output)
        processor.save_pretrained(output)
        if model_dtype(recipe) != torch.float32:
            round_saved_model(output, model_dtype(recipe))
        plot_losses(trainer.state.log_history, output / "losses.png")
    return trainer
