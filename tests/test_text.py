"Text is read and written as UTF-8, whatever the machine's language settings say."

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fisher_unlearn

ROOT = Path(fisher_unlearn.__file__).parent.parent
SOURCES = [
    *ROOT.glob("nbs/**/*.ipynb"),
    *ROOT.glob("fisher_unlearn/**/*.py"),
]


def code(path):
    "The code of a notebook or module, cell by cell."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [text]
    cells = json.loads(text)["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def name_of(call):
    return getattr(call.func, "attr", getattr(call.func, "id", None))


def binary(call):
    "Does it open a file for bytes?"
    given = [*call.args, *(k.value for k in call.keywords)]
    modes = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return any(set(mode) <= set("rwxab+") and "b" in mode for mode in modes)


def of_bytes(call):
    "os.open and Pillow's Image.open, which read no text."
    return isinstance(call.func, ast.Attribute) and (
        getattr(call.func.value, "id", None) in ("os", "Image")
    )


def unnamed(source):
    "Calls that read or write text, and leave its encoding to the machine."
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        given = {keyword.arg for keyword in call.keywords}
        text = name_of(call) in ("read_text", "write_text")
        opened = name_of(call) == "open" and not binary(call) and not of_bytes(call)
        piped = given & {"text", "universal_newlines"}
        if (text or opened or piped) and "encoding" not in given:
            yield ast.unparse(call)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_whoever_reads_or_writes_text_says_how(path):
    assert not [call for source in code(path) for call in unnamed(source)]


def test_calls_that_do_not_say_how_are_found():
    bad = "p.read_text(); p.write_text('x'); open(p); p.open('w'); subprocess.run(['a'], text=True)"
    good = (
        "p.read_text(encoding='utf-8'); open(p, 'rb'); p.open(mode='wb'); os.open(p, os.O_RDONLY); "
        "Image.open(p)"
    )
    assert len(list(unnamed(bad))) == 5 and not list(unnamed(good))


PLAIN = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
USED = """
import sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="fisher_unlearn")
from pathlib import Path
import fisher_unlearn.cli, fisher_unlearn.lab.report
from fisher_unlearn.images.data import load_images
from fisher_unlearn.lab.store import read_record
from fisher_unlearn.lab.settings import resolve
from fisher_unlearn.lab.paper import paper_numbers
from fisher_unlearn.lab.report import read_kept
from fisher_unlearn.lab.run import run
chosen = resolve("quick", method="mask_classifier", subset=64, epochs=1, fine_tune_epochs=0)
done = run(chosen, Path(sys.argv[1]), progress="none")
assert read_record(Path(sys.argv[1]) / done["key"] / "record.json")["key"] == done["key"]
assert len(paper_numbers()) and sys.getfilesystemencoding() != "utf-8"
print("done")
"""


def test_a_machine_without_utf8_imports_runs_and_reads(tmp_path):
    words = [sys.executable, "-X", "warn_default_encoding", "-c", USED, str(tmp_path)]
    done = subprocess.run(words, env=os.environ | PLAIN, capture_output=True, encoding="utf-8")
    assert done.stdout.endswith("done\n"), done.stderr
