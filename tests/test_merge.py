"""Records and checkpoints from elsewhere: what fits is taken in, what doesn't is named, and nothing
is overwritten, whenever it is stopped."""

import json
import os
import shutil
import signal

import pytest
from typer.testing import CliRunner

from fisher_unlearn.cli import app
from fisher_unlearn.images.atomic import locked
from fisher_unlearn.images.budget import Budget
from fisher_unlearn.lab.executors import complete
from fisher_unlearn.lab.experiments import cast, sweep
from fisher_unlearn.lab.merge import merge
from fisher_unlearn.lab.results import outcomes
from fisher_unlearn.lab.run import readout, with_readouts
from fisher_unlearn.lab.settings import resolve, run_key, training_key
from fisher_unlearn.lab.store import keep_run, read_record, write_record
from fisher_unlearn.networks.train import read_tensors, save_tensors
from made import listed
from test_budget import rows_in
from test_grid import timeless

FEW = sweep("smoke", [{"seed": 1}, {"seed": 2}], cast("finetune", "mask_classifier"), device="cpu")
KEYS = [run_key(s) for s in FEW]
W_STAR = f"train-{training_key(FEW[0])}"


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    "Two folders that share a w* and a run, and a third one that did it all."
    base = tmp_path_factory.mktemp("machines")
    complete(FEW[:2], base / "one")
    complete(FEW[1:], base / "other")
    complete(FEW, base / "all")
    return base


@pytest.fixture
def folders(machines, tmp_path):
    "Copies of the two."
    for name in ("one", "other"):
        shutil.copytree(machines / name, tmp_path / name)
    return tmp_path / "one", tmp_path / "other"


def content(folder):
    "All files of a folder but locks."
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def became(table):
    return dict(zip(zip(table.key, table.what), table.became))


def change(path, edit):
    "Edit a record, and sign it anew."
    record = json.loads(path.read_text(encoding="utf-8"))
    edit(record)
    write_record(path, record)


def test_two_folders_give_the_table_that_one_gives(machines, folders):
    one, other = folders
    before = content(one)
    found = became(merge(other, one))
    assert found[KEYS[1], "run"] == found[W_STAR, "run"] == "here already"
    assert sorted(found.values()) == ["here already"] * 2 + ["taken in"] * 3
    records = complete(FEW, one, on="none")
    whole = complete(FEW, machines / "all", on="none")
    assert list(map(timeless, records)) == list(map(timeless, whole))
    same = lambda found: outcomes(found).drop(columns=["seconds"], errors="ignore")
    assert same(records).equals(same(whole))
    assert content(one).items() >= before.items()
    assert {*merge(other, one).became} == {"here already"}
    for key in KEYS[2:]:  # as old as they are
        stamps = [(f / key / "record.json").stat().st_mtime_ns for f in (one, other)]
        assert stamps[0] == stamps[1]


def test_a_merge_that_is_killed_anywhere_is_run_again(folders, machines, tmp_path):
    "At each of its writes, before and after it."
    one, other = folders
    wanted = tmp_path / "wanted"
    shutil.copytree(one, wanted)
    merge(other, wanted)
    for count in range(1, 20):
        for after in (False, True):
            place = tmp_path / f"{count}-{after}"
            shutil.copytree(one, place)
            if not _killed(other, place, count, after):
                assert count == 7  # two files each of two runs and of their w*
                return
            assert all(read_record(p) for p in place.rglob("record.json"))
            merge(other, place)
            assert content(place) == content(wanted)


def _killed(folder, runs, count, after):
    "Merge in a process that dies at its so-manieth write; False if it came to its end."
    if not (child := os.fork()):
        replace, seen = os.replace, []

        def dying(*args):
            seen.append(args)
            if len(seen) == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = dying
        merge(folder, runs)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_does_not_fit_is_named_and_left_where_it_is(folders, tmp_path):
    one, other = folders
    weights = other / KEYS[2] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    text = (other / KEYS[3] / "record.json").read_text(encoding="utf-8")
    (other / KEYS[3] / "record.json").write_text(text.replace('"epoch": 1', '"epoch": 2'), "utf-8")
    shutil.copytree(other / KEYS[1], other / ("0" * 16))
    (other / "notes").mkdir()
    before = content(other)
    runs = tmp_path / "fresh"
    table = merge(other, runs).set_index("key")
    assert table.became[[KEYS[2], KEYS[3], "0" * 16, "notes"]].tolist() == ["refused"] * 4
    said = dict(table.why)
    assert "is damaged" in said[KEYS[2]] and "is not a record" in said[KEYS[3]]
    assert f"it is that of {KEYS[1]}" in said["0" * 16] and "is no key" in said["notes"]
    assert all("\n" not in why for why in table.why)
    assert content(other) == before
    assert {p.parent.name for p in runs.rglob("record.json")} == {
        *table.index[table.became == "taken in"]
    }
    said = CliRunner().invoke(app, ["merge", str(other), "--runs", str(tmp_path / "again")])
    assert said.exit_code == 1 and said.output.count("refused: ") == 4
    assert "3 taken in" in said.output and "4 refused" in said.output


def test_the_same_key_with_another_content_is_said_and_nothing_changes(folders):
    one, other = folders
    change(other / KEYS[1] / "record.json", lambda r: r["history"][-1].update(forget_acc=1.5))
    before = content(one / KEYS[1])
    table = merge(other, one).set_index("key")
    assert table.became[KEYS[1]] == "differs"
    assert table.why[KEYS[1]] == "it differs from the one here in history"
    assert content(one / KEYS[1]) == before


def test_the_same_result_in_other_words_is_the_same(folders):
    one, other = folders
    change(other / KEYS[1] / "record.json", lambda r: r.update(note="It moved."))
    assert merge(other, one).set_index("key").became[KEYS[1]] == "here already"


def test_a_run_that_started_from_another_w_star_is_refused(folders):
    one, other = folders
    change(one / W_STAR / "record.json", lambda r: r.update(weights="0" * 64))
    shutil.rmtree(one / KEYS[1])
    table = merge(other, one).set_index("key")
    assert table.became[W_STAR] == "differs" and table.became[KEYS[1]] == "refused"
    assert f"started from a w*, {W_STAR}, that is another one here" in table.why[KEYS[1]]
    assert table.became[KEYS[2]] == "taken in"  # from the other seed's
    assert not (one / KEYS[1] / "record.json").exists()


def test_records_of_other_images_are_refused(folders, tmp_path):
    _, other = folders
    change(other / KEYS[1] / "record.json", lambda r: r["data"].update(digest="0" * 64))
    table = merge(other, tmp_path / "fresh").set_index("key")
    assert table.became[KEYS[1]] == "refused" and "other" in table.why[KEYS[1]]


def test_weights_that_no_record_speaks_of_and_records_without_a_digest_are_refused(
    folders, tmp_path
):
    _, other = folders
    change(other / KEYS[1] / "record.json", lambda r: r.pop("weights"))
    record = json.loads((other / KEYS[2] / "record.json").read_text(encoding="utf-8"))
    del record["digest"]
    (other / KEYS[2] / "record.json").write_text(json.dumps(record), encoding="utf-8")
    table = merge(other, tmp_path / "fresh").set_index("key")
    assert table.became[KEYS[1:3]].tolist() == ["refused"] * 2
    assert "doesn't say which its weights are" in table.why[KEYS[1]]
    assert "has no digest" in table.why[KEYS[2]]


def test_weights_come_to_a_record_that_has_none(folders):
    one, other = folders
    file = one / KEYS[1] / "weights.safetensors"
    wanted = file.read_bytes()
    file.unlink()
    assert became(merge(other, one))[KEYS[1], "run"] == "taken in"
    assert file.read_bytes() == wanted


def test_a_training_that_was_stopped_is_taken_in_and_goes_on(tmp_path):
    ticks = iter(range(1000))
    wanted = sweep("smoke", cast("finetune"), seed=3, epochs=9, device="cpu")
    soon = Budget(begun=0, until=9, clock=lambda: next(ticks))
    complete(wanted, tmp_path / "there", budget=soon)
    (file,) = (tmp_path / "there").rglob("progress.safetensors")
    here, key = tmp_path / "here", file.parent.name
    assert became(merge(tmp_path / "there", here)) == {(key, "run"): "taken in"}
    assert became(merge(tmp_path / "there", here)) == {(key, "run"): "here already"}
    assert 1 <= len(rows_in(here / key / "progress.safetensors")) < 9
    (here / key / "progress.safetensors").write_bytes(b"another one")
    assert became(merge(tmp_path / "there", here)) == {(key, "run"): "differs"}
    shutil.copy(file, here / key / "progress.safetensors")
    parts, whole = (complete(wanted, p)[0] for p in (here, tmp_path / "whole"))
    assert timeless(parts) == timeless(whole)
    assert became(merge(tmp_path / "there", here)) == {(key, "run"): "here already"}
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert became(merge(tmp_path / "there", tmp_path / "third")) == {(key, "run"): "refused"}


def test_a_training_comes_in_pieces(tmp_path):
    "The longer one takes the place of the one that it goes on from, and of no other."
    ticks = iter(range(1000))
    wanted = sweep("smoke", cast("finetune"), seed=3, epochs=9, device="cpu")
    there, here, old = (tmp_path / name for name in ("there", "here", "old"))
    key = f"train-{training_key(wanted[0])}"
    file = here / key / "progress.safetensors"
    lengths = []
    for _ in range(2):
        start = next(ticks) + 1
        soon = Budget(begun=0, until=start + 7, clock=lambda: next(ticks))
        complete(wanted, there, budget=soon)
        assert became(merge(there, here)) == {(key, "run"): "taken in"}
        assert file.read_bytes() == (there / key / "progress.safetensors").read_bytes()
        lengths.append(len(rows_in(file)))
        if not old.exists():
            shutil.copytree(here, old)
    assert 1 <= lengths[0] < lengths[1] < 9
    longest = file.read_bytes()
    assert became(merge(old, here)) == {(key, "run"): "here already"}
    assert file.read_bytes() == longest
    tensors, said = read_tensors(file)
    other = [row | {"train_loss": 77.0} for row in json.loads(said["rows"])]
    for part in ({"rows": json.dumps(other)}, {"fingerprint": "another"}):
        save_tensors(there / key / "progress.safetensors", tensors, **{**said, **part})
        assert became(merge(there, here)) == {(key, "run"): "differs"}
        assert file.read_bytes() == longest
    parts, whole = (complete(wanted, p)[0] for p in (here, tmp_path / "whole"))
    assert timeless(parts) == timeless(whole)


def test_a_w_star_without_weights_is_refused_and_spares_our_checkpoint(folders, tmp_path):
    _, other = folders
    (other / W_STAR / "weights.safetensors").unlink()
    ours = tmp_path / "fresh" / W_STAR / "progress.safetensors"
    ours.parent.mkdir(parents=True)
    ours.write_bytes(b"so far")
    table = merge(other, tmp_path / "fresh").set_index("key")
    assert table.became[W_STAR] == "refused" and "without its weights" in table.why[W_STAR]
    assert listed(ours.parent) == ["progress.safetensors"]
    assert all(complete(FEW[1:2], tmp_path / "fresh"))


@pytest.mark.parametrize("key", [W_STAR, KEYS[1]])
def test_what_is_kept_beside_the_data_is_compared_as_well(folders, tmp_path, key):
    _, other = folders
    shutil.copytree(other / key, tmp_path / "elsewhere" / key)
    keep_run(key, tmp_path / "elsewhere", root := tmp_path / "root")
    assert became(merge(tmp_path / "elsewhere", tmp_path / "same", root))[key, "run"] == "taken in"
    change(root / "checkpoints" / f"{key}.json", lambda r: r["history"][-1].update(train_loss=7.5))
    table = merge(other, tmp_path / "fresh", root).set_index("key")
    assert (table.became[key], table.why[key]) == (
        "differs",
        "it differs from the one here in history",
    )
    assert not (tmp_path / "fresh" / key / "record.json").exists()


def test_settings_that_mean_nothing_to_a_run_make_no_other_one(tmp_path):
    "A retraining is the same in both readings, and is not fine-tuned."
    asked = {"profile": "smoke", "method": "retrain", "device": "cpu"}
    one, other = (
        resolve(**asked, preset=preset, fine_tune_epochs=epochs)
        for preset, epochs in (("paper", 5), ("authors_code", 0))
    )
    assert run_key(one) == run_key(other) and one.flat != other.flat
    complete([one], tmp_path / "one"), complete([other], tmp_path / "other")
    assert {*merge(tmp_path / "other", tmp_path / "one").became} == {"here already"}


def test_what_was_read_out_comes_with_its_run(folders, tmp_path):
    one, other = folders
    readout(FEW[1], "relearn_classifier", other, progress="none", cap=1)
    assert became(merge(other, one))[KEYS[1], "relearn_classifier_1"] == "taken in"
    record = read_record(one / KEYS[1] / "record.json")
    assert "relearn_classifier_1" in with_readouts(record, one)["readouts"]
    path = other / KEYS[1] / "relearn_classifier_1.json"
    change(path, lambda r: r.update(epochs=77))
    assert became(merge(other, one))[KEYS[1], "relearn_classifier_1"] == "differs"
    path.write_text("{}", encoding="utf-8")
    assert became(merge(other, one))[KEYS[1], "relearn_classifier_1"] == "refused"


def test_a_readout_without_a_digest_is_refused_as_a_record_is(folders):
    one, other = folders
    said = readout(FEW[1], "relearn_classifier", other, progress="none", cap=1)
    path = other / KEYS[1] / "relearn_classifier_1.json"
    path.write_text(json.dumps({n: v for n, v in said.items() if n != "digest"}), "utf-8")
    assert became(merge(other, one))[KEYS[1], "relearn_classifier_1"] == "refused"
    assert not (one / KEYS[1] / path.name).exists()


def test_a_folder_in_use_is_left_for_the_next_time(folders):
    one, other = folders
    with locked(other / KEYS[2]):
        assert became(merge(other, one))[KEYS[2], "run"] == "in use"
    with locked(one / KEYS[2]):
        assert became(merge(other, one))[KEYS[2], "run"] == "in use"
    assert became(merge(other, one))[KEYS[2], "run"] == "taken in"


def test_no_folder_and_the_same_folder_are_refused(folders):
    one, _ = folders
    for wrong in (one / "no such", one):
        said = CliRunner().invoke(app, ["merge", str(wrong), "--runs", str(one)])
        assert said.exit_code == 2 and said.output.count("\n") == 1
    assert not (one / "no such").exists()
