"Other optimisers, losses and schedules: each trains as torch does, and goes on where it stopped."

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from fisher_unlearn.networks.optimizers import OPTIMIZERS, name_of
from fisher_unlearn.networks.schedule import Schedule, replay, schedule_of
from fisher_unlearn.networks.train import TrainSettings, read_tensors, save_tensors, train_model

BATCHES = [
    (torch.randn(8, 5, generator=torch.Generator().manual_seed(k)), torch.arange(8) % 3)
    for k in range(3)
]
PLAIN = TrainSettings(Schedule(lr=0.01, epochs=3, drops=(2,)), select="last")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def trained(settings, model=None, **more):
    train_model(model := model or net(), BATCHES, settings, progress="none", **more)
    return model


def stopped_after_an_epoch(settings, path):
    "Train until there is a file of progress, and then stop."

    class Stops(list):
        def __iter__(self):
            if path.exists():
                raise KeyboardInterrupt
            return super().__iter__()

    with pytest.raises(KeyboardInterrupt):
        train_model(net(), Stops(BATCHES), settings, None, path, "none")
    assert len(json.loads(read_tensors(path)[1]["rows"])) == 1


def by_hand(make, settings, loss=F.cross_entropy, clip=None):
    "A loop of one's own, with torch's optimiser."
    model = net()
    optimizer = make(model.parameters())
    for step in range(settings.epochs * len(BATCHES)):
        inputs, labels = BATCHES[step % len(BATCHES)]
        for group in optimizer.param_groups:
            group["lr"] = settings.schedule.rate(step, len(BATCHES))
        optimizer.zero_grad()
        loss(model(inputs), labels).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_by_name_is_torchs(name):
    usual = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    takes = OPTIMIZERS[name].__init__.__code__.co_varnames
    make = partial(OPTIMIZERS[name], **{n: v for n, v in usual.items() if n in takes})
    settings = replace(PLAIN, optimizer=name)
    assert same(trained(settings), by_hand(make, settings))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_training_that_stopped_goes_on_as_if_it_had_not(name, tmp_path):
    settings = replace(PLAIN, optimizer=name)
    whole = trained(settings, checkpoint=tmp_path / "whole")
    stopped_after_an_epoch(settings, tmp_path / "stopped")
    train_model(model := net(), BATCHES, settings, None, tmp_path / "stopped", "none")
    assert same(model, whole)


def test_a_factory_has_rates_of_its_own_which_the_schedule_scales():
    def factory(parameters):
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.02)

    settings = TrainSettings(Schedule(lr=0.02, epochs=2, drops=(1,)), select="last")
    settings = replace(settings, optimizer=factory)
    model = trained(settings)
    plain = net()
    groups = [{"params": [next(plain.parameters())]}, {"params": [*plain.parameters()][1:]}]
    optimizer = torch.optim.SGD(groups, lr=0.02)
    for step in range(6):
        inputs, labels = BATCHES[step % 3]
        rate = 0.02 if step < 3 else 0.002
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 5 * rate, rate
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs), labels).backward()
        optimizer.step()
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), plain.parameters()))


def test_losses_and_clipping():
    smooth = partial(F.cross_entropy, label_smoothing=0.2)
    make = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-4)
    assert same(trained(replace(PLAIN, loss=smooth)), by_hand(make, PLAIN, smooth))
    clipped = trained(replace(PLAIN, clip=0.05))
    assert same(clipped, by_hand(make, PLAIN, clip=0.05)) and not same(clipped, trained(PLAIN))


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adagrad", "nadam", "radam", "rprop"])
def test_zeros_stay_zero_under_other_optimizers(name):
    model = net()
    where = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    with torch.no_grad():
        model[0].weight[where] = 0
    trained(replace(PLAIN, optimizer=name), model, zeros={"0.weight": where})
    assert bool((model[0].weight[where] == 0).all())
    assert bool((model[0].weight[~where] != 0).all())


WRONG = {
    "did you mean 'adamw'?": {"optimizer": "adamww"},
    "unknown loss": {"loss": "hinge"},
    "can't be imported": {"optimizer": "no_such_module:make"},
    "`clip` of the training settings is 0": {"clip": 0.0},
    "`optimizer` of the training settings is 3": {"optimizer": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_optimizer_or_loss_is_refused_with_the_settings(message):
    with pytest.raises((ValueError, TypeError)) as refused:
        replace(PLAIN, **WRONG[message])
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "factory, message",
    [
        (lambda parameters: None, "makes a NoneType"),
        (lambda parameters: torch.optim.LBFGS(parameters), "makes a LBFGS"),
        (lambda parameters: torch.optim.SGD([], lr=1), "can't be made"),
        (lambda: None, "can't be made"),
    ],
)
def test_a_factory_that_makes_no_optimizer_is_refused_before_the_first_step(factory, message):
    model = net()
    with pytest.raises((ValueError, TypeError), match=message):
        trained(replace(PLAIN, optimizer=factory), model)
    assert same(model, net())


def test_keys_and_records_are_as_before_where_nothing_else_was_chosen():
    record = PLAIN.record
    assert not {"optimizer", "loss", "clip"} & {*record} and "rates" not in record["schedule"]
    others = {
        "optimizer": "adam",
        "loss": partial(F.cross_entropy, label_smoothing=0.1),
        "clip": 1.0,
    }
    found = [replace(PLAIN, **{name: value}).values for name, value in others.items()]
    texts = {json.dumps(values, sort_keys=True) for values in (PLAIN.values, *found)}
    assert len(texts) == 4


def test_functions_without_a_name_are_told_apart():
    one, other = (lambda a, b: a.sum()), (lambda a, b: a.mean())
    assert name_of(one) != name_of(other) and name_of(one) == name_of(one)


def test_a_file_of_progress_from_before_is_read(tmp_path):
    "Momentum had a name of its own, when SGD was all there was."
    whole = trained(PLAIN, checkpoint=tmp_path / "whole")
    short = tmp_path / "short"

    stopped_after_an_epoch(PLAIN, short)
    tensors, metadata = read_tensors(short)
    old = {n.replace("optimizer:momentum_buffer:", "momentum:"): t for n, t in tensors.items()}
    assert any(name.startswith("momentum:") for name in old)
    save_tensors(short, old, **metadata)
    model = net()
    train_model(model, BATCHES, PLAIN, None, short, "none")
    assert same(model, whole)


# ---------------------------------------------------------------- schedules

SCHEDULERS = {
    "CosineAnnealingLR": {},
    "StepLR": {"step_size": 4, "gamma": 0.5},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"start_factor": 0.1},
    "PolynomialLR": {"power": 2},
    "OneCycleLR": {"max_lr": 0.3},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_those_of_torchs_scheduler(name):
    schedule = schedule_of(name, 0.1, 10, **SCHEDULERS[name])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    length = {
        "CosineAnnealingLR": {"T_max": 10},
        "OneCycleLR": {"total_steps": 10},
        "LinearLR": {"total_iters": 10},
        "PolynomialLR": {"total_iters": 10},
    }
    theirs = getattr(lr_scheduler, name)(optimizer, **SCHEDULERS[name], **length.get(name, {}))
    for epoch in range(10):
        assert schedule.rate(epoch * 7, 7) == schedule.rate(epoch * 7 + 6, 7)
        assert schedule.rate(epoch * 7, 7) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("length", [1, 3, 5, 10, 20])
def test_a_replay_runs_through_all_rates_in_their_order(length):
    short = replay(schedule_of("CosineAnnealingLR", 0.1, 10), length)
    rates = [short.rate(step, 20) for step in range(length * 20)]
    assert list(dict.fromkeys(rates)) == list(short.rates)
    counts = [rates.count(rate) for rate in short.rates]
    assert max(counts) - min(counts) <= 1
    assert short.rate(10**6, 20) == short.rates[-1]


def test_a_factory_of_a_scheduler():
    chained = schedule_of(lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, 2), 0.2, 4)
    assert chained.rates == (0.1, 0.1, 0.2, 0.2)
    with pytest.raises(ValueError, match="they must be as many as the epochs, 3"):
        Schedule(epochs=3, drops=(), rates=(0.1, 0.1))
