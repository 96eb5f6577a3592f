"""Training other people's networks on other people's loaders."""

import copy
import random

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.parameters import copied
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.images.draws import samples_digest
from fisher_unlearn.networks.train import (
    Joined,
    TrainSettings,
    load_weights,
    save_weights,
    train_model,
    trainable_batches,
)

SHORT = TrainSettings(Schedule(lr=0.1, epochs=2, drops=(1,)), select="last", batch_size=4)
X, Y = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 5


def normed():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def train(model, batches, settings=SHORT, **more):
    return train_model(model, batches, settings, progress="none", **more)


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# A last batch of one


@pytest.mark.parametrize(
    "batches",
    [
        DataLoader(TensorDataset(X, Y), 4),
        DataLoader(TensorDataset(X, Y), 4, shuffle=True),
        [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])],
    ],
    ids=["DataLoader", "shuffled", "list"],
)
def test_a_last_batch_of_one_is_joined_where_batchnorm_would_fail(batches):
    model = normed()
    assert [len(y) for _, y in trainable_batches(model, batches)] == [4, 5]
    assert len(trainable_batches(model, batches)) == 2
    assert len(train(model, batches)) == 2
    assert model[2].num_batches_tracked == 4


def test_and_nowhere_else():
    for model, batches in [
        (plain(), [(X[:8], Y[:8]), (X[8:], Y[8:])]),
        (normed(), [(X[:5], Y[:5]), (X[5:], Y[5:])]),
        (normed(), DataLoader(TensorDataset(X, Y), 4, drop_last=True)),
        (normed().eval(), DataLoader(TensorDataset(X, Y), 3)),
    ]:
        before = copy.deepcopy(model)
        assert trainable_batches(model, batches) is batches
        assert same(model, before)
        assert model.training == before.training
    model = plain()
    train(model, [(X[:8], Y[:8]), (X[8:], Y[8:])])
    assert model[1].num_batches_tracked == 4


def test_our_densenet_learns_digits_with_a_last_batch_of_one(digits):
    model, few = build_model("densenet", 10, 1, seed=0), digits.train[torch.arange(9)]
    assert len(train(model, few)) == 2
    assert isinstance(trainable_batches(model, few.batches(4)), Joined)
    assert len(trainable_batches(model, few.batches(4))) == 2
    assert not isinstance(
        trainable_batches(build_model("resnet20", 10, 1, seed=0), few.batches(4)), Joined
    )


def test_a_single_image_without_a_batch_before_is_said_at_the_start(digits):
    for model, batches in [
        (build_model("densenet", 10, 1, seed=0), digits.train[torch.arange(1)]),
        (normed(), DataLoader(TensorDataset(X, Y), 1)),
    ]:
        before = copy.deepcopy(model)
        with pytest.raises(
            ValueError,
            match="`samples` begins with a batch of a single image, .*no batch before to "
            "join it to",
        ):
            train(model, batches)
        assert same(model, before)


def test_a_network_that_squeezes_trains_on_a_last_batch_of_one():
    class Squeezing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3), keepdim=True).squeeze())

    assert len(train(Squeezing(), DataLoader(TensorDataset(X, Y), 4))) == 2


# Batches and outputs of any kind


@pytest.mark.parametrize(
    "batches",
    [
        [{"pixel_values": X, "labels": Y}],
        [(X, Y.int(), torch.arange(9))],
        [(X.numpy(), Y.numpy().astype("uint8"))],
        [(X, Y.double())],
        [(X[:0], Y[:0]), (X, Y)],
        [(X, Y.tolist())],
    ],
    ids=["dict", "triple", "numpy", "float labels", "an empty batch", "list"],
)
def test_batches_of_any_kind_train_as_tensors_do(batches):
    model = plain()
    other = copy.deepcopy(model)
    history = train(model, batches)
    assert history.train_loss.tolist() == train(other, [(X, Y)]).train_loss.tolist()
    assert same(model, other)


def test_no_batch_with_images_is_one_sentence():
    with pytest.raises(ValueError, match="`samples` is empty"):
        train(plain(), [(X[:0], Y[:0])])


class Wrapped(nn.Module):
    def __init__(self, model, out):
        super().__init__()
        self.model, self.out = model, out

    def forward(self, x):
        return self.out(self.model(x))


@pytest.mark.parametrize("out", [lambda z: {"logits": z}, lambda z: (z, z), lambda z: [z]])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_outputs_of_any_kind_train_as_logits_do(out, precision):
    model, settings = plain(), TrainSettings(SHORT.schedule, select="last", precision=precision)
    other = copy.deepcopy(model)
    train(Wrapped(model, out), [(X, Y)], settings)
    train(other, [(X, Y)], settings)
    assert same(model, other)


def test_googlenet_trains_with_its_auxiliary_outputs():
    model = torchvision.models.googlenet(
        weights=None, num_classes=5, aux_logits=True, init_weights=False
    )
    assert len(train(model, [(torch.randn(2, 3, 64, 64), torch.tensor([0, 4]))])) == 2


def test_indices_for_an_embedding_train():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5))
    assert len(train(model, [(torch.arange(9), Y)])) == 2


# Names


def pair():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5)
    )
    model[3].weight.data[:2] = 0
    return model, torch.arange(6)[:, None].expand(6, 6) < 2


@pytest.mark.parametrize("name", ["module.3.weight", "3.wieght", "4.weight", "weight"])
def test_zeros_under_an_unknown_name_are_refused_with_the_nearest(name):
    model, where = pair()
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError,
        match=f"`zeros` names '{name}', which is no parameter or buffer of the model: did "
        "you mean '",
    ):
        train(model, [(X, Y)], zeros={name: where})
    assert same(model, before)


@pytest.mark.parametrize("share", ["parameter", "memory", "module"])
@pytest.mark.parametrize("name", ["3.weight", "5.weight"])
def test_tied_weights_are_held_under_each_of_their_names(share, name):
    model, where = pair()
    model[5] = nn.Linear(6, 6)
    if share == "parameter":
        model[5].weight = model[3].weight
    if share == "memory":
        model[5].weight.data = model[3].weight.data
    if share == "module":
        model[5] = model[3]
    model.append(nn.Linear(6, 5))
    train(model, [(X, Y)], zeros={name: where})
    assert (model[3].weight[:2] == 0).all() and (model[5].weight[:2] == 0).all()
    assert (model[3].weight[2:] != 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_weights_that_share_memory_still_do_after_training(layout):
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 5),
    )
    model[2].weight.data = model[0].weight.data
    train(model, [(X, Y)], TrainSettings(SHORT.schedule, select="last", layout=layout))
    assert torch.equal(model[2].weight, model[0].weight)


def test_a_wrapped_network_takes_names_with_and_without_the_wrappers_word():
    for name in ("3.weight", "module.3.weight"):
        model, where = pair()
        train(nn.DataParallel(model), [(X, Y)], zeros={name: where})
        assert (model[3].weight[:2] == 0).all() and (model[3].weight[2:] != 0).all()


def test_zeros_that_do_not_fit_are_one_sentence():
    model, where = pair()
    for bad, message in [
        (where[:2], "it must be bool of the parameter's shape"),
        (where.float(), "it must be bool"),
        (~where, "marks entries of `3.weight` that are not zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(model, [(X, Y)], zeros={"3.weight": bad})


# Checkpoints


class Drawn(Dataset):
    "Images with noise that is drawn anew each time."

    def __init__(self, noise):
        self.noise = noise

    def __len__(self):
        return 9

    def __getitem__(self, i):
        return X[i] + self.noise(), Y[i]


def test_a_checkpoint_is_that_of_its_data(tmp_path):
    start, file = plain(), tmp_path / "p.safetensors"
    loader = lambda x: DataLoader(TensorDataset(x, Y), 4)
    train(copy.deepcopy(start), loader(X), checkpoint=file)
    with pytest.raises(ValueError, match="checkpoint of another training run"):
        train(copy.deepcopy(start), loader(X + 1), checkpoint=file)
    with pytest.raises(ValueError, match="checkpoint of another training run"):
        train(copy.deepcopy(start), DataLoader(TensorDataset(X, Y.flip(0)), 4), checkpoint=file)
    again = copy.deepcopy(start)
    train(again, loader(X), checkpoint=file)


def test_a_checkpoint_is_that_of_the_sets_it_was_measured_on(tmp_path):
    start, file = plain(), tmp_path / "p.safetensors"
    train(copy.deepcopy(start), [(X, Y)], checkpoint=file, evaluate={"test": [(X, Y)]})
    with pytest.raises(ValueError, match="checkpoint of another training run"):
        train(copy.deepcopy(start), [(X, Y)], checkpoint=file, evaluate={"test": [(X, Y.flip(0))]})


def test_the_digest_of_a_loader_is_that_of_its_samples_in_any_order():
    data = TensorDataset(X, Y)
    generator = torch.Generator().manual_seed(5)
    found = {
        samples_digest(b)
        for b in (
            DataLoader(data, 4),
            DataLoader(data, 9, shuffle=True),
            DataLoader(data, 2, shuffle=True, generator=generator),
            [(X.numpy(), Y.int())],
        )
    }
    assert len(found) == 1
    assert samples_digest([(X[:8], Y[:8])]) not in found
    assert samples_digest([(X, Y.roll(1))]) not in found
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())


@pytest.mark.parametrize(
    "noise",
    [lambda: torch.randn(()), lambda: random.random(), lambda: np.random.rand()],
    ids=["torch", "random", "numpy"],
)
def test_a_loader_that_draws_is_known_again_and_no_generator_is_moved(noise):
    loader, states = (
        DataLoader(Drawn(noise), 4, shuffle=True),
        (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    )
    assert samples_digest(loader) == samples_digest(loader)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_a_loader_that_draws_from_elsewhere_is_not_resumed(tmp_path):
    own = np.random.default_rng(0)
    loader, start, file = DataLoader(Drawn(own.random), 9), plain(), tmp_path / "p.safetensors"
    train(copy.deepcopy(start), loader, checkpoint=file)
    with pytest.raises(ValueError, match="another training run"):
        train(copy.deepcopy(start), loader, checkpoint=file)


# States of any kind


class Counting(nn.Module):
    "Keeps what is no tensor in its state."

    def __init__(self, state):
        super().__init__()
        self.state, self.head = state, nn.Linear(192, 5)

    def forward(self, x):
        return self.head(x.flatten(1))

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_a_state_beyond_tensors_is_kept(tmp_path):
    model = Counting({"seen": 3, "names": ["a"]})
    start = copy.deepcopy(model)
    sets = {"test": [(X, Y)]}
    train(
        model,
        [(X, Y)],
        TrainSettings(SHORT.schedule),
        checkpoint=tmp_path / "p.safetensors",
        evaluate=sets,
    )
    again = copy.deepcopy(start)
    again.state = {"seen": 0, "names": []}
    train(
        again,
        [(X, Y)],
        TrainSettings(SHORT.schedule),
        checkpoint=tmp_path / "p.safetensors",
        evaluate=sets,
    )
    assert again.state == {"seen": 3, "names": ["a"]}
    assert torch.equal(again.head.weight, model.head.weight)
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(start, tmp_path / "w.safetensors")
    assert torch.equal(start.head.weight, model.head.weight)


def test_a_state_that_no_checkpoint_can_hold_is_said_at_the_start(tmp_path):
    model = Counting({1, 2})
    with pytest.raises(
        ValueError, match="the state of the model has '_extra_state', .*train without one"
    ):
        train(model, [(X, Y)], checkpoint=tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())
    assert len(train(model, [(X, Y)])) == 2


def test_expanded_buffers_are_trained_and_resumed(tmp_path):
    model = Counting({})
    model.register_buffer("mean", torch.zeros(1).expand(3))
    start = copy.deepcopy(model)
    for settings in (SHORT, TrainSettings(SHORT.schedule, compile=False)):
        for _ in range(2):
            train(
                copy.deepcopy(start),
                [(X, Y)],
                settings,
                checkpoint=tmp_path / f"{settings.select}.safetensors",
                evaluate={"test": [(X, Y)]},
            )


def test_bfloat16_networks_train_and_resume(tmp_path):
    batches, file = [(X.bfloat16(), Y)], tmp_path / "p.safetensors"
    start = plain().bfloat16()
    one, two = copy.deepcopy(start), copy.deepcopy(start)
    train(one, batches, checkpoint=file)
    train(two, batches, checkpoint=file)
    assert same(one, two)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
    ],
)
def test_pruned_and_parametrised_networks_train_and_resume(tmp_path, change):
    start, file = plain(), tmp_path / "p.safetensors"
    change(start[0])
    one, two = copied(start), copied(start)
    train(one, [(X, Y)], checkpoint=file)
    train(two, [(X, Y)], checkpoint=file)
    assert same(one, two)


@pytest.mark.parametrize(
    "bad",
    [
        {"length": True},
        {"length": 1.5},
        {"momentum": float("nan")},
        {"weight_decay": float("inf")},
        {"seed": 2**70},
        {"batch_size": "4"},
        {"holdout": float("nan")},
        {"schedule": "short"},
        {"select": None},
        {"layout": 3},
        {"weight_decay": "0"},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(bad):
    with pytest.raises(
        (TypeError, ValueError), match=f"`{next(iter(bad))}` of the training settings is"
    ):
        TrainSettings(**bad)


def test_scalars_of_numpy_and_torch_are_numbers():
    settings = TrainSettings(length=np.int64(3), momentum=torch.tensor(0.5), seed=np.uint8(4))
    assert (settings.epochs, settings.momentum, settings.seed) == (3, 0.5, 4)
    assert type(settings.epochs) is int


@pytest.mark.parametrize(
    "bad",
    [
        {"progress": "x"},
        {"progress": True},
        {"zeros": 3},
        {"checkpoint": 3},
        {"evaluate": [1]},
        {"settings": "x"},
        {"zero": {}},
        {"model": 3},
        {"samples": 3},
        {"samples": "text"},
    ],
)
def test_arguments_that_make_no_sense_are_one_sentence(bad):
    with pytest.raises((TypeError, ValueError), match=next(iter(bad))) as error:
        train_model(
            **{"model": plain(), "samples": [(X, Y)], "settings": SHORT, "progress": "none"} | bad
        )
    assert "\n" not in str(error.value)
