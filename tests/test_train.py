"""The loop against plain PyTorch, resuming after a real SIGKILL, and files that must not be
trusted."""

import copy
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fisher_unlearn.images.data import Batches, Samples
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import (
    TrainSettings,
    train_epoch,
    _bar,
    epoch_seed,
    load_weights,
    read_tensors,
    save_tensors,
    save_weights,
    train_model,
)


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_loop_is_plain_sgd(digits, layout):
    settings = TrainSettings(Schedule(epochs=2, drops=(1,)), select="last", layout=layout)
    ours = build_model("resnet20", 10, 1, seed=3)
    plain, batches = copy.deepcopy(ours), digits.train.batches(128)
    history = train_model(ours, digits.train, settings, progress="none")

    if layout == "channels_last":
        plain.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], 0.1)
    losses = []
    for epoch in range(2):
        order = torch.randperm(
            len(digits.train), generator=torch.Generator().manual_seed(epoch_seed(666, epoch))
        )
        inputs, labels, total = (
            torch.cat([x for x, _ in batches])[order],
            digits.train.labels[order],
            0,
        )
        for x, y in zip(inputs.split(128), labels.split(128)):
            x = x.contiguous(
                memory_format=torch.channels_last
                if layout == "channels_last"
                else torch.contiguous_format
            )
            loss = F.cross_entropy(plain(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        scheduler.step()
        losses.append(total / len(labels))
    assert same(ours, plain) and history.train_loss.tolist() == pytest.approx(losses, rel=1e-5)
    assert history.lr.tolist() == pytest.approx([0.1, 0.01])


def test_the_same_seed_gives_the_same_weights_and_another_does_not(digits, original, settings):
    again, other = build_model("resnet20", 10, 1, seed=0), build_model("resnet20", 10, 1, seed=0)
    train_model(again, digits.train, settings, progress="none")
    train_model(other, digits.train, replace(settings, seed=1), progress="none")
    assert same(again, original) and not same(other, original)


def test_a_loader_of_the_users_is_deterministic_too(digits, settings):
    x, y = (torch.cat(part) for part in zip(*digits.train.batches(500)))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 128, shuffle=True)
    a, b = (build_model("resnet20", 10, 1, seed=0) for _ in range(2))
    for model in (a, b):
        train_model(
            model, loader, replace(settings, schedule=Schedule(epochs=1, drops=())), progress="none"
        )
    assert same(a, b)


class Scripted(nn.Module):
    "A model whose test accuracy after each epoch is scripted, to see which epoch is selected."

    def __init__(self, right):
        super().__init__()
        self.right, self.w = right, nn.Parameter(torch.zeros(1))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.epoch += 1
        hits = self.right[min(int(self.epoch), len(self.right)) - 1] if self.epoch else 0
        logits = torch.zeros(len(x), 2)
        logits[:hits, 0], logits[hits:, 1] = 1, 1
        return logits + self.w


def test_the_first_best_epoch_is_selected_and_marked():
    batches = [(torch.zeros(10, 1), torch.zeros(10, dtype=torch.int64))]
    settings = TrainSettings(Schedule(epochs=5, drops=()))
    model = Scripted([3, 7, 5, 7, 6])
    history = train_model(model, batches, settings, {"test": batches}, progress="none")
    assert (
        history.accuracy.tolist() == [30, 70, 50, 70, 60]
        and history.selected.tolist() == [False, True, False, False, False]
        and model.epoch == 2
    )
    last = Scripted([3, 7, 5])
    history = train_model(
        last, batches, replace(settings, select="last"), {"test": batches}, progress="none"
    )
    assert history.selected.tolist() == [False] * 4 + [True] and last.epoch == 5


def test_validation_is_held_out_of_the_training_set(digits, monkeypatch):
    seen = []
    shuffled = Batches.shuffled
    monkeypatch.setattr(
        Batches, "shuffled", lambda self, g: (seen.append(self), shuffled(self, g))[1]
    )
    settings = TrainSettings(Schedule(epochs=3, drops=()), select="validation", holdout=0.2)
    history = train_model(
        build_model("resnet20", 10, 1, seed=0), digits.train, settings, progress="none"
    )
    assert len(seen[0].labels) == 1297 - 259 and history.selected.sum() == 1
    assert history.validation_acc[history.selected].item() == history.validation_acc.max()
    with pytest.raises(ValueError, match="needs `Samples`"):
        train_model(build_model("resnet20", 10, 1), digits.train.batches(128), settings)


def test_an_epoch_reads_nothing_back_from_the_device(digits, settings, monkeypatch):
    """On a GPU each of these calls would wait for it: there may be a fixed number in an epoch,
    and none for a step."""
    counts = {}
    for name in ("item", "cpu", "numpy", "tolist", "__bool__", "__float__", "__int__"):
        old = getattr(torch.Tensor, name)

        def counting(self, *args, _name=name, _old=old, **kwargs):
            counts[_name] = counts.get(_name, 0) + 1
            return _old(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    model, found = build_model("resnet20", 10, 1, seed=0), []
    for size in (128, 32):
        batches = digits.train.batches(size)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        counts.clear()
        with _bar("none", 0, 0) as bar:
            train_epoch(model, batches, optimizer, settings, 0, len(batches), 10, bar)
        found.append(sum(counts.values()))
    assert found[0] == found[1] <= 3


RUN = """
import os, signal, sys, torch
from fisher_unlearn.images.data import Batches, load_images
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, save_weights, train_model

class Deadly(Batches):
    "Kills its own process at a step."
    left = int(sys.argv[2])
    def shuffled(self, generator):
        for batch in super().shuffled(generator):
            self.left -= 1
            if self.left == 0: os.kill(os.getpid(), signal.SIGKILL)
            yield batch

torch.set_num_threads(1)
folder, images = sys.argv[1], load_images("digits")
model = build_model("resnet20", 10, 1, seed=0)
settings, progress = TrainSettings(Schedule(epochs=6, drops=(3,))), folder + "/progress.safetensors"
history = train_model(model, Deadly(images.train, 128, "cpu"), settings,
                      {"test": images.test.batches(500)}, progress, progress="none")
history.drop(columns="seconds").to_json(folder + "/history.json")
save_weights(model, folder + "/weights.safetensors")
"""


def killed_run(folder, steps):
    "The run in a process of its own, ended by SIGKILL at a step (0: never)."
    folder.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-c", RUN, str(folder), str(steps)]).returncode


@pytest.mark.slow
def test_a_killed_run_ends_like_one_never_killed(tmp_path):
    """11 steps are an epoch: killed in the middle of epoch 1, with nothing saved yet, and of
    epochs 3 and 5."""
    assert killed_run(tmp_path / "whole", 0) == 0
    for steps in (5, 27, 27):
        assert killed_run(tmp_path / "killed", steps) == -signal.SIGKILL
    done = json.loads(read_tensors(tmp_path / "killed" / "progress.safetensors")[1]["rows"])
    assert [row["epoch"] for row in done] == [1, 2, 3, 4]
    assert killed_run(tmp_path / "killed", 0) == 0
    for name in ("weights.safetensors", "history.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    whole, killed = (
        read_tensors(tmp_path / run / "progress.safetensors")[0] for run in ("whole", "killed")
    )
    assert set(whole) == set(killed) and all(torch.equal(whole[k], killed[k]) for k in whole)
    assert any(k.startswith("best:") for k in whole) and any(
        k.startswith("optimizer:momentum_buffer:") for k in whole
    )


def test_a_checkpoint_belongs_to_the_weights_it_started_from(digits, settings, tmp_path):
    short = replace(settings, schedule=Schedule(epochs=1, drops=()))
    train_model(
        build_model("resnet20", 10, 1, seed=0),
        digits.train,
        short,
        checkpoint=tmp_path / "p.safetensors",
        progress="none",
    )
    with pytest.raises(ValueError, match="another training run"):
        train_model(
            build_model("resnet20", 10, 1, seed=1),
            digits.train,
            short,
            checkpoint=tmp_path / "p.safetensors",
            progress="none",
        )


def test_labels_of_a_later_batch_are_checked_before_their_step(settings):
    x, y = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels from 12 to 12"):
        train_model(
            build_model("resnet20", 10, 1, seed=0), [(x, y), (x, y + 12)], settings, progress="none"
        )


def test_other_dimensions_and_loaders_without_a_length_train_too(settings):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.full((1, 4, 4, 4), float(k)), k % 2) for k in range(6)])

    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(16, 2))
    assert (
        len(train_model(model, torch.utils.data.DataLoader(Stream(), 4), settings, progress="none"))
        == 4
    )


def test_divergence_stops_the_run_and_keeps_what_was_good(digits, tmp_path):
    settings = TrainSettings(Schedule(lr=1e30, epochs=2, drops=()), select="last")
    with pytest.raises(FloatingPointError, match="training diverged in epoch 1"):
        train_model(
            build_model("resnet20", 10, 1, seed=0),
            digits.train,
            settings,
            checkpoint=tmp_path / "p.safetensors",
            progress="none",
        )
    assert not (tmp_path / "p.safetensors").exists()


KILLED_IN_WRITING = """
import resource, signal, sys, torch
from fisher_unlearn.networks.train import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
save_tensors(sys.argv[1], {"x": torch.zeros(10_000)})
"""


def test_a_process_that_dies_in_writing_leaves_one_part_that_the_next_replaces(tmp_path):
    for _ in range(2):
        died = subprocess.run(
            [sys.executable, "-c", KILLED_IN_WRITING, str(tmp_path / "x.safetensors")],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        )
        assert died.returncode == -signal.SIGXFSZ
        (part,) = tmp_path.glob("*.part")
        assert re.fullmatch(r"x\.safetensors\.[0-9a-f]{8}\.part", part.name)
    save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_files_that_are_not_whole_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build_model("resnet20", 10, 1, seed=0)
    save_weights(model, "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Trap()))
    torch.save({"x": Trap()}, "zip.pt")
    cases = {
        "pickle.pt": "never opened",
        "zip.pt": "never opened",
        "half": "truncated or damaged",
        "empty": "truncated or damaged",
        "junk": "truncated or damaged",
    }
    for name, content in {
        "half": good[: len(good) // 2],
        "empty": b"",
        "junk": b"\xff" * 1000,
    }.items():
        (tmp_path / name).write_bytes(content)
    before = copy.deepcopy(model)
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_weights(model, name)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_weights(model, "none")
    with pytest.raises(ValueError, match="another network"):
        load_weights(build_model("resnet20", 9, 1), "good.safetensors")
    assert not (tmp_path / "trapped").exists() and same(model, before)
    other = build_model("resnet20", 10, 1, seed=1)
    load_weights(other, "good.safetensors")
    assert same(other, model)


def test_a_checkpoint_of_another_run_is_refused(digits, settings, tmp_path):
    file, train = (
        tmp_path / "p.safetensors",
        lambda s, model=None: train_model(
            model or build_model("resnet20", 10, 1, seed=0),
            digits.train,
            s,
            checkpoint=file,
            progress="none",
        ),
    )
    short = replace(settings, schedule=Schedule(epochs=1, drops=()))
    train(short)
    for other in (
        replace(short, seed=5),
        replace(short, batch_size=64),
        replace(short, weight_decay=0.0),
    ):
        with pytest.raises(ValueError, match="another training run"):
            train(other)
    with pytest.raises(ValueError, match="another training run"):
        train_model(
            build_model("resnet20", 10, 1, seed=0),
            digits.train[torch.arange(1, 1297)],
            short,
            checkpoint=file,
            progress="none",
        )
    with pytest.raises(ValueError, match="another network"):
        train(short, build_model("densenet", 10, 1))


def test_a_damaged_file_of_progress_is_said_and_the_training_starts_anew(
    digits, settings, tmp_path, capsys
):
    """Cut off, a bit flipped in a tensor or in the rows, or signed anew but not what progress
    can be: it ends as if there had been none."""
    file, short = (
        tmp_path / "p.safetensors",
        replace(settings, schedule=Schedule(epochs=1, drops=())),
    )
    few = digits.train[torch.arange(200)]

    def trained():
        model = build_model("resnet20", 10, 1, seed=0)
        train_model(model, few, short, checkpoint=file, progress="none")
        return model

    whole = trained()
    good = file.read_bytes()
    tensors, meta = read_tensors(file)
    less = {n: t for n, t in tensors.items() if not n.startswith("optimizer")}
    half = {n: t.bfloat16() if n.startswith("optimizer") else t for n, t in tensors.items()}
    odd = [
        (less, meta),
        (half, meta),
        (tensors, meta | {"rows": "[" * 100_000}),
        (tensors, meta | {"rows": json.dumps(json.loads(meta["rows"]) * 100)}),
        (tensors, meta | {"way": '{"precision": "bfloat16"}'}),
        (tensors, meta | {"way": "[]"}),
        (tensors | {"other:x": torch.zeros(1)}, meta),
    ]
    start = 8 + int.from_bytes(good[:8], "little")
    flipped = bytearray(good)
    flipped[start + 1000] ^= 16
    contents = [
        good[:5000],
        bytes(flipped),
        good.replace(b"rows", b"rovs", 1),
        b"",
        good.replace(b'"digest"', b'"dijest"', 1),
    ]
    for content in contents:
        file.write_bytes(content)
        assert same(trained(), whole) and "starts anew" in capsys.readouterr().out
    for content in odd:
        save_tensors(file, content[0], **content[1])
        assert same(trained(), whole)
        said = capsys.readouterr().out
        assert "damaged" in said and said.count("\n") == 1, content


def test_a_flipped_bit_in_weights_is_refused(tmp_path):
    model = build_model("resnet20", 10, 1, seed=0)
    found = save_weights(model, tmp_path / "w.safetensors")
    content = bytearray((tmp_path / "w.safetensors").read_bytes())
    content[-1000] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its content has the digest"):
        load_weights(model, tmp_path / "flipped.safetensors")
    save_weights(build_model("resnet20", 10, 1, seed=1), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is damaged or another's"):
        load_weights(model, tmp_path / "other.safetensors", found)
    load_weights(model, tmp_path / "w.safetensors", found)


def test_weights_kept_as_whole_numbers_are_refused_and_halves_are_not(tmp_path):
    model = build_model("resnet20", 10, 1, seed=0)
    for kind in (torch.int8, torch.complex64):
        save_tensors(
            tmp_path / "w.safetensors", {n: t.to(kind) for n, t in model.state_dict().items()}
        )
        with pytest.raises(ValueError, match="of another network"):
            load_weights(model, tmp_path / "w.safetensors")
    save_tensors(
        tmp_path / "w.safetensors",
        {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()},
    )
    load_weights(model, tmp_path / "w.safetensors")


def test_weights_are_saved_whatever_their_layout(tmp_path):
    model = build_model("resnet20", seed=0).to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "w.safetensors")
    again = build_model("resnet20", seed=1)
    load_weights(again, tmp_path / "w.safetensors")
    assert same(model, again) and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "bad",
    [
        {"length": 0},
        {"batch_size": 0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"select": "first"},
        {"holdout": 1.0},
        {"layout": "last"},
        {"seed": -1},
    ],
)
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` of the training settings is"):
        TrainSettings(**bad)


def test_bad_batches_are_refused_before_any_step(digits, settings):
    model = build_model("resnet20", 10, 1, seed=0)
    before = copy.deepcopy(model)
    with pytest.raises(TypeError, match="only once"):
        train_model(model, iter(digits.train.batches(8)), settings)
    with pytest.raises(TypeError, match="normalise"):
        train_model(model, [(digits.train.images, digits.train.labels)], settings)
    with pytest.raises(ValueError, match="labels from 0 to 10"):
        train_model(model, [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]))], settings)
    with pytest.raises(TypeError, match=r"`evaluate\['test'\]` can be read only once"):
        train_model(model, digits.train, settings, {"test": iter(digits.test.batches(8))})
    with pytest.raises(OSError, match="cannot write in the folder"):
        train_model(model, digits.train, settings, checkpoint="/proc/none/p.safetensors")
    with pytest.raises(ValueError, match="needs test images"):
        train_model(model, digits.train, replace(settings, select="best"))
    late = Samples(
        digits.train.images,
        digits.train.labels.clone().index_fill_(0, torch.tensor([1000]), 12),
        (0.5,),
        (0.5,),
        8,
    )
    with pytest.raises(ValueError, match="labels from 0 to 12, but the model has 10 classes"):
        train_model(model, late, settings)
    assert same(model, before)


def test_progress_is_a_line_an_epoch_outside_a_terminal(digits, settings, capsys):
    short = replace(settings, schedule=Schedule(epochs=2, drops=()))
    history = train_model(
        build_model("resnet20", 10, 1, seed=0),
        digits.train,
        short,
        {"test": digits.test.batches(500)},
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 2
        and lines[1].startswith("epoch 2/2  lr 0.1  loss")
        and isinstance(history, pd.DataFrame)
    )
    train_model(build_model("resnet20", 10, 1, seed=0), digits.train, short, progress="bar")
    assert "batch" in capsys.readouterr().err
