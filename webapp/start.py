"""Chat with a checkpoint about an image, in a browser: boxes and masks go in by hand, and come out drawn.

    python app.py                                       # the checkpoint beside app.py
    python app.py --model outputs/mine --port 7861
    python app.py --model user/name --revision v1

Without `--model`, the environment variable PERCEPTIONGPT_MODEL (and PERCEPTIONGPT_REVISION) names the checkpoint, then
space.json beside app.py, which `publish.py --space` writes, then the folder of app.py. The code that comes with
the checkpoint is run. Nothing else of this repository is needed: gradio, torch, transformers and pycocotools.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from . import FOLDER
from .assistant import Assistant
from .page import build, launch


SPACE_FILE = "space.json"


def find_model() -> tuple[str, str | None]:
    """The checkpoint that the surroundings name: (folder or repository id, revision)."""
    if name := os.environ.get("PERCEPTIONGPT_MODEL"):
        return name, os.environ.get("PERCEPTIONGPT_REVISION")
    if (FOLDER / SPACE_FILE).is_file():
        named = json.loads((FOLDER / SPACE_FILE).read_text(encoding="utf-8"))
        return named["model"], named["revision"]
    if (FOLDER / "config.json").is_file():
        return str(FOLDER), None
    sys.exit("error: there is no checkpoint here: give --model, or set PERCEPTIONGPT_MODEL")


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the head of this file."""
    summary, _, epilog = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="app.py", description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a checkpoint, or a repository id on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of a repository on the Hub")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--open", action="store_true", help="open it in a browser")
    options = parser.parse_args(arguments)
    name, revision = (options.model, options.revision) if options.model else find_model()
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        sys.exit(f"error: --model {name}: there is no such folder")
    try:
        assistant = Assistant(name, revision)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --model {name}: not a checkpoint that can be loaded: {error}")
    launch(build(assistant), server_port=options.port, inbrowser=options.open)
