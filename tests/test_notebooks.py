"""The notebooks themselves: their structure, their order, and that the executed quickstart says
what its records say."""

import ast
import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from PIL import Image
from typer.testing import CliRunner

import fisher_unlearn
from fisher_unlearn.cli import app
from fisher_unlearn.lab.notebook import _with_palette, find_notebook
from fisher_unlearn.lab.deletion_order import order_types
from fisher_unlearn.lab.settings import parameter_names, resolve, run_key

import copies

ROOT = Path(fisher_unlearn.__file__).parent.parent
CHAPTERS = [
    *sorted((ROOT / "nbs").glob("[0-9]*/[0-9]*.ipynb")),
    *sorted((ROOT / "nbs").glob("[0-9]*.ipynb")),
]
EXPERIMENTS = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))
NOTEBOOKS = [*CHAPTERS, ROOT / "nbs" / "index.ipynb", *EXPERIMENTS]
by_name = {"ids": lambda path: path.stem}


def test_there_is_something_to_test():
    assert len(CHAPTERS) >= 12 and len(EXPERIMENTS) >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, **by_name)
def test_every_notebook_is_valid_small_and_names_no_place(path):
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    assert path.stat().st_size < 300_000 and len(nb.cells) <= 60
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CHAPTERS, **by_name)
def test_a_chapter_opens_with_its_question_and_closes_with_what_we_know(path):
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    assert re.match(r"# .+\n\n> .+\?", cells[0]) and "## What we now know" in {
        line for c in cells[-2:] for line in c.splitlines()
    }


def module_of(path):
    "What a chapter is exported to, such as `images.data`; those above the parts stand alone."
    parts = [re.sub(r"^\d+_", "", name) for name in (*path.parent.parts, path.stem)]
    return ".".join(parts[parts.index("nbs") + 1 :])


def source_of(path):
    "The exported code of a chapter."
    file = ROOT / "fisher_unlearn" / f"{module_of(path).replace('.', '/')}.py"
    return file.read_text(encoding="utf-8")


ORDER = [module_of(path) for path in CHAPTERS]


def imported(source, module):
    """The modules of this package that the code of one imports: in whatever form, and inside of
    functions, too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            package = ["fisher_unlearn", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    inside = {name.removeprefix("fisher_unlearn.") for name in found}
    return sorted(inside & set(ORDER))


def too_early(source, module):
    "The imports of a module that are not of rooms before it."
    return [name for name in imported(source, module) if ORDER.index(name) >= ORDER.index(module)]


@pytest.mark.parametrize("path", CHAPTERS, ids=module_of)
def test_a_room_imports_only_rooms_before_it(path):
    assert not too_early(source_of(path), module_of(path))


@pytest.mark.parametrize(
    "line",
    [
        "from fisher_unlearn.lab.run import run",
        "import fisher_unlearn.lab.run as r",
        "from fisher_unlearn.lab.run import run",
        "from ..lab.run import run",
        "from ..lab import run",
        "def f():\n    from ..lab.run import run",
        "def f():\n    import fisher_unlearn.lab.run",
    ],
)
def test_an_import_of_a_later_room_is_seen_whatever_its_form(line):
    assert too_early(line, "images.data") == ["lab.run"]
    assert not too_early("from ..images.data import digest", "lab.run")
    assert too_early("from .run import run", "lab.settings") == ["lab.run"]


def test_the_parts_are_those_of_the_book():
    parts = {name.split(".")[0]: None for name in ORDER if "." in name}
    assert list(parts) == ["images", "networks", "scores", "methods", "audit", "lab"]
    rooms = [name.rpartition(".")[2] for name in ORDER]
    assert len(set(rooms)) == len(rooms)


@pytest.mark.parametrize("path", CHAPTERS, ids=module_of)
def test_public_functions_say_what_they_do_and_take(path):
    tree = ast.parse(source_of(path))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert all(a.annotation for a in node.args.args), node.name


@pytest.mark.parametrize("path", EXPERIMENTS, **by_name)
def test_an_experiment_has_one_parameters_cell_and_only_known_names(path):
    cells = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1 and "#|" not in "".join(
        c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"
    )
    known = papermill.inspect_notebook(str(path))
    assert all(p["help"] for p in known.values())
    if path.stem == "forget_your_own":  # the names of an order, which has no profile
        assert list(known) == list(order_types())
        assert {p["default"] for p in known.values()} == {"None"}
        return
    places = {"profile", "seeds", "on", "runs", "figures", "root"}
    assert set(known) <= {*parameter_names(), *places}
    assert known["profile"]["default"] == '"quick"' and {
        p["default"] for n, p in known.items() if n != "profile"
    } == {"None"}


# Where each experiment is executed: `make notebooks` leaves them out.
EXECUTED = {
    "audit": "experiments_masks",
    "every_class": "experiments_masks",
    "the_kick": "experiments_masks",
    "costs": "experiments_tables",
    "figure1": "experiments_figures",
    "figure2": "experiments_figures",
    "figure3": "experiments_figures",
    "figure4": "experiments_figures",
    "forget_your_own": "deletion",
    "proposition1": "experiments_facts",
    "quickstart": "notebooks",
    "recommended": "experiments_masks",
    "rivals": "experiments_masks",
    "table1": "experiments_tables",
    "table2": "experiments_tables",
    "table3": "experiments_tasks",
    "table4": "experiments_tasks",
    "table5": "experiments_tasks",
    "table6": "experiments_facts",
    "table7": "experiments_facts",
    "train": "cluster",
    "unlearn": "grid",
    "what_the_mask_removes": "experiments_masks",
}


def test_every_experiment_is_executed_by_a_test():
    assert set(EXECUTED) == {path.stem for path in EXPERIMENTS}
    for name, place in EXECUTED.items():
        text = Path(__file__).with_name(f"test_{place}.py").read_text(encoding="utf-8")
        runs_notebooks = re.search(r"execute_notebook\(|\bexecute\(|\bcomplete\(|app, ", text)
        assert runs_notebooks and (f'"{name}"' in text or place in ("grid", "cluster")), name


def test_the_package_carries_its_version_and_types():
    assert (ROOT / "fisher_unlearn" / "py.typed").exists()
    text = (ROOT / "settings.ini").read_text(encoding="utf-8") + (ROOT / "CITATION.cff").read_text(
        encoding="utf-8"
    )
    assert text.count(fisher_unlearn.__version__) >= 2


QUICKSTART = ["quickstart", "--profile", "smoke", "--epochs", "3", "--fine-tune-epochs", "2"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    "The quickstart, executed by the command on the shortest profile."
    base = tmp_path_factory.mktemp("quickstart")
    places = ["--runs", str(base / "runs"), "--figures", str(base / "figures")]
    done = CliRunner().invoke(app, [*QUICKSTART, *places])
    assert done.exit_code == 0, done.output
    return base, done.output


def test_quickstart_leaves_table_figure_records_and_a_clean_notebook(quickstart):
    base, output = quickstart
    folder, stem = base / "figures" / "smoke", "quickstart_digits_resnet20"
    assert (
        all(
            (folder / f"{stem}.{kind}").stat().st_size > 0 for kind in ("csv", "md", "png", "ipynb")
        )
        and len(list((folder / "records").iterdir())) == 6
    )
    assert (
        all(f"{stem}.{kind}" in output for kind in ("csv", "png", "ipynb"))
        and "| Retrain" in output
    )
    nb = nbformat.read(folder / f"{stem}.ipynb", 4)
    drawn = [
        part.data["image/png"]
        for c in nb.cells
        for part in c.get("outputs", [])
        if "image/png" in part.get("data", {})
    ]
    assert drawn and all(picture(text).mode == "P" for text in drawn)
    assert nb.metadata.papermill.exception is None and not list(folder.glob("*.partial.*"))
    assert (
        nb.metadata.papermill.input_path == "quickstart.ipynb"
        and (folder / f"{stem}.ipynb").stat().st_size < 300_000
    )


def picture(text):
    "A PNG in base64, opened."
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_drawing_with_a_palette_is_smaller_and_looks_the_same():
    figure, axis = plt.subplots(figsize=(6, 4))
    points = np.random.default_rng(0).random((400, 2))
    axis.scatter(*points.T, c=points[:, 0], label="some")
    axis.legend()
    held = io.BytesIO()
    figure.savefig(held, format="png")
    plt.close(figure)
    before = base64.b64encode(held.getvalue()).decode()
    after = _with_palette(before)
    one, other = (np.asarray(picture(t).convert("RGB"), dtype=int) for t in (before, after))
    assert len(after) < len(before) / 2 and np.abs(one - other).mean() < 1
    assert _with_palette(after) == after
    for broken in ("", "no base64!", base64.b64encode(b"no picture").decode(), before[:200]):
        assert _with_palette(broken) == broken


def test_quickstarts_table_says_what_its_records_say(quickstart):
    folder = quickstart[0] / "figures" / "smoke"
    table = pd.read_csv(folder / "quickstart_digits_resnet20.csv", index_col="method")
    records = [
        json.loads(p.read_text(encoding="utf-8")) for p in (folder / "records").glob("[!t]*.json")
    ]
    named = {(r["settings"]["method"], r["settings"]["preset"]): r["history"] for r in records}
    for row, case in {
        "Finetune": ("finetune", "paper"),
        "FisherMask (authors_code)": ("fisher_mask", "authors_code"),
    }.items():
        history = named[case]
        scores = [h["remain_acc"] / (1 + h["forget_acc"] / 100) for h in history]
        best = max(range(1, len(history)), key=lambda e: (scores[e], -e))
        wanted = [
            history[0]["remain_acc"],
            history[0]["forget_acc"],
            history[best]["forget_acc"],
            scores[best],
            best,
            history[-1]["remain_acc"],
        ]
        assert table.loc[
            row,
            [
                "remain before",
                "forget before",
                "forget best",
                "score best",
                "epoch best",
                "remain last",
            ],
        ].tolist() == pytest.approx(wanted, abs=1e-3)
    retrain = max(named["retrain", "paper"][1:], key=lambda h: h["accuracy"])
    assert table.loc["Retrain", "remain best"] == pytest.approx(retrain["remain_acc"], abs=1e-3)


def test_a_second_start_reads_the_records(quickstart):
    base, _ = quickstart
    stamps = {p: p.stat().st_mtime_ns for p in (base / "runs").rglob("record.json")}
    places = ["--runs", str(base / "runs"), "--figures", str(base / "figures")]
    done = CliRunner().invoke(app, [*QUICKSTART, *places])
    assert done.exit_code == 0 and stamps == {
        p: p.stat().st_mtime_ns for p in (base / "runs").rglob("record.json")
    }


def test_a_notebook_that_fails_ends_in_one_line_and_is_kept_apart(tmp_path):
    "A damaged record stops the first run inside the notebook."
    damaged = tmp_path / "runs" / run_key(resolve("quick", method="retrain")) / "record.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{", encoding="utf-8")
    done = CliRunner().invoke(
        app,
        ["quickstart", "--runs", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")],
    )
    last = done.output.strip().splitlines()[-1]
    assert (
        done.exit_code == 2
        and last.startswith("fisher-unlearn: ")
        and "is not a record" in last
        and "Traceback" not in done.output
    )
    assert [p.name for p in (tmp_path / "figures").rglob("*") if p.is_file()] == [
        "quickstart_digits_resnet20.partial.ipynb"
    ]


def test_a_notebook_that_is_not_there_is_said():
    with pytest.raises(FileNotFoundError, match="neither in the package"):
        find_notebook("none")


@pytest.mark.slow
def test_a_wheel_runs_the_quickstart_outside_a_checkout(tmp_path):
    """The wheel is unpacked and put before the checkout on the path: notebooks and profiles must
    come with it."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(tmp_path / "site"),
            str(wheel),
        ],
        check=True,
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import "
        "fisher_unlearn; from fisher_unlearn.cli import app; assert 'site' in "
        "fisher_unlearn.__file__; app()"
    )
    env = {
        "PYTHONPATH": str(tmp_path / "site"),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    for command in ("quickstart", "table1"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--profile", "smoke"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=env,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "figures" / "smoke" / "quickstart_digits_resnet20.ipynb").exists()
    assert (tmp_path / "runs").is_dir()
    table = (tmp_path / "figures" / "smoke" / "table1.md").read_text(encoding="utf-8")
    assert "FisherMask" in table


def test_modules_name_each_other_relatively():
    "nbdev does this for imports of one line only."
    found = [
        f"{path.name}: {line}"
        for path in Path(fisher_unlearn.__file__).parent.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"(from|import) fisher_unlearn\b", line) and path.name not in ("_modidx.py",)
    ]
    # the version, which stands in the package itself
    assert [line for line in found if "import fisher_unlearn" not in line] == []


def test_executed_copies_are_of_todays_notebooks():
    "The same check is a part of `make sync`."
    assert not copies.stale(ROOT / "figures", ROOT / "nbs" / "experiments")


def test_a_copy_that_is_out_of_step_or_too_large_is_named(tmp_path):
    notebooks = ROOT / "nbs" / "experiments"
    (tmp_path / "quick").mkdir()
    copy = tmp_path / "quick" / "quickstart_digits_resnet20.ipynb"
    assert copies.original(copy, notebooks).stem == "quickstart"
    whole = nbformat.read(notebooks / "quickstart.ipynb", 4)
    given = nbformat.v4.new_code_cell("seed = 1", metadata={"tags": [copies.GIVEN]})
    whole.cells.insert(2, given)
    nbformat.write(whole, copy)
    assert copies.stale(tmp_path, notebooks) == []
    whole.cells[0].source += " changed"
    nbformat.write(whole, copy)
    (line,) = copies.stale(tmp_path, notebooks)
    assert "not that of today's notebook" in line and str(tmp_path) not in line
    whole.cells[-1].source = "x" * copies.MOST
    nbformat.write(whole, copy)
    assert len(copies.stale(tmp_path, notebooks)) == 2
