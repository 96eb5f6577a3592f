"""What the field's rivals read and whom they ask while they train: counted image by image."""

import copy
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_unlearn.methods.labels as labels_room
from fisher_unlearn import unlearn
from fisher_unlearn.images.data import Samples
from fisher_unlearn.lab.settings import resolve, run_key, training_key
from fisher_unlearn.methods.base import Method, Task, Trained
from fisher_unlearn.methods.conformance import check_method
from fisher_unlearn.methods.labels import UNSIR, L1Sparse, NegGradPlus, RandomLabels
from fisher_unlearn.methods.saliency import SalUn
from fisher_unlearn.methods.teachers import DELETE, SCRUB, BadTeacher
from fisher_unlearn.methods.unlearn import METHODS
from fisher_unlearn.networks.objective import Objective, Step, minimise

X = torch.randn(24, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
LOST = [(X[Y == 0][:5], Y[Y == 0][:5]), (X[Y == 0][5:], Y[Y == 0][5:])]
KEPT = [(x, y) for x, y in zip(X[Y > 0].split(6), Y[Y > 0].split(6))]


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*first, nn.Linear(24, 3)).double()


def batch_normed(seed=0):
    "A network that can't be trained on a single image."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = [nn.Conv2d(1, 3, 6), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 3)]
        return nn.Sequential(*parts).double()


def task(lost, kept, model=None, **more):
    model = model or net()
    given = {"num_classes": 3, "original": model, "build": lambda: net(7)}
    return Task(lost, kept, **given | more)


def names_of(images):
    "What tells images apart."
    return [one.double().numpy().tobytes() for one in images]


def trained(model, steps=150):
    "A network that knows all labels."
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        adam.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        adam.step()
    return model


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("name", ["delete", "fisher_mask"])
def test_a_methods_recipe_is_in_its_own_keys_only_and_only_above_one(name, monkeypatch):
    able = [n for n, kind in METHODS.items() if "held_out" not in kind.needs]
    runs = {n: resolve("smoke", method=n, device="cpu") for n in able}
    before = {n: run_key(settings) for n, settings in runs.items()}
    heirs = {n for n in able if issubclass(METHODS[n], METHODS[name])}
    for recipe, changed in ((1, set()), (2, heirs)):
        monkeypatch.setattr(METHODS[name], "recipe", recipe)
        assert {n for n in able if run_key(runs[n]) != before[n]} == changed
    assert training_key(runs[name]) == training_key(runs["retrain"])


# ---------------------------------------------------------------- Bad-T


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda model: copy.deepcopy(model), "`build` returns the weights of the trained model"),
        (lambda model: model, "`build` returns the trained model itself"),
        (lambda model: None, "`build` returns a NoneType"),
        (lambda model: nn.Sequential(*net(7)[:5], nn.Linear(24, 4)), "they differ in `5.weight`"),
    ],
)
def test_only_a_fresh_network_is_a_teacher_that_knows_nothing(build, message):
    model = trained(net())
    with pytest.raises((TypeError, ValueError), match=message):
        ways = {"method": "bad_teacher", "progress": "none", "build": lambda: build(model)}
        unlearn(model, LOST, KEPT, **ways)


def test_a_fresh_network_of_singles_teaches_one_of_doubles():
    ways = {"method": BadTeacher(own_lr=1e-3, own_epochs=3), "progress": "none"}
    rounded = net(7).float().double()
    found, wanted = (
        unlearn(net(), LOST, KEPT, **ways, build=lambda made=made: copy.deepcopy(made)).model
        for made in (rounded.float(), rounded)
    )
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters()))


def read_by(method, given, epochs=1):
    "The inputs of each step."
    return [s.loss.args[1] for e in range(epochs) for s in method.steps(given, {}, e)]


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_bad_teacher_reads_each_image_to_forget_once_and_never_one_alone(size, share):
    kept = list(zip(X[Y > 0].split(size), Y[Y > 0].split(size)))
    for seed in range(5):
        steps = read_by(BadTeacher(bad_share=share), task(LOST, kept, seed=seed))
        read = Counter(names_of(torch.cat(steps)))
        lost, known = ({*names_of(X[where])} for where in (Y == 0, Y > 0))
        assert all(read[name] == 1 for name in lost) and max(read.values()) == 1
        assert {*read} <= lost | known and min(map(len, steps)) > 1
        assert share or {*read} == lost
        assert len(steps) >= min(len(kept), 4)  # they are joined in twos, and no further


def test_bad_teacher_forgets_one_image_or_says_that_nothing_is_beside_it():
    one, kept = [(X[:1], Y[:1])], [(x[None], y[None]) for x, y in zip(X[Y > 0], Y[Y > 0])]
    ways = {"method": "bad_teacher", "build": lambda: net(7), "progress": "none"}
    for seed in range(4):
        result = unlearn(net(), one, kept, seed=seed, **ways)
        assert "changed nothing" not in result.note
    with pytest.raises(ValueError, match="`bad_share` is 0.0, which leaves nothing to remember"):
        unlearn(net(), one, KEPT, bad_share=0.0, **ways)


# ---------------------------------------------------------------- UNSIR


def pixels(count, label):
    "Images that are all different, and their labels."
    drawn = torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(label))
    made = drawn.to(torch.uint8), torch.full((count,), label)
    return Samples(*made, (0.5,), (0.25,), 8)


def simple():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def remembered(steps, known):
    "How many steps read some of the images that remain, and which images these are."
    read = [[name for name in names_of(step.loss.args[0]) if name in known] for step in steps]
    return sum(map(bool, read)), [name for names in read for name in names]


@pytest.mark.parametrize(
    ("batches", "share", "wanted"),
    [(1, 0.3, 1), (3, 0.3, 1), (10, 0.3, 3), (20, 0.3, 6), (10, 0.7, 7), (4, 0.0, 1)],
)
def test_unsir_repairs_on_the_part_that_it_impaired_on(batches, share, wanted):
    remain = pixels(4 * batches, 1)
    known = {*names_of(torch.cat([x for x, _ in remain.batches(4, "cpu")]))}
    loader = DataLoader(
        TensorDataset(torch.cat([x for x, _ in remain.batches(4, "cpu")]), remain.labels),
        4,
        shuffle=True,
    )
    for kept in (remain.batches(4, "cpu"), loader):
        given = task(pixels(4, 0).batches(4, "cpu"), kept, simple(), seed=3)
        method, found = UNSIR(unsir_steps=1, unsir_share=share), []
        for epoch in range(3):
            torch.manual_seed(epoch)
            steps, images = remembered(method.steps(given, {}, epoch), known)
            assert steps == wanted and len({*images}) == len(images) == 4 * wanted
            found.append({*images})
        assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("batches", [1, 2, 3, 10])
def test_unsir_impairs_each_class_and_repairs_without_noise(batches):
    kept = pixels(4 * batches, 2).batches(4, "cpu")
    lost = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]))]
    given = task(lost, kept, simple(), classes=(0, 1))
    for share in (0.3, 0.9):
        impair, repair = (
            torch.cat([s.loss.args[1] for s in UNSIR(unsir_share=share).steps(given, {}, epoch)])
            for epoch in (0, 1)
        )
        counts = impair.bincount(minlength=3)
        assert counts[:2].min() >= 4 and 0 <= counts[0] - counts[1] <= 4  # batches of noise
        assert counts[2] == len(repair) and (repair == 2).all()


# ---------------------------------------------------------------- NegGrad+


def test_neggrad_plus_reads_the_whole_forget_set_before_any_of_it_again():
    lost = [(X[:1] + k, torch.tensor([0])) for k in range(6)]
    given = task(lost, KEPT[:2])
    read = [s.loss.args[1][0] for e in range(9) for s in NegGradPlus().steps(given, {}, e)]
    assert names_of(torch.cat(read)) == names_of(torch.cat([x for x, _ in lost])) * 3


def test_neggrad_plus_goes_on_in_shuffled_passes_wherever_it_begins():
    lost, kept = pixels(10, 0).batches(4, "cpu"), pixels(20, 1).batches(4, "cpu")
    given = task(lost, kept, simple(), seed=3)
    epochs = [[s.loss.args[1][0] for s in NegGradPlus().steps(given, {}, e)] for e in range(3)]
    assert [len(steps) for steps in epochs] == [5, 5, 5]
    passes = names_of(torch.cat([x for steps in epochs for x in steps]))
    assert len(passes) == 50  # in five passes, over three, five and five batches and so on
    orders = [passes[k : k + 10] for k in range(0, 50, 10)]
    assert all(len({*order}) == 10 for order in orders) and orders[0] != orders[1]
    alone = [s.loss.args[1][0] for s in NegGradPlus().steps(given, {}, 2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, epochs[2]))


# ---------------------------------------------------------------- one memory, two parameters


class Shared(nn.Module):
    "Two layers whose weights are one memory, as one parameter or as two."

    def __init__(self, tied):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(36, 36), nn.Linear(36, 36)
            self.c = nn.Linear(36, 3)
        self.double()
        if tied:
            self.b.weight = self.a.weight
        else:
            self.b.weight.data = self.a.weight.data

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x.flatten(1))))))


@pytest.mark.parametrize("tied", [True, False])
def test_factors_and_what_is_frozen_reach_every_parameter_of_a_memory(tied):
    model = Shared(tied)
    before, where = model.a.weight.detach().clone(), torch.rand(36, 36) > 0.5
    loss = lambda m: F.cross_entropy(m(X), Y)
    steps = lambda epoch: [Step(loss, {"a.weight": where.double()})] * 5
    minimise(model, Objective(steps, 1, 0.1, momentum=0.9))
    assert torch.equal(model.a.weight[~where], before[~where])
    assert (model.a.weight != before)[where].all()
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
    slopes = []
    towards = lambda m: slopes.extend(p.grad for p in m.parameters()) or loss(m)
    frozen = {"a.weight": torch.ones(36, 36, dtype=torch.bool)}
    minimise(model, Objective(lambda e: [Step(towards)] * 2, 1, 0.1, frozen=frozen))
    assert sum(bool((g == 0).all()) for g in slopes if g is not None) == (1 if tied else 2)


def test_salun_moves_nothing_outside_of_its_mask_where_two_parameters_share():
    model = Shared(False)
    plain = {"own_decay": 0.0, "own_epochs": 1, "own_momentum": 0.0}
    method = SalUn(salun_freeze="gradients", **plain)
    result = unlearn(model, LOST, KEPT, method=method, progress="none")
    moved = result.model.a.weight != model.a.weight
    assert moved.any() and not (moved & ~result.mask["a.weight"]).any()


def test_l1_sparse_counts_a_memory_once():
    sizes = []
    for model in (Shared(True), Shared(False)):
        given = task(LOST, KEPT, model)
        first, *_ = L1Sparse(l1_alpha=1.0).steps(given, {}, 0)
        rest = F.cross_entropy(model(KEPT[0][0]), KEPT[0][1])
        sizes.append((first.loss(model) - rest).item())
    state = {n: t for n, t in Shared(True).state_dict().items() if n != "b.weight"}
    wanted = sum(float(t.abs().sum()) for t in state.values())
    assert sizes == pytest.approx([wanted] * 2, rel=1e-9)


# ---------------------------------------------------------------- the loop


def test_a_training_whose_last_step_ends_in_infinity_says_so():
    line = nn.Linear(2, 1)
    last = lambda epoch: [Step(lambda m: m(torch.full((1, 2), 1e30)).sum())]
    with pytest.raises(FloatingPointError, match="a weight is not finite. Lower its rate"):
        minimise(line, Objective(last, 1, 1e30))


@pytest.mark.parametrize("name", [n for n, kind in METHODS.items() if issubclass(kind, Trained)])
def test_momentum_is_an_option_of_those_that_have_one(name):
    kind = METHODS[name]
    if kind.optimizer == "sgd":
        assert replace(kind(), own_momentum=0.5).own_momentum == 0.5
        return
    with pytest.raises(ValueError, match=f"`own_momentum` is 0.5, and `{name}` trains by adam"):
        kind(own_momentum=0.5)
    assert "own_momentum" in kind().dump()  # as keys have it
    assert kind(own_momentum=0.9) == kind()


def test_whoever_learns_by_softmax_refuses_labels_in_columns():
    trainings = [kind for kind in METHODS.values() if issubclass(kind, Trained)]
    assert len(trainings) > 10 and all("one_class" in kind.needs for kind in trainings)


# ---------------------------------------------------------------- teachers


@pytest.mark.parametrize("method", [DELETE(), SCRUB(scrub_steps=1), BadTeacher(bad_share=0.9)])
def test_a_teacher_with_batchnorm_answers_by_its_running_statistics(method):
    "Teachers that are asked in training mode answer by the batch, and their statistics move."
    model, fresh = batch_normed(), batch_normed(7)
    for one in (model, fresh):
        one.train()(3 * X + 1)  # so that its statistics are not those of any batch
    given = task(LOST, KEPT, model, build=lambda: copy.deepcopy(fresh))
    kept = {*names_of(X[Y > 0])}
    for step in method.objective(replace(given), {}).steps(0):
        args = step.loss.args
        inputs, said = (args[0], args[1]) if args[0].dim() == 4 else (args[1], args[0])
        w, z = (copy.deepcopy(one).eval()(inputs).detach() for one in (model, fresh))
        if isinstance(method, DELETE):
            w = w.masked_fill(F.one_hot(Y[: len(w)] * 0, 3).bool(), -torch.inf).softmax(1)
        if isinstance(method, BadTeacher):
            stays = torch.tensor([name in kept for name in names_of(inputs)])
            w = torch.where(stays[:, None], w, z)
        assert torch.allclose(said, w, rtol=1e-9, atol=1e-12)
    before = copy.deepcopy(model.state_dict())
    ways = {"build": lambda: copy.deepcopy(fresh), "progress": "none"}
    unlearn(model, LOST, KEPT, method=method, **ways)
    minimise(copy.deepcopy(model), method.objective(given, {}))
    for state in (model.state_dict(), given.teacher.model.state_dict()):
        assert all(torch.equal(t, before[n]) for n, t in state.items())


# ---------------------------------------------------------------- the conformance of seeds


@dataclass(frozen=True)
class Drawing(Method):
    "Adds numbers that are drawn in one of several ways."

    name, title, how = "drawing", "Drawing", "seed"

    @torch.no_grad()
    def __call__(self, model, task):
        seed = {"seed": task.seed, "parity": task.seed % 2}.get(self.how, 1)
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        if self.how not in ("nothing", "in vain"):
            model[-1].bias.add_(drawn.to(model[-1].bias))
        elif self.how == "in vain":  # as a trial does, whose outcome is the same
            model[-1].bias.add_((drawn * 0).to(model[-1].bias) + 1)
        return {}


@pytest.mark.parametrize("how", ["seed", "parity", "in vain", "nothing"])
def test_a_method_may_draw_by_its_seed_or_in_vain_or_not_at_all(how, monkeypatch):
    monkeypatch.setattr(Drawing, "how", how)
    check_method(Drawing)


def test_a_method_that_draws_the_same_under_each_seed_is_found(monkeypatch):
    monkeypatch.setattr(Drawing, "how", "fixed")
    with pytest.raises(AssertionError, match="`drawing` draws the same under each seed"):
        check_method(Drawing)
    real = labels_room.epoch_seed
    monkeypatch.setattr(labels_room, "epoch_seed", lambda seed, epoch: real(666, epoch))
    with pytest.raises(AssertionError, match="`random_labels` draws the same under each seed"):
        check_method(RandomLabels, tried=[RandomLabels(own_epochs=1)])


def test_images_of_two_sizes_are_no_mixed_batch():
    "What remains is larger than what is to be forgotten, which a network that pools can take."
    build = lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    large = [(F.pad(x, (1, 1, 1, 1)), y) for x, y in KEPT]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    with pytest.raises(ValueError, match=r"the shapes \(1, 8, 8\) and \(1, 6, 6\)"):
        unlearn(model, LOST, large, method="bad_teacher", build=build, progress="none")
