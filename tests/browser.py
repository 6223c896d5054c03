"""A headless Chromium, spoken to over two pipes: no driver and no port is needed.

The protocol is Chromium's own (`--remote-debugging-pipe`): JSON messages, each ended by a
zero byte. A test gets a `Tab` and asks it questions in JavaScript.
"""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import select
import shutil
import signal
import tempfile
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE = 60  # seconds for one answer, on a machine that may be busy
needs_browser = pytest.mark.skipif(
    PROGRAM is None, reason=f"no browser is found: none of {', '.join(NAMES)}"
)
MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}
TEXTS = {"Enter": "\r", " ": " "}


class Tab:
    """One page of a browser."""

    def __init__(self, ask):
        self._ask = ask
        self.errors: list[str] = []

    def open(self, path: pathlib.Path, width=1280, height=800, dark=False, touch=False):
        """Opens a file in a window of this size, and waits until its script has run."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.prefer("dark" if dark else "light")
        self("Page.navigate", url=path.as_uri())
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def prefer(self, theme: str) -> None:
        """Sets what the system prefers."""
        feature = {"name": "prefers-color-scheme", "value": theme}
        self("Emulation.setEmulatedMedia", features=[feature])

    def __call__(self, method: str, **parameters):
        """Sends one command; its result."""
        return self._ask(method, parameters)

    def js(self, code: str):
        """The value of an expression."""
        found = self("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, code: str, patience: float = PATIENCE) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + patience
        while not self.js(code):
            assert time.monotonic() < end, f"never true: {code}; {self.errors}"
            time.sleep(0.02)

    def middle(self, selector: str) -> tuple[float, float]:
        """Where the middle of an element is, once it is scrolled into view."""
        found = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return tuple(found)

    def hover(self, selector: str) -> None:
        """Moves the mouse over an element."""
        x, y = self.middle(selector)
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, *modifiers: str) -> None:
        """Presses the mouse on an element."""
        x, y = self.middle(selector)
        held = sum(MODIFIERS[name] for name in modifiers)
        for kind in ("mousePressed", "mouseReleased"):
            event = {"x": x, "y": y, "button": "left", "clickCount": 1, "modifiers": held}
            self("Input.dispatchMouseEvent", type=kind, **event)

    def tap(self, selector: str) -> None:
        """Touches an element."""
        x, y = self.middle(selector)
        self("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str, *modifiers: str) -> None:
        """Presses a key."""
        held = sum(MODIFIERS[name] for name in modifiers)
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
        event = {"key": key, "modifiers": held, "windowsVirtualKeyCode": codes.get(key, 0)}
        text = {"text": TEXTS[key]} if key in TEXTS else {}
        self("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self("Input.dispatchKeyEvent", type="keyUp", **event)

    def picture(self, path: str) -> None:
        """Writes a PNG of what the window shows."""
        data = self("Page.captureScreenshot", format="png")["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def opened():
    """A browser with one empty tab; ended in the end."""
    read, write = os.pipe(), os.pipe()
    # Above 9: the numbers 3 and 4, on which Chromium listens, may be in use here.
    theirs = [fcntl.fcntl(x, fcntl.F_DUPFD_CLOEXEC, 10) for x in (read[0], write[1])]
    places = [(os.POSIX_SPAWN_DUP2, x, 3 + i) for i, x in enumerate(theirs)]
    quiet = [(os.POSIX_SPAWN_OPEN, x, os.devnull, os.O_WRONLY, 0) for x in (1, 2)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [PROGRAM, "--headless", "--no-sandbox", "--remote-debugging-pipe"]
        command += ["--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        process = os.posix_spawn(PROGRAM, command, os.environ, file_actions=quiet + places)
        try:
            for x in (*theirs, read[0], write[1]):
                os.close(x)
            yield _tab(read[1], write[0])
        finally:
            with contextlib.suppress(OSError):
                os.write(read[1], b'{"id":0,"method":"Browser.close"}\0')
            _end(process)
            os.close(read[1])
            os.close(write[0])


def _end(process: int) -> None:
    """Waits until the browser has closed itself, and ends it if it does not."""
    for _ in range(500):
        if os.waitpid(process, os.WNOHANG) != (0, 0):
            return
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def _tab(to: int, of: int) -> Tab:
    numbers, waiting, session = itertools.count(1), bytearray(), {}

    def message():
        while b"\0" not in waiting:
            ready, *_ = select.select([of], [], [], PATIENCE)
            assert ready, "the browser does not answer"
            part = os.read(of, 2**20)
            assert part, "the browser has ended"
            waiting.extend(part)
        text, _, rest = bytes(waiting).partition(b"\0")
        waiting[:] = rest
        return json.loads(text)

    def ask(method, parameters):
        number = next(numbers)
        sent = {"id": number, "method": method, "params": parameters, **session}
        data = json.dumps(sent).encode() + b"\0"
        while data:
            data = data[os.write(to, data) :]
        while (found := message()).get("id") != number:
            if found.get("method") == "Runtime.exceptionThrown":
                tab.errors.append(str(found["params"]["exceptionDetails"]))
        assert "error" not in found, (method, found)
        return found["result"]

    tab = Tab(ask)
    target = tab("Target.createTarget", url="about:blank")["targetId"]
    attached = tab("Target.attachToTarget", targetId=target, flatten=True)
    session["sessionId"] = attached["sessionId"]
    tab("Page.enable")
    tab("Runtime.enable")
    return tab
