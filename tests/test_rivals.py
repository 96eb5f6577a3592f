"""The field's rivals, each against plain loops in double precision that know nothing of ours."""

import copy
import math
from dataclasses import fields, replace
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fisher_unlearn import unlearn
from fisher_unlearn.methods.base import Method, Task
from fisher_unlearn.methods.conformance import check_method
from fisher_unlearn.methods.dampening import LFSSD, SSD
from fisher_unlearn.methods.kick import Kick, length_of
from fisher_unlearn.methods.labels import UNSIR, L1Sparse, NegGradPlus, RandomLabels
from fisher_unlearn.methods.labels import repelling_noise
from fisher_unlearn.methods.layers import CFk, EUk, last_modules
from fisher_unlearn.methods.masks import FisherMask
from fisher_unlearn.methods.saliency import CT, MSG, SalUn, SFRon
from fisher_unlearn.methods.teachers import DELETE, SCRUB, BadTeacher, RewoundSCRUB
from fisher_unlearn.methods.unlearn import METHODS
from fisher_unlearn.networks.metrics import accuracy
from fisher_unlearn.networks.objective import Objective, Step, Teacher, minimise

X = torch.randn(24, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
LOST = [(X[Y == 0][:5], Y[Y == 0][:5]), (X[Y == 0][5:], Y[Y == 0][5:])]  # 5 and 3
KEPT = [(x, y) for x, y in zip(X[Y > 0].split(6), Y[Y > 0].split(6))]  # 6, 6 and 4
ALL = [(X, Y)]
HELD = [(X[Y == 0] + 0.3, Y[Y == 0])]  # like the forget set, and none of it
NEW = list(METHODS)[9:]  # after those of the paper
FEW = {"own_epochs": 2, "sfron_steps": 7, "unsir_steps": 3, "last_k": 2}
PLAIN = {"own_momentum": 0.0, "own_decay": 0.0, "own_epochs": 1}


def net(seed=0):
    "Smooth, so that a slip in the seventh digit of a weight stays one."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*first, nn.Linear(24, 3)).double()


def done(method, **more):
    "A network after a method."
    given = {"reference": ALL, "build": lambda: net(7), "held_out": HELD, "progress": "none"}
    return unlearn(net(), LOST, KEPT, method=method, **given | more)


def same(result, wanted, tol=1e-9):
    "Are two networks the same up to rounding?"
    found = result.model.state_dict()
    for name, t in wanted.state_dict().items():
        assert (found[name] - t).abs().max() <= tol * t.abs().max(), name
    return True


def far(result, other):
    "Does a network differ from another?"
    other = other.state_dict()
    return any(not torch.equal(t, other[n]) for n, t in result.model.state_dict().items())


def descend(model, losses, lr, momentum=0.0, decay=0.0, touch=lambda: None):
    "SGD by hand: v ← m v + g + d w, w ← w − lr v."
    speed = [torch.zeros_like(p) for p in model.parameters()]
    for loss_of in losses:
        slopes = torch.autograd.grad(loss_of(model), [*model.parameters()])
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), speed, slopes):
                v.mul_(momentum).add_(g + decay * p)
                p.sub_(lr * v)
        touch()
    return model


def ce(x, y):
    return lambda model: F.cross_entropy(model(x), y)


def kl(p, q):
    "KL between rows of probabilities, the mean over rows, by its definition."
    terms = torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.log()), torch.zeros_like(p))
    return terms.sum() / len(p)


def each_gradient(model, x, y):
    "The gradient of −log p of each sample: {name: (n, …)}."
    found = {n: [] for n, _ in model.named_parameters()}
    for one, label in zip(x, y):
        loss = -model(one[None]).log_softmax(1)[0, label]
        for name, g in zip(found, torch.autograd.grad(loss, [*model.parameters()])):
            found[name].append(g)
    return {n: torch.stack(gs) for n, gs in found.items()}


@pytest.mark.parametrize("name", NEW)
def test_each_passes_the_conformance_of_methods(name):
    kind = METHODS[name]
    own = {f.name for f in fields(kind)}
    few = {n: v for n, v in FEW.items() if n in own}
    presets = dict.fromkeys(kind.preset(p) for p in kind.presets or ["paper"])
    check_method(kind, tried=[replace(method, **few) for method in presets])


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_ssd_shrinks_by_the_ratio_of_the_slow_fisher_information(per):
    def slow(batches):
        total, terms = None, 0
        for x, y in batches:
            grads = each_gradient(net(), x, y)
            parts = grads if per == "sample" else {n: g.mean(0, True) for n, g in grads.items()}
            square = {n: g.square().sum(0) for n, g in parts.items()}
            total = square if total is None else {n: total[n] + s for n, s in square.items()}
            terms += len(next(iter(parts.values())))
        return {n: t / terms for n, t in total.items()}

    cut = [(X[k : k + 4], Y[k : k + 4]) for k in range(0, 24, 4)]
    lost = [(X[Y == 0][k : k + 4], Y[Y == 0][k : k + 4]) for k in (0, 4)]
    forget, everything, wanted = slow(lost), slow(cut), net()
    changed = 0
    with torch.no_grad():
        for name, p in wanted.named_parameters():
            for place in range(p.numel()):
                f, d = forget[name].flatten()[place], everything[name].flatten()[place]
                if f > 1.5 * d:
                    p.view(-1)[place] *= min(0.8 * d / f, 1)
                    changed += 1
    method = SSD(fisher_per=per, fisher_batch=4, ssd_alpha=1.5, ssd_lambda=0.8)
    result = done(method)
    assert same(result, wanted) and 0 < changed == sum(int(m.sum()) for m in result.mask.values())


def test_ssd_of_a_tenth_can_select_nothing_per_sample():
    "F_D is a mean over all, of which the forget set is a part: F_f / F_D is at most their ratio."
    task = Task(LOST, KEPT, ALL)
    for seed in range(5):
        scores = SSD(fisher_per="sample").score(net(seed), task, None)
        assert max(float(s.max()) for s in scores.values()) <= 3 * (1 + 1e-9)
    result = done(SSD(fisher_per="sample"))
    assert result.mask == {} and "changed nothing" in result.note


def test_lfssd_uses_the_slopes_of_the_logits_norm():
    def slow(batches):
        total = None
        for x, _ in batches:
            model = net()
            loss = sum((model(one[None]) ** 2).sum() for one in x) / len(x)
            slopes = torch.autograd.grad(loss, [*model.parameters()])
            sizes = [g.abs() / len(batches) for g in slopes]
            total = sizes if total is None else [a + b for a, b in zip(total, sizes)]
        return total

    together = [(torch.cat([x for x, _ in LOST]), torch.cat([y for _, y in LOST]))]
    wanted, forget, everything = net(), slow(together), slow(ALL)
    with torch.no_grad():
        for p, f, d in zip(wanted.parameters(), forget, everything):
            p.mul_(torch.where(f > 1.2 * d, (0.9 * d / f).clamp(max=1), torch.ones_like(f)))
    result = done(LFSSD(ssd_alpha=1.2, ssd_lambda=0.9))
    assert same(result, wanted) and far(result, net())


def drawn_labels(method, epoch, seed=666):
    "The labels that a method draws in an epoch, read from its steps."
    task = Task(LOST, KEPT, num_classes=3, original=net(), seed=seed)
    steps = [*method.steps(task, {}, epoch)]
    return torch.cat([step.loss.args[1] for step in steps[: len(LOST)]])


def test_labels_are_drawn_anew_in_each_epoch_and_from_all_classes():
    method = RandomLabels()
    epochs = [drawn_labels(method, e) for e in range(40)]
    assert len({tuple(e.tolist()) for e in epochs}) > 35
    assert torch.equal(epochs[3], drawn_labels(method, 3))
    counts = torch.cat(epochs).bincount(minlength=3) / (40 * 8)
    assert (counts - 1 / 3).abs().max() < 0.1  # the true class among them


def test_random_labels_are_learned_before_the_remain_set():
    method = RandomLabels(own_epochs=2, own_momentum=0.9, own_decay=5e-4, own_lr=0.05)
    losses = []
    for epoch in range(2):
        wrong = drawn_labels(method, epoch).split([5, 3])
        losses += [ce(x, y) for (x, _), y in zip(LOST, wrong)] + [ce(x, y) for x, y in KEPT]
    assert same(done(method), descend(net(), losses, 0.05, 0.9, 5e-4))


@pytest.mark.parametrize("freeze", ["values", "gradients"])
def test_salun_lets_the_upper_half_learn(freeze):
    model, flat = net(), []
    grads = {n: g.sum(0).abs() for n, g in each_gradient(model, X[Y == 0], Y[Y == 0]).items()}
    flat = torch.cat([g.flatten() for g in grads.values()])
    least = flat.sort(descending=True).values[len(flat) // 2 - 1]
    chosen = {n: g >= least for n, g in grads.items()}
    method = SalUn(own_epochs=2, salun_freeze=freeze)
    losses = []
    for epoch in range(2):
        wrong = drawn_labels(method, epoch).split([5, 3])
        losses += [ce(x, y) for (x, _), y in zip(LOST, wrong)] + [ce(x, y) for x, y in KEPT]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    speed = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for loss_of in losses:
        slopes = torch.autograd.grad(loss_of(model), [*model.parameters()])
        with torch.no_grad():
            for (n, p), g in zip(model.named_parameters(), slopes):
                speed[n] = 0.9 * speed[n] + g * chosen[n] + 5e-4 * p
                p -= 0.013 * speed[n]
                if freeze == "values":
                    p.copy_(torch.where(chosen[n], p, start[n]))
    result = done(method)
    assert same(result, model)
    assert all(torch.equal(result.mask[n], w) for n, w in chosen.items() if w.any())
    rest = [(result.model.state_dict()[n] != start[n])[~w] for n, w in chosen.items()]
    moved = torch.cat(rest).double().mean()
    assert moved == 0 if freeze == "values" else moved > 0.99


def test_sfron_ascends_every_fifth_step_with_what_leans_on_the_forget_set():
    method = SFRon(sfron_steps=7, sfron_every=3, sfron_alpha=2.0, sfron_clip=0.05, own_lr=0.02)
    model = net()

    def fisher(batches):
        squares = [
            {n: g.mean(0) ** 2 for n, g in each_gradient(net(), *b).items()} for b in batches
        ]
        return {n: sum(s[n] for s in squares) / len(squares) for n in squares[0]}

    whole = [[tuple(torch.cat(parts) for parts in zip(*batches))] for batches in (LOST, KEPT)]
    f, r = (fisher(batches) for batches in whole)
    chosen = {n: ((f[n] + 1e-15) / (r[n] + 1e-15) >= 1).double() for n in f}
    away, towards, number = cycle(LOST), cycle(KEPT), 0
    speed = [torch.zeros_like(p) for p in model.parameters()]
    total = 7 + 3

    def step(loss, up):
        nonlocal number
        slopes = [*torch.autograd.grad(loss, [*model.parameters()])]
        if up:
            slopes = [g * chosen[n] for g, n in zip(slopes, chosen)]
            norm = math.sqrt(sum(float((g**2).sum()) for g in slopes))
            assert norm > 0.05  # so that clipping is tried
            slopes = [g * 0.05 / (norm + 1e-6) for g in slopes]
        lr = 0.02 * (1 + math.cos(math.pi * (number + 0.5) / total)) / 2
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), speed, slopes):
                v.mul_(0.9).add_(g + 5e-4 * p)
                p.sub_(lr * v)
        number += 1

    for k in range(7):
        if k % 3 == 0:
            x, y = next(away)
            losses = -model(x).log_softmax(1)[range(len(y)), y]
            weights = losses.detach() ** -0.5
            alpha = 2.0 * (1 + math.cos(math.pi * k / 7)) / 2
            step(-alpha * (weights / weights.sum() * losses).sum(), True)
        x, y = next(towards)
        step(F.cross_entropy(model(x), y), False)
    assert same(done(method), model, 1e-7)


def test_msg_starts_again_where_gradients_differ_least():
    kept = [KEPT[0], (KEPT[1][0][:2], KEPT[1][1][:2])]  # as many as are to be forgotten: all count
    method = MSG(own_epochs=1, own_lr=1e-12)
    result = unlearn(net(), LOST, kept, method=method, progress="none")
    remain = [torch.cat(parts) for parts in zip(*kept)]
    f, r = each_gradient(net(), X[Y == 0], Y[Y == 0]), each_gradient(net(), *remain)
    before, after = net().state_dict(), result.model.state_dict()
    for name in before:
        fresh = result.mask.get(name)
        if fresh is None:
            assert (after[name] - before[name]).abs().max() < 1e-9
            continue
        difference = (r[name].sum(0) - f[name].sum(0)).abs()
        lowest = difference.flatten().argsort()[: int(0.3 * difference.numel())]
        assert {*lowest.tolist()} == {*fresh.flatten().nonzero()[:, 0].tolist()}
        assert ((after[name] - before[name]).abs() > 1e-4)[fresh].float().mean() > 0.95
        assert (after[name] - before[name])[~fresh].abs().max() < 1e-9
    assert {*result.mask} == {"0.weight", "2.weight"}


def test_msg_draws_by_fan_out_and_lets_the_rest_learn_a_tenth():
    from fisher_unlearn.methods.saliency import reset_

    wide = nn.Sequential(nn.Conv2d(8, 64, 3))
    whole = {"0.weight": torch.ones(64, 8, 3, 3, dtype=torch.bool)}
    assert reset_(wide, whole, 0)[0].weight.std().item() == pytest.approx(
        (2 / (64 * 9)) ** 0.5, 0.03
    )
    task = Task(LOST, KEPT, num_classes=3, original=net())
    mask = {"0.weight": torch.rand(4, 1, 3, 3) > 0.5}
    (first, *_) = MSG().steps(task, mask, 0)
    found, chosen = first.factors["0.weight"], mask["0.weight"]
    assert (found[chosen] == 1).all() and (found[~chosen] == 0.1).all()
    assert (first.factors["5.bias"] == 0.1).all() and len(first.factors) == 6
    rates = [MSG().objective(task, mask).rate(k) for k in range(15)]
    assert max(rates) == rates[7] == pytest.approx(1e-3) and rates[0] == pytest.approx(rates[14])


def test_ct_turns_kernels_and_trains_on():
    wanted = net()
    with torch.no_grad():
        for k in (0, 2):
            wanted[k].weight.copy_(wanted[k].weight.permute(0, 1, 3, 2).clone())
    numbers = iter(range(9))
    speed = [torch.zeros_like(p) for p in wanted.parameters()]
    for _ in range(3):
        for x, y in KEPT:
            lr = 1e-3 * (1 + math.cos(math.pi * (next(numbers) + 0.5) / 9)) / 2
            slopes = torch.autograd.grad(F.cross_entropy(wanted(x), y), [*wanted.parameters()])
            with torch.no_grad():
                for p, v, g in zip(wanted.parameters(), speed, slopes):
                    v.mul_(0.9).add_(g + 5e-4 * p)
                    p.sub_(lr * v)
    assert same(done(CT()), wanted)
    with pytest.raises(ValueError, match="the model has none"):
        unlearn(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double(), LOST, KEPT, method=CT())


def test_neggrad_plus_subtracts_the_forget_sets_loss_and_cycles_through_it():
    method = NegGradPlus(own_epochs=2, own_lr=0.05, neggrad_alpha=0.7)
    losses = []
    for first in (0, 1):  # of three batches, so that the second epoch begins with the other one
        for kept, lost in zip(KEPT, [LOST[first], LOST[1 - first], LOST[first]]):
            losses.append(lambda m, kept=kept, lost=lost: 0.7 * ce(*kept)(m) - 0.3 * ce(*lost)(m))
    assert same(done(method), descend(net(), losses, 0.05, 0.9, 5e-4))


def test_l1_sparse_wears_weights_away_and_less_so_in_each_epoch():
    method = L1Sparse(own_epochs=2, own_lr=0.05, l1_alpha=0.01)
    losses = [
        lambda m, b=b, a=a: ce(*b)(m) + a * sum(p.abs().sum() for p in m.parameters())
        for a in (0.01, 0.005)
        for b in KEPT
    ]
    assert same(done(method), descend(net(), losses, 0.05, 0.9, 5e-4))


def test_scrub_leaves_the_teacher_first_and_then_follows_it():
    method = SCRUB(own_epochs=2, scrub_steps=1, scrub_gamma=0.9, scrub_alpha=0.4)
    teacher, model = net(), net()
    adam = torch.optim.Adam(model.parameters(), lr=5e-4, weight_decay=5e-4)

    def distance(x):
        p, q = (m(x).div(2).softmax(1) for m in (teacher, model))
        return 4 * kl(p.detach(), q)

    for epoch in range(2):
        losses = [lambda x=x: -distance(x) for x, _ in LOST] if epoch < 1 else []
        losses += [lambda b=b: 0.9 * ce(*b)(model) + 0.4 * distance(b[0]) for b in KEPT]
        for loss_of in losses:
            adam.zero_grad()
            loss_of().backward()
            adam.step()
    assert same(done(method), model, 1e-7) and far(done(method), teacher)


def test_scrub_rewound_ends_at_the_epoch_closest_to_its_last_error_on_held_out_images():
    method = RewoundSCRUB(own_epochs=4, own_lr=0.02)
    ends = [done(SCRUB(own_epochs=e, own_lr=0.02)).model for e in (1, 2, 3, 4)]
    aim = accuracy(ends[-1], HELD)
    apart = [abs(accuracy(m, LOST) - aim) for m in ends]
    wanted = ends[apart.index(min(apart))]
    assert same(done(method), wanted)
    with pytest.raises(ValueError, match="needs `held_out`"):
        done(method, held_out=None)
    with pytest.raises(ValueError, match="8 of the 8 samples of `held_out` are to be forgotten"):
        done(method, held_out=LOST)


def test_bad_teacher_mixes_both_sets_and_follows_two_teachers():
    method = BadTeacher(own_lr=1e-3, bad_share=0.5)
    task = Task(LOST, KEPT, num_classes=3, original=net(), build=lambda: net(7))
    objective = method.objective(task, {})
    steps = [*objective.steps(0)]
    inputs = [step.loss.args[1] for step in steps]
    lost = torch.cat([x for x, _ in LOST])
    away = [torch.stack([(one == lost).flatten(1).all(1).any() for one in x]) for x in inputs]
    assert sum(int(a.sum()) for a in away) == len(lost)  # each of them once
    assert len(away) == len(KEPT) and all(0 < a.sum() < len(a) for a in away)
    model, adam = net(), None
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x, gone in zip(inputs, away):
        told = torch.where(gone[:, None], net(7)(x), net()(x)).softmax(1).detach()
        adam.zero_grad()
        kl(told, model(x).softmax(1)).backward()
        adam.step()
    assert same(done(method), model, 1e-7)
    shares = torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.3
    kept = [(torch.randn(40, 1, 6, 6, dtype=torch.float64), torch.ones(40).long())] * 100
    many = Task(LOST, kept, num_classes=3, original=net(), build=lambda: net(7))
    read = sum(len(s.loss.args[1]) for s in BadTeacher().objective(many, {}).steps(0)) - len(lost)
    assert abs(read / 4000 - shares.double().mean()) < 0.05


def test_delete_follows_the_teacher_without_the_true_class():
    method = DELETE(own_epochs=2, own_lr=0.05)
    losses = []
    for x, y in LOST * 2:
        told = net()(x).softmax(1).detach()
        told[range(len(y)), y] = 0
        told = told / told.sum(1, keepdim=True)
        losses.append(lambda m, x=x, told=told: kl(told, m(x).softmax(1)))
    assert same(done(method), descend(net(), losses, 0.05, 0.9, 5e-4))
    assert same(done(method, fine_tune=None), done(method).model)
    alone = unlearn(net(), LOST, None, method=method, progress="none")
    assert same(alone, done(method).model)


def test_noise_goes_where_the_class_is_least_likely_at_a_price():
    model, start = net(), torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    noise = start.double().requires_grad_()
    adam = torch.optim.Adam([noise], lr=0.1)
    for _ in range(25):
        adam.zero_grad()
        loss = model(noise).log_softmax(1)[:, 1].mean()
        (loss + 0.1 * sum((one**2).sum() for one in noise) / 5).backward()
        adam.step()
    found = repelling_noise(net(), X[:5], 1, seed=3)
    assert torch.allclose(found, noise.detach(), rtol=1e-9, atol=1e-9)


def test_unsir_impairs_by_noise_and_repairs_by_the_remain_set():
    method = UNSIR(own_lr=1e-3, unsir_share=0.7)
    noise = repelling_noise(net(), LOST[0][0], 0)
    part = KEPT[:2]  # 0.7 of 3 batches are 2.1
    model = net()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for beside in (True, False):
        for x, y in part:
            if beside:
                x, y = torch.cat([x, noise]), torch.cat([y, torch.zeros(5).long()])
            adam.zero_grad()
            ce(x, y)(model).backward()
            adam.step()
    assert same(done(method), model, 1e-7)
    some = [(X[:3], Y[:3])], [(X[3:], Y[3:])]
    with pytest.raises(ValueError, match="`unsir` forgets whole classes"):
        unlearn(net(), *some, method="unsir", classes=(0,))


@pytest.mark.parametrize("kind", [CFk, EUk])
def test_only_the_last_layers_learn(kind):
    method = kind(own_epochs=2, last_k=2, own_lr=0.05)
    model = net()
    if kind is EUk:
        fresh = net(7)
        model[2], model[5] = fresh[2], fresh[5]
    for p in model[0].parameters():
        p.requires_grad_(False)
    sgd = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0.05, 0.9, weight_decay=5e-4
    )
    for x, y in KEPT * 2:
        sgd.zero_grad()
        ce(x, y)(model).backward()
        sgd.step()
    result = done(method)
    assert same(result, model) and torch.equal(result.model[0].weight, net()[0].weight)
    assert last_modules(net(), 2) == ["2", "3", "4", "5"]


def test_a_kick_is_as_long_as_what_the_mask_removes_and_goes_where_it_is_told():
    mask = done(FisherMask(ratio=0.1))
    removed = mask.changed.distance.pow(2).sum() ** 0.5
    for where in ("units", "all", "along"):
        for scale in (0.5, 1.0):
            kick = done(Kick(ratio=0.1, kick_where=where, kick_scale=scale))
            assert kick.changed.distance.pow(2).sum() ** 0.5 == pytest.approx(scale * removed)
            moved = {n: kick.model.state_dict()[n] != t for n, t in net().state_dict().items()}
            inside = all(not (m & ~mask.mask.get(n, m & False)).any() for n, m in moved.items())
            assert inside == (where != "all")
    assert same(done(Kick(ratio=0.1, kick_where="along")), mask.model)
    given = done(Kick(ratio=0.1, kick_length=0.25))
    assert given.changed.distance.pow(2).sum() ** 0.5 == pytest.approx(0.25)


def test_directions_of_a_kick_are_even_and_decided_by_the_seed():
    kick, task = Kick(ratio=0.1, kick_length=1.0), Task(LOST, KEPT, num_classes=3)
    start = torch.cat([p.detach().flatten() for p in net().parameters()])
    scores = kick.score(net(), task, kick.pool(net(), task))
    mask, steps = kick.rule(scores, kick.pool(net(), task)), []
    for seed in range(300):
        model = net()
        kick.act(model, replace(task, seed=seed), scores, mask)
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
    steps = torch.stack(steps)
    assert torch.allclose(steps.norm(dim=1), torch.ones(300).double())
    assert steps.mean(0).norm() < 3 * (1 / 300) ** 0.5
    assert (steps.square().mean(0) * steps.shape[1]).mean() == pytest.approx(1.0, 0.01)
    again = net()
    kick.act(again, replace(task, seed=7), scores, mask)
    moved = torch.cat([p.detach().flatten() for p in again.parameters()]) - start
    assert torch.equal(moved, steps[7]) and not torch.equal(steps[7], steps[8])
    assert length_of({"a": steps[0]}) == pytest.approx(1.0)


def test_a_teacher_that_is_the_student_is_refused(monkeypatch):
    model = net()
    teacher = Teacher(model)
    teacher.model = model
    towards = Objective(lambda epoch: [], 1, 0.1, teachers=(teacher,))
    with pytest.raises(ValueError, match="the teacher is the student"):
        minimise(model, towards)
    teacher.model = copy.deepcopy(model)
    teacher.model[0].bias = model[0].bias  # one tensor is enough
    with pytest.raises(ValueError, match="shares tensors"):
        minimise(model, towards)
    teacher.model = copy.deepcopy(model)
    seen = model[5].weight.detach().t()  # the same memory, in another shape
    teacher.model[5].weight = nn.Parameter(seen)
    with pytest.raises(ValueError, match="shares tensors"):
        minimise(model, towards)


def test_a_teacher_stays_as_it_is_and_so_does_the_given_model():
    model = net()
    before = copy.deepcopy(model.state_dict())
    task = Task(LOST, KEPT, num_classes=3, original=model)
    student, method = copy.deepcopy(model), SCRUB(own_epochs=1, own_lr=0.05)
    minimise(student, method.objective(task, {}))
    for state in (model.state_dict(), task.teacher.model.state_dict()):
        assert all(torch.equal(t, before[n]) for n, t in state.items())
    assert not torch.equal(student[0].weight, model[0].weight)


def test_batchnorm_of_a_teacher_and_of_still_layers_does_not_move():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3))
    model = model.double()
    for method in (CFk(last_k=1, own_epochs=1), SCRUB(own_epochs=1)):
        ended = unlearn(model, LOST, KEPT, method=method, progress="none").model
        still = torch.equal(ended[1].running_mean, model[1].running_mean)
        assert still == isinstance(method, CFk)


TRAINS_ON = dict.fromkeys(("l1_sparse", "msg", "ct", "cf_k", "eu_k"), ["remain"])
TRAINS_ON |= {"delete": ["forget"]}  # the others on both


@pytest.mark.parametrize("name", [n for n in NEW if METHODS[n].objective is not Method.objective])
def test_a_batch_of_one_is_joined_where_the_network_needs_it(name):
    """BatchNorm can't be trained on one image of one pixel; a set that is such a batch is refused,
    if the method trains on it."""
    parts = lambda: [nn.Conv2d(1, 3, 6), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 3)]
    build = lambda: nn.Sequential(*parts()).double()
    model, kind = build(), METHODS[name]
    few = {n: v for n, v in FEW.items() if n in {f.name for f in fields(kind)}}
    lost = [(X[Y == 0][:7], Y[Y == 0][:7]), (X[Y == 0][7:], Y[Y == 0][7:])]
    kept = [*KEPT[:2], (X[Y == 1][:3], Y[Y == 1][:3]), (X[Y == 1][7:], Y[Y == 1][7:])]
    assert len(lost[-1][1]) == len(kept[-1][1]) == 1
    ways = {"build": build, "held_out": HELD, "reference": ALL}
    ways |= {"check_sets": False, "progress": "none"}
    result = unlearn(model, lost, kept, method=name, **few, **ways)
    assert all(p.isfinite().all() for p in result.model.parameters())
    alone = {"forget": (lost[1:], kept), "remain": (lost, kept[-1:])}
    for which, sets in alone.items():
        if which in TRAINS_ON.get(name, alone):
            with pytest.raises(ValueError, match=f"`{which}` begins with a batch of a single"):
                unlearn(model, *sets, method=name, **few, **ways)
        else:
            unlearn(model, *sets, method=name, **few, **ways)


WRONG = {
    "`ssd_alpha` is 0": {"method": "ssd", "ssd_alpha": 0},
    "`ssd_lambda` is -1": {"method": "ssd", "ssd_lambda": -1},
    "`neggrad_alpha` is 1.5": {"method": "neggrad_plus", "neggrad_alpha": 1.5},
    "`scrub_temperature` is 0": {"method": "scrub", "scrub_temperature": 0},
    "`bad_share` is 2": {"method": "bad_teacher", "bad_share": 2},
    "`own_lr` is nan": {"method": "delete", "own_lr": float("nan")},
    "`kick_where` is 'unit'": {"method": "kick", "kick_where": "unit"},
    "did you mean 'per_sample'": {"method": "ssd", "preset": "per_samples"},
    "did you mean 'scrub'": {"method": "scrubs"},
    "did you mean 'ssd_alpha'": {"method": "ssd", "sd_alpha": 1.0},
    "`last_k` is 9, and the model has 3": {"method": "cf_k", "last_k": 9},
    "needs `reference`": {"method": "ssd", "reference": None},
    "needs `build`": {"method": "bad_teacher", "build": None},
    "needs a remain set": {"method": "neggrad_plus", "remain": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_makes_no_sense_is_one_sentence(message):
    given = {"forget": LOST, "remain": KEPT, "reference": ALL, "build": lambda: net(7)}
    with pytest.raises((ValueError, TypeError), match=message) as refused:
        unlearn(net(), progress="none", **given | WRONG[message])
    assert "\n" not in str(refused.value)


def test_a_training_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="Lower its rate"):
        done(NegGradPlus(own_lr=1e30))


@pytest.mark.parametrize("name", NEW)
def test_samples_of_several_classes_are_served_or_refused_in_a_sentence(name):
    columns = lambda batches: [(x, F.one_hot(y, 3)) for x, y in batches]
    kind = METHODS[name]
    few = {n: v for n, v in FEW.items() if n in {f.name for f in fields(kind)}}
    ways = {"reference": columns(ALL), "build": lambda: net(7), "held_out": columns(HELD)}
    ways |= {"classes": (0,), "progress": "none"}
    call = lambda: unlearn(net(), columns(LOST), columns(KEPT), method=name, **few, **ways)
    if "one_class" in kind.needs:
        with pytest.raises(ValueError, match="needs samples of one class each"):
            call()
    else:
        assert all(p.isfinite().all() for p in call().model.parameters())


def test_the_last_step_of_a_course_is_the_smallest():
    ways = [Objective(lambda e: [], 1, 1.0, course=c, total=10) for c in ("cosine", "triangle")]
    for objective in ways:
        rates = [objective.rate(k) for k in range(10)]
        assert min(rates) == pytest.approx(rates[-1]) and rates[-1] > 0 and objective.rate(99) >= 0
    with pytest.raises(ValueError, match="needs `total`"):
        Objective(lambda e: [Step(lambda m: None)], 1, 1.0, course="cosine")
