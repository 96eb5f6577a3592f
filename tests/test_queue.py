"""What a minute adds, and the list of open experiments."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import fisher_unlearn
from fisher_unlearn.cli import LATER, app
from fisher_unlearn.images.budget import Budget
from fisher_unlearn.lab.executors import complete, work_in
from fisher_unlearn.lab.experiments import NEEDS, cast, needed, sweep
from fisher_unlearn.lab.paper import in_our_words, paper_numbers
from fisher_unlearn.lab.plans import kept_record, plan
from fisher_unlearn.lab.queue import Entry, queue_plan, read_queue, work_off
from fisher_unlearn.lab.settings import resolve, run_key, training_key
from fisher_unlearn.lab.store import read_record, write_record
from fisher_unlearn.lab.value import by_value, is_printed
from made import run_record

OVER = Budget(begun=0, until=0)
DATA = Path(fisher_unlearn.__file__).parent.parent / "data"


def entry(**more):
    usual = {"experiment": "floor", "profile": "smoke", "device": "cpu", "why": "x", "seeds": [1]}
    return Entry.model_validate(usual | more)


# ---------------------------------------------------------------- value


def test_every_cell_with_printed_numbers_of_its_own_has_runs_and_no_other():
    "By the names that tables give to their rows: those of the paper's tables, and nobody else's."
    wanted = {s for n in NEEDS for s in needed(n, "paper", seeds=[666], device="cpu")}
    printed = [s for s in wanted if is_printed(s)]
    numbers = in_our_words(paper_numbers())
    own = numbers[~numbers.setting.str.startswith("average") & (numbers.method != "w*")]
    assert {s.method.title for s in printed} == {*own.method}
    assert {(s.data.dataset, s.network) for s in printed} == {
        ("cifar10", "resnet20"),
        ("cifar100", "googlenet"),
    }
    assert not any(is_printed(s) for s in needed("rivals", "interpolating", device="cpu"))
    assert not any(is_printed(s) for s in needed("table1", "cpu", device="cpu"))


def timed(settings, seconds, folder):
    "A record of a run that took so long."
    record = run_record(settings)
    record["seconds"] = {"fine_tune": float(seconds)}
    for row in record["history"]:
        row["seconds"] = seconds / (len(record["history"]) - 1) if row["epoch"] else None
    (folder / run_key(settings)).mkdir()
    write_record(folder / run_key(settings) / "record.json", record)


@pytest.mark.parametrize(
    "given",
    [{"batch_size": 32}, {"optimizer": "adamw"}, {"loss": "binary_cross_entropy"}, {"clip": 0.01}],
    ids=str,
)
def test_another_training_is_none_that_the_paper_prints(given):
    usual = {"profile": "paper", "method": "finetune", "device": "cpu"}
    assert is_printed(resolve(**usual)) and is_printed(resolve(**usual, precision="bfloat16"))
    assert not is_printed(resolve(**usual, **given))


def test_printed_runs_a_minute_come_first_then_others_a_minute_then_the_unknown(tmp_path):
    """Retrainings need no w*, and what one takes is told by another seed of it: so the minutes
    are those that were written here."""
    fresh = lambda **more: sweep("paper", cast("retrain")[:1], device="cpu", **more)
    timed(fresh(seed=1)[0], 600, tmp_path)
    timed(fresh(seed=1, network="vgg16")[0], 60, tmp_path)
    some = {
        "unknown": fresh(network="densenet"),
        "unprinted and quick": fresh(network="vgg16"),
        "unprinted and slow": fresh(classes=(3,)),
        "printed and slow": fresh(),
        "done": fresh(seed=1),
        "half printed": fresh() + fresh(classes=(4,)),
    }
    table = by_value(some, tmp_path, tmp_path)
    order = ["printed and slow", "half printed", "unprinted and quick", "unprinted and slow"]
    assert [*table.index] == [*order, "unknown"]
    assert [*table.missing] == [1, 2, 1, 1, 1] and [*table.printed] == [1, 1, 0, 0, 0]
    assert [*table.minutes[:4]] == pytest.approx([10, 20, 1, 10])
    assert [*table["printed a minute"][:4]] == pytest.approx([0.1, 0.05, 0, 0])
    assert table.minutes.isna()["unknown"]
    assert by_value({}, tmp_path).empty and by_value({"done": some["done"]}, tmp_path).empty


def test_the_command_gives_that_order(tmp_path):
    words = ["plan", "floor", "table1", "--profile", "smoke", "--by", "value", "--runs"]
    said = CliRunner().invoke(app, [*words, str(tmp_path)])
    assert said.exit_code == 0 and "table1" in said.output and "not known" in said.output
    said = CliRunner().invoke(app, ["plan", "--by", "valeu"])
    assert said.exit_code == 2 and "did you mean 'value'" in said.output


# ---------------------------------------------------------------- the list


def test_the_repositorys_own_list_is_one_of_runs_that_a_machine_can_do():
    entries = read_queue()
    assert {e.device for e in entries} == {"cpu", "cuda"}
    for found in entries:
        assert all(s.machine.device == found.device for s in found.settings), found.title
        if found.device == "cpu":  # w* is trained there, too, or comes with the repository
            there = [s for s in found.settings if s.machine.trains_on != "cpu"]
            assert all(kept_record(f"train-{training_key(s)}", DATA) for s in there), found.title
    titles = [e.title for e in entries]
    assert len({*titles}) == len(titles)
    keys = [run_key(s) for e in entries for s in e.settings]
    assert len(keys) > 100


def test_nothing_that_can_be_computed_is_typed_in_it():
    file = Path(fisher_unlearn.__file__).parent / "queue.yaml"
    for row in yaml.safe_load(file.read_text(encoding="utf-8")):
        assert {*row} <= {"experiment", "profile", "device", "why", "seeds", "parameters"}


FLOOR = "- {experiment: floor, profile: smoke, device: cpu, why: x"


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "can't be read"),
        ("a: 1", "is no list"),
        ("- 3", "entry 1 of the queue"),
        ("- {experiment: flor, profile: smoke, device: cpu, why: x}", "did you mean 'floor'"),
        ("- {experiment: floor, profile: smok, device: cpu, why: x}", "did you mean 'smoke'"),
        ("- {experiment: floor, profile: smoke, device: cpu, why: x, seeds: []}", "`seeds`"),
        ("- {experiment: floor, profile: smoke, device: cpu, why: x, seeds: [-1]}", "`seeds`"),
        ("- {experiment: floor, profile: smoke, device: cpu, why: 3}", "`why`"),
        (
            "- {experiment: floor, profile: smoke, device: cpu, why: x, parameters: {epoch: 1}}",
            "did you mean 'epochs'",
        ),
        (
            "- {experiment: floor, profile: smoke, device: cpu, why: x, parameters: {epochs: -1}}",
            "`epochs`",
        ),
        *(
            (f"{FLOOR}, parameters: {given}}}", said)
            for given, said in (
                ("{seed: 5}", "`seed` is what floor itself chooses: give `seeds`"),
                ("{method: ssd}", "`method` is what floor itself chooses"),
                ("{device: cuda}", "`device` is no parameter"),
                ("{seeds: [3]}", "`seeds` is no parameter"),
            )
        ),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_entry_is_one_sentence(text, said, tmp_path):
    file = tmp_path / "queue.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="queue") as error:
        read_queue(file)
    assert said in str(error.value) and "\n" not in str(error.value)
    command = CliRunner().invoke(app, ["queue", "--file", str(file), "--runs", str(tmp_path / "r")])
    assert command.exit_code == 2 and command.output.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_what_is_done_is_passed_and_what_is_for_a_gpu_is_said(tmp_path, capsys):
    entries = [entry(device="cuda"), entry(), entry(seeds=[1, 2])]
    complete(entries[1].settings, tmp_path)
    table = queue_plan(entries, tmp_path, gpu=False)
    assert [*table.done] == ["0 of 1", "1 of 1", "1 of 2"]
    assert table.left[0].startswith("passed over here: 1 run") and table.left[1] == "nothing"
    assert table.left[2].startswith("1 run, about ")  # as the other seed took
    capsys.readouterr()
    assert work_off(entries, tmp_path, gpu=False) == []
    said = capsys.readouterr().out
    assert "passed over: floor in smoke, seeds 1: it is for a GPU" in said
    assert said.count("===") == 1 and "=== floor in smoke, seeds 1 2" in said
    assert not work_in(plan(entries[2].settings, tmp_path))
    assert work_off(entries[1:], tmp_path, budget=OVER, gpu=False) == []


def test_a_machine_with_a_gpu_takes_all_in_their_order(monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(
        "fisher_unlearn.lab.queue.complete", lambda wanted, *more: begun.append(wanted) or [None]
    )
    entries = [entry(device="cuda"), entry()]
    assert work_off(entries, tmp_path, gpu=True) == entries
    assert begun == [e.settings for e in entries]


def test_no_entry_begins_when_time_is_over(tmp_path, capsys):
    entries = [entry(), entry(seeds=[2])]
    assert work_off(entries, tmp_path, budget=OVER, gpu=False) == entries
    assert "===" not in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_command_says_how_far_it_is_works_it_off_and_says_what_is_left(tmp_path):
    file, runs = tmp_path / "queue.yaml", tmp_path / "runs"
    rows = [entry().model_dump(), entry(seeds=[2], parameters={"epochs": 900}).model_dump()]
    file.write_text(yaml.safe_dump(rows), encoding="utf-8")
    words = ["queue", "--file", str(file), "--runs", str(runs)]
    said = CliRunner().invoke(app, [*words, "--on", "none"])
    assert said.exit_code == 0 and said.output.count("0 of 1") == 2 and not runs.exists()
    said = CliRunner().invoke(app, [*words, "--budget", "8s"])
    assert said.exit_code == LATER, said.output
    assert "left: floor in smoke, seeds 2, epochs 900" in said.output
    assert read_record(runs / run_key(entry().settings[0]) / "record.json")
    assert list(runs.rglob("progress.safetensors"))


def test_a_budget_that_is_not_spent_is_not_what_is_lacking(tmp_path):
    "A damaged record is a failure: the same command again would find the same."
    file, runs = tmp_path / "queue.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump([entry().model_dump()]), encoding="utf-8")
    (damaged := runs / run_key(entry().settings[0]) / "record.json").parent.mkdir(parents=True)
    damaged.write_text("broken", encoding="utf-8")
    words = ["queue", "--file", str(file), "--runs", str(runs), "--budget", "1h"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 1 and "left: floor in smoke" in said.output, said.output
    assert "failed: " in said.output and "the budget is" not in said.output


def test_an_estimate_is_computed_from_records(tmp_path):
    fresh = resolve("smoke", method="retrain", seed=9, device="cpu")
    timed(fresh, 5400, tmp_path)
    assert "1 run, about 1h30m" in queue_plan([entry()], tmp_path, gpu=False).left[0]
