"""Chapters run from top to bottom in JupyterLab: by its server and kernels, over the socket that
its pages use; and in a browser, where there is one."""

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from urllib.request import Request, urlopen

import nbformat
import pytest
import websocket

import fisher_unlearn

ROOT = Path(fisher_unlearn.__file__).parent.parent
CHAPTERS = ("1_images/02_data", "2_networks/05_schedule", "4_methods/00_masking")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
OUTPUTS = ("stream", "display_data", "execute_result", "error")
TOKEN = "of-this-test"
PATIENCE = 120  # seconds that anything may take on a busy machine
pytestmark = pytest.mark.slow


def waited(found, what):
    "What a function finds in the end."
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.2)
    raise TimeoutError(f"{what} did not come within {PATIENCE} s")


def started(words, **more):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, words)), **quiet, **more)


def ended(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Lab:
    "A JupyterLab of our own, whose notebooks are copies."

    def __init__(self, folder):
        shutil.copytree(ROOT / "nbs", folder / "nbs")
        own = {f"JUPYTER_{what}_DIR": folder / what for what in ("RUNTIME", "CONFIG", "DATA")}
        own |= {f"FISHER_UNLEARN_{what}": folder / what for what in ("RUNS", "FIGURES")}
        words = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
        words += ["--ServerApp.port=0", f"--IdentityProvider.token={TOKEN}"]
        words += [f"--ServerApp.root_dir={folder}", "--expose-app-in-browser"]
        environment = os.environ | {name: str(place) for name, place in own.items()}
        self.process = started(words, cwd=folder, env=environment)
        self.runtime = folder / "RUNTIME"
        self.address = waited(self._address, "JupyterLab")

    def _address(self):
        assert self.process.poll() is None, "JupyterLab has ended"
        for path in self.runtime.glob("jpserver-*.json"):
            return json.loads(path.read_text(encoding="utf-8"))["url"]

    def ask(self, path, body=None):
        "An answer of the server's; what has a body is posted."
        data = json.dumps(body).encode() if body else None
        head = {"Authorization": f"token {TOKEN}", "Content-Type": "application/json"}
        with urlopen(Request(self.address + path, data, head), timeout=PATIENCE) as answer:
            return json.load(answer)

    def session(self, path):
        "A kernel for a notebook, as its page asks for one."
        kernel = {"path": path, "name": path, "type": "notebook", "kernel": {"name": "python3"}}
        number = self.ask("api/sessions", kernel)["kernel"]["id"]
        place = self.address.replace("http", "ws", 1) + f"api/kernels/{number}/channels"
        return websocket.create_connection(f"{place}?token={TOKEN}", timeout=PATIENCE)


def executed(socket, source):
    "The outputs of a cell, as a kernel sends them."
    number = uuid.uuid4().hex
    header = {"msg_id": number, "msg_type": "execute_request", "version": "5.3"}
    header |= {"session": "test", "username": "", "date": ""}
    content = {"code": source, "silent": False, "allow_stdin": False}
    asked = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
    socket.send(json.dumps(asked | {"channel": "shell"}))
    outputs = []
    while True:
        message = json.loads(socket.recv())
        if message["parent_header"].get("msg_id") != number:
            continue
        if message["msg_type"] in OUTPUTS:
            outputs.append(nbformat.v4.output_from_msg(message))
        if message["content"].get("execution_state") == "idle":
            return outputs


def kinds(outputs):
    "What came out of a cell: text, tables, pictures."
    return {kind for one in outputs for kind in one.get("data", [one["output_type"]])}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    ended(lab.process)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_runs_in_jupyterlab_and_its_pictures_arrive(lab, chapter):
    content = lab.ask(f"api/contents/nbs/{chapter}.ipynb")["content"]
    socket = lab.session(f"nbs/{chapter}.ipynb")
    pictures = 0
    for cell in (cell for cell in content["cells"] if cell["cell_type"] == "code"):
        outputs = executed(socket, cell["source"])
        assert kinds(outputs) == kinds(cell["outputs"]), (cell["source"], outputs)
        pictures += "image/png" in kinds(outputs)
    socket.close()
    assert pictures


class Page:
    "A page of a browser, told what to do over the browser's own socket."

    def __init__(self, folder, address):
        words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"]
        words += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
        self.process = started(words)
        port = waited(lambda: self._port(folder), "the browser")
        page = waited(lambda: self._page(port), "a page of the browser")
        self.socket = websocket.create_connection(page, timeout=PATIENCE, suppress_origin=True)
        self.tell("Page.navigate", url=address)

    def _port(self, folder):
        path = folder / "DevToolsActivePort"
        return path.exists() and path.read_text(encoding="utf-8").split("\n")[0]

    def _page(self, port):
        with urlopen(f"http://127.0.0.1:{port}/json", timeout=PATIENCE) as answer:
            pages = [one for one in json.load(answer) if one["type"] == "page"]
        return pages and pages[0]["webSocketDebuggerUrl"]

    def tell(self, method, **parameters):
        self.socket.send(json.dumps({"id": 1, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == 1:
                return answer["result"]

    def value(self, script):
        "What a script gives; None while it can't be run yet."
        how = {"awaitPromise": True, "returnByValue": True}
        return self.tell("Runtime.evaluate", expression=script, **how)["result"].get("value")


@pytest.fixture
def page(lab, tmp_path):
    page = Page(tmp_path, f"{lab.address}lab/tree/nbs/{CHAPTERS[1]}.ipynb?token={TOKEN}")
    yield page
    ended(page.process)


NOTEBOOK = "jupyterapp.shell.currentWidget"
READY = f"{NOTEBOOK}.content.model.cells.length && {NOTEBOOK}.sessionContext.session.kernel.status"
RUN = "jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)"
CELLS = f"JSON.stringify({NOTEBOOK}.content.model.sharedModel.toJSON().cells)"
SHOWN = "[...document.querySelectorAll('.jp-OutputArea-output img')].some(i => i.naturalWidth)"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH, and none in $CHROMIUM")
def test_a_chapter_runs_in_a_browser_and_shows_its_picture(page):
    waited(lambda: page.value(READY) == "idle", "the notebook with its kernel")
    page.value("jupyterapp.commands.execute('editmenu:clear-all')")
    assert "image/png" not in page.value(CELLS)
    assert page.value(RUN)
    cells = json.loads(page.value(CELLS))
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    came = [kinds(cell.get("outputs", [])) for cell in cells]
    assert not any("error" in kind for kind in came)
    place = next(place for place, kind in enumerate(came) if "image/png" in kind)
    page.value(f"{NOTEBOOK}.content.scrollToItem({place})")
    waited(lambda: page.value(SHOWN), "the picture")
