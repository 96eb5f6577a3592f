"""What begins within a budget, and what is left: the clock is the test's, except where a process
is killed or a kernel started."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import pytest
import torch
from typer.testing import CliRunner

from fisher_unlearn.cli import LATER, app
from fisher_unlearn.images.budget import PASSED_ON, Budget, OutOfTime, budget_of, duration
from fisher_unlearn.images.budget import passed_on, spoken
from fisher_unlearn.lab import cluster
from fisher_unlearn.lab.cards import cards_of
from fisher_unlearn.lab.executors import complete, reading, work_in
from fisher_unlearn.lab.experiment import Experiment
from fisher_unlearn.lab.experiments import cast, needed, sweep
from fisher_unlearn.lab.notebook import execute, failures, in_notebook
from fisher_unlearn.lab.plans import plan
from fisher_unlearn.lab.run import _paced, estimator, readout_seconds, run
from fisher_unlearn.lab.settings import resolve, run_key, training_key
from fisher_unlearn.lab.store import KeptScores, read_record, write_record
from fisher_unlearn.networks import train
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, read_tensors, train_model
from made import run_record
from test_grid import timeless

OVER = Budget(begun=0, until=0)
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


class Clock:
    "A clock that goes on by `pace` seconds with each epoch of training."

    def __init__(self):
        self.now, self.pace = 0.0, 10.0

    def __call__(self):
        return self.now

    def budget(self, seconds):
        "So much time from now on; records of before are older than it."
        return Budget(begun=time.time(), until=self.now + seconds, clock=self)


@pytest.fixture
def clock(monkeypatch):
    found, epoch = Clock(), train.train_epoch

    def watched(*args, **more):
        loss = epoch(*args, **more)
        found.now += found.pace
        return loss

    monkeypatch.setattr(train, "train_epoch", watched)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=found))
    return found


def few(**more):
    return sweep("smoke", cast("finetune", "mask_classifier"), device="cpu", **more)


# ---------------------------------------------------------------- durations


@pytest.mark.parametrize(
    "text, seconds",
    [("90s", 90), ("12m", 720), ("1h30m", 5400), ("1h5s", 3605), (" 2h ", 7200), ("0h1s", 1)],
)
def test_a_duration_is_read_as_it_is_said(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "12", "m", "0s", "0h0m", "-3m", "1.5h", "30m1h", "1m1m", "12 min", "1e9s", "٣m?"]
)
def test_nonsense_is_one_sentence(text, tmp_path):
    with pytest.raises(ValueError, match="is no duration: write it as 90s, 12m or 1h30m"):
        duration(text)
    said = CliRunner().invoke(app, ["unlearn", "--budget", text, "--runs", str(tmp_path / "r")])
    assert said.exit_code == 2 and said.output.count("\n") == 1 and "no duration" in said.output
    assert not (tmp_path / "r").exists()


def test_a_time_that_is_spoken_is_read_again():
    for seconds in (1, 59, 119, 120, 600, 3600, 5400, 86_400):
        assert duration(spoken(seconds)) == seconds


def test_a_budget_goes_through_the_environment(monkeypatch):
    ours = budget_of("12m")
    monkeypatch.setenv(PASSED_ON, passed_on(ours)[PASSED_ON])
    assert budget_of() == ours and budget_of("1h") != ours and budget_of(OVER) is OVER
    for wrong in ("12m", "[1]", "[1, null]", "3"):
        monkeypatch.setenv(PASSED_ON, wrong)
        with pytest.raises(ValueError, match="give the command --budget"):
            budget_of()


# ---------------------------------------------------------------- epochs


def net():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def trained(model, *place, budget=None, epochs=6):
    numbers = torch.Generator().manual_seed(0)
    batches = [(torch.randn(5, 4, generator=numbers), torch.tensor([0, 1, 2, 0, 1]))]
    settings = TrainSettings(Schedule(epochs=epochs, drops=()), select="last")
    return train_model(model, batches, settings, None, *place, progress="none", budget=budget)


def rows_in(file):
    return json.loads(read_tensors(file)[1]["rows"])


def test_epochs_begin_as_long_as_they_end_and_the_rest_goes_on_as_if_nothing_were(clock, tmp_path):
    file, whole, parts = tmp_path / "progress.safetensors", net(), net()
    trained(whole)
    with pytest.raises(OutOfTime, match="an epoch takes 10s, and 5s of the budget are left"):
        trained(parts, file, budget=clock.budget(35))
    assert len(rows_in(file)) == 3
    trained(parts := net(), file, budget=clock.budget(30))  # which is just enough
    assert torch.equal(parts.weight, whole.weight) and len(rows_in(file)) == 6


def test_nothing_begins_that_would_not_end(clock, tmp_path):
    file = tmp_path / "progress.safetensors"
    small = Budget(0, clock.now + 9, epoch=10.0, clock=clock)
    with pytest.raises(OutOfTime, match="an epoch takes 10s, and 9s"):
        trained(net(), file, budget=small)
    assert not file.exists() and clock.now == 0
    with pytest.raises(OutOfTime):
        trained(net(), file, budget=clock.budget(15))
    before = file.read_bytes()
    with pytest.raises(OutOfTime, match="an epoch takes 10s"):  # as the checkpoint has it
        trained(net(), file, budget=clock.budget(9))
    assert file.read_bytes() == before


def test_this_process_knows_better_than_a_slower_one_before(clock, tmp_path):
    file = tmp_path / "progress.safetensors"
    with pytest.raises(OutOfTime):
        trained(net(), file, budget=clock.budget(15), epochs=60)
    clock.pace = 1.0
    with pytest.raises(OutOfTime, match="an epoch takes 1s"):
        trained(net(), file, budget=clock.budget(12.5), epochs=60)
    assert len(rows_in(file)) == 1 + 12


# ---------------------------------------------------------------- runs


def test_a_small_budget_leaves_what_a_larger_one_ends(clock, tmp_path, capsys):
    wanted = few()
    runs, whole = tmp_path / "parts", tmp_path / "whole"
    assert complete(wanted, runs, budget=clock.budget(25)) == [None, None]  # two epochs of w*
    said = capsys.readouterr().out
    assert "an epoch after it takes 10s, and 5s of the budget are left" in said
    assert "\nleft: 2 runs, 2 of them like nothing" in said and "failed" not in said
    files = {p.relative_to(runs) for p in runs.rglob("*.*") if p.name != ".lock"}
    key = f"train-{training_key(wanted[0])}"
    assert {p.parts[0] for p in files} == {key} and (runs / key / "record.json").exists()
    parts = complete(wanted, runs, budget=clock.budget(20))  # an epoch each
    assert "left" not in capsys.readouterr().out
    assert list(map(timeless, parts)) == list(map(timeless, complete(wanted, whole)))


def test_a_budget_too_small_for_an_epoch_begins_nothing_and_says_so(clock, tmp_path, capsys):
    complete(few(), tmp_path)
    past = time.time() - 1000
    for path in tmp_path.rglob("record.json"):
        os.utime(path, (past, past))
    before = {*tmp_path.rglob("*.safetensors")}, clock.now
    capsys.readouterr()
    assert complete(few(seed=1), tmp_path, budget=clock.budget(9)) == [None, None]
    said = capsys.readouterr().out
    assert said.count("an epoch takes 10s, and 9s of the budget are left") == 2
    assert "left: 2 runs, 1 training of w*, about " in said
    assert ({*tmp_path.rglob("*.safetensors")}, clock.now) == before
    assert not list(tmp_path.rglob("failure.json"))


def test_what_was_measured_since_it_began_is_believed_first(clock, tmp_path):
    run(few()[0], tmp_path, progress="none")  # on a slow day
    past = time.time() - 1000
    for path in tmp_path.rglob("record.json"):
        os.utime(path, (past, past))
    clock.pace = 1.0
    budget = clock.budget(40)
    run(few(seed=1)[0], tmp_path, progress="none", budget=budget)
    clock.now += 32  # five seconds are left, and 3 are needed
    assert budget.left == 5
    run(few(seed=2)[0], tmp_path, progress="none", budget=budget)
    with pytest.raises(OutOfTime):
        run(few(seed=3)[0], tmp_path, progress="none", budget=budget)


def test_who_has_little_time_waits_for_nobody(clock, tmp_path, capsys):
    from fisher_unlearn.images.atomic import locked

    wanted = few()
    for held in (run_key(wanted[0]), f"train-{training_key(wanted[0])}"):
        (tmp_path / held).mkdir()
        with locked(tmp_path / held):
            complete(wanted[:1], tmp_path, budget=clock.budget(100))
        assert "another process does it." in capsys.readouterr().out
    assert clock.now == 0 and not list(tmp_path.rglob("failure.json"))


def test_nothing_is_read_out_when_time_is_over(tmp_path, capsys):
    assert reading(few()[0], "agreement", tmp_path, budget=OVER) is None
    assert not list(tmp_path.iterdir())
    assert "left: agreement of digits resnet20 666: finetune: 0s" in capsys.readouterr().out


def test_what_a_readout_needs_keeps_to_the_budget(clock, tmp_path, capsys):
    "Its run, w*, and the retrained model; what is done by then is read out in the next one."
    wanted = few()[0]
    small = clock.budget(15)
    assert reading(wanted, "relearn_all", tmp_path, cap=1, budget=small) is None
    assert clock.now == 10 and not list(tmp_path.rglob("record.json"))
    said = capsys.readouterr().out
    assert "left: relearn_all_1 of digits resnet20 666: finetune: an epoch takes 10s" in said
    assert small.lacked == ["relearn_all_1"]
    run(wanted, tmp_path, progress="none")
    before = clock.now
    assert reading(wanted, "agreement", tmp_path, budget=clock.budget(15)) is None
    assert clock.now - before == 10 and len([*tmp_path.rglob("record.json")]) == 2
    assert reading(wanted, "relearn_all", tmp_path, cap=1, budget=clock.budget(15))["cap"] == 1
    assert not list(tmp_path.rglob("failure.json"))


@pytest.mark.parametrize("kind", ["relearn_all", "card"])
def test_a_readout_that_would_not_end_is_not_begun(kind, tmp_path, capsys):
    "By what others of its kind took after runs alike in pace, and by nothing else."
    one, other = few()[:2]

    def read(settings, budget=None, cap=1):
        if kind == "card":
            found = cards_of([settings], [], tmp_path, cap=cap, budget=budget)
            return next((card for _, card in found), None)
        return reading(settings, kind, tmp_path, cap=cap, budget=budget)

    now = time.time()
    soon, later = (Budget(now, now + seconds) for seconds in (500, 5000))
    run(other, tmp_path, progress="none")
    assert read(one, soon) is not None  # none was measured before
    (path,) = (tmp_path / run_key(one)).glob(f"{kind}_1*.json")
    record = read_record(path)
    assert 0 < record["seconds"] < 100
    slow = {name: part for name, part in record.items() if name != "digest"} | {"seconds": 1000.0}
    path.unlink()
    write_record(path, slow)
    capsys.readouterr()
    assert read(one, OVER) is not None and not capsys.readouterr().out  # it is only read
    assert read(other, soon) is None and soon.lacked == [f"{kind}_1"]
    said = capsys.readouterr().out
    assert f"left: {kind}_1 of digits resnet20 666: mask_classifier: {kind}_1 takes 17m" in said
    assert read(other, soon, cap=2) is not None  # another kind
    assert read(other, later) is not None and not later.lacked
    older = {name: part for name, part in slow.items() if name != "seconds"}
    path.unlink()
    write_record(path, older)
    assert math.isnan(readout_seconds(other, f"{kind}_3*", later, tmp_path))
    assert 0 < readout_seconds(other, f"{kind}_1*", later, tmp_path) < 100  # the other's alone


def test_nobody_waits_for_scores_who_has_little_time(tmp_path):
    from fisher_unlearn.images.atomic import locked

    with locked(tmp_path), pytest.raises(BlockingIOError):
        KeptScores(tmp_path, "cpu", wait=False)("scores", dict)


# ---------------------------------------------------------------- estimates


def told(folder, settings, age=1000, method=1.0, epoch=2.0, tuned=None, **more):
    "A record that was written so many seconds ago, of a run that took so long."
    record = run_record(settings, **more)
    rows = record["history"]
    for row in rows:
        row["seconds"] = epoch if row["epoch"] else None
    seconds = epoch * (len(rows) - 1) if tuned is None else tuned
    record["seconds"] = {"method": method, "fine_tune": seconds}
    file = folder / run_key(settings) / "record.json"
    file.parent.mkdir(parents=True)
    write_record(file, record)
    then = time.time() - age
    os.utime(file, (then, then))


def smoke(**more):
    return resolve("smoke", device="cpu", **more)


def seconds_of(folder, *settings):
    "What a plan says of the last of some runs."
    return plan(settings, folder, folder).seconds.iloc[-1]


def paced(folder, settings, scored=False):
    budget = Budget(begun=time.time() - 10, until=time.time() + 60)
    own, told = _paced(budget, settings, settings.method.name, folder, folder, scored)
    return own, told.epoch


def test_a_record_of_today_says_nothing_of_what_it_did_not_do(tmp_path):
    wanted = smoke(method="influence", seed=2)
    told(tmp_path, smoke(method="influence", seed=1), method=1000.0)
    assert paced(tmp_path, wanted) == (1002, 2)
    told(tmp_path, smoke(method="finetune", seed=1), age=0, epoch=3.0)
    assert paced(tmp_path, wanted) == (1003, 3)
    told(tmp_path, smoke(method="mask_classifier", fine_tune_epochs=0), age=0)
    assert paced(tmp_path, wanted) == (1003, 3)
    told(tmp_path, smoke(method="influence", seed=3), age=0, method=5.0, epoch=3.0)
    assert paced(tmp_path, wanted) == (8, 3)


def test_scores_that_are_kept_are_computed_again_for_another_w_star(tmp_path):
    told(tmp_path, smoke(method="fisher_mask"), method=1000.0)
    for ratio in (0.1, 0.2, 0.3):
        told(tmp_path, smoke(method="fisher_mask", ratio=ratio), method=0.5, spared=999.5)
    known, other = smoke(method="fisher_mask", ratio=0.4), smoke(method="fisher_mask", seed=2)
    assert paced(tmp_path, other) == (1002, 2) and paced(tmp_path, known, True) == (2.5, 2)
    assert seconds_of(tmp_path, other) == 1002
    assert seconds_of(tmp_path, other, other.but(ratio=0.4)) == 2.5  # by the first of the two
    assert seconds_of(tmp_path, smoke(method="fisher_mask"), known) == 2.5
    assert seconds_of(tmp_path, other, smoke(method="fisher_mask", seed=3)) == 1002
    theirs = known.but(preset="authors_code")  # from other scores
    assert seconds_of(tmp_path, smoke(method="fisher_mask"), theirs) == 1002


def test_scores_are_known_by_the_names_under_which_methods_keep_them(tmp_path):
    ours, theirs = (smoke(method="fisher_mask", preset=p) for p in ("paper", "authors_code"))
    run(ours, tmp_path, progress="none")
    (folder,) = {file.parent for file in tmp_path.rglob("fisher/*/*.safetensors")}
    kept = KeptScores(folder, "cpu")
    assert kept.there(estimator(ours)) and not kept.there(estimator(theirs))
    assert estimator(smoke(method="finetune")) == ""


def test_epochs_before_an_interruption_count_and_are_not_done_again(clock, tmp_path):
    long = {"method": "retrain", "epochs": 12}
    told(tmp_path, smoke(**long), method=0.0, epoch=10.0, tuned=20.0)
    assert seconds_of(tmp_path, smoke(**long, seed=2)) == 120
    with pytest.raises(OutOfTime):
        run(smoke(**long, seed=2), tmp_path, progress="none", budget=clock.budget(55))
    assert seconds_of(tmp_path, smoke(**long, seed=2)) == 70
    (file,) = tmp_path.rglob("progress.safetensors")
    file.write_bytes(b"damaged")
    assert seconds_of(tmp_path, smoke(**long, seed=2)) == 120


def test_what_nobody_did_takes_nobody_knows_how_long(tmp_path):
    told(tmp_path, smoke(method="finetune"), method=0.0)
    for odd in ({"method": "influence", "fine_tune_epochs": 0}, {"method": "ct", "own_epochs": 50}):
        assert math.isnan(seconds_of(tmp_path, smoke(**odd)))
    assert seconds_of(tmp_path, smoke(method="retrain", epochs=9)) == 18  # which is but epochs
    told(tmp_path, smoke(method="influence", seed=1), method=7.0)
    assert seconds_of(tmp_path, smoke(method="influence", fine_tune_epochs=0)) == 7
    assert seconds_of(tmp_path, smoke(method="influence", fine_tune_epochs=3)) == 13


def test_other_threads_another_precision_and_other_batches_have_another_pace(tmp_path):
    told(tmp_path, smoke(method="retrain"))
    assert seconds_of(tmp_path, smoke(method="retrain", seed=1)) > 0
    for other in ({"threads": 7}, {"precision": "bfloat16"}, {"batch_size": 7}):
        assert math.isnan(seconds_of(tmp_path, smoke(method="retrain", **other)))


def test_a_w_star_from_which_no_missing_run_starts_is_no_work(tmp_path):
    done, missing = few(), few(seed=4)
    complete(done, tmp_path)
    assert [*plan(done, tmp_path, tmp_path).state] == ["done"] * 3
    shutil.rmtree(tmp_path / f"train-{training_key(done[0])}")
    assert work_in(plan(done, tmp_path, tmp_path)) == ""
    words = work_in(plan([*done, *missing], tmp_path, tmp_path))
    assert words.startswith("2 runs, 1 training of w*, ")


def test_an_experiment_without_a_run_says_why(tmp_path):
    with pytest.raises(OutOfTime, match="none of the 13 runs"):
        print(Experiment("table1", "smoke", runs=tmp_path, device="cpu", budget=OVER).records)


def test_a_failure_within_a_budget_is_not_for_want_of_time(tmp_path, capsys):
    folder = tmp_path / run_key(needed("floor", "smoke", device="cpu")[0])
    folder.mkdir()
    (folder / "record.json").write_text("broken", encoding="utf-8")
    asked = Experiment("floor", "smoke", runs=tmp_path, device="cpu", budget="1h")
    with pytest.raises(ValueError, match="none of the 1 runs"):
        print(asked.records)
    assert "left" not in capsys.readouterr().out


def test_over_is_over_for_notebooks_and_clusters_too(tmp_path, capsys, monkeypatch):
    "No kernel is started."
    monkeypatch.setattr("fisher_unlearn.lab.notebook.execute", None)
    complete(few(), tmp_path, on="papermill", budget=OVER)
    assert capsys.readouterr().out.count("0s of the budget are left") == 2
    with pytest.raises(OutOfTime):
        cluster._unlearn(few()[0], tmp_path, tmp_path, OVER, None)


# ---------------------------------------------------------------- processes


def test_a_kernel_is_told_and_what_it_says_comes_back(tmp_path):
    code = (
        "from fisher_unlearn.images.budget import budget_of\n"
        "print('left: something')\nbudget_of().check(7200, 'it')"
    )
    book, out = tmp_path / "a.ipynb", tmp_path / "b.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(notebook, book)
    with pytest.raises(RuntimeError, match="it takes 2h00m, and 1h00m") as told:
        execute(book, out, {}, budget=budget_of("1h"))
    assert told.value.kind == "OutOfTime" and PASSED_ON not in os.environ
    assert failures(tmp_path / "b.partial.ipynb", "left: ") == ["left: something"]


@pytest.mark.slow
def test_a_run_in_a_notebook_stops_as_it_does_here(tmp_path):
    soon = Budget(begun=time.time(), until=time.time() + 15)
    long = few(epochs=4000)[0]
    with pytest.raises(OutOfTime):
        in_notebook(long, tmp_path, None, True, soon)
    assert not list(tmp_path.rglob("failure.json"))
    assert list(tmp_path.rglob("progress.safetensors"))


@pytest.mark.slow
def test_a_command_ends_with_what_is_done(tmp_path):
    places = ["--runs", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]
    words = ["table1", "--profile", "smoke", "--set", "epochs=4000", "--budget", "20s", *places]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == LATER, said.output
    assert "What is done is kept; the same command goes on from there." in said.output
    assert list(tmp_path.rglob("progress.safetensors"))


BEGUN = """
import sys
from fisher_unlearn.lab.executors import complete
from fisher_unlearn.lab.experiments import cast, sweep
complete(sweep("smoke", cast("finetune"), epochs=5, device="cpu"), sys.argv[1], budget="1h")
"""


def test_a_run_that_was_killed_within_a_budget_goes_on_within_the_next(tmp_path, capsys):
    wanted = sweep("smoke", cast("finetune"), epochs=5, device="cpu")
    runs = tmp_path / "runs"
    process = subprocess.Popen([sys.executable, "-c", BEGUN, str(runs)], env=QUIET)
    file = runs / f"train-{training_key(wanted[0])}" / "progress.safetensors"
    limit = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = len(rows_in(file))
    assert 1 <= before < 5

    ticks = iter(range(1000))  # a clock that goes on whenever it is asked
    soon = Budget(begun=0, until=4, clock=lambda: next(ticks))
    assert complete(wanted, runs, budget=soon) == [None]
    assert "left: 1 run" in capsys.readouterr().out
    ended = complete(wanted, runs, budget="1h")
    assert timeless(ended[0]) == timeless(complete(wanted, tmp_path / "whole")[0])
