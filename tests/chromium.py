"""A real browser for tests: shows a page in a frame of a given width and runs a script against it.

The page and the frame around it come from one server on this machine, so that the script may look into the page, whose own policy
stays as it is. What the script returns is posted back; what the browser's console says is collected.
"""

import functools
import http.server
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_PATIENCE_S = 120
_FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="view" style="border:0;width:WIDTHpx;height:900px"></iframe><script>
const frame = document.getElementById("view");
const wait = (condition, patience = 30000) => new Promise((done) => {
  const started = Date.now();
  const timer = setInterval(() => {
    if (condition() || Date.now() - started > patience) { clearInterval(timer); done(); }
  }, 50);
});
frame.onload = async () => {
  let told;
  try { told = await (async (view, page) => { SCRIPT })(frame.contentWindow, frame.contentDocument); }
  catch (error) { told = { failed: String(error) }; }
  await fetch("/told", { method: "POST", body: JSON.stringify(told) });
};
frame.src = "/PAGE";
</script></body>"""


@dataclass(frozen=True)
class Shown:
    """What came of a page: the script's result, and every line that the browser wrote to the console."""

    told: Any
    console: list[str]


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args, frame: str, answers: "queue.Queue[Any]", **kwargs) -> None:
        self.frame, self.answers = frame, answers
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        if self.path != "/frame":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.frame.encode())
        return None

    def do_POST(self) -> None:
        self.answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def show(page: Path, script: str, *, width_px: int, profile: Path) -> Shown:
    """Opens ``page`` at a width and awaits ``script``, which sees its window as ``view`` and its document as ``page``.

    Args:
        profile: an empty folder for the browser's own files.
    """
    assert CHROMIUM is not None
    answers: queue.Queue[Any] = queue.Queue()
    frame = _FRAME.replace("WIDTH", str(width_px)).replace("SCRIPT", script).replace("PAGE", page.name)
    handler = functools.partial(_Handler, directory=str(page.parent), frame=frame, answers=answers)
    log = profile / "browser.log"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, log.open("wb") as stderr:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--autoplay-policy=no-user-gesture-required"]
        flags += [f"--user-data-dir={profile}", "--window-size=1400,1000", "--enable-logging=stderr", "--log-level=0"]
        address = f"http://127.0.0.1:{server.server_address[1]}/frame"
        home = os.environ | {"HOME": str(profile)}
        browser = subprocess.Popen(
            [CHROMIUM, *flags, address], stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True, env=home
        )
        try:
            told = answers.get(timeout=_PATIENCE_S)
        finally:
            os.killpg(browser.pid, signal.SIGTERM)
            browser.wait(30)
            server.shutdown()
    lines = log.read_text(errors="replace").splitlines()
    return Shown(told, [line for line in lines if re.search(r"\bCONSOLE\b", line)])
