"""The notebooks of tables and figures when some of their runs are missing: they show what there
is, or say in one sentence what they need; with nothing, too."""

import json
import shutil
from pathlib import Path

import matplotlib
import nbformat
import pandas as pd
import pytest

import fisher_unlearn
from fisher_unlearn.lab.notebook import notebooks
from fisher_unlearn.lab.report import restore

FIGURES = Path(fisher_unlearn.__file__).parent.parent / "figures"
NAMES = sorted(path.stem for path in (FIGURES / "cpu").glob("*.parquet"))


def executed(name, **given):
    "The namespace of a notebook whose cells were executed in this process."
    matplotlib.use("Agg")
    cells = [
        cell.source
        for cell in nbformat.read(notebooks()[name], 4).cells
        if cell.cell_type == "code"
    ]
    space = {"In": [""], "__name__": "__main__"}
    exec(cells[0], space)
    space.update(given)
    for source in cells[1:]:
        exec(source, space)
    return space


@pytest.fixture(scope="module", params=NAMES)
def restored(request, tmp_path_factory):
    "The name of an experiment, the folder of its finished runs, and its seeds."
    folder = tmp_path_factory.mktemp(request.param)
    restore(FIGURES / "cpu" / f"{request.param}.parquet", folder / "runs", folder / "data")
    rows = pd.read_parquet(FIGURES / "cpu" / f"{request.param}.parquet")
    return request.param, folder, sorted({json.loads(text)["seed"] for text in rows.settings})


def without(folder, place, *methods):
    "A copy of a folder of runs without those of some methods."
    for path in (folder / "runs").glob("*/record.json"):
        if json.loads(path.read_text(encoding="utf-8"))["settings"].get("method") not in methods:
            shutil.copytree(path.parent, place / path.parent.name)


@pytest.mark.slow
@pytest.mark.parametrize("methods", [("retrain", "mask_classifier"), ("finetune",)], ids="-".join)
def test_missing_runs_leave_the_rest_or_one_sentence(restored, methods, tmp_path):
    name, folder, seeds = restored
    without(folder, tmp_path / "runs", *methods)
    given = dict(
        profile="cpu",
        seeds=seeds,
        on="none",
        runs=str(tmp_path / "runs"),
        root=str(folder / "data"),
        figures=str(tmp_path / "figures"),
    )
    try:
        executed(name, **given)
    except ValueError as error:
        assert "do them first" in str(error) and "\n" not in str(error), error
    else:
        assert (tmp_path / "figures/cpu" / f"{name}.md").stat().st_size > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nothing_at_all_is_said_in_one_sentence(name, tmp_path):
    given = dict(
        profile="cpu",
        seeds=[666],
        on="none",
        runs=str(tmp_path / "runs"),
        root=str(tmp_path / "data"),
        figures=str(tmp_path / "figures"),
    )
    with pytest.raises(
        ValueError, match="^none of the .* runs that this is made from is done: do them first"
    ) as said:
        executed(name, **given)
    assert "\n" not in str(said.value) and not (tmp_path / "runs").exists()
