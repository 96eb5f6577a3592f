"""The schedule against torch's own scheduler, and the replay's milestones against the protocol's
numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_unlearn.networks.schedule import Schedule, replay


@pytest.mark.parametrize(
    "batches, milestones",
    [(352, (880, 1320)), (387, (967, 1451)), (3110, (7775, 11662)), (1, (2, 3))],
)
def test_milestones_of_the_protocol(batches, milestones):
    schedule = replay(Schedule(), 5)
    assert tuple(schedule.milestone(e, batches) for e in (80, 120)) == milestones
    for k, m in enumerate(milestones):
        assert schedule.rate(m - 1, batches) == pytest.approx(0.1 ** (k + 1)) and schedule.rate(
            m, batches
        ) == pytest.approx(0.1 ** (k + 2))


@given(st.integers(2, 200), st.integers(1, 12), st.integers(1, 400), st.data())
def test_replayed_steps_are_exact_fractions(epochs, length, batches, data):
    drop = data.draw(st.integers(1, epochs - 1))
    schedule = replay(Schedule(epochs=epochs, drops=(drop,)), length)
    assert schedule.milestone(drop, batches) == int(Fraction(drop, epochs) * length * batches)


def test_training_steps_like_torchs_multistep():
    schedule, batches = Schedule(epochs=8, drops=(3, 6)), 5
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    torchs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6], 0.1)
    for epoch in range(8):
        for step in range(epoch * batches, (epoch + 1) * batches):
            assert schedule.rate(step, batches) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()


def test_warm_up_of_training_rises_once_an_epoch():
    schedule = Schedule(warmup=20)
    assert [schedule.rate(e * 10 + s, 10) for e in range(20) for s in (0, 9)] == pytest.approx(
        [0.1 * (e + 1) / 20 for e in range(20) for _ in "ab"]
    )
    assert schedule.rate(200, 10) == 0.1


def test_warm_up_of_the_replay_is_compressed_and_rises_with_each_step():
    schedule, batches = replay(Schedule(warmup=20)), 3110
    end = int(0.625 * batches)
    rates = [schedule.rate(t, batches) for t in range(end + 1)]
    assert (
        rates[:end] == pytest.approx([0.1 * (t + 1) / end for t in range(end)])
        and rates[end] == 0.1
    )
    assert schedule.rate(int(2.5 * batches), batches) == pytest.approx(0.01)


def test_after_its_end_the_rate_stays():
    assert replay(Schedule()).rate(10**6, 352) == pytest.approx(0.001)
    assert Schedule(epochs=30, drops=()).rate(10**6, 469) == 0.1


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0},
        {"epochs": 0},
        {"drops": (160,)},
        {"drops": (0,)},
        {"factor": 0},
        {"factor": 2},
        {"warmup": 160},
        {"warmup": -1},
        {"replay": 0},
    ],
)
def test_bad_values_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` of the schedule is"):
        Schedule(**bad)


NONSENSE = [
    {"lr": math.inf},
    {"lr": math.nan},
    {"lr": True},
    {"lr": "x"},
    {"lr": 1e300},
    {"epochs": math.inf},
    {"epochs": 2.5},
    {"epochs": 2**70},
    {"epochs": True},
    {"drops": (120, 80)},
    {"drops": (80.5,)},
    {"drops": 80},
    {"drops": "80"},
    {"drops": (True,)},
    {"drops": None},
    {"factor": math.nan},
    {"factor": -1},
    {"warmup": 0.5},
    {"warmup": None},
    {"replay": 1.5},
    {"replay": math.inf},
]


@pytest.mark.parametrize("bad", NONSENSE)
def test_nonsense_is_refused_in_one_sentence(bad):
    with pytest.raises(
        (TypeError, ValueError),
        match=f"^`{next(iter(bad))}` of the schedule is .*: it must be .*[.]$",
    ):
        Schedule(**bad)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(TypeError, match="`Schedule` takes no `drop`: did you mean `drops`"):
        Schedule(drop=(80,))


def test_scalars_and_arrays_are_the_numbers_that_they_are():
    assert (
        Schedule(np.float64(0.1), torch.tensor(160), np.array([80, 120]))
        == Schedule()
        == Schedule(0.1, 160, [80, 120])
    )
