"""Serve a checkpoint over HTTP, with the chat endpoint that OpenAI's clients speak, in front of any number of replicas.

    pip install "perceptiongpt[serve]"
    python serve.py --model . --port 8000
    python serve.py --model outputs/mine --replicas 2 --gpus 1 --max_batch_size 16

`POST /v1/chat/completions` takes images as data URLs, and boxes, masks and points as content items; the answer's
message holds `content` and `objects`, in pixels of the image, masks as COCO RLE. `"stream": true` sends it while it is
generated. docs/serving.md has examples. Batching, queues and replicas are Ray Serve's.
"""

import argparse
import os
import sys
import threading
from pathlib import Path

from perceptiongpt.inference import InputError, check_name
from perceptiongpt.serving.messages import Limits


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, limits = parser.add_argument, Limits()
    add("--model", required=True, help="folder of a checkpoint, or a repository id on the Hub")
    add("--revision", help="branch, tag or commit of a repository on the Hub")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the checkpoint")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--name", help="what clients call the model (default: the last part of --model)")
    add("--host", default="127.0.0.1", help="0.0.0.0 for clients elsewhere (default: this machine alone)")
    add("--port", type=int, default=8000)
    add("--replicas", type=int, default=1, help="processes that hold the model (default 1)")
    add("--cpus", type=float, default=1.0, help="cores of each, may be a fraction (default 1)")
    add("--gpus", type=float, default=0.0, help="GPUs of each, may be a fraction (default 0)")
    add("--max_batch_size", type=int, default=8, help="requests that a replica answers at once (default 8)")
    add("--batch_wait", type=float, default=0.01, help="seconds that a request waits for others (default 0.01)")
    add("--max_queue", type=int, default=64, help="requests that wait; further ones get status 503 (default 64)")
    add("--max_body_mb", type=float, default=limits.body_bytes / 2**20, help="of a request (default %(default)g)")
    add("--max_images", type=int, default=limits.images, help="of a request (default %(default)s)")
    add("--max_image_pixels", type=int, default=limits.image_pixels, help="of an image (default %(default)s)")
    add("--max_new_tokens", type=int, default=limits.new_tokens, help="of an answer (default %(default)s)")
    add("--allow_urls", action="store_true", help="fetch images from http(s) URLs, whatever they lead to")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command line; serves until it is interrupted."""
    options = parse_arguments(arguments)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray

        from perceptiongpt.serving.deployments import Settings, start
    except ImportError as error:
        sys.exit(f'error: {error}; install it: pip install "perceptiongpt[serve]"')
    try:
        check_name(options.model)
    except InputError as error:
        sys.exit(f"error: {error}")
    is_folder = Path(options.model).is_dir()
    settings = Settings(
        model=str(Path(options.model).resolve()) if is_folder else options.model,
        name=options.name or Path(options.model).resolve().name,
        revision=options.revision,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        replicas=options.replicas,
        cpus=options.cpus,
        gpus=options.gpus,
        batch_size=options.max_batch_size,
        batch_wait=options.batch_wait,
        queue=options.max_queue,
        limits=Limits(
            body_bytes=int(options.max_body_mb * 2**20),
            images=options.max_images,
            image_pixels=options.max_image_pixels,
            new_tokens=options.max_new_tokens,
            urls=options.allow_urls,
        ),
    )
    ray.init(include_dashboard=False, log_to_driver=True, ignore_reinit_error=True)
    start(settings, options.host, options.port)
    print(f"http://{options.host}:{options.port}/v1/chat/completions", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
