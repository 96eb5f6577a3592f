"""Which layers the rivals change, and which they must leave as they are."""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_unlearn import unlearn
from fisher_unlearn.images.data import Samples
from fisher_unlearn.methods import saliency
from fisher_unlearn.methods.base import READINGS, Task
from fisher_unlearn.methods.kick import Kick
from fisher_unlearn.methods.layers import CFk, EUk, last_modules
from fisher_unlearn.methods.saliency import MSG
from fisher_unlearn.methods.unlearn import METHODS

X = torch.randn(24, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
LOST = [(X[Y == 0], Y[Y == 0])]
KEPT = [(X[Y > 0][:8], Y[Y > 0][:8]), (X[Y > 0][8:], Y[Y > 0][8:])]


class Attending(nn.Module):
    "Rows of an image look at each other."

    def __init__(self):
        super().__init__()
        self.e = nn.Linear(6, 8)
        self.a = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.h = nn.Linear(8, 3)

    def forward(self, x):
        rows = self.e(x[:, 0])
        return self.h(self.a(rows, rows, rows)[0].mean(1))


class Tied(nn.Module):
    "A table of words whose rows are the classes, too."

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(3, 4)
        self.head = nn.Linear(4, 3)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(torch.tanh(self.words(x).mean(1)))


def made(build, seed=0):
    "A network of doubles, drawn under a seed."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def plain():
    first = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*first, nn.Linear(24, 3))


def normed():
    model = plain()
    nn.utils.parametrizations.weight_norm(model[5])
    return model


def trained(model, names, still=()):
    "Two epochs of SGD over KEPT on these parameters; `still` modules stay in evaluation mode."
    model.train()
    for module in still:
        module.eval()
    own = dict(model.named_parameters())
    sgd = torch.optim.SGD([own[n] for n in names], 0.05, 0.9, weight_decay=5e-4)
    for x, y in KEPT * 2:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sgd.step()
    return model.state_dict()


def done(method, build, **more):
    "A network's state after a method."
    model = made(build)
    before = copy.deepcopy(model.state_dict())
    ways = {"build": lambda: made(build, 7), "progress": "none"}
    result = unlearn(model, LOST, KEPT, method=method, **ways | more)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    return result.model.state_dict()


def close(found, wanted):
    "Are two states the same up to rounding?"
    return all(torch.allclose(found[n], t, 1e-9, 1e-12) for n, t in wanted.items())


SETTINGS = {"own_epochs": 2, "own_lr": 0.05}
KINDS = pytest.mark.parametrize("kind", [CFk, EUk])


@KINDS
def test_a_last_layer_under_a_parametrisation_is_a_layer(kind):
    start, head = made(normed), [n for n, _ in made(normed).named_parameters() if n[0] == "5"]
    if kind is EUk:
        fresh = made(normed, 7).state_dict()
        start.load_state_dict({**start.state_dict(), **{n: fresh[n] for n in head}})
    assert len(head) == 3 and last_modules(start, 1)[0] == "5"
    found = done(kind(last_k=1, **SETTINGS), normed)
    assert close(found, trained(start, head))
    before = made(normed).state_dict()
    assert {n for n in found if not torch.equal(found[n], before[n])} == {*head}


@KINDS
def test_a_model_may_be_one_layer(kind):
    build, flat = lambda: nn.Linear(36, 3), lambda s: [(x.flatten(1), y) for x, y in s]
    start = made(build, 7 if kind is EUk else 0).train()
    sgd = torch.optim.SGD(start.parameters(), 0.05, 0.9, weight_decay=5e-4)
    for x, y in flat(KEPT) * 2:
        sgd.zero_grad()
        F.cross_entropy(start(x), y).backward()
        sgd.step()
    sets, ways = (flat(LOST), flat(KEPT)), {"build": lambda: made(build, 7), "progress": "none"}
    found = unlearn(made(build), *sets, method=kind(last_k=1, **SETTINGS), **ways)
    assert close(found.model.state_dict(), start.state_dict())


@KINDS
def test_attention_goes_with_its_output_map(kind):
    before, after = made(Attending), done(kind(last_k=2, **SETTINGS), Attending)
    moved = {n for n, t in before.state_dict().items() if not torch.equal(t, after[n])}
    assert moved == {n for n in after if n[0] in "ah"}
    assert last_modules(before, 2) == ["a", "a.out_proj", "h"]


def test_what_lies_before_the_last_layers_is_asked_in_evaluation_mode():
    "Attention with dropout, before the only layer that learns."
    model = made(Attending)
    wanted = trained(model, ["h.weight", "h.bias"], [model.a])
    assert close(done(CFk(last_k=1, **SETTINGS), Attending), wanted)


@KINDS
@pytest.mark.parametrize("twice", ["weight", "module", "memory"])
def test_a_last_layer_that_an_earlier_one_shares_is_refused(kind, twice):
    def build():
        model = Tied() if twice == "weight" else nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model = model.double()  # which takes memory apart
        if twice == "module":
            model[1] = model[0]
        if twice == "memory":
            model[1].weight.data = model[0].weight.data
        return model

    x = torch.arange(18).reshape(6, 3) % 3 if twice == "weight" else X[:6, 0, 0]
    sets = [(x[:2], torch.tensor([0, 0]))], [(x[2:], torch.tensor([1, 1, 2, 2]))]
    with pytest.raises(ValueError, match="the last layers share `(words|0).weight`") as refused:
        method = kind(last_k=1, **SETTINGS)
        unlearn(made(build), *sets, method=method, build=lambda: made(build, 7), progress="none")
    assert "\n" not in str(refused.value)


@KINDS
def test_frozen_parameters_among_the_last_stay(kind):
    def build():
        model = plain()
        model[2].requires_grad_(False)
        return model

    found, before = done(kind(last_k=2, **SETTINGS), build), made(build).state_dict()
    assert {n for n in found if not torch.equal(found[n], before[n])} == {"5.weight", "5.bias"}
    frozen = lambda: nn.Sequential(*plain()[:5], plain()[5].requires_grad_(False))
    with pytest.raises(ValueError, match="no parameter of the last layers requires a gradient"):
        done(kind(last_k=1, **SETTINGS), frozen)


def blocks():
    "Two convolutions with their norms and a classifier, of which much is frozen."
    first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    second = [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(24, 3))
    for part in (model[0], model[1], model[4]):
        part.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    model[7].bias.requires_grad_(False)
    return model


EACH = [method for kind in METHODS.values() for method in dict.fromkeys(map(kind.preset, READINGS))]


@pytest.mark.parametrize("method", [m for m in EACH if m.name != "retrain"], ids=lambda m: m.name)
def test_frozen_parameters_stay_under_every_method(method):
    few = {"ratio": 0.5, "lissa_epochs": 1, "sfron_steps": 3, "unsir_steps": 2, "own_epochs": 1}
    few |= {"last_k": 3, "ssd_alpha": 0.5, "lissa_scale": 1e4}
    known = {f.name for f in fields(method)}
    method = replace(method, **{n: v for n, v in few.items() if n in known})
    found = done(method, blocks, reference=[(X, Y)], held_out=[(-X[Y == 0], Y[Y == 0])])
    start = dict(made(blocks).named_parameters())
    moved = {n for n, p in start.items() if not torch.equal(p, found[n])}
    free = {n for n, p in start.items() if p.requires_grad}
    assert free == {"3.weight", "7.weight"} and moved <= free
    assert moved or method.name == "finetune"


def test_a_frozen_classifier_has_no_row_to_zero():
    frozen = lambda: nn.Sequential(*plain()[:5], plain()[5].requires_grad_(False))
    with pytest.raises(ValueError, match="the classifier '5' is frozen"):
        done("mask_classifier", frozen)


@pytest.mark.parametrize("name", ["msg", "ct"])
def test_a_convolution_that_may_not_change_is_left_out(name):
    def build(parts=(0,)):
        model = plain()
        for k in parts:
            weight = model[k].weight.detach()
            del model[k].weight
            model[k].register_buffer("weight", weight)
        return model

    found, before = done(name, build, own_epochs=1), made(build).state_dict()
    assert torch.equal(found["0.weight"], before["0.weight"])
    assert (found["2.weight"] - before["2.weight"]).abs().max() > 0.01
    with pytest.raises(ValueError, match="changes convolutions, and the model has none that may"):
        done(name, lambda: build((0, 2)))


ASKED = nn.Linear(1, 3)  # nobody reads its weights


def sampled(loader, seed):
    "Which of thirty images that remain MSG reads beside five to forget; image k is full of k."
    lost = [(torch.zeros(5, 1, 6, 6), torch.zeros(5).long())]
    task = Task(lost, loader, num_classes=3, original=ASKED, seed=seed)
    return sorted(int(x.flatten()[0]) for inputs, _ in saliency._as_many(task) for x in inputs)


FULL = torch.arange(30.0).reshape(30, 1, 1, 1).expand(30, 1, 6, 6).contiguous()
SORTED = [(FULL[:15], torch.ones(15).long()), (FULL[15:], torch.full((15,), 2))]


def test_msg_draws_its_sample_from_all_that_remains():
    "By the seed, out of batches that are sorted by class; each image as often as any other."
    found = [sampled(SORTED, seed) for seed in range(240)]
    assert all(len({*each}) == 5 and 0 <= each[0] <= each[-1] < 30 for each in found)
    counts = torch.tensor(found).flatten().bincount(minlength=30)
    assert 15 < counts.min() and counts.max() < 70  # of 40 each
    assert found[3] == sampled(SORTED, 3) != found[4]
    assert sampled([(FULL[:4], torch.ones(4).long())], 0) == [0, 1, 2, 3]  # where fewer remain


def test_msg_draws_the_same_sample_from_a_loader_that_shuffles():
    data, own = TensorDataset(FULL, torch.ones(30).long()), torch.Generator().manual_seed(5)
    for more in ({}, {"generator": own}):
        loader, found = DataLoader(data, 4, shuffle=True, **more), set()
        for state in range(3):
            with torch.random.fork_rng():
                torch.manual_seed(state)
                before = torch.get_rng_state(), own.get_state()
                found.add(tuple(sampled(loader, 7)))
                after = torch.get_rng_state(), own.get_state()
                assert all(torch.equal(a, b) for a, b in zip(before, after))
        assert len(found) == 1 and sampled(loader, 8) != [*found.pop()]


def test_msg_reads_the_first_of_our_batches_in_their_order():
    pixels = torch.arange(30, dtype=torch.uint8).reshape(30, 1, 1, 1).expand(30, 1, 6, 6)
    ours = Samples(pixels.contiguous(), torch.ones(30).long(), (0.0,), (1 / 255,), 6).batches(4)
    for seed in (0, 666):
        mixed = int(np.random.SeedSequence([seed, 0]).generate_state(1, np.uint64)[0]) >> 1
        order = torch.randperm(30, generator=torch.Generator().manual_seed(mixed))
        task = Task(SORTED[:1], ours, num_classes=3, original=ASKED, seed=seed)
        read = [x.amax((1, 2, 3)).round().int() for x, _ in saliency._as_many(task)]
        assert torch.cat(read).tolist() == order[:15].tolist()


def test_the_seed_decides_what_msg_draws_anew():
    "All that remains is compared, so that the mask is the same under each seed."
    method = MSG(own_epochs=1, own_lr=1e-12)
    go = lambda seed: unlearn(
        made(plain), LOST, [KEPT[0]], method=method, seed=seed, progress="none"
    )
    one, two, again = go(1), go(2), go(1)
    for name, mask in one.mask.items():
        values = [r.model.state_dict()[name][mask] for r in (one, two, again)]
        assert torch.equal(mask, two.mask[name]) and torch.equal(values[0], values[2])
        assert (values[0] - values[1]).abs().min() > 0


WHERES = pytest.mark.parametrize("where", ["units", "along"])


@WHERES
def test_a_length_without_a_direction_is_refused_before_scoring(where, monkeypatch):
    monkeypatch.setattr(Kick, "score", lambda *given: pytest.fail("scored"))
    with pytest.raises(ValueError, match="`kick_length` has no direction") as refused:
        done(Kick(ratio=1e-4, kick_length=0.25, kick_where=where), plain)
    assert "\n" not in str(refused.value)


def test_a_kick_along_zeros_is_refused_and_one_on_all_weights_needs_no_mask():
    def zeros():
        model = plain()
        for k in (0, 2):
            nn.init.zeros_(model[k].weight)
        return model

    with pytest.raises(ValueError, match="removes zeros only"):
        done(Kick(ratio=0.1, kick_length=0.25, kick_where="along"), zeros)
    start = made(plain).state_dict()
    with pytest.warns(UserWarning, match="less than one"):
        found = done(Kick(ratio=1e-4, kick_length=0.25), plain)
    length = sum(float((found[n] - t).square().sum()) for n, t in start.items()) ** 0.5
    assert length == pytest.approx(0.25)


@pytest.mark.parametrize("given, said", [({"hard": True}, "hard"), ({"ratio": 0}, "ratio` is 0")])
def test_a_kick_refuses_what_it_would_ignore(given, said):
    with pytest.raises(ValueError, match=said) as refused:
        Kick(**{"kick_length": 0.25} | given)
    assert "\n" not in str(refused.value)


class Scaled(nn.Module):
    "A parameter without dimensions."

    def __init__(self):
        super().__init__()
        self.inner, self.scale = plain(), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * self.inner(x)


@pytest.mark.parametrize("name", ["salun", "sfron", "ssd", "lfssd"])
def test_a_parameter_may_be_a_single_number(name):
    few = {"ssd_alpha": 1e-6, "sfron_steps": 3, "sfron_threshold": 1e-6, "own_epochs": 1}
    few |= {"salun_ratio": 0.99, "ssd_lambda": 1e-6}
    known = {f.name for f in fields(METHODS[name])}
    method = METHODS[name](**{n: v for n, v in few.items() if n in known})
    result = unlearn(made(Scaled), LOST, KEPT, method=method, reference=[(X, Y)], progress="none")
    assert result.mask["scale"].shape == () and bool(result.mask["scale"])
    assert result.model.scale != 1.5


class Turning(nn.Module):
    "A convolution, and a linear map of complex numbers."

    def __init__(self):
        super().__init__()
        self.c, self.l = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)
        self.w = nn.Parameter(torch.randn(32, 8, dtype=torch.complex128))

    def forward(self, x):
        return self.l((self.c(x).flatten(1).to(self.w.dtype) @ self.w).abs())


@pytest.mark.parametrize("name", ["salun", "msg"])
def test_complex_parameters_have_no_gradient_to_be_ranked(name):
    with pytest.raises(ValueError, match="the parameter `w` is complex") as refused:
        done(name, Turning)
    assert "\n" not in str(refused.value)
