"""A Space on the Hub that shows a published model: app.py, what it needs, a card, and images to try it with."""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, SpaceCardData
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from perceptiongpt.publishing.card import PAPER, Facts, is_hub_id
from perceptiongpt.publishing.publication import Publication, access, finish, working_folders
from perceptiongpt.publishing.stage import CARD_NAME, MODEL_TYPE, SPACE_FILE, PublishError, Stage, fill_stage, read_json
from perceptiongpt.publishing.upload import HUB_ERRORS, explained


ROOT = Path(__file__).resolve().parents[1]
APP_FILE = "app.py"
CODE_FOLDER = "webapp"
EXAMPLE_FOLDER = "examples"
REQUIREMENTS_FILE = "requirements.txt"
MORE_REQUIREMENTS = ("pycocotools",)  # beside those of this package; Gradio itself comes with the Space
SPACE_FILES = (APP_FILE, f"{CODE_FOLDER}/*.py", REQUIREMENTS_FILE, SPACE_FILE, CARD_NAME, f"{EXAMPLE_FOLDER}/*")
MESSAGE = "Publish a Space"


def publish_space(model_id: str, publication: Publication, log: Callable[[str], None] = print) -> str | None:
    """Publish a Space that shows a model.

    Args:
        model_id: `user/name` of the model, which is on the Hub already.
        publication: where and how; of the card's parts, the licence counts.
        log: gets each line of the report.

    Returns:
        The commit's id; None in a dry run.

    Raises:
        PublishError: there is no such model, or the Hub refuses; `main` never holds a part of the stage.
    """
    if not is_hub_id(model_id):
        raise PublishError(
            f"--model {model_id}: a Space shows a model on the Hub: publish it first, give USER/NAME here"
        )
    target = access(publication, repo_type="space")
    revision = find_model(target.api, model_id) if target else None
    with working_folders(publication.stage) as (stage_folder, _):
        repo_id = target.repo_id if target else publication.repo_id
        stage = stage_space(stage_folder, repo_id, model_id, revision, publication.facts)
        log(stage.table())
        return finish(stage, target, publication, log, SPACE_FILES)


def find_model(api: HfApi, model_id: str) -> str:
    """The commit of a published model.

    Raises:
        PublishError: it is not there, or of another type.
    """
    try:
        revision = api.model_info(model_id).sha
        config = read_json(Path(api.hf_hub_download(model_id, "config.json", revision=revision)))
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise PublishError(f"--model {model_id}: there is no such model on the Hub; publish it first") from error
    except HUB_ERRORS as error:
        raise explained(error, model_id) from error
    if config.get("model_type") != MODEL_TYPE:
        raise PublishError(f"--model {model_id} is of the type {config.get('model_type')!r}, expected {MODEL_TYPE!r}")
    return revision


def stage_space(folder: str | Path, repo_id: str, model_id: str, revision: str | None, facts: Facts) -> Stage:
    """Stage a Space.

    Args:
        folder: the stage; it is made, or must be empty.
        repo_id: of the Space.
        model_id, revision: of the model; code comes with it, so the Space keeps to this revision. None: the newest.
        facts: of which the licence is taken.

    Raises:
        PublishError: the stage is not empty, or Gradio is not installed.
    """
    files = [ROOT / APP_FILE, *sorted((ROOT / CODE_FOLDER).glob("*.py")), *sorted((ROOT / EXAMPLE_FOLDER).iterdir())]
    stage = fill_stage(ROOT, folder, files)
    requirements = [line for line in importlib.metadata.requires("perceptiongpt") if "extra ==" not in line]
    stage.left_out.clear()  # the other files of this repository are not missed in a Space
    texts = {
        REQUIREMENTS_FILE: "\n".join([*requirements, *MORE_REQUIREMENTS, ""]),
        SPACE_FILE: json.dumps({"model": model_id, "revision": revision}, indent=1),
        CARD_NAME: space_card(repo_id, model_id, facts),
    }
    for name, text in texts.items():
        (stage.folder / name).write_text(text, encoding="utf-8")
    return stage


def space_card(repo_id: str, model_id: str, facts: Facts) -> str:
    """The README.md of a Space, from whose metadata the Hub builds it.

    Raises:
        PublishError: Gradio is not installed, whose version the card names.
    """
    try:
        gradio_version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError as error:
        raise PublishError("the Space runs the version of Gradio that is installed here: pip install gradio") from error
    name = repo_id.split("/")[-1]
    data = SpaceCardData(
        title=name,
        sdk="gradio",
        sdk_version=gradio_version,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file=APP_FILE,
        license=facts.license,
        models=[model_id],
        tags=["perceptiongpt", "visual-grounding", "image-segmentation"],
        colorFrom="blue",
        colorTo="red",
        short_description="Chat about an image, with boxes and masks",
    )
    text = f"""# {name}

Chat with [{model_id}](https://huggingface.co/{model_id}) about an image. What it finds is drawn as boxes and masks, in
the colours of its words. A region is given by two clicks or a stroke. It is a [PerceptionGPT]({PAPER}) model.

The revision of the model is in `{SPACE_FILE}`. The variables `PERCEPTIONGPT_MODEL` and `PERCEPTIONGPT_REVISION` of the
Space override it; a private model needs the secret `HF_TOKEN`.
"""
    content = f"---\n{data}\n---\n\n{text}"
    SpaceCard(content)  # the client's own parser reads it
    return content
