"""A headless Chromium, driven by the WebDriver protocol alone. No test lives here.

Debian's packages `chromium` and `chromium-driver` are all that it takes: the protocol is JSON over HTTP.
"""

import base64
import contextlib
import io
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from processes import free_port


ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key for a reference to an element
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # WebGL, which the editor of masks draws with, on a processor
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--window-size=1280,1500",
)


def missing_programs() -> list[str]:
    """Which of the programs that a browser needs are not installed."""
    return [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


class Element:
    def __init__(self, browser: "Browser", reference: str):
        self.browser, self.reference = browser, reference

    def call(self, method: str, path: str, body: dict | None = None):
        return self.browser.call(method, f"/element/{self.reference}/{path}", body)

    @property
    def text(self) -> str:
        return self.call("GET", "text")

    def click(self) -> None:
        self.call("POST", "click", {})

    def type(self, text: str) -> None:
        """Type into it; into a file input, the path of a file."""
        self.call("POST", "value", {"text": text})

    def picture(self) -> np.ndarray:
        """What it looks like: RGB, `(height, width, 3)`."""
        content = base64.b64decode(self.call("GET", "screenshot"))
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


class Browser:
    """One session of a driver.

    Args:
        driver: address of the driver.
        profile: an empty folder.
    """

    def __init__(self, driver: str, profile: Path):
        options = {"binary": shutil.which("chromium"), "args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        self.base = driver
        started = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base = f"{driver}/session/{started['sessionId']}"

    def call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {json.load(error)['value']['message']}") from error

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def find(self, selector: str) -> list[Element]:
        found = self.call("POST", "/elements", {"using": "css selector", "value": selector})
        return [Element(self, one[ELEMENT]) for one in found]

    def one(self, selector: str) -> Element:
        """The only element of a selector, once it is there."""
        (element,) = self.wait(lambda: self.find(selector), f"an element {selector}")
        return element

    def run(self, script: str, *arguments):
        """Run JavaScript in the page, elements as arguments."""
        arguments = [{ELEMENT: one.reference} if isinstance(one, Element) else one for one in arguments]
        return self.call("POST", "/execute/sync", {"script": script, "args": arguments})

    def drag(self, element: Element, *points: tuple[float, float]) -> None:
        """Press at the first point, move to the others, release; points are 0..1 of the element. One point: a click."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        box = self.run("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y, b.width, b.height]", element)
        places = [(round(box[0] + x * box[2]), round(box[1] + y * box[3])) for x, y in points]
        moves = [{"type": "pointerMove", "duration": 80, "x": x, "y": y} for x, y in places]
        steps = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        self.call("POST", "/actions", {"actions": [pointer]})

    def download_into(self, folder: Path) -> None:
        parameters = {"behavior": "allow", "downloadPath": str(folder)}
        self.call("POST", "/goog/cdp/execute", {"cmd": "Browser.setDownloadBehavior", "params": parameters})

    def screenshot(self, path: str | Path) -> None:
        Path(path).write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def requested(self) -> list[str]:
        """The addresses that pages asked servers for since the last call."""
        entries = self.call("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        urls = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if url.startswith(("http:", "https:", "ws:", "wss:"))]

    def wait(self, condition: Callable, wanted: str, seconds: float = 60):
        """What a condition returns, once that is true."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"{wanted} did not come within {seconds} s"
            time.sleep(0.1)
        return found


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile in a folder; it and its driver end with the block."""
    port = free_port()
    driver = subprocess.Popen(
        [shutil.which("chromedriver"), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while True:
            try:
                opened = Browser(address, folder / "profile")
                break
            except urllib.error.URLError:
                assert time.monotonic() < end and driver.poll() is None, "the driver did not start"
                time.sleep(0.1)
        try:
            yield opened
        finally:
            opened.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()
