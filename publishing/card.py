"""The model card: metadata and text from the config, the recipe of the training and the evaluations."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import HFValidationError, validate_repo_id

from perceptiongpt.publishing.stage import EVALUATION_FOLDER, PublishError, read_json


PIPELINE_TAG = "image-text-to-text"
TAGS = (
    "perceptiongpt",
    "vision-language-model",
    "visual-grounding",
    "referring-expression-comprehension",
    "referring-expression-segmentation",
    "custom_code",
)
BENCHMARKS_FOLDER = Path(__file__).parents[1] / "recipes/benchmarks"
LOCAL_DATASET = "local/"  # what validate.py calls a data set that is not on the Hub
MODEL_ORIGINS = ("checkpoint", "vision", "text", "vlm", "llava")
DATA_PARTS = ("train", "eval")
PAPER = "https://arxiv.org/abs/2311.06612"


@dataclass
class Facts:
    """What only the author knows, from the command line.

    Attributes:
        license: an identifier of the Hub, such as apache-2.0.
        languages: ISO 639 codes.
        datasets: Hub ids of the training data.
        data_licenses: by data set, its licence.
        base_models: Hub ids, in place of those in the recipe.
    """

    license: str | None = None
    languages: Sequence[str] = ()
    datasets: Sequence[str] = ()
    data_licenses: dict[str, str] = field(default_factory=dict)
    base_models: Sequence[str] = ()


@dataclass
class Evaluation:
    """One output folder of validate.py: its summary, and the results that it selects for a card."""

    folder: Path
    summary: dict
    results: list[EvalResult]

    @property
    def name(self) -> str:
        return str(self.summary["benchmark"])


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_evaluation(folder: str | Path, model: str | Path, repo_id: str) -> Evaluation:
    """An evaluation of the checkpoint that is published.

    Args:
        folder: the output of validate.py.
        model: the checkpoint's folder.
        repo_id: the repository; an evaluation of what it held on the Hub is accepted, too.

    Raises:
        PublishError: files are missing or unreadable, or another model was measured.
    """
    from perceptiongpt.inference import checkpoint_hash

    folder = Path(folder)
    for name in ("summary.json", "model_index.yaml"):
        if not (folder / name).is_file():
            raise PublishError(f"--evaluation {folder} has no {name}: give the output folder of a finished validate.py")
    summary = read_json(folder / "summary.json")
    if missing := {"benchmark", "split", "n", "decoding"} - summary.keys():
        raise PublishError(f"{folder}/summary.json has no {', '.join(sorted(missing))}: it is not one of validate.py's")
    measured = summary.get("checkpoint_sha256")
    if measured is None and summary.get("checkpoint") != repo_id:
        raise PublishError(f"--evaluation {folder} measured {summary.get('checkpoint')}, not the model in {model}")
    if measured is not None and measured != checkpoint_hash(model):
        raise PublishError(
            f"--evaluation {folder} measured other weights than those in {model}: run validate.py --model {model} again"
        )
    try:
        index = yaml.safe_load((folder / "model_index.yaml").read_text(encoding="utf-8"))["model-index"]
        results = model_index_to_eval_results(index)[1]
    except (yaml.YAMLError, KeyError, TypeError, IndexError) as error:
        raise PublishError(f"{folder}/model_index.yaml cannot be read as a model-index: {error!r}") from error
    for result in results:
        result.dataset_type = result.dataset_type.removeprefix(LOCAL_DATASET)
        if result.metric_args and "command" in result.metric_args:
            result.metric_args["command"] = without_absolute_paths(result.metric_args["command"])
    return Evaluation(folder, summary, results)


def eval_result_files(folders: Iterable[Path]) -> tuple[list[Path], dict[str, str]]:
    """The `.eval_results` of evaluations that the Hub can use, and by name why the others are left out.

    Raises:
        PublishError: two folders hold different files of one name, or a file is not valid.
    """
    chosen, left_out = {}, {}
    for path in (path for folder in folders for path in sorted((folder / EVALUATION_FOLDER).glob("*.yaml"))):
        try:
            entries = parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise PublishError(f"{path} is not a valid file of evaluation results: {error!r}") from error
        if local := [entry.dataset_id for entry in entries if entry.dataset_id.startswith(LOCAL_DATASET)]:
            left_out[f"{EVALUATION_FOLDER}/{path.name}"] = f"{local[0]} is no data set on the Hub; the card has it"
        elif path.name in chosen and chosen[path.name].read_bytes() != path.read_bytes():
            raise PublishError(f"{path} and {chosen[path.name]} have one name: give only one of the two evaluations")
        else:
            chosen[path.name] = path
    return list(chosen.values()), left_out


def is_hub_id(name: object) -> bool:
    """Whether a name in a recipe can be a repository on the Hub: it is no folder here, and its form is right."""
    if not isinstance(name, str) or Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def recipe_parts(recipe: dict) -> list[dict]:
    """A recipe and, where it has any, its stages: each may name a model and data."""
    stages = recipe.get("stages") or {}
    return [recipe, *(stage for stage in (stages.values() if isinstance(stages, dict) else stages) if stage)]


def recipe_base_models(recipe: dict) -> list[str]:
    """The Hub ids that a recipe starts from, in its order."""
    found = [(part.get("model") or {}).get(key) for part in recipe_parts(recipe) for key in MODEL_ORIGINS]
    return list(dict.fromkeys(name for name in found if is_hub_id(name)))


def recipe_sources(recipe: dict) -> list[dict]:
    """The training sources of a recipe, those of a mixture too."""
    found = []
    for part in recipe_parts(recipe):
        train = (part.get("data") or {}).get("train") or []
        if isinstance(train, dict):
            train = train.get("mixture", [train])
        found += [source for source in train if isinstance(source, dict)]
    return found


def without_paths(value):
    """A recipe for the public: of local paths only the last part; no tokens, and no keys without a value."""
    if isinstance(value, dict):
        return {
            key: without_paths(item)
            for key, item in value.items()
            if item not in (None, {}, []) and not str(key).endswith("_token")
        }
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and ("/" in value or "\\" in value) and not is_hub_id(value) and "://" not in value:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def without_absolute_paths(text: str) -> str:
    """A command or a note for the public: of absolute paths only the last part."""
    return re.sub(r"(?<![\w.:/~])~?/(?:[^\s/;,'\"]+/)*([^\s/;,'\"]+)/?", r"\1", text)


# ---- writing ---------------------------------------------------------------------------------------------------------


def card_data(repo_id: str, recipe: dict, evaluations: Sequence[Evaluation], facts: Facts, **more) -> ModelCardData:
    """The card's metadata."""
    results = [result for evaluation in evaluations for result in evaluation.results]
    sources = [source["root"] for source in recipe_sources(recipe) if source.get("source") == "hub"]
    datasets = [*facts.datasets, *(name for name in sources if is_hub_id(name))]
    base_models = list(facts.base_models or recipe_base_models(recipe))
    values = {
        "license": facts.license,
        "language": list(facts.languages),
        "library_name": "transformers",
        "pipeline_tag": PIPELINE_TAG,
        "base_model": base_models[0] if len(base_models) == 1 else base_models,
        "datasets": list(dict.fromkeys(datasets)),
        "metrics": list(dict.fromkeys(result.metric_type for result in results)),
        "tags": list(TAGS),
        **more,
    }
    values = {key: value for key, value in values.items() if value}
    if results:
        values |= {"model_name": repo_id.split("/")[-1], "eval_results": results}
    return ModelCardData(**values)


def write_card(
    repo_id: str,
    config: dict,
    recipe: dict,
    evaluations: Sequence[Evaluation] = (),
    facts: Facts | None = None,
    *,
    parameters: int,
    steps: int | None = None,
    picture: str | None = None,
    about_picture: str = "",
    prompts: Sequence[str] = (),
    is_adapter: bool = False,
    adapter_base: str | None = None,
) -> str:
    """The whole card of a checkpoint, or of an adapter by itself.

    Args:
        repo_id: `user/name` of the repository.
        config: the content of config.json.
        recipe: the content of recipe.yaml, or empty.
        evaluations: of this very checkpoint.
        facts: what the author adds.
        parameters: how many the weights have.
        steps: optimizer steps of the training, where they are known.
        picture, about_picture: path of the picture of answers in the repository, and what it shows.
        prompts: prompts that the checkpoint was asked in its check; the first is the example of the card.
        is_adapter: the repository holds an adapter alone.
        adapter_base: the repository of its base; None: the base is joined again from its parts.
    """
    facts = facts or Facts()
    name = repo_id.split("/")[-1]
    picture_lines = [f"![What this checkpoint answers]({picture})", "", about_picture, ""] if picture else []
    text = [
        f"# {name}",
        "",
        "A vision-language model that reads and writes boxes and masks as one token, `<vis>`: an implementation of "
        f"[PerceptionGPT]({PAPER}) for `transformers`. {size_sentence(config, parameters, is_adapter)}",
        "",
        *picture_lines,
        "## Use",
        "",
        adapter_usage(repo_id, adapter_base) if is_adapter else usage(repo_id, prompts[0] if prompts else "Find it."),
        "",
        "Boxes are `[x0, y0, x1, y1]` in pixels of the image; masks are bool arrays of its size; no object found is an "
        "empty list. Boxes and masks also go in, as content items `box`, `mask` and `region` of a message.",
        "",
        "## Results",
        "",
        *results_section(evaluations),
        "",
        "### Not measured",
        "",
        *not_measured_section(evaluations),
        "",
        "## Training",
        "",
        *training_section(recipe, steps, facts),
        "",
        "## Licences",
        "",
        *licence_section(recipe, facts),
        "",
    ]
    more = {"library_name": "peft", "base_model_relation": "adapter"} if is_adapter else {}
    if is_adapter and adapter_base and not facts.base_models:
        more["base_model"] = adapter_base
    data = card_data(repo_id, recipe, evaluations, facts, **more)
    return checked_card(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text))


def checked_card(content: str) -> str:
    """A card's content, after the client's own parser has read it.

    Raises:
        PublishError: the metadata is missing, cannot be read, or lacks what loaders and the Hub need.
    """
    if not re.match(r"---\r?\n.*?\r?\n---(\r?\n|$)", content, re.DOTALL):
        raise PublishError("the card does not begin with metadata between two lines of ---")
    try:
        data = ModelCard(content).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise PublishError(f"the card's metadata cannot be read: {error}") from error
    if data.get("library_name") not in ("transformers", "peft"):
        raise PublishError(f"the card's library_name is {data.get('library_name')!r}, expected transformers")
    if data.get("pipeline_tag") != PIPELINE_TAG:
        raise PublishError(f"the card's pipeline_tag is {data.get('pipeline_tag')!r}, expected {PIPELINE_TAG}")
    return content


def size_sentence(config: dict, parameters: int, is_adapter: bool) -> str:
    millions = parameters / 1e6
    size = f"{millions / 1000:.1f} billion" if millions >= 1000 else f"{millions:.1f} million"
    vision, text = (config[key].get("model_type", "?") for key in ("vision_config", "text_config"))
    image_size = config.get("image_size") or config["vision_config"].get("image_size")
    resolution = f" at {image_size} pixels" if image_size else ""
    if is_adapter:
        return f"This is an adapter of {size} parameters for a `{vision}` vision tower and a `{text}` language model."
    return f"It has {size} parameters: a `{vision}` vision tower{resolution} and a `{text}` language model."


def usage(repo_id: str, prompt: str) -> str:
    return f"""```python
from transformers import pipeline

pipe = pipeline("perception", model="{repo_id}", trust_remote_code=True)
result = pipe("photo.jpg", {json.dumps(prompt)}, max_new_tokens=64)
print(result["text"])
for found in result["objects"]:
    print(found["phrase"], found["box"], found["score"], found["mask"].shape)
```"""


def adapter_usage(repo_id: str, base: str | None) -> str:
    if base is None:
        return f"""The base is joined from its parts, with the code of the `perceptiongpt` package:

```python
from perceptiongpt.publishing.adapters import load_adapter

model, processor = load_adapter("{repo_id}")
```"""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{repo_id}").merge_and_unload()
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
```"""


def results_section(evaluations: Sequence[Evaluation]) -> list[str]:
    if not evaluations:
        return ["This checkpoint has not been measured on any benchmark."]
    lines = [
        "| benchmark | split | metric | result | 95 % interval | samples |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for evaluation in evaluations:
        for result in evaluation.results:
            arguments = result.metric_args or {}
            interval = arguments.get("interval_95")
            cells = [
                evaluation.name,
                evaluation.summary["split"],
                result.metric_name or result.metric_type,
                f"{result.metric_value:.4f}",
                f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
                arguments.get("n", evaluation.summary["n"]),
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    decoding = sorted({str(evaluation.summary["decoding"]) for evaluation in evaluations})
    lines += ["", f"Answers: {'; '.join(decoding)}, compared in pixels of the original image."]
    notes = [f"{one.name}: {one.summary['note']}" for one in evaluations if one.summary.get("note")]
    commands = [without_absolute_paths(one.summary["command"]) for one in evaluations if one.summary.get("command")]
    return lines + [f"- {line}" for line in (*notes, *(f"measured by `{command}`" for command in commands))]


def not_measured_section(evaluations: Sequence[Evaluation]) -> list[str]:
    measured = {evaluation.name for evaluation in evaluations}
    known = {}
    for path in sorted(BENCHMARKS_FOLDER.glob("*.yaml")):
        known[path.stem] = [name for name in yaml.safe_load(path.read_text(encoding="utf-8")) if name not in measured]
    lines = [f"- Benchmarks ({group}): {', '.join(names)}." for group, names in known.items() if names]
    for evaluation in evaluations:
        for metric, reason in (evaluation.summary.get("not_measured") or {}).items():
            lines.append(f"- {evaluation.name}, {metric}: {reason}.")
    return [
        *lines,
        "- Bias, safety, robustness to other image domains, and languages other than that of the training prompts.",
    ]


def training_section(recipe: dict, steps: int | None, facts: Facts) -> list[str]:
    if not recipe:
        return ["How this checkpoint was trained is not recorded beside its weights."]
    adapter, model = recipe.get("adapter") or {}, recipe.get("model") or {}
    start = [f"{key} `{without_paths(model[key])}`" for key in MODEL_ORIGINS if model.get(key)]
    lines = []
    if start:
        lines.append(f"Started from {' and '.join(start)}.")
    if not recipe_sources(recipe):
        lines.append("Joined from these parts and not trained.")
    if adapter.get("mode"):
        rank = f" of rank {adapter['rank']}" if adapter["mode"] in ("lora", "qlora") and adapter.get("rank") else ""
        lines.append(f"Adapter mode `{adapter['mode']}`{rank}.")
    if steps:
        lines.append(f"{steps} optimizer step{'' if steps == 1 else 's'}.")
    names = list(dict.fromkeys([*(str(one.get("source", "coco")) for one in recipe_sources(recipe)), *facts.datasets]))
    if names:
        lines.append(f"Data: {', '.join(names)}.")
    recipe_text = yaml.safe_dump(without_paths(recipe), sort_keys=False, width=110)
    return [
        " ".join(lines),
        "",
        "<details><summary>The recipe (of local paths, the last part)</summary>",
        "",
        "```yaml",
        recipe_text.rstrip(),
        "```",
        "",
        "</details>",
    ]


def licence_section(recipe: dict, facts: Facts) -> list[str]:
    stated = facts.license or "not stated by the author; ask before use"
    lines = [f"- These weights: {stated}.", "- The code in this repository: Apache-2.0."]
    for name in facts.base_models or recipe_base_models(recipe):
        lines.append(f"- Base model [{name}](https://huggingface.co/{name}): its own licence applies.")
    names = [str(source.get("source", "coco")) for source in recipe_sources(recipe)]
    for name in dict.fromkeys([*names, *facts.datasets, *facts.data_licenses]):
        licence = facts.data_licenses.get(name)
        if licence is None and name == "scenes":
            licence = "drawn by the training program, no licence needed"
        lines.append(f"- Data `{name}`: {licence or 'licence not stated by the author'}.")
    return lines


def images_in_card(content: str) -> list[str]:
    """The images that a card shows from its own repository."""
    found = re.findall(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)", content) + re.findall(r"<img[^>]+src=[\"']([^\"']+)", content)
    return [path for path in dict.fromkeys(found) if "://" not in path and not path.startswith(("data:", "#"))]
