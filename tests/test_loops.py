"What must not happen in an epoch or an evaluation: counted, not timed."

import gc
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from fisher_unlearn.scores.activation import mean_activations
from fisher_unlearn.scores.graph import find_readers
from fisher_unlearn.networks.metrics import evaluate
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.train import TrainSettings, train_epoch, train_model

SETTINGS = TrainSettings(batch_size=16, select="last")
# what `.item()`, `float(tensor)` and `if tensor:` come down to: the host waits for the device
SYNC = "_local_scalar_dense"


class Calls(TorchDispatchMode):
    "Counts of the operators that were called, and the bytes of the largest result."

    def __init__(self):
        super().__init__()
        self.count, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.count[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def calls(do):
    with Calls() as seen:
        do()
    return seen


@pytest.fixture
def model():
    return build_model("resnet20", 10, 1, seed=0)


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)  # as after the first step
    return optimizer


def epoch(model, digits, steps):
    batches, optimizer = digits.train[torch.arange(16 * steps)].batches(16, "cpu"), sgd(model)
    return lambda: train_epoch(
        model, batches, optimizer, SETTINGS, 0, steps, 10, tqdm(disable=True)
    )


def bare(model, digits, steps):
    prepared, optimizer = (
        list(digits.train[torch.arange(16 * steps)].batches(16, "cpu")),
        sgd(model),
    )

    def loop():
        model.train()
        for x, y in prepared:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return loop


def test_an_epoch_waits_for_the_device_once(model, digits):
    "For its mean loss, however many steps it has."
    assert [
        calls(epoch(model, digits, steps)).count[SYNC]
        - calls(bare(model, digits, steps)).count[SYNC]
        for steps in (2, 6)
    ] == [1, 1]


def test_a_step_calls_little_more_than_a_bare_one(model, digits):
    """Taking a batch, normalising it, and adding to the loss: fewer than a dozen operators
    beside hundreds."""

    def a_step(loop):
        return (
            calls(loop(model, digits, 6)).count.total()
            - calls(loop(model, digits, 2)).count.total()
        ) / 4

    ours, theirs = a_step(epoch), a_step(bare)
    assert theirs > 200 and ours - theirs < 12, (ours, theirs)


def test_a_step_keeps_nothing(model, digits):
    "No result grows with the number of steps, and none is alive after the epoch."

    def alive():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    left = []
    for steps in (2, 6):
        loop = epoch(model, digits, steps)
        loop()
        gc.collect()
        before = alive()
        loop()
        gc.collect()
        left.append(alive() - before)
    assert left == [0, 0]
    assert calls(epoch(model, digits, 2)).largest == calls(epoch(model, digits, 6)).largest


def test_images_in_memory_need_no_workers(model, digits, monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("a DataLoader or another process was started")

    for what in (
        "torch.utils.data.DataLoader.__init__",
        "multiprocessing.process.BaseProcess.start",
    ):
        monkeypatch.setattr(what, refuse)
    train_model(
        model,
        digits.train[torch.arange(32)],
        SETTINGS.replayed(1),
        {"test": digits.test.batches(100, "cpu")},
        progress="none",
    )


def test_evaluation_waits_once_for_each_set(model, digits):
    sets = [digits.test[torch.arange(50 * n)].batches(50, "cpu") for n in (1, 5)]
    counts = [calls(lambda test=test: evaluate(model, {"test": test})).count[SYNC] for test in sets]
    assert counts[0] == counts[1] <= 3


def test_activations_are_read_in_one_pass(model, digits):
    batches = digits.test[torch.arange(100)].batches(50, "cpu")
    seen = calls(lambda: mean_activations(model, batches, find_readers(model)))
    assert (
        seen.count["convolution"] + seen.count["mkldnn_convolution"] == 2 * 21
        and not seen.count[SYNC]
    )
