"""A headless Chromium driven over a pipe: what is needed to look at a page, with nothing but the standard library."""

import base64
import json
import os
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60.0  # seconds for an answer


def find_chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser. `told` are its console messages, log entries and uncaught errors."""

    def __init__(self, binary, profile):
        read, self._out = os.pipe()  # the browser reads commands at 3
        self._in, write = os.pipe()  # and answers at 4
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [binary, *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]

        def number():
            for pipe, expected in [(os.dup(read), 3), (os.dup(write), 4)]:
                os.dup2(pipe, expected)

        self._process = subprocess.Popen(
            command, pass_fds=(3, 4), preexec_fn=number, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        self._buffer, self._last, self._session, self.told, self.events = b"", 0, None, [], []
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def __call__(self, method, **params):
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def open(self, path, *, width=1100, height=900, dark=False, media="screen"):
        """Show a file as a device of that width would."""
        self.set(width=width, height=height, dark=dark, media=media)
        before = len(self.events)
        self("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.events[before:]:
            self._next()

    def set(self, *, width=1100, height=900, dark=False, media="screen"):
        phone = width < 600
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self("Emulation.setEmulatedMedia", media=media, features=features)

    def value(self, expression):
        """What an expression of JavaScript gives in the page."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self):
        return base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self):
        self("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        return base64.b64decode(self("Page.printToPDF", preferCSSPageSize=True)["data"])

    def _next(self):
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            assert time.monotonic() < deadline, "the browser does not answer"
            chunk = os.read(self._in, 2**20)
            assert chunk, "the browser has gone"
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message["method"])
            if message["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.told.append(message["params"])
            if message["method"] == "Network.requestWillBeSent":
                self.told += (
                    [url] if not (url := message["params"]["request"]["url"]).startswith(("file:", "data:")) else []
                )
        return message
