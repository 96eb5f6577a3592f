"""Files at once or not at all, locks, and what several processes do with one folder."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure

import fisher_unlearn.images.atomic as atomic
from fisher_unlearn.images.atomic import is_held, locked, remove_abandoned, write_whole
from fisher_unlearn.images.data import digest, load_images
from fisher_unlearn.lab.executors import complete
from fisher_unlearn.lab.plans import state
from fisher_unlearn.lab.store import checked_key, read_record, runs_root, write_record
from fisher_unlearn.lab.settings import resolve, run_key
from fisher_unlearn.lab.results import histories
from fisher_unlearn.lab.report import read_kept, restore
from fisher_unlearn.lab.report import keep as keep_result
from fisher_unlearn.lab.store import keep_run
from fisher_unlearn.networks.train import save_tensors
from made import listed, run_record, training_record


def quick(**more):
    return resolve(
        "quick",
        **{"device": "cpu", "method": "finetune", "epochs": 2, "fine_tune_epochs": 1} | more,
    )


def put(runs, record, name=None):
    "A finished run, as far as its record goes."
    folder = runs / (name or record["key"])
    folder.mkdir(parents=True)
    return write_record(folder / "record.json", record)


def test_each_writer_has_a_part_of_its_own_and_what_fails_leaves_nothing(tmp_path):
    place = tmp_path / "x"

    def write(part):
        part.write_text("new", encoding="utf-8")
        write_whole(place, lambda other: other.write_text("other", encoding="utf-8"))
        assert (
            part.read_text(encoding="utf-8") == "new"
            and place.read_text(encoding="utf-8") == "other"
        )

    write_whole(place, write)
    assert place.read_text(encoding="utf-8") == "new" and os.listdir(tmp_path) == ["x"]

    def full(part):
        part.write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=rf"cannot write {place} \(No space left on device\)"):
        write_whole(place, full)
    assert place.read_text(encoding="utf-8") == "new" and os.listdir(tmp_path) == ["x"]


def test_what_a_living_process_writes_is_not_swept(tmp_path):
    def write(part):
        remove_abandoned(tmp_path)
        part.write_text("mine", encoding="utf-8")

    write_whole(tmp_path / "x", write)
    (tmp_path / "x.0123abcd.part").write_text("of a dead process", encoding="utf-8")
    (tmp_path / "y.0123abcd.part").write_text("of another file", encoding="utf-8")
    write_whole(tmp_path / "x", write)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named_with_the_file_of_a_figure(tmp_path, monkeypatch):
    figure = Figure()
    monkeypatch.setattr(
        figure,
        "savefig",
        lambda part, **_: open("/dev/full", "w", encoding="utf-8").write("x" * 100_000),
    )
    record = run_record(quick())
    with pytest.raises(
        OSError, match=r"cannot write .*table\.png \(No space left on device\)"
    ) as error:
        keep_result("table", tmp_path, pd.DataFrame([{"x": 1}]), figure, "text", [record])
    assert "\n" not in str(error.value) and listed(tmp_path) == [
        "table.csv",
        "table.md",
    ]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.ENOTSUP])
def test_where_files_cant_be_locked_is_said_by_name(tmp_path, monkeypatch, number):
    def never(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.FileLock, "acquire", never)
    with (
        pytest.raises(OSError, match=f"files in {tmp_path} can't be locked") as error,
        locked(tmp_path),
    ):
        pass
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="cannot write .*/x"):
        write_whole(tmp_path / "x", lambda part: part.write_text("x", encoding="utf-8"))
    assert listed(tmp_path) == []


def test_who_locks_a_folder_removes_what_killed_processes_left_there(tmp_path):
    "A part, with or without its lock, and a lock whose part is in its place already."
    for name in ("x.0123abcd.part", "y.0123abcd.part.lock", "x.0123abcd.part.lock"):
        (tmp_path / name).touch()
    assert not is_held(tmp_path) and len(listed(tmp_path)) == 3  # who only looks removes nothing
    with locked(tmp_path):
        assert listed(tmp_path) == []


def test_what_others_call_a_part_is_left_alone(tmp_path):
    "A download that somebody began in a folder of data, and a folder of that name."
    (tmp_path / "cifar-10.tar.gz.part").write_text("half", encoding="utf-8")
    (tmp_path / "x.0123abcd.part").mkdir()
    (tmp_path / "tiny.part").mkdir()
    before = listed(tmp_path)
    with locked(tmp_path):
        pass
    remove_abandoned(tmp_path)
    assert listed(tmp_path) == before


def test_where_nothing_can_be_written_nobody_works(tmp_path, monkeypatch):
    "A folder of finished runs may be read only, with the lock of whoever did them in it."
    (tmp_path / ".lock").touch()

    def never(*args, **options):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(atomic.FileLock, "acquire", never)
    assert not is_held(tmp_path)


def test_a_lock_is_one_at_a_time_also_within_a_process(tmp_path):
    assert not is_held(tmp_path) and listed(tmp_path) == []
    with locked(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
            pass
    assert not is_held(tmp_path)
    with locked(tmp_path, wait=False):
        pass


PREPARE = """
import sys
from fisher_unlearn.images import data
calls = sys.argv[2]
def built(name, root, download):
    with open(calls, "a") as file: file.write("x")
    import time, torch
    time.sleep(.5)
    x, y = torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.arange(20) % 10
    parts = (x, y, x.clone(), y.clone())
    return parts, {"digest": data.digest(*parts)}
data._built = built
print(data.load_images("mnist", sys.argv[1]).digest)
"""


def test_three_processes_that_prepare_a_data_set_at_once_prepare_it_once(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(tmp_path / "data"), str(tmp_path / "calls")],
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for _ in range(3)
    ]
    said = [process.communicate()[0].splitlines()[-1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0] and len({*said}) == 1
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "x"
    assert listed(tmp_path / "data") == ["mnist.safetensors"]


READ_OUT = """
import sys, time
from fisher_unlearn.lab import run as module
from fisher_unlearn.lab.settings import resolve
s = resolve("quick", device="cpu", method="finetune", epochs=2, fine_tune_epochs=1)
def relearned(*args):
    with open(sys.argv[2], "a") as file: file.write("x")
    time.sleep(.5)
    return {"epochs": 1, "cap": 5, "threshold": .5, "losses": [1., .5]}
module.run = lambda *args, **budget: {"key": module.run_key(s)}
module.load_run = lambda model, *args: model
module._relearned = relearned
print(module.readout(s, "relearn_all", sys.argv[1], progress="none", cap=5)["losses"])
"""


def test_a_readout_that_three_ask_for_at_once_is_computed_once(tmp_path):
    put(tmp_path / "runs", run_record(quick()))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READ_OUT, str(tmp_path / "runs"), str(tmp_path / "calls")],
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for _ in range(3)
    ]
    said = [process.communicate()[0].splitlines()[-1] for process in started]
    assert said == ["[1.0, 0.5]"] * 3 and (tmp_path / "calls").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc",
        "",
        ".",
        "train-../x",
        "0" * 15,
        "0" * 17,
        "A" * 16,
        "train-",
        f"{'0' * 16}/..",
        f"{'0' * 16}\n",
    ],
)
def test_nothing_but_a_key_is_a_key(name, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "record.json").write_text(json.dumps(run_record(quick())), encoding="utf-8")
    (outside / "weights.safetensors").write_bytes(b"\x80a pickle")
    with pytest.raises(ValueError, match="is no key of a run"):
        keep_run(name, tmp_path / "runs", tmp_path / "data")
    with pytest.raises(ValueError, match="is no key of a run"):
        checked_key(name)
    assert not (tmp_path / "data").exists()


def test_only_whole_weights_of_their_record_are_kept(tmp_path):
    record = training_record(quick(), weights="0" * 64)
    name, folder = f"train-{record['key']}", tmp_path / "runs" / f"train-{record['key']}"
    put(tmp_path / "runs", record, name)
    with pytest.raises(ValueError, match="without weights"):
        keep_run(name, tmp_path / "runs", tmp_path / "data")
    for content, message in ((b"\x80a pickle", "never opened"), (b"junk", "truncated or damaged")):
        (folder / "weights.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            keep_run(name, tmp_path / "runs", tmp_path / "data")
    found = save_tensors(folder / "weights.safetensors", {"w": torch.ones(3)})
    with pytest.raises(ValueError, match="is damaged or another's"):
        keep_run(name, tmp_path / "runs", tmp_path / "data")
    assert listed(tmp_path / "data" / "checkpoints") == []
    write_record(folder / "record.json", record | {"weights": found})
    assert keep_run(name, tmp_path / "runs", tmp_path / "data").exists()


def parquet(path, *records):
    "A file such as `keep` writes, of whatever one likes."
    rows = [
        {n: part if n == "key" else json.dumps(part) for n, part in record.items()}
        for record in records
    ]
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"key": "../../x"},
        {"key": "/tmp/x"},
        {"key": "0" * 16},
        {"readouts": {"../../x": {}}},
        {"readouts": {"record": {}}},
        {"readouts": {"agreement": {"key": "../x", "readout": "agreement"}}},
        {"history": []},
        {"note": None},
        {"more": 1},
    ],
)
def test_a_parquet_file_puts_nothing_outside_its_folder(tmp_path, change):
    path = parquet(tmp_path / "x.parquet", run_record(quick()) | change)
    with pytest.raises(ValueError, match="is damaged: the record") as error:
        restore(path, tmp_path / "a" / "runs", tmp_path)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["x.parquet"]


def test_a_small_parquet_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    record = run_record(quick()) | {"note": "x" * 100_000}
    texts = {n: part if n == "key" else json.dumps(part) for n, part in record.items()}
    repeated = pa.array([0] * 20_000, pa.int32())
    table = pa.table(
        {n: pa.DictionaryArray.from_arrays(repeated, pa.array([text])) for n, text in texts.items()}
    )
    plain = pa.schema([(n, pa.string()) for n in texts])
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", store_schema=False)
    assert pq.read_schema(tmp_path / "x.parquet") == plain
    assert (tmp_path / "x.parquet").stat().st_size < 100_000
    with pytest.raises(ValueError, match="more than records have"):
        read_kept(tmp_path / "x.parquet")


def test_no_mean_covers_two_data_sets(tmp_path, capsys):
    """Records of other images than those at hand are named, and where none are at hand, those
    that differ are refused."""
    right, other = load_images("digits").digest, "0" * 64
    chosen = [quick(seed=seed) for seed in (1, 2)]
    records = [run_record(s) for s in chosen]
    for record, made in zip(records, (right, other)):
        record["data"] |= {"digest": made, "name": "digits"}
        put(tmp_path / "runs", record)
    first, second = complete(chosen, tmp_path / "runs", on="none")
    assert first["key"] == run_key(chosen[0]) and second is None
    assert "made from other digits images" in capsys.readouterr().out
    kind, reason = state(tmp_path / "runs" / run_key(chosen[1]))
    assert kind == "failed" and "made from other digits images" in reason
    with pytest.raises(ValueError, match="were made from different digits images"):
        histories(records)
    away = [quick(seed=seed).but(dataset="mnist") for seed in (1, 2)]
    for s, made in zip(away, (right, other)):
        record = run_record(s)
        record["data"] |= {"digest": made, "name": "mnist"}
        put(tmp_path / "away", record)
    with pytest.raises(ValueError, match="were made from different mnist images"):
        complete(away, tmp_path / "away", tmp_path, on="none")


def test_two_kept_w_star_with_swapped_weights_are_refused(tmp_path):
    import fisher_unlearn
    from fisher_unlearn.lab.store import _copy

    kept = Path(fisher_unlearn.__file__).parent.parent / "data" / "checkpoints"
    one, two = sorted(kept.glob("train-*.safetensors"))[:2]
    shutil.copy(two, tmp_path / one.name)
    record = read_record(one.with_suffix(".json"))
    with pytest.raises(ValueError, match="is damaged or another's"):
        _copy({tmp_path / one.name: tmp_path / "weights.safetensors"}, record)
    assert os.listdir(tmp_path) == [one.name]


def test_a_folder_without_a_name_is_no_folder(monkeypatch):
    with pytest.raises(ValueError, match="has no name"):
        runs_root("")
    monkeypatch.setenv("FISHER_UNLEARN_RUNS", "")
    assert runs_root() == Path("runs")


def test_one_bad_folder_hides_no_other(tmp_path):
    chosen = [quick(seed=seed) for seed in (1, 2, 3)]
    for s in chosen:
        record = run_record(s)
        record["data"] |= {"digest": load_images("digits").digest, "name": "digits"}
        put(tmp_path, record)
    (tmp_path / run_key(chosen[0]) / "record.json").write_text('{"key":' * 50_000, encoding="utf-8")
    (tmp_path / run_key(chosen[1]) / "record.json").unlink()
    (tmp_path / run_key(chosen[1]) / "record.json").mkdir()
    states = [state(tmp_path / run_key(s))[0] for s in chosen]
    assert states == ["failed", "failed", "done"]
    found = complete(chosen, tmp_path, on="none")
    assert [record and record["key"] for record in found] == [None, None, run_key(chosen[2])]


def test_a_digest_can_be_had_of_any_type():
    values = [
        torch.tensor([1, 0, 1]).to(kind)
        for kind in (torch.bfloat16, torch.float16, torch.complex64, torch.bool, torch.int8)
    ]
    assert len({digest(v) for v in values}) == len(values)
    assert digest(torch.ones(1).expand(4)) == digest(torch.ones(4)) and digest(torch.tensor(1.0))
    assert digest(torch.zeros(0)) != digest(torch.zeros(0, 1))
