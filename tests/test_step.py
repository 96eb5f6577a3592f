"""Ways to compute a step: what they give beside the plain way, what a trial may not change, and
what a run remembers of its choice."""

import copy
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fisher_unlearn.networks import step as steps_module
from fisher_unlearn.networks import train as train_module
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.lab.settings import RunSettings, training_key
from fisher_unlearn.networks.machine import repeatable
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.step import Way, allowed_ways, choose_way, forward_in
from fisher_unlearn.networks.train import TrainSettings, train_model

PLAIN, COMPILED, HALF = Way(), Way(compiled=True), Way(precision="bfloat16")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHORT = dict(schedule=Schedule(lr=0.05, epochs=3, drops=(2,)), select="last")
compile_really = torch.compile


@pytest.fixture
def traced(monkeypatch):
    """torch.compile with the whole of its tracing, and PyTorch's own operators in place of
    generated code."""
    monkeypatch.setattr(torch, "compile", partial(compile_really, backend="aot_eager"))


def small():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


def batch(n=16):
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 10


def pretend(monkeypatch, wrap):
    "Let `torch.compile` give a function of the model."
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: wrap(model))


def slow(model):
    def forward(x):
        time.sleep(0.03)
        return model(x)

    return forward


def close(a, b, tol):
    return all(
        (x.double() - y.double()).abs().max() <= tol * y.double().abs().max()
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_autocast_is_what_bfloat16_means():
    model, (x, _) = small().eval(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).float()
    found = forward_in(model, HALF)(x)
    assert (
        found.dtype == torch.float32
        and torch.equal(found, expected)
        and not torch.equal(found, model(x))
    )


def test_batches_of_another_shape_take_the_model_itself(monkeypatch):
    made = []
    pretend(monkeypatch, lambda model: lambda x: made.append(len(x)) or model(x))
    forward = forward_in(small().eval(), COMPILED)
    for n in (16, 16, 5, 16):
        forward(batch(n)[0])
    assert made == [16, 16, 16]


def test_the_faster_way_is_chosen_if_the_run_is_long_enough(monkeypatch):
    model = small()
    pretend(monkeypatch, slow)
    assert choose_way(model, *batch(), [PLAIN, COMPILED], steps=10**9) == PLAIN
    pretend(monkeypatch, lambda _: model)
    late = slow(model.forward)
    monkeypatch.setattr(model, "forward", lambda x: late(x))
    monkeypatch.setattr(
        steps_module, "forward_in", lambda m, way: type(m).forward.__get__(m) if way.compiled else m
    )
    assert choose_way(model, *batch(), [PLAIN, COMPILED], steps=10**9) == COMPILED
    assert choose_way(model, *batch(), [PLAIN, COMPILED], steps=10) == PLAIN


def test_a_short_run_compiles_nothing(monkeypatch):
    pretend(monkeypatch, lambda _: pytest.fail("compiled"))
    for ways in (allowed_ways("auto", "float32"), allowed_ways("auto", "auto")):
        assert not choose_way(small(), *batch(), ways, steps=10).compiled


def test_a_trial_leaves_no_trace(traced):
    model, (x, y) = small(), batch()
    F.cross_entropy(model(x), y).backward()
    model[1].eval()
    before, gradients, modes = (
        copy.deepcopy(model),
        [p.grad.clone() for p in model.parameters()],
        [m.training for m in model.modules()],
    )
    random = torch.get_rng_state()
    choose_way(model, x, y, allowed_ways("auto", "auto"), steps=10**9)
    assert (
        same(model, before)
        and torch.equal(random, torch.get_rng_state())
        and modes == [m.training for m in model.modules()]
    )
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))


def test_what_can_not_be_compiled_is_said(monkeypatch):
    def broken(model):
        def forward(x):
            raise KeyError("no compiler")

        return forward

    pretend(monkeypatch, broken)
    with pytest.raises(
        RuntimeError, match="can't be compiled here .*no compiler.*let `compile` be False"
    ):
        forward_in(small(), COMPILED)(batch()[0])
    with pytest.raises(RuntimeError, match="mat1 and mat2|shapes cannot"):
        forward_in(nn.Linear(3, 2), COMPILED)(torch.randn(2, 5))  # the model's own fault
    with pytest.warns(UserWarning, match="compiled=True.*was tried and failed"):
        assert choose_way(small(), *batch(), [PLAIN, COMPILED], steps=10**9) == PLAIN
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="none of the ways"):
        choose_way(small(), *batch(), [COMPILED, Way(True, "bfloat16")], steps=10**9)


def test_a_traced_run_is_the_plain_run_and_holds_zeros(digits, traced):
    plain, ours = (build_model("resnet20", 10, 1, seed=0) for _ in range(2))
    zeros = {"classifier.weight": torch.zeros(10, 64, dtype=torch.bool)}
    zeros["classifier.weight"][3] = True
    for model, how in ((plain, False), (ours, True)):
        model.classifier.weight.data[3] = 0
        train_model(
            model,
            digits.train[torch.arange(300)],
            TrainSettings(**SHORT, compile=how),
            zeros=zeros,
            progress="none",
        )
    assert (ours.classifier.weight[3] == 0).all() and close(ours, plain, 1e-3)


@pytest.mark.slow
def test_a_run_in_bfloat16_learns_and_differs(digits, original, settings):
    model = build_model("resnet20", 10, 1, seed=0)
    history = train_model(
        model,
        digits.train,
        TrainSettings(settings.schedule, select="last", precision="bfloat16"),
        {"test": digits.test.batches(500)},
        progress="none",
    )
    assert (
        history.accuracy.iloc[-1] > 80
        and not same(model, original)
        and all(p.dtype == torch.float32 for p in model.parameters())
    )
    assert "precision" not in history


def test_a_choice_is_told_and_outlives_the_process(digits, monkeypatch, tmp_path):
    "Resumed, a run doesn't choose again, however its trial would end now."
    settings, data = TrainSettings(**SHORT, precision="auto"), digits.train[torch.arange(200)]
    whole, resumed = (build_model("resnet20", 10, 1, seed=0) for _ in range(2))
    monkeypatch.setattr(train_module, "choose_way", lambda *_: HALF)
    history = train_model(whole, data, settings, progress="none")
    assert set(history.precision) == {"bfloat16"} and set(history.compiled) == {False}

    check = train_module._check_finite

    def stop(model, loss, epoch, settings):
        check(model, loss, epoch, settings)
        if epoch == 2:
            raise InterruptedError

    monkeypatch.setattr(train_module, "_check_finite", stop)
    with pytest.raises(InterruptedError):
        train_model(
            copy.deepcopy(resumed),
            data,
            settings,
            checkpoint=tmp_path / "p.safetensors",
            progress="none",
        )
    monkeypatch.setattr(train_module, "_check_finite", check)
    monkeypatch.setattr(train_module, "choose_way", lambda *_: pytest.fail("chosen again"))
    train_model(resumed, data, settings, checkpoint=tmp_path / "p.safetensors", progress="none")
    assert same(whole, resumed)


def test_ways_are_in_the_key_where_they_are_not_plain():
    ways = (
        {},
        {"compile": False, "precision": "float32", "cuda_graph": False},
        {"compile": True},
        {"compile": "auto"},
        {"precision": "bfloat16"},
        {"precision": "auto"},
        {"cuda_graph": True},
    )
    keys = [training_key(RunSettings(train=TrainSettings(**how))) for how in ways]
    assert keys[0] == keys[1] and len(set(keys)) == 6


@pytest.mark.parametrize(
    "bad", [{"compile": "yes"}, {"compile": None}, {"precision": "float16"}, {"cuda_graph": "auto"}]
)
def test_bad_ways_are_refused(bad):
    with pytest.raises(
        (TypeError, ValueError), match=f"`{next(iter(bad))}` of the training settings is"
    ):
        TrainSettings(**bad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graph_changes_no_bit(digits, device, precision):
    """300 images are two whole batches, which a GPU replays, and a shorter one, which it
    launches; masked weights stay at zero."""
    data, settings = digits.train[torch.arange(300)], TrainSettings(**SHORT, precision=precision)
    zeros = {"classifier.weight": torch.arange(10).eq(3)[:, None].expand(10, 64)}
    plain, ours = (build_model("resnet20", 10, 1, seed=0).to(device) for _ in range(2))
    losses = []
    for model, graph in ((plain, False), (ours, True)):
        model.classifier.weight.data[3] = 0
        with repeatable(2):
            losses.append(
                train_model(
                    model, data, replace(settings, cuda_graph=graph), zeros=zeros, progress="none"
                ).train_loss.tolist()
            )
    assert same(plain, ours) and losses[0] == losses[1] and (ours.classifier.weight[3] == 0).all()


def test_capturing_leaves_the_model_and_the_generators_as_they_were(monkeypatch):
    "Only batches of the first shape are replayed."
    replayed = []

    def capture(module, sample, allow_unused_input):
        module(*sample).sum().backward()  # as a recording does, to warm up
        return lambda inputs: replayed.append(len(inputs)) or module(inputs)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    model, plain = small().train(), small().train()
    plain.load_state_dict(model.state_dict())
    forward = forward_in(model, Way(graphed=True))
    for n in (16, 16, 5):
        x, _ = batch(n)
        torch.manual_seed(n)
        found = forward(x)
        torch.manual_seed(n)
        assert torch.equal(found, plain(x))
    assert (
        replayed == [16, 16]
        and same(model, plain)
        and all(p.grad is None for p in model.parameters())
    )


def test_what_can_not_be_captured_is_said():
    if torch.cuda.is_available():
        forward = lambda x: torch.relu(x) if x.sum() > 0 else x
    else:
        forward = torch.relu  # without a GPU nothing can be captured
    with pytest.raises(
        RuntimeError, match="can't be captured in a CUDA graph .*let `cuda_graph` be False"
    ):
        steps_module._graphed(small(), forward)(batch()[0].to(DEVICES[-1]))


@pytest.mark.slow
def test_a_compiled_run_learns_as_the_plain_one_and_resumes_exactly(digits, tmp_path):
    "With generated code: the compiler's own rounding, and a run that stops and goes on."
    settings = TrainSettings(Schedule(epochs=4, drops=(2,)), select="last", compile=True)
    plain, whole, resumed = (build_model("resnet20", 10, 1, seed=0) for _ in range(3))
    test = {"test": digits.test.batches(500)}
    expected = train_model(
        plain, digits.train, TrainSettings(settings.schedule, select="last"), test, progress="none"
    )
    found = train_model(whole, digits.train, settings, test, progress="none")
    assert (
        found.train_loss[0] == pytest.approx(expected.train_loss[0], rel=0.02)
        and abs(found.accuracy.iloc[-1] - expected.accuracy.iloc[-1]) < 5
    )

    class Stop(Exception):
        pass

    def stop(model, loss, epoch, settings):
        if epoch == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "_check_finite", stop)
        with pytest.raises(Stop):
            train_model(
                copy.deepcopy(resumed),
                digits.train,
                settings,
                test,
                tmp_path / "p.safetensors",
                progress="none",
            )
    torch.compiler.reset()  # as in a new process
    train_model(resumed, digits.train, settings, test, tmp_path / "p.safetensors", progress="none")
    assert same(whole, resumed)
