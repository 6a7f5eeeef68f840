"""Publish a checkpoint on the Hugging Face Hub: stage it, check the stage, show it, upload it.

    hf auth login
    python publish.py --model outputs/mine --repo USER/NAME --license apache-2.0 --dry_run
    python publish.py --model outputs/mine --repo USER/NAME --license apache-2.0 --tag v1 \
        --evaluation outputs/mine_scores --image photo.jpg --text "Find every dog."
    python publish.py --model outputs/mine --repo USER/NAME-adapter --adapter_only --base_repo USER/NAME-base
    python publish.py --model USER/NAME --repo USER/NAME-app --space

The stage holds the code files that the configuration names, weights, processor, tokenizer, chat template, a generated
card and `.eval_results`, nothing else. A fresh process, in which this package is hidden, loads it and answers with it;
the card's picture shows these answers. Large files are uploaded first and one commit names them all, so that `main`
holds all of the stage or nothing of it. After an interruption, give the same command again. See docs/publishing.md.
"""

import argparse
import sys

from perceptiongpt.publishing.card import Facts
from perceptiongpt.publishing.publication import Publication, publish, publish_adapter
from perceptiongpt.publishing.space import MESSAGE as SPACE_MESSAGE
from perceptiongpt.publishing.space import publish_space
from perceptiongpt.publishing.stage import PublishError


def data_license(text: str) -> tuple[str, str]:
    name, equals, licence = text.partition("=")
    if not (name and equals and licence):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=LICENCE")
    return name, licence


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, epilog = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="publish.py", description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR",
        help="folder of the checkpoint; with --space, the published model: USER/NAME",
    )
    add("--repo", required=True, metavar="USER/NAME", help="the repository; it is made where it does not exist")
    add("--tag", help="name of the published revision, such as v1")
    add("--message", help="of the commit")
    add("--private", action="store_true", default=None, help="make a new repository private")
    add("--replace", action="store_true", help="allow a repository that holds a model of another kind")
    add("--dry_run", action="store_true", help="stage, check and show; nothing is sent, no token is needed")
    add("--stage", metavar="DIR", help="keep the stage in this folder, which must be new or empty")
    add("--adapter_only", action="store_true", help="publish adapter/ of the folder by itself")
    add("--base_repo", metavar="USER/NAME", help="with --adapter_only: publish its joined base here first")
    add("--space", action="store_true", help="publish a Space in which one chats with a published model")
    card = parser.add_argument_group("card")
    add = card.add_argument
    add("--card", metavar="FILE", help="a whole card, in place of the generated one; its images are published, too")
    add("--evaluation", nargs="+", default=[], action="extend", metavar="DIR", help="output folders of validate.py")
    add("--image", nargs="+", default=[], action="extend", metavar="FILE", help="images for its picture; else scenes")
    add("--text", metavar="PROMPT", help="what is asked about the images")
    add("--license", metavar="ID", help="of the weights: apache-2.0, cc-by-nc-4.0, ...")
    add("--language", nargs="+", default=[], action="extend", metavar="CODE", help="of the prompts: en, de, ...")
    add("--dataset", nargs="+", default=[], action="extend", metavar="ID", help="training data on the Hub")
    add("--data_license", type=data_license, nargs="+", default=[], action="extend", metavar="NAME=LICENCE",
        help="of a data set, or of a source of the recipe")  # fmt: skip
    add("--base_model", nargs="+", default=[], action="extend", metavar="ID", help="in place of those in the recipe")
    options = parser.parse_args(arguments)
    if options.base_repo and not options.adapter_only:
        parser.error("--base_repo is for --adapter_only")
    if options.adapter_only and (options.evaluation or options.card):
        parser.error("--adapter_only takes neither --evaluation nor --card: publish the plain model with them")
    card_parts = ("evaluation", "card", "image", "text", "language", "dataset", "data_license", "base_model")
    if options.space and any(getattr(options, name) for name in ("adapter_only", *card_parts)):
        parser.error("--space takes --license alone of the card's options, and not --adapter_only")
    return options


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the head of this file."""
    options = parse_arguments(arguments)
    publication = Publication(
        repo_id=options.repo,
        tag=options.tag,
        private=options.private,
        message=options.message or (SPACE_MESSAGE if options.space else Publication.message),
        replace=options.replace,
        dry_run=options.dry_run,
        stage=options.stage,
        evaluations=options.evaluation,
        images=options.image,
        text=options.text,
        card=options.card,
        facts=Facts(
            license=options.license,
            languages=options.language,
            datasets=options.dataset,
            data_licenses=dict(options.data_license),
            base_models=options.base_model,
        ),
    )
    try:
        if options.space:
            publish_space(options.model, publication)
        elif options.adapter_only:
            publish_adapter(options.model, publication, options.base_repo)
        else:
            publish(options.model, publication)
    except PublishError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: main holds all of the stage or nothing of it; give the same command again to continue")


if __name__ == "__main__":
    main()
