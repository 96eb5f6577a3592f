"""300 damaged files, drawn at random: whoever reads one gets the right result, or one sentence,
and never another result."""

import json
import pickle
import random
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load, save
from torch import nn

from fisher_unlearn.lab.executors import complete
from fisher_unlearn.lab.plans import state
from fisher_unlearn.lab.store import read_record
from fisher_unlearn.lab.settings import resolve, run_key, training_key
from fisher_unlearn.lab.report import keep as keep_result
from fisher_unlearn.lab.report import read_kept, restore
from fisher_unlearn.lab.store import KeptScores
from fisher_unlearn.lab.run import images_of, run, train_original
from fisher_unlearn.lab.store import keep_run
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, read_tensors, train_model

TINY = {"device": "cpu", "subset": 60, "epochs": 1, "fine_tune_epochs": 1, "threads": 1}
EACH = 50


def tiny(**more):
    return resolve("quick", **TINY | more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Two small runs, each with its w*, and what is read from their files."
    place = tmp_path_factory.mktemp("whole")
    chosen = [tiny(seed=seed) for seed in (1, 2)]
    records = [run(s, place / "runs", progress="none") for s in chosen]
    for s in chosen:
        keep_run(f"train-{training_key(s)}", place / "runs", place / "data")
    keep_result("result", place, pd.DataFrame([{"x": 1}]), Figure(), "text", records)
    return SimpleNamespace(place=place, chosen=chosen, records=records)


def flipped(content, rng, bits=1):
    "A file with some bits flipped."
    content = bytearray(content)
    for _ in range(bits):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def zeroed(content, rng):
    "A file with a part of zeros, as a machine leaves it that lost its power."
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randint(1, 5000))
    return content[:start] + bytes(end - start) + content[end:]


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


ANY = {
    "a flipped bit": flipped,
    "a flipped bit at the start": lambda content, rng: flipped(content[:300], rng) + content[300:],
    "flipped bits": lambda content, rng: flipped(content, rng, 30),
    "cut off": lambda content, rng: content[: rng.randrange(len(content))],
    "zeros": zeroed,
    "no bytes": lambda content, rng: b"",
    "a pickle": lambda content, rng: pickle.dumps(Trap()),
    "more behind it": lambda content, rng: content + rng.randbytes(rng.randint(1, 50)),
    "noise": lambda content, rng: rng.randbytes(500),
}


def text(change):
    "A damage to a file of text."
    return lambda content, rng: change(content.decode(), rng).encode()


def another_number(said, rng):
    "A file of which a number is another, or none."
    numbers = list(re.finditer(r"(?<=[ \[])-?\d+(\.\d+)?(?=[,\n\]])", said))
    found = rng.choice(numbers)
    new = rng.choice(["NaN", "Infinity", "1e400", "-1", "250", "7", "[]", '"7"', "null", "true"])
    return said[: found.start()] + new + said[found.end() :]


def another_name(said, rng):
    found = rng.choice(list(re.finditer(r'"(\w+)": ', said)))
    return said[: found.start(1)] + rng.choice(["", "x", "key", "settings"]) + said[found.end(1) :]


JSON = ANY | {
    "another number": text(another_number),
    "another name": text(another_name),
    "nested deeply": text(
        lambda said, rng: said.rstrip()[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    ),
    "a part left out": text(
        lambda said, rng: json.dumps(
            {k: v for k, v in json.loads(said).items() if k != rng.choice(list(json.loads(said)))}
        )
    ),
    "another key": text(
        lambda said, rng: said.replace(json.loads(said)["key"], f"{rng.getrandbits(64):016x}")
    ),
    "a list": text(lambda said, rng: f"[{said}]"),
}


def retyped(content, rng):
    "Tensors of another type, with the old metadata."
    tensors, kind = load(content), rng.choice([torch.int8, torch.float64, torch.bfloat16])
    name = rng.choice(sorted(tensors))
    return save(tensors | {name: tensors[name].to(kind)}, metadata_of(content))


def metadata_of(content):
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def changed(change):
    "A damage to the tensors of a file, whose metadata stay."
    return lambda content, rng: save(
        {n: change(t, rng) for n, t in load(content).items()}, metadata_of(content)
    )


TENSORS = ANY | {
    "another type": retyped,
    "all zeros": changed(lambda tensor, rng: torch.zeros_like(tensor)),
    "NaN": changed(
        lambda tensor, rng: tensor * float("nan") if tensor.is_floating_point() else tensor
    ),
    "no metadata, all zeros": lambda content, rng: save(
        {n: torch.zeros_like(t) for n, t in load(content).items()}
    ),
    "a tensor left out": lambda content, rng: save(
        dict(list(load(content).items())[1:]), metadata_of(content)
    ),
}


def each_damage(kinds, path, others, seed):
    """Damage a file in many ways, that of other files in its place among them; it is whole again
    afterwards."""
    rng, content = random.Random(seed), path.read_bytes()
    swaps = {
        f"{other.name} in its place": lambda *_, other=other: other.read_bytes() for other in others
    }
    damages = kinds | swaps
    for k in range(EACH):
        name = list(damages)[k % len(damages)]
        path.write_bytes(damages[name](content, rng))
        yield name
    path.write_bytes(content)


def one_sentence(error):
    assert "\n" not in str(error) and len(str(error)) > 20
    for jargon in ("Traceback", "object has no attribute", "NoneType", "KeyError"):
        assert jargon not in str(error)


def test_records(whole, tmp_path):
    runs = shutil.copytree(whole.place / "runs", tmp_path / "runs")
    (first, second), (right, _) = whole.chosen, whole.records
    folder = runs / run_key(first)
    others = [
        runs / run_key(second) / "record.json",
        runs / f"train-{training_key(first)}" / "record.json",
    ]
    seen = set()
    for damage in each_damage(JSON, folder / "record.json", others, 0):
        try:
            assert read_record(folder / "record.json") == right, damage
        except ValueError as error:
            one_sentence(error)
            assert str(folder) in str(error)
            assert state(folder) == ("failed", " ".join(str(error).split()))
            seen.add(damage)
        found = complete([first, second], runs, on="none")
        assert found[0] in (None, right) and found[1] == whole.records[1], damage
    assert len(seen) > 12


def test_weights_and_record_of_w_star(whole, tmp_path):
    runs = shutil.copytree(whole.place / "runs", tmp_path / "runs")
    check_w_star(whole, runs, None, runs, "{name}/weights.safetensors")


def test_kept_weights(whole, tmp_path):
    data = shutil.copytree(whole.place / "data", tmp_path / "data")
    check_w_star(whole, tmp_path / "runs", data, data / "checkpoints", "{name}.safetensors")


def check_w_star(whole, runs, root, place, where):
    first, second = (f"train-{training_key(s)}" for s in whole.chosen)
    images = images_of(whole.chosen[0])
    right = train_original(whole.chosen[0], images, whole.place / "runs", "none")[0].state_dict()
    refused = 0
    for damage in each_damage(
        TENSORS, place / where.format(name=first), [place / where.format(name=second)], 1
    ):
        try:
            model, _ = train_original(whole.chosen[0], images, runs, "none", root)
            found = model.state_dict()
            assert all(torch.equal(right[n], found[n]) for n in right), damage
        except ValueError as error:
            one_sentence(error)
            assert "delete it" in str(error) and str(place) in str(error)
            refused += 1
        if root:
            shutil.rmtree(runs)
    assert refused > 40


def test_kept_scores(whole, tmp_path, capsys):
    runs = shutil.copytree(whole.place / "runs", tmp_path / "runs")
    (path, other) = sorted(
        runs.glob(f"train-{training_key(whole.chosen[0])}/fisher/*/*.safetensors")
    )
    right, _ = read_tensors(path)
    for damage in each_damage(TENSORS, path, [other], 2):
        computed = []
        found = KeptScores(path.parent, "cpu")(
            path.stem, lambda said=computed: said.append(1) or right
        )
        assert all(torch.equal(right[n], found[n]) for n in right), damage
        assert bool(computed) == ("computed again" in capsys.readouterr().out)


def test_files_of_progress(whole, tmp_path):
    "What goes on from one ends as if nothing had happened."
    images, file = images_of(whole.chosen[0]).train[torch.arange(20)], tmp_path / "p.safetensors"

    def trained(seed=1):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
        )
        settings = TrainSettings(Schedule(epochs=2, drops=()), select="last", seed=1)
        train_model(model, images, settings, checkpoint=file, progress="none")
        return model.state_dict()

    right = trained()
    file.rename(tmp_path / "right")
    trained(seed=5)
    other = file.rename(tmp_path / "other")
    (tmp_path / "right").rename(file)
    for damage in each_damage(TENSORS, file, [other], 3):
        try:
            found = trained()
            assert all(torch.equal(right[n], found[n]) for n in right), damage
        except ValueError as error:
            one_sentence(error)
            assert "another" in str(error), damage


def test_parquet_files(whole, tmp_path):
    path = tmp_path / "result.parquet"
    shutil.copy(whole.place / "result.parquet", path)
    refused = 0
    for damage in each_damage(ANY, path, [], 4):
        runs = tmp_path / "there"
        try:
            restore(path, runs, tmp_path)
            assert read_kept(path) == whole.records, damage
        except (ValueError, OSError) as error:
            one_sentence(error)
            assert str(path) in str(error)
            assert not runs.exists()
            refused += 1
        shutil.rmtree(runs, ignore_errors=True)
    assert refused > 40
