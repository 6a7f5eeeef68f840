"""The trainer: loss terms over their own counts, each logged, and evaluation in which the model answers by itself."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from perceptiongpt.configuration_perceptiongpt import VIS_TOKEN
from perceptiongpt.data.collator import IGNORED_LABEL, TOWER_STATES, PerceptionCollator, answer_slots
from perceptiongpt.data.mixtures import Mixture, MixtureCollator
from perceptiongpt.signals_perceptiongpt import SIGNALS
from perceptiongpt.training.answers import SCORES, answer_and_score, mean_scores
from perceptiongpt.training.datasets import stream_file
from perceptiongpt.training.guidance import Guidance


TRAINING_DEFAULTS = {
    "report_to": "none",
    "logging_steps": 10,
    "per_device_train_batch_size": 8,
    "remove_unused_columns": False,
    "prediction_loss_only": True,
}
LOADER_WORKERS = 4  # beside an accelerator, which must not wait for images; on a CPU they would take its cores
HUB_SETTINGS = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_revision", "hub_token")


def training_arguments(recipe: dict, output: str | Path) -> TrainingArguments:
    """The arguments of a recipe's section `training`.

    They set up distributed training and ZeRO-3, which builds models in pieces: make them before the model.
    """
    has_accelerator = torch.accelerator.is_available()
    settings = {
        **TRAINING_DEFAULTS,
        "use_cpu": not has_accelerator,  # bf16 asks for it
        "dataloader_pin_memory": has_accelerator,
        "dataloader_num_workers": min(LOADER_WORKERS, (os.cpu_count() or 1) - 1) if has_accelerator else 0,
        "disable_tqdm": not sys.stderr.isatty(),  # a log file would get a line a step
    }
    # Publishing is not the library's: it would upload checkpoints while they change. `train` does it at the end.
    given = {key: value for key, value in recipe["training"].items() if key not in HUB_SETTINGS}
    return TrainingArguments(**{**settings, **given, "output_dir": str(output)})


class PerceptionTrainer(Trainer):
    """The library's `Trainer`, with loss terms over their own counts, each logged, and free-running evaluation.

    Args:
        generation_rows: rows of the schema with direct tasks that evaluation lets the model answer, or None.
        generate_batch_size, generate_tokens: how many at a time, and the most tokens of an answer.
        compute_dtype: what is computed in, where the arguments ask for no mixed precision; None for the weights' own.
        rates: learning rates of parts, see `adapters.add_adapter`.
        guidance_weight: of the loss of the heads that are told where to look (`training/guidance.py`); 0 for none.
        feature_cache: a `training.features.FeatureCache` that the collator reads, to be filled; or None.
        Others: as `Trainer`; `processing_class` is the processor.
    """

    def __init__(
        self,
        *args,
        generation_rows=None,
        generate_batch_size: int = 8,
        generate_tokens: int = 64,
        compute_dtype: torch.dtype | None = None,
        guidance_weight: float = 0.0,
        rates: dict[str, float] | None = None,
        feature_cache=None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.rates = rates or {}
        if self.args.n_gpu > 1:
            raise ValueError("several GPUs need one process each: start with `accelerate launch` or `torchrun`")
        if not self.args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices must stay on: losses are sums over all processes' counts")
        self.model_accepts_loss_kwargs = True
        self.generation_rows = generation_rows
        self.generate_batch_size, self.generate_tokens = generate_batch_size, generate_tokens
        self.compute_dtype = None if compute_dtype == torch.float32 else compute_dtype
        self.vis_token_id = self.processing_class.tokenizer.convert_tokens_to_ids(VIS_TOKEN)
        self.signals = [SIGNALS[name] for name in self.accelerator.unwrap_model(self.model).config.signals]
        self.loss_terms = ("loss_lm", *(signal.loss_name for signal in self.signals), "loss_iou")
        if self.args.label_names is None:
            names = ((signal.plural, signal.valid_name) for signal in self.signals)
            self.label_names = ["labels", *(name for pair in names for name in pair)]
        self.feature_cache = feature_cache
        if feature_cache is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "data.feature_cache needs the whole vision tower in each process, which FSDP and DeepSpeed share out"
            )
        self.guidance, self.guidance_weight = None, guidance_weight
        if guidance_weight:
            if self.args.gradient_checkpointing:
                raise ValueError("guidance needs gradient_checkpointing: false; or set guidance.weight to 0")
            self.guidance = Guidance(self.plain_model)
        self._train_sums = torch.zeros(len(self.train_terms), device=self.args.device)
        self._train_steps = 0
        # Of the language model's loss and each signal's; of the predicted IoU of each signal.
        self._eval_sums = torch.zeros(1 + 2 * len(self.signals), device=self.args.device)
        self._eval_counts = torch.zeros(1 + len(self.signals), dtype=torch.int64, device=self.args.device)
        self.add_callback(_FollowTheData(self))

    @property
    def plain_model(self):
        """The model without wrappers and adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def train_terms(self) -> tuple[str, ...]:
        """The names of the terms that training logs; evaluation has no guidance."""
        return self.loss_terms if self.guidance is None else (*self.loss_terms, "loss_guidance")

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """Autocast to `compute_dtype`: weights that train are float32 beside frozen ones in it."""
        if self.compute_dtype is None:
            return nullcontext()
        return torch.autocast(self.args.device.type, dtype=self.compute_dtype, cache_enabled=cache_enabled)

    def create_optimizer(self, model=None):
        """As the library's; parts with a rate of their own become groups of their own."""
        optimizer = super().create_optimizer(model)
        for part, rate in self.rates.items():
            chosen = {id(one) for name, one in (model or self.model).named_parameters() if f".{part}." in f".{name}."}
            for group in list(optimizer.param_groups):
                of_part = [parameter for parameter in group["params"] if id(parameter) in chosen]
                if of_part:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
                    optimizer.add_param_group({**group, "params": of_part, "lr": self.args.learning_rate * rate})
        return optimizer

    # ---- losses over their own counts --------------------------------------------------------------------------------

    def count_targets(self, batches: list[dict]) -> torch.Tensor:
        """Supervised tokens, and supervised values of each signal, in the batches of all processes: int64."""
        counts = torch.zeros(1 + len(self.signals), dtype=torch.int64, device=self.args.device)
        for batch in batches:
            labels = batch["labels"]
            valid = [batch[signal.valid_name] for signal in self.signals]
            answers = answer_slots(batch["input_ids"], labels, self.vis_token_id, valid[0].shape[1])
            targets = (labels[:, 1:] != IGNORED_LABEL, *(answers & known for known in valid))
            counts += torch.stack([target.sum() for target in targets]).to(counts)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimizer step, each told how many targets all of them hold, over all processes."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        tokens, *counts = self.count_targets(batches).clamp(min=1)
        for batch in batches:
            if "stream_state" in batch:
                self.train_dataset.took(batch.pop("stream_state"))
            batch |= self._count_arguments(counts)
        self._train_steps += 1
        return batches, tokens

    def _count_arguments(self, counts) -> dict:
        """`num_boxes_in_batch` and the like, of one count for each signal."""
        return {signal.count_name: count for signal, count in zip(self.signals, counts, strict=True)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the library's; each term is added up for the log."""
        inputs = self._encode_images(inputs)
        if "labels" in inputs and (model.training or self.args.prediction_loss_only):
            # No logits where nothing is learned from them, such as at the tokens of images, most of a row.
            learned = (inputs["labels"][:, 1:] != IGNORED_LABEL).any(0)
            inputs["logits_to_keep"] = learned.nonzero()[:, 0]
        if model.training:
            if self.guidance is not None:
                self.guidance.watch(inputs)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if self.guidance is not None:
                guidance = self.guidance_weight * self.guidance.value / self.current_gradient_accumulation_steps
                # A mean over this process's boxes; `log` adds the processes up.
                loss, outputs = loss + guidance, {**outputs, "loss_guidance": guidance / self.args.world_size}
            self._train_sums += torch.stack([outputs[name].detach().float() for name in self.train_terms])
            return (loss, outputs) if return_outputs else loss
        # Sums, not means, so that the means over the data set do not depend on its batches. A signal's count is 1 in a
        # place of its own and infinite in the others', so that `loss_iou` comes apart into the signals.
        inputs = self._without_repeated_rows(inputs)
        self._eval_counts += self.count_targets([inputs])
        one = torch.ones((), device=self.args.device)
        places = torch.eye(len(self.signals), device=self.args.device)
        inputs = {**inputs, **self._count_arguments(1 / places)}
        loss, outputs = super().compute_loss(model, inputs, True, one)
        terms = [outputs["loss_lm"], *(outputs[signal.loss_name].sum() for signal in self.signals)]
        terms += outputs["loss_iou"].expand(len(self.signals)).unbind()
        self._eval_sums += torch.stack([term.detach().float() for term in terms])
        return (loss, outputs) if return_outputs else loss

    def _encode_images(self, inputs: dict) -> dict:
        """Inputs with what the tower makes of images that the feature cache did not have; now it has them."""
        inputs = dict(inputs)
        for name, states_name in TOWER_STATES.items():
            keys = inputs.pop(f"{name}_keys", None)
            if keys is not None:
                model = self.plain_model.model
                model.vision_tower.eval()  # what is kept is not dropped from; the next step makes it train again
                with torch.no_grad(), self.accelerator.autocast():
                    _, inputs[states_name] = model.encode_tower(inputs.pop(name))
                self.feature_cache.write(keys, inputs[states_name])
        return inputs

    def _without_repeated_rows(self, inputs: dict) -> dict:
        """Take the labels off the rows that fill up the last batch over all processes: they were there before."""
        state, labels = self.accelerator.gradient_state, inputs["labels"]
        if not state.end_of_dataloader or state.remainder < 1:
            return inputs
        row = self.accelerator.process_index * len(labels) + torch.arange(len(labels), device=labels.device)
        return {**inputs, "labels": labels.masked_fill((row >= state.remainder)[:, None], IGNORED_LABEL)}

    def _prepare_inputs(self, inputs):
        """Coordinates stay float32: DeepSpeed's preparation casts every float to the model's dtype."""
        prepared = super()._prepare_inputs(inputs)
        for name in [*(name for signal in self.signals for name in signal.float32_names), "look_frames"]:
            if name in inputs:
                prepared[name] = inputs[name].to(self.args.device)
        return prepared

    def log(self, logs, *args, **kwargs):
        """Adds the mean of each loss term over the steps since the last log."""
        if "loss" in logs and self._train_steps:
            terms = self.accelerator.reduce(self._train_sums, "sum") / self._train_steps
            logs = {**logs, **dict(zip(self.train_terms, terms.tolist(), strict=True))}
            self._train_sums.zero_()
            self._train_steps = 0
        super().log(logs, *args, **kwargs)

    # ---- data --------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        """As the library's; a mixture makes its batches, and shares itself among the processes, by itself."""
        if not isinstance(self.train_dataset, Mixture):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            batch_size=None,
            collate_fn=MixtureCollator(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """As the library's, with the collator's evaluation form: no jitter, no dropping."""
        collator = self.data_collator
        try:
            self.data_collator = collator.for_evaluation()
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The library's (teacher-forced losses), each term over its own count, and what the model answers freely."""
        self._eval_sums.zero_()
        self._eval_counts.zero_()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = self.accelerator.reduce(self._eval_sums, "sum")
        counts = self._eval_counts.clamp(min=1)
        means, of_iou = sums[: len(counts)] / counts, sums[len(counts) :] / counts[1:]
        terms = [*means.tolist(), of_iou.sum().item()]
        metrics = {"loss": sum(terms), **dict(zip(self.loss_terms, terms, strict=True))}
        if self.generation_rows is not None and len(self.generation_rows):
            metrics |= self.answer_freely(self.generation_rows)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def answer_freely(self, rows) -> dict[str, float]:
        """Let the model answer the prompts of direct tasks.

        Returns:
            `emission`, the share of answers with as many `<vis>` as the task calls for (none where nothing is there);
            of answers with a single target `acc@0.5` and `acc@0.75`, the share whose first box has that IoU, and
            `mask_miou`, each over the targets that have a box, or a mask. A missing answer counts as 0.
        """
        rank, world, step = self.accelerator.process_index, self.accelerator.num_processes, self.generate_batch_size
        # Every process makes the same number of calls: sharded models need that. The surplus has weight 0.
        per_process = -(-len(rows) // world)
        indices = [rank * per_process + i for i in range(per_process)]
        sums = torch.zeros(len(SCORES), device=self.args.device)
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        was_training = model.training
        model.eval()
        for start in range(0, per_process, step):
            chosen = indices[start : start + step]
            batch = [rows[min(index, len(rows) - 1)] for index in chosen]
            for index, scores in zip(chosen, self._answer_and_score(model, batch), strict=True):
                if index < len(rows):
                    sums += torch.tensor(scores).to(sums)
        model.train(was_training)
        return mean_scores(self.accelerator.reduce(sums, "sum").tolist())

    def _answer_and_score(self, model, rows: list[dict]) -> list[list[float]]:
        native = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        dtype = native or self.compute_dtype
        # `generate` encodes images outside of `forward`, where accelerate's own autocast does not reach.
        synced = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with torch.autocast(self.args.device.type, dtype=dtype) if dtype else nullcontext():
            return answer_and_score(
                model,
                self.processing_class,
                rows,
                max_new_tokens=self.generate_tokens,
                synced_gpus=synced,
                **({"max_looks": 0} if synced else {}),  # only one process would run the tower
            )


class _FollowTheData(TrainerCallback):
    """Tells the collator which epoch its draws are for, and keeps with each checkpoint where the stream stands."""

    def __init__(self, trainer: PerceptionTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        collator: PerceptionCollator = self.trainer.data_collator
        collator.set_epoch(int(state.epoch or 0))

    def on_save(self, args, state, control, **kwargs):
        stream = self.trainer.train_dataset
        if isinstance(stream, Mixture):
            if args.process_index == 0:  # last of all: with its file the checkpoint is complete
                self.trainer.accelerator.wait_for_everyone()
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            path = stream_file(checkpoint, args.process_index)
            path.with_suffix(".new").write_text(json.dumps(stream.state_dict()))
            os.replace(path.with_suffix(".new"), path)
            if args.process_index != 0:
                self.trainer.accelerator.wait_for_everyone()
