"The kept tables and figures are what the kept records give, without any data and without a run."

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import fisher_unlearn
from fisher_unlearn.cli import app
from verdicts import verdicts

FIGURES = Path(fisher_unlearn.__file__).parent.parent / "figures"
NAMES = sorted(
    str(path.relative_to(FIGURES).with_suffix("")) for path in FIGURES.glob("*/*.parquet")
)


def command(*words):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


def asked_seed(settings):
    "The seed that an experiment was asked for: a floor adds networks of others on its images."
    drawn_by = settings.get("data_seed")
    return settings["seed"] if drawn_by is None else drawn_by


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_kept_records_give_the_kept_table(name, tmp_path):
    profile, experiment = name.split("/")
    rows = pd.read_parquet(FIGURES / f"{name}.parquet")
    seeds = sorted({asked_seed(json.loads(text)) for text in rows.settings})
    command("restore", str(FIGURES / f"{name}.parquet"), "--runs", str(tmp_path / "runs"))
    command(
        experiment,
        "--profile",
        profile,
        "--set",
        f"seeds={seeds}",
        "--on",
        "none",
        "--runs",
        str(tmp_path / "runs"),
        "--figures",
        str(tmp_path),
    )
    assert set(pd.read_parquet(tmp_path / f"{name}.parquet").key) == set(rows.key)
    again, kept = (pd.read_csv(place / f"{name}.csv") for place in (tmp_path, FIGURES))
    pd.testing.assert_frame_equal(
        again[kept.columns], kept, rtol=1e-9
    )  # an older one may lack a column


@pytest.mark.slow
def test_a_run_that_is_not_done_is_named_as_missing_and_not_as_failed(tmp_path):
    command("restore", str(FIGURES / "cpu" / "table1.parquet"), "--runs", str(tmp_path / "runs"))
    command(
        "table1",
        "--profile",
        "cpu",
        "--set",
        "seeds=[666, 888]",
        "--on",
        "none",
        "--runs",
        str(tmp_path / "runs"),
        "--figures",
        str(tmp_path),
    )
    text = (tmp_path / "cpu" / "table1.md").read_text(encoding="utf-8")
    assert (
        "* missing: cifar10 resnet20 888: fisher_mask, paper, R 0.02\n" in text
        and "* missing: cifar10 resnet20 666" not in text
        and "failed" not in text
    )


@pytest.mark.slow
def test_a_missing_run_is_no_evidence(tmp_path):
    command("restore", str(FIGURES / "cpu" / "figure1.parquet"), "--runs", str(tmp_path / "runs"))
    command(
        "figure1",
        "--profile",
        "cpu",
        "--set",
        "seeds=[666]",
        "--set",
        "lissa_scale=20",
        "--on",
        "none",
        "--runs",
        str(tmp_path / "runs"),
        "--figures",
        str(tmp_path),
    )
    text = (tmp_path / "cpu" / "figure1.md").read_text(encoding="utf-8")
    rows = verdicts(text)
    without = [
        row["claim"]
        for row in rows
        if row["here"] == "A run that it needs is missing." and row["says"] == "numbers missing"
    ]
    assert (
        "3 of 5 runs are done." in text
        and "nan" not in text
        and len(rows) == 7
        and len(without) == 4
        and all("influence function" in claim for claim in without)
    )


@pytest.mark.slow
def test_what_was_read_out_of_a_run_with_kept_weights_is_put_back_without_its_record(tmp_path):
    "Its record lies with its weights, and older ones lack their digest."
    kept, root = (
        FIGURES / "paper_bfloat16" / "what_the_mask_removes.parquet",
        FIGURES.parent / "data",
    )
    command("restore", str(kept), "--runs", str(tmp_path), "--root", str(root))
    rows = pd.read_parquet(kept)
    (fresh,) = [k for k, s in zip(rows.key, rows.settings) if json.loads(s)["method"] == "retrain"]
    assert (root / "checkpoints" / f"{fresh}.json").exists()
    there = {path.name for path in (tmp_path / fresh).glob("*.json")}
    assert "relearn_classifier_100.json" in there and "record.json" not in there


@pytest.mark.slow
@pytest.mark.parametrize("name", ["proposition1", "table7"])
def test_what_needs_no_training_is_executed_again_and_is_as_kept(name, tmp_path):
    command(name, "--figures", str(tmp_path))
    tables = sorted((FIGURES / "quick").glob(f"{name}*.csv"))
    assert tables
    for kept in tables:
        again = pd.read_csv(tmp_path / "quick" / kept.name)
        pd.testing.assert_frame_equal(again, pd.read_csv(kept), rtol=1e-4)
