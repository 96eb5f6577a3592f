"""Training at its edges: files that lie where a checkpoint goes, optimisers and losses of anyone's,
loaders with generators of their own, labels in columns, sets with names that are taken."""

import copy
import json
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from fisher_unlearn import unlearn
from fisher_unlearn.images.data import Samples
from fisher_unlearn.methods import unlearn as unlearn_room
from fisher_unlearn.methods.teachers import DELETE
from fisher_unlearn.networks.foreign import load_checkpoint
from fisher_unlearn.networks.metrics import evaluate
from fisher_unlearn.networks.models import check_batch
from fisher_unlearn.networks.objective import Teacher
from fisher_unlearn.networks.optimizers import make_optimizer, name_of
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, load_weights, save_weights, train_model
from fisher_unlearn.scores.fisher import diag_fisher

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 6, generator=GENERATOR), torch.arange(24) % 3
SHORT = TrainSettings(Schedule(lr=0.1, epochs=3, drops=(2,)), select="last", batch_size=8)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def train(model, samples=None, settings=SHORT, **more):
    samples = DataLoader(TensorDataset(X, Y), 8) if samples is None else samples
    return train_model(model, samples, settings, progress="none", **more)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Files


@pytest.fixture(params=["pickle", "weights", "text", "folder"])
def foreign_file(request, tmp_path):
    "Something of the user's that is no checkpoint of a training."
    path = tmp_path / "mine"
    if request.param == "folder":
        (path / "in it").mkdir(parents=True)
    elif request.param == "pickle":
        torch.save(net().state_dict(), path)
    elif request.param == "weights":
        save_weights(net(), path)
    else:
        path.write_text("a,b\n1,2\n", encoding="utf-8")
    return path


def test_a_file_that_is_no_checkpoint_is_never_written_over(foreign_file, monkeypatch):
    held = None if foreign_file.is_dir() else foreign_file.read_bytes()
    with pytest.raises(ValueError, match="no checkpoint of a training"):
        train(net(), checkpoint=foreign_file)
    monkeypatch.setattr(unlearn_room, "_changed", lambda *_: pytest.fail("it was scored first"))
    with pytest.raises(ValueError, match="no checkpoint of a training"):
        parts = [(X[:8], Y[:8])], [(X[8:], Y[8:])]
        unlearn(net(), *parts, fine_tune=SHORT, checkpoint=foreign_file, classes=(0,))
    assert held is None or foreign_file.read_bytes() == held


def test_an_empty_or_broken_checkpoint_is_begun_anew(tmp_path, capsys):
    train(whole := net(), checkpoint=tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for held in (b"", content[: len(content) // 2], content[:-9] + b"something"):
        (tmp_path / "broken").write_bytes(held)
        train(again := net(), checkpoint=tmp_path / "broken")
        assert same(again, whole) and "starts anew" in capsys.readouterr().out


def test_a_checkpoint_of_another_network_is_said_before_anything_is_scored(tmp_path, monkeypatch):
    train(nn.Sequential(nn.Linear(6, 3)), checkpoint=tmp_path / "other")
    monkeypatch.setattr(unlearn_room, "_changed", lambda *_: pytest.fail("it was scored first"))
    with pytest.raises(ValueError, match="of another network"):
        parts = [(X[:8], Y[:8])], [(X[8:], Y[8:])]
        unlearn(net(), *parts, fine_tune=SHORT, checkpoint=tmp_path / "other", classes=(0,))


def samples(mean=0.5, std=0.25):
    pixels = torch.randint(0, 256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return Samples(pixels.to(torch.uint8), torch.arange(12) % 3, (mean,), (std,), 8)


def test_a_checkpoint_is_that_of_its_normalisation_and_its_frozen_layers(tmp_path):
    flat = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    batches = lambda *how: samples(*how).batches(4)
    torch.manual_seed(0)
    start = flat()
    train(copy.deepcopy(start), batches(), checkpoint=tmp_path / "p")
    with pytest.raises(ValueError, match="another training run"):
        train(copy.deepcopy(start), batches(0.0, 3.0), checkpoint=tmp_path / "p")
    with pytest.raises(ValueError, match="another training run"):
        frozen = copy.deepcopy(start)
        frozen[1].bias.requires_grad_(False)
        train(frozen, batches(), checkpoint=tmp_path / "p")


# Optimisers and losses


def test_an_optimizer_of_other_parameters_is_refused_and_their_gradients_stay():
    model = net()
    model(X).sum().backward()
    held = [p.grad.clone() for p in model.parameters()]
    settings = replace(SHORT, optimizer=lambda parameters: torch.optim.SGD(model.parameters(), 0.1))
    parts = [(X[:8], Y[:8])], [(X[8:], Y[8:])]
    with pytest.raises(ValueError, match="not those of the model in training"):
        unlearn(model, *parts, fine_tune=settings, classes=(0,))
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), held))
    some = replace(SHORT, optimizer=lambda parameters: torch.optim.SGD([*parameters][2:], 0.1))
    train(part := net(), settings=some)  # some of them are
    assert torch.equal(part[0].weight, net()[0].weight) and not same(part, net())


class Closure(torch.optim.SGD):
    "An optimiser whose steps evaluate the loss again."

    def step(self, closure):
        return super().step(closure)


def test_an_optimizer_whose_steps_need_a_function_is_refused():
    with pytest.raises(TypeError, match="whose steps need no function"):
        make_optimizer(lambda parameters: Closure(parameters, 0.1), net(), 0.1)


class Counting(torch.optim.SGD):
    "An optimiser that keeps a number in its groups, by which its steps shrink."

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            rate, group["lr"] = group["lr"], group["lr"] / group["k"]
            super().step()
            group["lr"] = rate


def test_numbers_in_the_groups_of_an_optimizer_outlast_a_stop(tmp_path):
    settings = replace(SHORT, optimizer=partial(Counting, lr=0.1))
    train(whole := net(), settings=settings)
    goes_on(net(), None, settings, tmp_path / "p", wanted=whole)


def goes_on(model, loader, settings, file, wanted):
    "Train for an epoch, stop, go on from the checkpoint, and compare."

    def stop(module, inputs):
        if module.training and file.exists():
            raise KeyboardInterrupt

    start = copy.deepcopy(model)
    hook = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        train(model, loader, settings, checkpoint=file)
    hook.remove()
    train(start, loader, settings, checkpoint=file)
    assert same(start, wanted)


def test_a_group_without_a_rate_is_no_division_by_zero():
    def two(parameters):
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": rest}], lr=0.1)

    rows = train(net(), settings=replace(SHORT, optimizer=two))
    assert rows.lr.tolist() == pytest.approx([0.1, 0.1, 0.01])


def smooth(much):
    return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=much)


class Focal:
    "A loss that is an object."

    def __init__(self, power):
        self.power = power

    def __call__(self, logits, labels):
        return F.cross_entropy(logits, labels) ** self.power


@pytest.mark.parametrize(
    "one, other",
    [
        (smooth(0.1), smooth(0.5)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.5)),
        (nn.CrossEntropyLoss(weight=X[0, :3]), nn.CrossEntropyLoss(weight=X[1, :3])),
        (Focal(1), Focal(2)),
        (partial(F.cross_entropy, weight=X[0, :3]), partial(F.cross_entropy, weight=X[1, :3])),
    ],
    ids=["closures", "options", "tensors", "objects", "partials"],
)
def test_functions_that_hold_other_values_have_other_names(one, other):
    assert name_of(one) != name_of(other) and name_of(one) == name_of(copy.deepcopy(one))


def test_what_holds_itself_is_refused():
    loop = Focal(1)
    loop.itself = loop
    with pytest.raises(ValueError, match="holds itself"):
        name_of(loop)


def test_a_name_is_the_same_in_every_process():
    code = """
from functools import partial
from torch.optim import AdamW
from fisher_unlearn.networks.optimizers import name_of
inner = lambda ps: AdamW([p for p in ps if p.requires_grad], lr=1e-3)
print(name_of(inner), name_of(partial(AdamW, lr=1e-3, foreach=inner)), name_of({1, 'a', 'b'}.add))
"""
    said = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
    assert len(said) == 1


# Loaders


class Noisy(Dataset):
    "Samples with noise that is drawn anew each time."

    def __init__(self, noise=lambda: 0.0):
        self.noise = noise

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + self.noise(), Y[i]


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), 8, shuffle=True),
    "generator": lambda: DataLoader(
        Noisy(), 8, shuffle=True, generator=torch.Generator().manual_seed(4)
    ),
    "numpy": lambda: DataLoader(Noisy(lambda: np.random.rand()), 8, shuffle=True),
    "python": lambda: DataLoader(Noisy(random.random), 8),
    "torch": lambda: DataLoader(Noisy(lambda: torch.rand(())), 8),
    "batch sampler": lambda: DataLoader(
        Noisy(),
        batch_sampler=BatchSampler(
            RandomSampler(Noisy(), generator=torch.Generator().manual_seed(4)), 8, False
        ),
    ),
}


def drawn(loader):
    "The states of all generators that a loader may draw from."
    owners = (loader, loader.sampler, loader.batch_sampler, loader.batch_sampler.sampler)
    own = [g for g in (getattr(o, "generator", None) for o in owners) if g is not None]
    states = [torch.get_rng_state(), *(g.get_state() for g in own)]
    return [s.tolist() for s in states] + [random.getstate(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize("kind", LOADERS)
def test_any_loader_trains_the_same_again_goes_on_and_moves_no_generator(kind, tmp_path):
    loader, settings = LOADERS[kind](), SHORT
    train(one := net(), loader, settings)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    train(other := net(), LOADERS[kind](), settings)
    assert same(one, other)
    goes_on(net(), LOADERS[kind](), settings, tmp_path / "p", wanted=one)
    loader, model, forget = LOADERS[kind](), net(), [(X[:3], Y[:3])]
    before = drawn(loader)
    for call in (
        lambda: train(model, loader, settings),
        lambda: unlearn(model, forget, loader, classes=(0,), fine_tune=SHORT, check_sets=False),
        lambda: unlearn(model, forget, loader, method="scrub", classes=(0,), check_sets=False),
    ):
        call()
        assert drawn(loader) == before


def test_a_loader_that_leaves_samples_out_is_asked_for_its_batches():
    def whole(items):
        kept = [item for item in items if item[1] != 3]
        return torch.stack([x for x, _ in kept]), torch.tensor([int(y) for _, y in kept])

    odd = [(x, 3 if 9 <= i < 16 else int(y)) for i, (x, y) in enumerate(zip(X, Y))]
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    train(model, DataLoader(odd, 8, collate_fn=whole))  # of which one batch has one sample


# Sets and labels


def test_the_name_of_what_is_held_out_is_taken():
    settings = replace(SHORT, select="validation")
    with pytest.raises(ValueError, match='has a set "validation"'):
        train(net(), samples(), settings, evaluate={"validation": [(X, Y)]})


@pytest.mark.parametrize("count, select", [(0, "last"), (0, "validation"), (1, "validation")])
def test_too_few_samples_are_said(count, select):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match=f"`samples` are {count}"):
        train(flat, samples()[:count], replace(SHORT, select=select))


def test_one_sample_is_left_to_train_on_whatever_is_held_out():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    settings = replace(SHORT, select="validation", holdout=0.9)
    assert len(train(flat, samples()[:2], settings)) == 3


def test_training_learns_wherever_the_caller_stands():
    train(wanted := net())
    for context in (torch.no_grad, torch.inference_mode):
        model = net()
        with context():
            train(model)
        assert same(model, wanted)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        train(net().requires_grad_(False))


def test_one_hot_labels_are_said_wherever_nothing_else_says_what_they_mean():
    columns, settings = F.one_hot(Y, 3), replace(SHORT, loss="binary_cross_entropy")
    calls = {
        "evaluate": lambda: evaluate(net(), {"t": [(X, columns)]}),
        "diag_fisher": lambda: diag_fisher(net(), [(X, columns)]),
        "unlearn": lambda: unlearn(
            net(), [(X[:8], columns[:8])], [(X[8:], columns[8:])], classes=(0,), ratio=0.2
        ),
    }
    for call in calls.values():
        with pytest.warns(UserWarning, match="argmax"):
            call()
    several = columns.clone()
    several[0, :2] = 1
    assert "t_acc" in evaluate(net(), {"t": [(X, several)]}) and settings.several


def test_what_can_not_be_measured_is_named():
    for labels, error in ((Y + 1, "labels are outside"), (torch.full((24,), -1), "outside")):
        with pytest.raises(ValueError, match=f"the set 'mine' can't be measured: .*{error}"):
            evaluate(net(), {"mine": [(X, labels)]})

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, x):
            return self.layer(x)[:, 0]

    with pytest.raises(ValueError, match="'mine' can't be measured: .*it must give logits"):
        evaluate(Flat(), {"mine": [(X, Y)]})


# Networks


class InPlace(nn.Module):
    "A network that normalises its input where it lies."

    def __init__(self, in_place=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.in_place = net(), in_place

    def forward(self, x):
        return self.layers(x.sub_(1).mul_(3) if self.in_place else (x - 1) * 3)


def test_a_teacher_leaves_its_inputs_as_they_are():
    x = X.clone()
    Teacher(InPlace())(x)
    assert torch.equal(x, X)
    parts = lambda: ([(X[:8].clone(), Y[:8])], [(X[8:].clone(), Y[8:])])
    made = [
        unlearn(InPlace(way), *parts(), method=DELETE(), classes=(0,), check_sets=False).model
        for way in (True, False)
    ]
    assert all(torch.allclose(a, b) for a, b in zip(*(m.parameters() for m in made)))


def test_files_of_weights_that_are_not_those_of_the_network_are_said(tmp_path):
    model = net()
    whole = {n: (t * 3).to(torch.int8) for n, t in model.state_dict().items()}
    torch.save(whole, tmp_path / "int8.pt")
    with pytest.raises(ValueError, match="`0.weight` is int8, not float32"):
        load_checkpoint(net(), tmp_path / "int8.pt")
    save_weights(model, tmp_path / "w.safetensors")
    for call in (
        lambda m: load_checkpoint(m, tmp_path / "w.safetensors"),
        lambda m: check_batch(m, X, Y),
    ):
        with pytest.raises(ValueError, match="device `meta`"):
            call(net().to("meta"))


class Tied(nn.Module):
    "Two layers with one weight."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_a_file_with_one_name_of_a_tied_weight_is_read(tmp_path):
    torch.manual_seed(1)
    save_model(one := Tied(), tmp_path / "tied.safetensors")
    torch.manual_seed(2)
    load_checkpoint(other := Tied(), tmp_path / "tied.safetensors")
    assert same(one, other) and other.a.weight is other.b.weight


class Stateful(nn.Linear):
    "A layer whose state is more than tensors."

    def get_extra_state(self):
        return {"k": 7}

    def set_extra_state(self, state):
        pass


def test_a_state_beyond_tensors_that_is_not_read_is_said(tmp_path):
    torch.save(Stateful(6, 3).state_dict(), tmp_path / "w.pt")
    assert "_extra_state" in load_checkpoint(Stateful(6, 3), tmp_path / "w.pt")


def test_weights_of_a_wrapped_network_are_those_of_the_network(tmp_path):
    save_weights(nn.DataParallel(one := net(1)), tmp_path / "w.safetensors")
    load_weights(other := net(2), tmp_path / "w.safetensors")
    assert same(one, other)
    load_weights(nn.DataParallel(third := net(3)), tmp_path / "w.safetensors")
    assert same(one, third)


def test_a_history_says_its_rows(tmp_path):
    rows = train(net(), checkpoint=tmp_path / "p")
    assert json.loads(rows.to_json())["epoch"] == {"0": 1, "1": 2, "2": 3}
