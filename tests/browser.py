"""A headless Chromium, driven through the pipe of its DevTools: enough to fill in a page and see what it says."""

import itertools
import json
import os
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def find_browser() -> str | None:
    """What CHROME names, or a Chromium on the path."""
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page; `requests` are the addresses that were asked for, `problems` what its console says is wrong."""

    def __init__(self, program: str, profile: str):
        theirs, self.to = os.pipe()
        self.back, back = os.pipe()

        def connect() -> None:
            """Chromium reads from 3 and writes to 4."""
            copies = [os.dup(end) for end in (theirs, back)]
            for copy, number in zip(copies, (3, 4), strict=True):
                os.dup2(copy, number)

        self.process = subprocess.Popen(
            [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=connect,
        )
        os.close(theirs)
        os.close(back)
        self.numbers, self.buffer, self.session = itertools.count(1), b"", None
        self.requests: list[str] = []
        self.problems: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)

    def send(self, method: str, **parameters: object) -> dict:
        """A command and its answer; events that come before are noted."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (found := self._receive()).get("id") != number:
            self._note(found)
        assert "error" not in found, found["error"]
        return found["result"]

    def _receive(self) -> dict:
        while b"\0" not in self.buffer:
            part = os.read(self.back, 2**16)
            assert part, "the browser has gone"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict) -> None:
        found = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(found["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.problems.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")

    def ask(self, script: str) -> object:
        """The value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> object:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.ask(script)):
            assert time.monotonic() < end, f"{script} stayed {value!r}; the page says {self.ask(TEXT)!r}"
            time.sleep(0.1)
        return value

    def fill(self, selector: str, text: str) -> None:
        """Put a text into a field in place of what is there."""
        self.ask(f"(field => {{field.focus(); field.select()}})(document.querySelector({json.dumps(selector)}))")
        self.send("Input.insertText", text=text)


TEXT = "document.body.innerText"
