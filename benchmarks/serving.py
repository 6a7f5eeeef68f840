"""Requests per second and latency of `serve.py` on the loopback, at several numbers of clients, beside single calls.

    python benchmarks/serving.py                           # the checkpoint in the root, two replicas of half a core
    python benchmarks/serving.py --model DIR --replicas 2 --cpus 1 --seconds 30

Each client sends its next request once it has the answer to the last. "Single calls" are `inference.answer` in this
process, one after another.
"""

import argparse
import base64
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from perceptiongpt.images_perceptiongpt import read_image
from perceptiongpt.inference import answer, load


ROOT = Path(__file__).parents[1]
PORT = 8123
START = 400  # seconds that the server may take to start


def request(image: Path, text: str, tokens: int) -> bytes:
    """The body of a request about an image."""
    url = "data:image/jpeg;base64," + base64.b64encode(image.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": tokens}).encode()


def client(body: bytes, until: float, latencies: list[float], refused: list[int]) -> None:
    """Ask until a time; note how long each answer took."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=START)
    while time.perf_counter() < until:
        start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        if response.status == 200:
            latencies.append(time.perf_counter() - start)
        else:
            refused.append(response.status)
            time.sleep(float(response.getheader("Retry-After", 0)))


def print_line(name: str, latencies: list[float], seconds: float, refused: int = 0) -> None:
    """Requests per second, and the median and 95 % quantile of latencies."""
    ordered = sorted(latencies)
    median, late = statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    print(
        f"{name:<14}{len(ordered):>10}{len(ordered) / seconds:>14.2f}{1e3 * median:>14.0f}{1e3 * late:>14.0f}"
        f"{refused:>10}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT))
    parser.add_argument("--image", type=Path, default=ROOT / "examples/shapes.jpg")
    parser.add_argument("--text", default="Find every circle.")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=0.5)
    options = parser.parse_args()
    load_average = "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load_average}, {options.replicas} replicas of {options.cpus:g} cores")
    print(f"{'clients':<14}{'answers':>10}{'per second':>14}{'median, ms':>14}{'95 %, ms':>14}{'refused':>10}")

    model, processor = load(options.model)
    image, latencies = read_image(options.image), []
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": options.text}],
        }
    ]
    begin = time.perf_counter()
    while time.perf_counter() - begin < options.seconds:
        start = time.perf_counter()
        answer(model, processor, [messages], [(image.height, image.width)], max_new_tokens=options.tokens)
        latencies.append(time.perf_counter() - start)
    print_line("single calls", latencies, time.perf_counter() - begin)

    command = [sys.executable, str(ROOT / "serve.py"), "--model", options.model, "--port", str(PORT)]
    command += ["--replicas", str(options.replicas), "--cpus", str(options.cpus)]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            body, end = request(options.image, options.text, options.tokens), time.perf_counter() + START
            # The port answers before the replicas do: the first client waits for them.
            while True:
                try:
                    http.client.HTTPConnection("127.0.0.1", PORT).connect()
                    break
                except OSError:
                    if server.poll() is not None or time.perf_counter() > end:
                        log.seek(0)
                        sys.exit(f"serve.py did not start:\n{log.read()[-4000:]}")
                    time.sleep(0.5)
            answered = []
            while len(answered) < 4 and time.perf_counter() < end:
                client(body, time.perf_counter() + 2, answered, [])
            for count in options.clients:
                latencies, refused = [], []
                begin = time.perf_counter()
                arguments = (body, begin + options.seconds, latencies, refused)
                threads = [threading.Thread(target=client, args=arguments) for _ in range(count)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                print_line(str(count), latencies, time.perf_counter() - begin, len(refused))
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
