"""Which runs, which of them are done, and who does the rest: killed, failed, shared between
processes, in notebooks."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

from fisher_unlearn.cli import app
from fisher_unlearn.lab.executors import at_hand, complete, reading
from fisher_unlearn.lab.experiments import once
from fisher_unlearn.lab.experiments import NEEDS, cast, needed
from fisher_unlearn.lab.plans import plan
from fisher_unlearn.lab.experiments import sweep
from fisher_unlearn.lab.notebook import parameters
from fisher_unlearn.lab.plans import as_done, label, state
from fisher_unlearn.lab.notebook import notebooks
from fisher_unlearn.lab.settings import RunSettings, profiles, resolve, run_key, training_key
from fisher_unlearn.lab.store import read_record, write_record
from fisher_unlearn.lab.report import restore
from fisher_unlearn.images.atomic import locked
from fisher_unlearn.lab.run import READOUTS, readout, run, with_readouts
from fisher_unlearn.lab.report import keep
from fisher_unlearn.lab.store import keep_run
from fisher_unlearn.networks.train import read_tensors
from made import listed, run_record

SHORT = {"subset": 200, "epochs": 2, "fine_tune_epochs": 1, "device": "cpu"}


def few(*methods, **more):
    return sweep(
        "quick", cast(*(methods or ("finetune", "mask_classifier", "random_mask"))), **SHORT | more
    )


def timeless(record):
    """A record without what depends on the clock, the machine's load and the commit, and its
    digest, which covers them."""
    return {
        k: [{c: x for c, x in row.items() if c != "seconds"} for row in v] if k == "history" else v
        for k, v in record.items()
        if k not in ("seconds", "spared", "memory", "provenance", "digest")
    }


def test_a_sweep_is_a_product_without_repetitions():
    found = sweep(
        "quick",
        [{"seed": s} for s in (1, 2)],
        cast("finetune", "tfidf"),
        [{"ratio": r} for r in (0.1, 0.2)],
        device="cpu",
    )
    wanted = [
        (s, m, p, r if m == "tfidf" else 0)
        for s in (1, 2)
        for m, p in (("finetune", "paper"), ("tfidf", "paper"), ("tfidf", "authors_code"))
        for r in (0.1, 0.2)
        if m == "tfidf" or r == 0.1
    ]
    assert sorted(
        (s.seed, s.method.name, s.preset, getattr(s.method, "ratio", 0)) for s in found
    ) == sorted(wanted)


def test_a_profile_may_shorten_some_experiments_further():
    def sizes(*asked, **given):
        return {
            (s.data.dataset, s.data.subset, s.train.epochs, s.train.schedule.drops)
            for s in needed(*asked, device="cpu", **given)
        }

    for name in ("table3", "table4", "figure2", "figure3", "figure4"):
        assert sizes(name, "cpu") == {("cifar10", 10_000, 24, (12, 18))}
        assert sizes(name, "paper") == {("cifar10", None, 160, (80, 120))}
    assert sizes("figure1", "cpu") == {("cifar10", 10_000, 24, (12, 18))} and sizes(
        "figure1", "paper"
    ) == {("cifar100", None, 160, (80, 120))}
    assert sizes("table1", "cpu") == {("cifar10", None, 16, (8, 12))}
    assert sizes("figure4", "cpu", epochs=4) == {("cifar10", 10_000, 4, (2, 3))} and sizes(
        "figure4", "cpu", dataset="mnist"
    ) == {("mnist", None, 3, ())}


def test_the_papers_tables_need_the_papers_runs():
    """16 pairs of data set and network, three seeds, retraining and all methods in both presets,
    where they differ."""
    wanted = needed("table1", "paper", device="cpu")
    assert len(wanted) == 16 * 3 * (3 + 2 * 5) and {s.seed for s in wanted} == {666, 777, 888}
    assert {(s.data.dataset, s.network) for s in wanted} == {
        (d, n if n != "resnet" else {"cifar10": "resnet20", "mnist": "resnet20"}.get(d, "resnet50"))
        for d in ("mnist", "cifar10", "cifar100", "tinyimagenet")
        for n in ("resnet", "vgg16", "googlenet", "densenet")
    }
    assert {getattr(s.method, "ratio", None) for s in needed("table3", "paper", device="cpu")} == {
        None,
        0.15,
        0.2,
        0.25,
    } and all(
        s.request.count == 200 and s.request.patch_size == 4
        for s in needed("table3", "paper", device="cpu")
    )
    assert {s.request.mislabel_ratio for s in needed("table4", "paper", device="cpu")} == {
        0.1,
        0.3,
        0.5,
    }
    assert {
        (s.request.remain_limit, s.tuning.fine_tune_epochs)
        for s in needed("table5", "paper", device="cpu")
    } == {(0, 0), (50, 5), (None, 5)}
    one = needed("figure1", "paper", device="cpu")
    assert (
        {(s.data.dataset, s.network) for s in one} == {("cifar100", "resnet50")}
        and {s.tuning.fine_tune_length for s in one} == {30, None}
        and {s.tuning.fine_tune_lr for s in needed("figure3", "paper", device="cpu")}
        == {None, 0.1, 0.01, 0.001}
    )
    assert (
        needed("table2", "quick", device="cpu") == needed("table1", "quick", device="cpu")[1:]
        and len(needed("table1", "quick", seeds=[1, 2], device="cpu")) == 26
    )


@pytest.mark.parametrize("profile", profiles())
def test_every_needed_run_can_be_passed_to_a_notebook(profile):
    "Of one seed, and each once."
    wanted = once(s for name in NEEDS for s in needed(name, profile, seeds=[666], device="cpu"))
    for s in wanted:
        assert run_key(resolve(**parameters(s))) == run_key(s), label(s)


@pytest.mark.parametrize("name", NEEDS)
def test_no_two_runs_of_an_experiment_are_told_by_the_same_words(name):
    told = [label(settings) for settings in needed(name, "interpolating")]
    assert len({*told}) == len(told)


def test_the_words_for_a_run_name_what_is_unusual_in_its_request():
    asked = {
        "": {},
        "class 3": {"classes": [3]},
        "class 3, 7": {"classes": [7, 3]},
        "3 samples": {"request": "samples", "samples": [5, 1, 9]},
        "random 500": {"request": "random", "count": 500},
    }
    for words, request in asked.items():
        told = label(resolve("interpolating", method="finetune", **request))
        assert told == "cifar10 resnet20 666: finetune" + f", {words}" * bool(words)


def test_a_run_that_no_profile_has_can_be_passed_and_what_no_parameter_says_is_said():
    odd = RunSettings.of(dataset="mnist", subset=7, network="densenet", train={"batch_size": 3})
    assert run_key(resolve(**parameters(odd))) == run_key(odd)
    longer = RunSettings.of(train={"epochs": 3, "schedule": {"epochs": 2, "drops": []}})
    with pytest.raises(ValueError, match="no parameters say all of digits resnet20 666"):
        parameters(longer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("grid")


def test_the_rest_is_done_and_nothing_twice(folder):
    wanted = few()
    assert [state(folder / run_key(s)) for s in wanted] == [("missing", "")] * 4
    records = complete(wanted, folder)
    assert [r["key"] for r in records] == [run_key(s) for s in wanted] and [
        state(folder / run_key(s))[0] for s in wanted
    ] == ["done"] * 4
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*.json")}
    assert complete(wanted, folder) == records and stamps == {
        p: p.stat().st_mtime_ns for p in folder.rglob("*.json")
    }
    assert len(list(folder.glob("train-*"))) == 1 and all(
        r["memory"]["host"] > 100 for r in records
    )
    more = [*few("finetune", seed=1), *few("fisher_mask")]
    table = plan([*wanted, *more], folder)
    assert table.what.str.endswith("w*").tolist() == [True] * 2 + [False] * 7
    states = ["done", "missing", *["done"] * 4, *["missing"] * 3]
    assert table.state.tolist() == states and table.what[0] == "digits resnet20 666: w*"
    assert table.seconds.isna().tolist() == [False] * 7 + [True] * 2  # nobody ran a FisherMask
    assert table.seconds[6] == pytest.approx(plan(more[:1], folder).seconds.iloc[-1])


def test_a_plan_knows_what_is_kept_beside_the_data(folder, tmp_path):
    """It is neither missing nor costs anything, and is what pace is told from in an empty folder
    of runs; a folder that another process holds is running all the same."""
    wanted, root, empty = few("finetune"), tmp_path / "data", tmp_path / "runs"
    assert (
        plan(wanted, empty, root).state.tolist() == ["missing"] * 2
        and plan(wanted, empty, root).seconds.isna().all()
    )
    complete(wanted, folder)
    names = [f"train-{training_key(wanted[0])}", run_key(wanted[0])]
    for name in names:
        keep_run(name, folder, root)
    table = plan([*wanted, *few("finetune", seed=91)], empty, root)
    assert table.what.str.endswith("w*").tolist() == [True, True, False, False]
    assert table.state.tolist() == ["kept", "missing", "kept", "missing"] and (
        table.seconds > 0
    ).tolist() == [False, True, False, True]
    (empty / names[1]).mkdir(parents=True)
    with locked(empty / names[1]):
        assert state(empty / names[1], root) == ("running", "")
    assert state(empty / names[1], root) == ("kept", "") and state(empty / names[1], tmp_path) == (
        "missing",
        "",
    )


def test_what_was_done_where_w_star_comes_from_is_not_done_again(tmp_path):
    wanted = needed("table1", "paper_bfloat16", [666], device="cpu")
    assert as_done(wanted, tmp_path, tmp_path) == wanted
    there = [s.but(device="cuda") for s in wanted]
    for s in there[:3]:
        (tmp_path / run_key(s)).mkdir()
        write_record(tmp_path / run_key(s) / "record.json", run_record(s))
    assert as_done(wanted, tmp_path, tmp_path) == there[:3] + wanted[3:]
    assert as_done(few("finetune"), tmp_path, tmp_path) == few(
        "finetune"
    )  # which have no other device


def test_an_epoch_of_few_images_says_nothing_about_one_of_all(tmp_path):
    every = {"subset": 1297}
    asked = [*few("finetune", remain_limit=20, **every), *few("finetune", **every)]
    few_images, all_images = complete(asked, tmp_path)
    whole, limited, others = (
        plan(few("finetune", remain_limit=limit, **every, fine_tune_epochs=2), tmp_path)
        for limit in (None, 20, 40)
    )
    seconds = [table.seconds.iloc[-1] for table in (whole, limited, others)]
    w_star = read_record(tmp_path / f"train-{training_key(asked[0])}" / "record.json")
    epochs = [
        [row["seconds"] for row in r["history"] if row["seconds"]] for r in (w_star, all_images)
    ]
    paces = [np.mean([*map(np.median, epochs)]), few_images["history"][-1]["seconds"]]
    for found, record, pace in zip(seconds, (all_images, few_images), paces):
        assert found == pytest.approx(record["seconds"]["method"] + 2 * pace)
    assert pd.isna(seconds[2])


def test_nobody_does_what_is_missing_and_what_is_done_is_read(folder, capsys):
    done, missing = few("finetune"), few("finetune", seed=91)
    found = complete([*done, *missing], folder, on="none")
    assert (
        found[0]["key"] == run_key(done[0])
        and found[1] is None
        and "left undone: 1" in capsys.readouterr().out
        and not (folder / run_key(missing[0])).exists()
    )


def test_a_failure_is_told_and_stops_no_other_run(folder, capsys):
    bad, good = sweep("quick", method="finetune", lr=1e30, **SHORT), few("mask_classifier", seed=5)
    first, second = complete([*bad, *good], folder)
    assert (
        first is None
        and second["key"] == run_key(good[0])
        and "failed: digits resnet20 666: finetune: training diverged" in capsys.readouterr().out
    )
    kind, reason = state(folder / run_key(bad[0]))
    assert kind == "failed" and reason.startswith("training diverged")
    assert read_record(folder / run_key(bad[0]) / "failure.json")["error"] == "FloatingPointError"


def test_data_that_are_not_at_hand_stop_only_their_runs(tmp_path, monkeypatch):
    """As in Table 1 where one data set is missing: its runs fail with the reason, and the others
    are done."""
    import fisher_unlearn.lab.run as module

    whole = module.load_images

    def load(name, root=None):
        if name == "mnist":
            raise FileNotFoundError("mnist is missing: put it there.")
        return whole(name, root)

    monkeypatch.setattr(module, "load_images", load)
    missing, there = (
        sweep("quick", dataset="mnist", method="finetune", **SHORT),
        few("mask_classifier"),
    )
    first, second = complete([*missing, *there], tmp_path)
    assert (
        first is None
        and second["key"] == run_key(there[0])
        and state(tmp_path / run_key(missing[0])) == ("failed", "mnist is missing: put it there.")
    )


def test_a_failure_is_forgotten_once_the_run_is_done(tmp_path, monkeypatch):
    import fisher_unlearn.lab.run as module

    chosen, whole = few("mask_classifier")[0], module._done
    monkeypatch.setattr(
        module, "_done", lambda *a: (_ for _ in ()).throw(RuntimeError("a  bad\nday"))
    )
    with pytest.raises(RuntimeError):
        run(chosen, tmp_path)
    assert state(tmp_path / run_key(chosen)) == ("failed", "a bad day")
    monkeypatch.setattr(module, "_done", whole)
    run(chosen, tmp_path, progress="none")
    assert state(tmp_path / run_key(chosen)) == ("done", "")
    assert listed(tmp_path / run_key(chosen)) == ["record.json", "weights.safetensors"]


def test_damaged_records_are_failures_with_the_remedy(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "record.json").write_text("{", encoding="utf-8")
    assert state(tmp_path / "a")[0] == "failed" and "delete it" in state(tmp_path / "a")[1]


HOLD = (
    "import sys, time; from pathlib import Path; from fisher_unlearn.images.atomic import locked\n"
    "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def test_a_lock_is_seen_by_others_and_dies_with_its_process(tmp_path):
    chosen = few("mask_classifier")[0]
    place = tmp_path / run_key(chosen)
    place.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert other.stdout.readline() == "held\n" and state(place) == ("running", "")
    with pytest.raises(BlockingIOError):
        run(chosen, tmp_path, wait=False)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    other.stdout.close()
    assert state(place) == ("missing", "")
    with locked(place):
        pass


def test_a_full_disk_ends_the_grid_in_one_sentence(folder, monkeypatch):
    import fisher_unlearn.lab.run as module

    records = {p: p.read_bytes() for p in folder.rglob("record.json")}

    def full(*args):
        raise OSError(
            "cannot write weights.safetensors (No space left on device): is the disk full?"
        )

    monkeypatch.setattr(module, "save_weights", full)
    with pytest.raises(OSError, match="is the disk full"):
        complete(few("mask_classifier", seed=11), folder)
    assert records == {p: p.read_bytes() for p in records}


def test_readouts_are_kept_beside_the_record(folder):
    chosen = few("mask_classifier")[0]
    found = {kind: readout(chosen, kind, folder, progress="none", cap=3) for kind in READOUTS}
    assert (
        0 <= found["agreement"]["forget"]["divergence"] <= 0.6932
        and found["agreement"]["remain"]["images"] == 450
    )
    again = found["relearn_all"]["epochs"]
    assert (
        len(found["relearn_all"]["losses"]) == 1 + (3 if again is None else again)
        and found["relearn_classifier"]["cap"] == 3
    )
    files = listed(folder / run_key(chosen))
    assert files == [
        "agreement.json",
        "record.json",
        "relearn_all_3.json",
        "relearn_classifier_3.json",
        "weights.safetensors",
    ]
    assert {kind: readout(chosen, kind, folder, cap=3) for kind in READOUTS} == found
    with pytest.raises(ValueError, match="unknown readout"):
        readout(chosen, "agree", folder)
    none = folder.parent / "no data"
    assert {
        kind: reading(chosen, kind, folder, none, "none", 3) for kind in READOUTS
    } == found and reading(chosen, "relearn_all", folder, none, "none", 4) is None
    with pytest.raises(ValueError, match="unknown readout"):
        reading(chosen, "agree", folder, on="none")


def test_nothing_at_hand_is_said():
    assert at_hand([None, {"key": "a"}]) == [{"key": "a"}]
    with pytest.raises(
        ValueError, match="none of the 2 runs that this is made from is done: do them first"
    ):
        at_hand([None, None])


@pytest.mark.parametrize("seeds", [666, "666", [], ["x"], [-1], [1.5], [True], [2**70]])
def test_seeds_that_are_none_are_refused(seeds):
    with pytest.raises((TypeError, ValueError), match="`seeds"):
        needed("table1", "quick", seeds)


@contextmanager
def within(seconds):
    "Whoever waits longer fails, and does not hang."

    def late(*args):
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_retrained_model_agrees_with_itself(folder):
    run(*few("retrain"), folder, progress="none")
    with within(60):
        found = readout(few("retrain")[0], "agreement", folder, progress="none")
    assert all(
        part["divergence"] == pytest.approx(0, abs=1e-7) and part["images"] > 0
        for part in (found["forget"], found["remain"])
    )


def test_influence_is_measured_after_each_pass(folder):
    record = complete(
        sweep("quick", method="influence", lissa_epochs=2, **SHORT | {"fine_tune_epochs": 0}),
        folder,
    )[0]
    assert [row["epoch"] for row in record["steps"]] == [1, 2] and record["history"][0][
        "forget_acc"
    ] == record["steps"][-1]["forget_acc"]


def test_constant_rates_and_longer_tuning(folder):
    (record,) = complete(
        sweep("quick", method="mask_classifier", fine_tune_lr=0.02, fine_tune_length=3, **SHORT),
        folder,
    )
    assert [row["lr"] for row in record["history"][1:]] == [0.02] * 3
    (record,) = complete(
        sweep(
            "quick",
            method="mask_classifier",
            fine_tune_length=3,
            **SHORT | {"epochs": 4, "fine_tune_epochs": 2},
        ),
        folder,
    )
    assert [row["lr"] for row in record["history"][1:]] == pytest.approx(
        [0.1, 0.001, 0.001]
    )  # past S, the last rate


def command(*words):
    return CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, words)


def test_plan_and_status_say_what_is_left(folder):
    words = [w for n, v in SHORT.items() for w in ("--set", f"{n}={v}")]
    done = command("plan", "figure2", *words, "--runs", str(folder))
    assert (
        done.exit_code == 0
        and "mask_classifier" in done.output
        and "done" in done.output
        and "minutes are left" in done.output
    )
    counted = command("status", "table1", *words, "--set", "lr=1e30", "--runs", str(folder))
    assert (
        counted.exit_code == 0
        and "failed: digits resnet20 666: finetune: training diverged" in counted.output
        and "1 failed" in counted.output
    )
    wrong = command("plan", "tabel1")
    assert (
        wrong.exit_code == 2
        and "did you mean 'table1'" in wrong.output
        and wrong.output.count("\n") == 1
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--set", "epoch=3"], "did you mean 'epochs'"),
        (["--profile", "fast"], "unknown profile"),
        (["--on", "inlin"], "did you mean 'inline'"),
        (["--runs", "/proc/none"], "cannot write"),
        (["--on", "ray", "--gpu-share", "2"], "above 0 and at most 1"),
    ],
)
def test_experiments_refuse_in_one_line_before_they_start(words, message, tmp_path):
    extra = [] if "--runs" in words else ["--runs", str(tmp_path / "r")]
    failed = command("table1", *words, *extra, "--figures", str(tmp_path / "f"))
    assert (
        failed.exit_code == 2
        and message in failed.output
        and failed.output.count("\n") == 1
        and not list(tmp_path.rglob("*.ipynb"))
    )


LIMITED = (
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); from "
    "fisher_unlearn.cli import app; app()"
)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["inline", "papermill"])
def test_a_disk_that_takes_no_more_ends_in_a_sentence(on, tmp_path):
    """No file can grow beyond 200 kB, as weights must: one line and exit code 2, nothing
    half-written, and records made before are untouched."""
    (before,) = complete(few("retrain"), tmp_path / "runs")
    words = [
        "train" if on == "inline" else "figure3",
        "--runs",
        str(tmp_path / "runs"),
        "--figures",
        str(tmp_path / "figures"),
        *(
            w
            for n, v in SHORT.items()
            if n != "fine_tune_epochs" or on == "papermill"
            for w in ("--set", f"{n}={v}")
        ),
        "--on",
        on,
    ]
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, *words], capture_output=True, text=True, encoding="utf-8"
    )
    said = ended.stderr.strip().splitlines()[-1]
    assert (
        ended.returncode == 2
        and "cannot write" in said
        and "File too large" in said
        and said.endswith("choose another folder.")
    ), ended.stderr
    assert not list((tmp_path / "runs").rglob("*.part")) and complete(
        few("retrain"), tmp_path / "runs"
    ) == [before]
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 1


def test_every_experiment_is_a_command():
    text = command("--help").output
    assert set(notebooks()) >= {"quickstart", "train", "unlearn"} and all(
        name.removesuffix("_your_own") in text for name in notebooks()
    )


def test_restored_records_count_as_done(tmp_path):
    "Not that of w*, whose weights runs start from. What is there, or kept with its weights, stays."
    chosen = [
        *few("mask_classifier", fine_tune_epochs=0),
        *few("mask_classifier", "random_mask"),
        *few("retrain"),
    ]
    done = complete(chosen, tmp_path / "runs")
    keys = [record["key"] for record in done]
    keep(
        "x",
        tmp_path,
        pd.DataFrame([{"x": 1}]),
        Figure(),
        "",
        [
            *done,
            read_record(tmp_path / "runs" / f"train-{training_key(chosen[0])}" / "record.json"),
        ],
    )
    keep_run(keys[1], tmp_path / "runs", tmp_path / "data")
    (tmp_path / "there" / keys[0]).mkdir(parents=True)
    assert (
        restore(tmp_path / "x.parquet", tmp_path / "there", tmp_path / "data")
        == [keys[0], *keys[2:]]
        and restore(tmp_path / "x.parquet", tmp_path / "there", tmp_path / "data") == []
    )
    assert (
        complete(chosen, tmp_path / "there", on="none") == [done[0], None, *done[2:]]
        and complete(chosen, tmp_path / "there", tmp_path / "data", on="none") == done
    )
    other = write_record(
        tmp_path / "there" / keys[0] / "record.json", done[0] | {"note": "another"}
    )
    assert restore(
        tmp_path / "x.parquet", tmp_path / "there", tmp_path / "data"
    ) == [] and complete(chosen[:1], tmp_path / "there", on="none") == [other]
    assert command(
        "restore", str(tmp_path / "x.parquet"), "--runs", str(tmp_path / "new")
    ).output.startswith(f"{len(done)} runs of ")
    for bad, message in ((tmp_path / "none", "there is no file"), (tmp_path / "x.csv", "arquet")):
        failed = command("restore", str(bad), "--runs", str(tmp_path / "new"))
        assert failed.exit_code == 2 and message in failed.output


def test_readouts_are_restored_with_their_run(tmp_path):
    """With the record that they were read with, or to it if it is there already, and never to
    another; a new readout needs weights, and says so."""
    (settings,) = few("mask_classifier", classes=(3,))
    done = run(settings, tmp_path / "runs")
    keep("before", tmp_path, pd.DataFrame([{"x": 1}]), Figure(), "", [done])
    said = readout(settings, "relearn_classifier", tmp_path / "runs", cap=1)
    keep(
        "after",
        tmp_path,
        pd.DataFrame([{"x": 1}]),
        Figure(),
        "",
        [with_readouts(done, tmp_path / "runs")],
    )
    for name, found in (("before", {}), ("after", {"relearn_classifier_1": said})):
        restore(tmp_path / f"{name}.parquet", tmp_path / "there")
        assert (
            with_readouts(run(settings, tmp_path / "there"), tmp_path / "there").get("readouts", {})
            == found
        )
    assert readout(settings, "relearn_classifier", tmp_path / "there", cap=1) == said
    with pytest.raises(FileNotFoundError, match="without the weights.*remove this folder"):
        readout(settings, "relearn_classifier", tmp_path / "there", cap=2)
    (tmp_path / "other" / done["key"]).mkdir(parents=True)
    write_record(tmp_path / "other" / done["key"] / "record.json", done | {"note": "another"})
    assert restore(tmp_path / "after.parquet", tmp_path / "other") == [] and not list(
        (tmp_path / "other").rglob("relearn*")
    )


@pytest.mark.slow
@pytest.mark.parametrize("on", ["papermill", "ray"])
def test_notebooks_leave_the_records_of_this_process(on, tmp_path):
    """The same grid inline and in notebooks: records equal but for the clock, weights byte for
    byte, an executed notebook without a place in it; and a failure with its notebook."""
    chosen = [*few("finetune", "random_mask"), *sweep("quick", method="finetune", lr=1e30, **SHORT)]
    inline, noted = (complete(chosen, tmp_path / how, on=how) for how in ("inline", on))
    assert [r is None for r in noted] == [False, False, False, True]
    for s, a, b in zip(chosen[:3], inline, noted):
        assert timeless(a) == timeless(b)
        files = [
            (tmp_path / how / run_key(s) / "weights.safetensors").read_bytes()
            for how in ("inline", on)
        ]
        notebook = tmp_path / on / run_key(s) / "unlearn.ipynb"
        assert (
            files[0] == files[1]
            and nbformat.read(notebook, 4).metadata.papermill.exception is None
            and str(tmp_path) not in notebook.read_text(encoding="utf-8")
        )
    failed = tmp_path / on / run_key(chosen[3])
    assert (
        state(failed)[1].startswith("training diverged")
        and (failed / "unlearn.partial.ipynb").exists()
    )
    assert (tmp_path / on / f"train-{training_key(chosen[0])}" / "train.ipynb").exists() == (
        on == "ray"
    )


GRID = (
    "sweep('smoke', cast('fisher_mask', 'finetune', 'mask_classifier', 'random_mask'), "
    "device='cpu')"
)
RUNNER = (
    "import sys\nfrom fisher_unlearn.lab.executors import complete\n"
    f"from fisher_unlearn.lab.experiments import cast, sweep\ncomplete({GRID}, "
    "sys.argv[1], on=sys.argv[2])"
)


def wanted():
    return eval(GRID)


@pytest.mark.slow
def test_two_runners_share_one_folder(tmp_path):
    "Every training and fine-tuning epoch is printed by exactly one of them."
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    runners = [
        subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(tmp_path), "inline"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
            encoding="utf-8",
        )
        for _ in range(2)
    ]
    texts = [r.communicate(timeout=300)[0] for r in runners]
    assert [r.returncode for r in runners] == [0, 0]
    epochs = [line for text in texts for line in text.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 2 + 6 and len([p for p in tmp_path.glob("*/record.json")]) == 7
    assert (
        not list(tmp_path.rglob("progress*"))
        and not list(tmp_path.rglob("*.part"))
        and not list(tmp_path.rglob("failure*"))
    )


# stage, which time it is entered by a process, seconds after that (then it may have gone on to
# another stage, or have ended): in training, then in runs
KILLS = """train 1 0
train 1 .1
evaluate 1 0
write 1 0
written 1 0
write 2 0
written 2 0
score 1 0
score 1 .02
fine-tune 1 0
fine-tune 1 .1
evaluate 1 0
evaluate 2 0
write 1 0
written 1 0
fine-tune 1 .05
write 1 0
written 1 0
write 2 0
written 2 0
score 1 0
evaluate 1 0
fine-tune 1 0
written 2 0"""
STAGES = {"train", "evaluate", "write", "written", "score", "fine-tune"}


@contextmanager
def runners(folder, on, path):
    "What runs the grid once, with processes dying by the plan: its exit code, and what it said."
    killed = Path(__file__).parent / "killed"
    who = "forked" if on == "inline" else "ipykernel_launcher"
    env = {
        **os.environ,
        "KILL": f"{who} {path}",
        "PYTHONPATH": os.pathsep.join([str(killed), *sys.path[1:]]),
    }
    if on != "inline":
        words = [sys.executable, "-c", RUNNER, str(folder), on]

        def start():
            done = subprocess.run(words, capture_output=True, env=env, encoding="utf-8")
            return done.returncode, done.stdout + done.stderr

        yield start
        return
    said = folder.with_suffix(".said")
    words = [sys.executable, str(killed / "nursery.py"), str(said)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, env=env, encoding="utf-8") as nursery:

        def fork():
            print(folder, file=nursery.stdin, flush=True)
            return int(nursery.stdout.readline()), said.read_text(encoding="utf-8")

        yield fork
        nursery.stdin.close()


def killed(folder, on, plan):
    """Start a grid until it is done, with processes dying by plan; the stages in which they
    died, and how often the runner was started."""
    (path := folder.with_suffix(".kills")).write_text(plan, encoding="utf-8")
    kept, starts, ended = {}, 0, False
    with runners(folder, on, path) as run:
        while not ended:
            code, said = run()
            assert code in (0, -signal.SIGKILL), said
            print(*[line for line in said.splitlines() if line.startswith("failed")], sep="\n")
            for record, text in kept.items():
                assert record.read_text(encoding="utf-8") == text  # what is done is not done again
            kept |= {
                record: record.read_text(encoding="utf-8")
                for record in folder.glob("*/record.json")
                if read_record(record)
            }
            starts, ended = starts + 1, code == 0 and not path.read_text(encoding="utf-8")
            assert starts < 60
    complete(wanted(), folder)
    return Path(f"{path}.log").read_text(encoding="utf-8").splitlines(), starts


def same(one, other):
    """The files of two folders of runs are the same, byte for byte, but for the clock in records
    and beside scores."""
    files = [
        sorted(
            str(p.relative_to(folder))
            for p in folder.rglob("*")
            if p.is_file() and p.name != ".lock" and p.suffix != ".ipynb"
        )
        for folder in (one, other)
    ]
    scores = {f for f in files[0] if Path(f).parts[1] == "fisher"}
    assert (
        files[0] == files[1]
        and scores
        and {Path(f).name for f in files[0] if f not in scores}
        == {"record.json", "weights.safetensors"}
    )
    for name in files[0]:
        a, b = one / name, other / name
        if name in scores:
            assert all(
                torch.equal(x, y)
                for x, y in zip(*(read_tensors(p)[0].values() for p in (a, b)), strict=True)
            )
        else:
            assert (
                timeless(read_record(a)) == timeless(read_record(b))
                if name.endswith(".json")
                else a.read_bytes() == b.read_bytes()
            )


@pytest.mark.slow
@pytest.mark.parametrize("on", ["inline", "papermill"])
def test_a_grid_killed_in_every_stage_ends_like_one_never_killed(on, tmp_path):
    """At least 20 kills by SIGKILL, of the runner or of the kernels that it starts: in training,
    scoring, fine-tuning, evaluation, just before and just after a file is put in place."""
    complete(wanted(), tmp_path / "whole")
    stages, starts = killed(tmp_path / "killed", on, KILLS)
    print({stage: stages.count(stage) for stage in sorted(set(stages))}, f"{starts} starts")
    assert (
        len(stages) >= 20
        and set(stages) >= STAGES
        and (on == "papermill" or starts == len(stages) + 1)
    )
    same(tmp_path / "whole", tmp_path / "killed")
    assert not list(tmp_path.rglob("*.partial.ipynb"))


@pytest.mark.slow
def test_a_killed_kernel_is_a_failure_and_the_next_start_finishes(tmp_path):
    """SIGKILL of the kernel while it trains: the runner goes on, says so, and a second start
    ends with the record of a run never killed."""
    wanted = sweep("quick", method="mask_classifier", epochs=6, fine_tune_epochs=1, device="cpu")
    code = (
        "import sys\nfrom fisher_unlearn.lab.executors import complete\n"
        "from fisher_unlearn.lab.experiments import sweep\n"
        "print(complete(sweep('quick', method='mask_classifier', epochs=6, "
        "fine_tune_epochs=1, device='cpu'), sys.argv[1], on='papermill'))"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    progress = tmp_path / f"train-{training_key(wanted[0])}" / "progress.safetensors"
    while not progress.exists():
        time.sleep(0.05)
        assert runner.poll() is None
    children = subprocess.run(
        ["ps", "--ppid", str(runner.pid), "-o", "pid=,args="],
        capture_output=True,
        text=True,
        encoding="utf-8",
    ).stdout.splitlines()
    for line in children:
        if "ipykernel" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    out, _ = runner.communicate(timeout=300)
    assert (
        runner.returncode == 0
        and "[None]" in out
        and state(tmp_path / run_key(wanted[0]))[0] == "failed"
    )
    (record,) = complete(wanted, tmp_path)
    (whole,) = complete(wanted, tmp_path / "whole")
    assert timeless(record) == timeless(whole) and state(tmp_path / run_key(wanted[0])) == (
        "done",
        "",
    )
