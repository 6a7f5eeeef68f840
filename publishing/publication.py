"""From a folder to a repository: stage, check, card, upload. `publish` and `publish_adapter` are what commands call."""

import contextlib
import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from safetensors import safe_open

from perceptiongpt.publishing.card import (
    Evaluation,
    Facts,
    checked_card,
    eval_result_files,
    images_in_card,
    read_evaluation,
    without_absolute_paths,
    write_card,
)
from perceptiongpt.publishing.examples import answer_in_fresh_process, draw_answers, image_examples, scene_examples
from perceptiongpt.publishing.stage import (
    ADAPTER_FILES,
    CARD_NAME,
    EVALUATION_FOLDER,
    OWN_FILES,
    PROCESSOR_FILES,
    PublishError,
    Stage,
    check_checkpoint,
    code_files,
    fill_stage,
    link_or_copy,
    named_files,
    read_json,
    stage_checkpoint,
    weight_files,
)
from perceptiongpt.publishing.upload import Target, find_target, upload


LONGEST_SHOWN = 80  # letters of an answer in the report


@dataclass
class Publication:
    """What is published, and how.

    Attributes:
        repo_id: `user/name`, or the name alone for one's own.
        tag: of the revision.
        private: for a repository that is made; None is the owner's default.
        message: of the commit.
        token: in place of the one that `hf auth login` or `HF_TOKEN` left.
        replace: allow a repository that holds another kind of model.
        dry_run: stage, check and show, but do not speak to the Hub.
        stage: the folder of the stage, which is kept; None: a temporary one.
        evaluations: output folders of validate.py.
        images, text: images of which the card's picture is made, and the prompt; none: drawn scenes.
        card: a file with the whole card, in place of the generated one.
        facts: what the author adds to the card.
    """

    repo_id: str
    tag: str | None = None
    private: bool | None = None
    message: str = "Publish a checkpoint"
    token: str | None = None
    replace: bool = False
    dry_run: bool = False
    stage: str | Path | None = None
    evaluations: Sequence[str | Path] = ()
    images: Sequence[str | Path] = ()
    text: str | None = None
    card: str | Path | None = None
    facts: Facts = field(default_factory=Facts)


def publish(folder: str | Path, publication: Publication, log: Callable[[str], None] = print) -> str | None:
    """Publish a checkpoint as a model repository.

    Args:
        folder: what `train.py` or `save_pretrained` wrote.
        publication: where and how.
        log: gets each line of the report.

    Returns:
        The commit's id; None in a dry run.

    Raises:
        PublishError: the folder cannot be published, or the Hub refuses; `main` never holds a part of the stage.
    """
    folder = Path(folder)
    config = check_checkpoint(folder)
    if publication.card is None:
        check_drawing()
    target = access(publication)
    repo_id = target.repo_id if target else publication.repo_id
    evaluations = [read_evaluation(one, folder, repo_id) for one in publication.evaluations]
    with working_folders(publication.stage) as (stage_folder, work):
        stage = stage_checkpoint(folder, stage_folder)
        add_evaluations(stage, evaluations)
        examples = make_examples(publication, work)
        log(f"checking the stage: a fresh process loads it and answers {len(examples)} prompts")
        results = answer_in_fresh_process(stage.folder, examples, work)
        log_answers(examples, results, log)
        if publication.card is None:
            shown = "images that the author chose" if publication.images else "drawn scenes that training never shows"
            content = write_card(
                repo_id,
                config,
                read_recipe_file(folder),
                evaluations,
                publication.facts,
                parameters=count_parameters(weight_files(folder)),
                steps=trained_steps(folder),
                picture=draw_answers(examples, results, stage),
                about_picture=f"Answers of this very checkpoint about {shown}; none was left out.",
                prompts=[example["text"] for example in examples],
            )
            write_in_stage(stage, content)
        else:
            add_given_card(stage, Path(publication.card))
        log(stage.table())
        log_license(publication, log)
        return finish(stage, target, publication, log)


def publish_adapter(
    folder: str | Path, publication: Publication, base_repo: str | None = None, log: Callable[[str], None] = print
) -> str | None:
    """Publish the adapter of a training run by itself.

    Args:
        folder: the output of `train.py`, with `adapter/`, recipe.yaml and the plain model.
        publication: where and how; without evaluations, they belong to the plain model.
        base_repo: publish the joined base there first; without, the adapter's config names the parts that it is
            joined from, which must be on the Hub.
        log: gets each line of the report.

    Returns, raises:
        As `publish`.
    """
    from perceptiongpt.publishing import adapters

    folder = Path(folder)
    adapter = adapters.check_adapter_folder(folder)
    config = check_checkpoint(folder)
    recipe = read_recipe_file(folder)
    base = adapters.base_of_recipe(recipe)
    check_drawing()
    target = access(publication, is_adapter=True)
    repo_id = target.repo_id if target else publication.repo_id
    if base_repo is not None and target:
        base_repo = access(base_publication(publication, base_repo)).repo_id
    with working_folders(publication.stage) as (stage_folder, work):
        if base_repo is None:
            base = adapters.pin_revisions(base)
        log("checking that the adapter on its base is the model that training saved")
        model, processor = adapters.build_base(base)
        base_folder = work / "base"
        for part in (model, processor):
            part.save_pretrained(base_folder)
        adapters.check_same_model(folder, adapter, model)
        del model

        files = [
            *named_files(adapter, (*ADAPTER_FILES, *PROCESSOR_FILES)),
            *code_files(adapter, read_json(adapter / "processor_config.json")),
        ]
        stage = fill_stage(adapter, stage_folder, files)
        examples = make_examples(publication, work)
        answers = work / "adapter_answers"
        answers.mkdir()
        log(f"checking the stage: a fresh process loads it on its base and answers {len(examples)} prompts")
        results = answer_in_fresh_process(stage.folder, examples, answers, base=base_folder)
        log_answers(examples, results, log)

        staged_config = stage.folder / ADAPTER_FILES[0]
        if base_repo is not None:
            log(f"the base, {base_repo}:")
            described = {"model": recipe["model"]}
            (base_folder / "recipe.yaml").write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
            revision = publish(base_folder, base_publication(publication, base_repo), log)
            adapters.set_base(staged_config, base_repo, revision, None)
            log(f"the adapter, {repo_id}:")
        elif "checkpoint" in base["model"]:
            adapters.set_base(staged_config, base["model"]["checkpoint"], base["revisions"]["checkpoint"], None)
        else:
            adapters.set_base(staged_config, None, None, adapters.describe_base(base, read_json(staged_config)))
        content = write_card(
            repo_id,
            config,
            recipe,
            (),
            publication.facts,
            parameters=count_parameters([stage.folder / ADAPTER_FILES[1]]),
            steps=trained_steps(folder),
            picture=draw_answers(examples, results, stage),
            about_picture="Answers of this very adapter on its base; none was left out.",
            prompts=[example["text"] for example in examples],
            is_adapter=True,
            adapter_base=base_repo or base["model"].get("checkpoint"),
        )
        write_in_stage(stage, content)
        log(stage.table())
        log_license(publication, log)
        return finish(stage, target, publication, log)


def base_publication(publication: Publication, base_repo: str) -> Publication:
    """How the base of an adapter is published: as the adapter, under its own name."""
    return Publication(
        base_repo,
        tag=publication.tag,
        private=publication.private,
        message="Publish the base of an adapter",
        token=publication.token,
        replace=publication.replace,
        dry_run=publication.dry_run,
        images=publication.images,
        text=publication.text,
        facts=publication.facts,
    )


def run_publication(folder: str | Path, training: dict) -> Publication:
    """How a training run is to be published, by the arguments of `transformers.TrainingArguments` in its recipe.

    Checks the token and the name: call it before the training, which may take days.

    Args:
        folder: the output of the run; its name is the repository's where `hub_model_id` is not given.
        training: the recipe's section, with `push_to_hub`, `hub_model_id` and `hub_private_repo`.

    Raises:
        PublishError: there is no right to publish there, or the section has settings that are not supported.
    """
    if training.get("hub_token"):
        raise PublishError("training.hub_token: recipes are kept in outputs; log in, or set HF_TOKEN")
    if training.get("hub_strategy", "end") != "end":
        raise PublishError("training.hub_strategy: a run is published when it is finished, which is the strategy `end`")
    if training.get("hub_revision", "main") != "main":
        raise PublishError("training.hub_revision: a run is published to main; publish.py --tag names a revision")
    name = training.get("hub_model_id") or Path(folder).resolve().name
    return Publication(find_target(name).repo_id, private=training.get("hub_private_repo"))


# ---- parts -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def working_folders(stage: str | Path | None) -> Iterator[tuple[Path, Path]]:
    """(folder of the stage, folder for everything else); what is temporary goes away."""
    with tempfile.TemporaryDirectory(prefix="perceptiongpt_publish_") as temporary:
        work = Path(temporary, "work")
        work.mkdir()
        yield Path(stage) if stage is not None else Path(temporary, "stage"), work


def access(publication: Publication, is_adapter: bool = False, repo_type: str = "model") -> Target | None:
    """The repository, which may be written to; None in a dry run."""
    if publication.dry_run:
        return None
    return find_target(publication.repo_id, publication.token, publication.replace, is_adapter, repo_type)


def check_drawing() -> None:
    """Raise `PublishError` where the card's picture could not be drawn."""
    if importlib.util.find_spec("supervision") is None:
        raise PublishError("the card's picture is drawn by supervision: pip install supervision, or give --card FILE")


def make_examples(publication: Publication, work: Path) -> list[dict]:
    """What the stage is asked: about the author's images, or drawn scenes."""
    if bool(publication.images) != (publication.text is not None):
        raise PublishError("--image and --text go together: the prompt is about the images")
    return image_examples(publication.images, publication.text, work) if publication.images else scene_examples(work)


def log_license(publication: Publication, log: Callable[[str], None]) -> None:
    if publication.facts.license is None and publication.card is None:
        log("no --license was given: the card says so, and others may not know what they may do with the weights")


def finish(
    stage: Stage,
    target: Target | None,
    publication: Publication,
    log: Callable[[str], None],
    own_files: Sequence[str] = OWN_FILES,
) -> str | None:
    """Upload a stage, unless this is a dry run; what an earlier publication left of `own_files` is deleted."""
    if target is None:
        log("dry run: nothing was sent")
        return None
    commit, kept = upload(
        target,
        stage.folder,
        message=publication.message,
        private=publication.private,
        tag=publication.tag,
        own_files=own_files,
    )
    if kept:
        log(f"left as they are in the repository, not made by this program: {', '.join(kept)}")
    tagged = f", tagged {publication.tag}" if publication.tag else ""
    log(f"published {target.url} at {commit}{tagged}")
    return commit


def read_recipe_file(folder: Path) -> dict:
    """The recipe of the run that wrote a folder, or an empty one."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise PublishError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error


def trained_steps(folder: Path) -> int | None:
    """The optimizer steps of the run that wrote a folder, where its log is there."""
    path = folder / "trainer_state.json"
    return read_json(path).get("global_step") if path.is_file() else None


def count_parameters(files: Sequence[Path]) -> int:
    """How many numbers safetensors files hold."""
    total = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total


def add_evaluations(stage: Stage, evaluations: Sequence[Evaluation]) -> None:
    """Stage the `.eval_results` that the Hub can use."""
    files, left_out = eval_result_files([evaluation.folder for evaluation in evaluations])
    for path in files:
        target = stage.folder / EVALUATION_FOLDER / path.name
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)  # the checkpoint's folder may have had one of this name
        target.write_text(without_absolute_paths(path.read_text(encoding="utf-8")), encoding="utf-8")
    stage.left_out |= left_out


def log_answers(examples: list[dict], results: list[dict], log: Callable[[str], None]) -> None:
    for example, result in zip(examples, results, strict=True):
        count = len(result["objects"])
        answer = result["text"] if len(result["text"]) <= LONGEST_SHOWN else result["text"][:LONGEST_SHOWN] + "..."
        log(f"  {example['text']!r} -> {answer!r}, {count} object{'' if count == 1 else 's'}")


def write_in_stage(stage: Stage, card: str) -> None:
    (stage.folder / CARD_NAME).write_text(card, encoding="utf-8")


def add_given_card(stage: Stage, card: Path) -> None:
    """Stage a card that the author wrote, with the images that it shows.

    Raises:
        PublishError: it cannot be read, its metadata is not valid, or an image is missing or outside its folder.
    """
    try:
        content = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PublishError(f"--card {card} cannot be read: {error}") from error
    write_in_stage(stage, checked_card(content))
    for name in images_in_card(content):
        path = card.parent / name
        if not path.is_file() or not path.resolve().is_relative_to(card.parent.resolve()):
            raise PublishError(f"--card {card} shows {name}, which is not a file beside it")
        if not (stage.folder / name).exists():
            link_or_copy(path, stage.folder / name)
    stage.left_out.pop(CARD_NAME, None)
