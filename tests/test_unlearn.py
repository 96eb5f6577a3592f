"""Each method against an independent computation of what it must change, and the promise that
the input stays as it was."""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from fisher_unlearn.images.data import Samples
from fisher_unlearn.scores.fisher import diag_fisher
from fisher_unlearn.methods.masking import quota
from fisher_unlearn.networks.models import NETWORKS, build_model, min_size
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, train_model
from fisher_unlearn.methods.base import READINGS, Task
from fisher_unlearn.methods.masks import FisherMask
from fisher_unlearn.methods.unlearn import METHODS, method_named, unlearn
from test_activation import made, slow_table, slow_tfidf
from test_influence import Small, flat, hessian_of
from test_noise import slow_std


# The paper's larger networks take their turn in the slow tests.
LARGE, OTHERS = (
    [pytest.param(name, marks=pytest.mark.slow) for name in names]
    for names in (("vgg16", "densenet"), [name for name in NETWORKS if name != "resnet20"])
)
MASKING = ("mask_classifier", "random_mask", "activation_mask", "tfidf", "fisher_mask")


@pytest.fixture(scope="module")
def sets(request_zero):
    return {
        "remain": request_zero.test_remain.batches(500),
        "forget": request_zero.test_forget.batches(500),
    }


@pytest.fixture(scope="module")
def loaders(request_zero):
    return request_zero.forget.batches(128), request_zero.remain.batches(128)


def difference(before, after):
    return {n: (v != before[n]) for n, v in after.items() if not torch.equal(v, before[n])}


def top_by_numpy(scores, ratio):
    "The positions of the highest of all scores, by a stable sort in NumPy."
    flat = np.concatenate([np.ravel(s) for s in scores.values()])
    chosen = np.zeros(len(flat), bool)
    chosen[np.argsort(-flat, kind="stable")[: quota(ratio, len(flat))]] = True
    parts = np.split(chosen, np.cumsum([s.size for s in scores.values()])[:-1])
    return {n: p.reshape(s.shape) for (n, s), p in zip(scores.items(), parts)}


def squared_gradients(model, samples, per):
    """Per image with its true label, or per batch of 128 with all labels weighted by their mean
    probability: by backward()."""
    model = copy.deepcopy(model).eval()
    batches = list(samples.batches(1 if per == "sample" else 128))
    total = {n: 0 for n, _ in model.named_parameters()}
    for x, y in batches:
        p = model(x).softmax(1).mean(0).detach()
        for c in [None] if per == "sample" else range(10):
            model.zero_grad()
            nn.functional.cross_entropy(
                model(x), y if c is None else torch.full_like(y, c)
            ).backward()
            for n, w in model.named_parameters():
                total[n] = total[n] + (1 if c is None else p[c]) * w.grad.double() ** 2
    return {n: t.numpy() / (len(batches) if per == "batch" else 1) for n, t in total.items()}


def test_fisher_mask_paper_is_the_difference_of_sums_of_squares(original, request_zero):
    "Independent of the engine: one image at a time, single weights, without the classifier."
    few = request_zero.remain[torch.arange(0, 1169, 23)]
    forget, remain = request_zero.forget[torch.arange(20)], few
    result = unlearn(
        original,
        forget.batches(7),
        remain.batches(9),
        method="fisher_mask",
        preset="paper",
        ratio=0.05,
    )
    names = [n for n, p in original.named_parameters() if p.dim() == 4]
    f, r = (squared_gradients(original, part, "sample") for part in (forget, remain))
    wanted = top_by_numpy({n: f[n] - r[n] for n in names}, 0.05)
    found = {
        n: result.mask[n].numpy() if n in result.mask else np.zeros_like(wanted[n]) for n in names
    }
    apart = sum((found[n] != wanted[n]).sum() for n in names)
    assert apart <= 0.002 * sum(
        w.sum() for w in wanted.values()
    )  # float32 may swap neighbours at the threshold
    assert set(result.mask) <= set(names) and sum(m.sum() for m in found.values()) == sum(
        m.sum() for m in wanted.values()
    )


def test_fisher_mask_authors_code_is_the_difference_of_batch_means(original, request_zero):
    """Kernels of convolutions and single weights of the classifier, whatever batches the
    caller's loader gives."""
    result = unlearn(
        original,
        request_zero.forget.batches(50),
        request_zero.remain.batches(33),
        method="fisher_mask",
        preset="authors_code",
        ratio=0.02,
    )
    f, r = (
        squared_gradients(original, part, "batch")
        for part in (request_zero.forget, request_zero.remain)
    )
    scores = {
        n: (f[n] - r[n]).mean((2, 3)) if p.dim() == 4 else f[n] - r[n]
        for n, p in original.named_parameters()
        if p.dim() in (2, 4)
    }
    wanted = top_by_numpy(scores, 0.02)
    found = {
        n: (
            result.mask[n].flatten(2).all(2) if result.mask[n].dim() == 4 else result.mask[n]
        ).numpy()
        if n in result.mask
        else np.zeros_like(w)
        for n, w in wanted.items()
    }
    assert sum(f.sum() for f in found.values()) == 658  # floor(.02 · 32,912)
    assert sum((found[n] != wanted[n]).sum() for n in wanted) <= 14
    for m in result.mask.values():
        if m.dim() == 4:
            assert torch.equal(m.flatten(2).all(2), m.flatten(2).any(2))


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_family_between_sums_and_means(original, loaders, weight):
    forget, remain = loaders
    scores = FisherMask(remain_weight=weight).score(original, Task(forget, remain), None)
    f, r = diag_fisher(original, forget), diag_fisher(original, remain)
    for n in scores:
        assert torch.allclose(scores[n], f[n] / 128 - weight * r[n] / 1169, rtol=1e-4, atol=1e-9)


def test_remain_weight_none_ranks_like_n_r_over_n_f(original, loaders):
    masks = [unlearn(original, *loaders, remain_weight=w).mask for w in ("sums", 1169 / 128)]
    assert set(masks[0]) == set(masks[1])
    assert sum((masks[0][n] != masks[1][n]).sum() for n in masks[0]) <= 0.002 * sum(
        m.sum() for m in masks[0].values()
    )


def test_without_remain_data_the_forget_set_alone_decides(original, loaders):
    scores = FisherMask().score(original, Task(loaders[0]), None)
    f = diag_fisher(original, loaders[0])
    assert all(torch.equal(scores[n], f[n]) for n in f)
    assert unlearn(original, loaders[0], None).note.startswith("The method changed 5,")


def test_mask_classifier_zeroes_one_row_and_nothing_else(original, loaders, sets):
    result = unlearn(original, *loaders, method="mask_classifier", evaluate=sets)
    after = result.model.state_dict()
    changed = difference(original.state_dict(), after)
    assert set(changed) == {"classifier.weight", "classifier.bias"}
    assert (after["classifier.weight"][0] == 0).all() and after["classifier.bias"][0] == 0
    assert all(not c[1:].any() for c in changed.values())
    assert result.changed.set_index("name").masked.to_dict() == {
        "classifier.weight": 64,
        "classifier.bias": 1,
    }
    rows = unlearn(
        original, *loaders, method="mask_classifier", classes=(3, 5), check_sets=False
    ).mask["classifier.weight"]
    assert rows.any(1).nonzero()[:, 0].tolist() == [3, 5]


def test_a_mask_of_what_was_zero_already_changes_nothing_and_says_so(original, loaders):
    model = unlearn(original, *loaders, method="mask_classifier").model
    again = unlearn(model, *loaders, method="mask_classifier")
    assert (
        again.note == "The method changed nothing: the 65 entries that it masked were zero before."
    )
    assert again.changed[["name", "masked", "changed", "distance"]].values.tolist() == [
        ["classifier.weight", 64, 0, 0.0],
        ["classifier.bias", 1, 0, 0.0],
    ]
    wider = unlearn(model, *loaders, method="mask_classifier", classes=(0, 1), check_sets=False)
    assert wider.note.startswith(
        "The method changed 65 entries in 2 tensors, masked 130, and moved the model by "
    )


def with_norms(model, units):
    """The masked entries of the state, by the order of the modules: rows of convolutions with
    biases and the next BatchNorm, rows of the classifier with biases. `units`: positions in that
    order."""
    order = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    ]
    places, masks = [], {n: np.zeros(v.shape, bool) for n, v in model.state_dict().items()}
    for k, (name, m) in enumerate(order):
        norm = (
            next((n for n, o in order[k:] if isinstance(o, nn.BatchNorm2d)), None)
            if isinstance(m, nn.Conv2d)
            else None
        )
        if not isinstance(m, nn.BatchNorm2d):
            places += [(name, norm, c) for c in range(len(m.weight))]
    for u in units:
        layer, norm, channel = places[u]
        for entry in (
            f"{layer}.weight",
            f"{layer}.bias",
            *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
        ):
            if entry in masks:
                masks[entry][channel] = True
    return {n: m for n, m in masks.items() if m.any()}


def same_masks(found, wanted):
    return set(found) == set(wanted) and all(
        np.array_equal(found[n].numpy(), wanted[n]) for n in wanted
    )


def task(network):
    "`task_of` a network of the package with statistics that do something."
    return task_of(*made(network, n=11))


def task_of(model, x, y):
    """The network with biases that are not zero, its eleven images of three classes, forget and
    remain batches of them; in double precision, so that ranks don't hang on rounding."""
    model, x = model.double(), x.double()
    y[:] = torch.tensor([0, 1, 2] * 3 + [1, 0])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.add_(0.1)
    part = lambda keep, size: list(zip(x[keep].split(size), y[keep].split(size)))
    return model, x, y, part(y == 0, 3), part(y > 0, 4)


@pytest.mark.parametrize("network", ["resnet20", *OTHERS])
def test_random_mask_draws_weights_or_channels_of_which_everything_goes(network):
    "The draw is the first ⌊R·N⌋ of a permutation by the seed."
    model, _, _, *loaders = task(network)
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 4}
    total, channels = (
        sum(p.numel() for p in weights.values()),
        sum(len(p) for p in weights.values()) + 3,
    )
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(9))[: total * 2 // 100]
    flat_mask = np.zeros(total, bool)
    flat_mask[drawn] = True
    parts = dict(
        zip(weights, np.split(flat_mask, np.cumsum([p.numel() for p in weights.values()])[:-1]))
    )
    paper = unlearn(model, *loaders, method="random_mask", preset="paper", seed=9)
    assert same_masks(
        paper.mask, {n: p.reshape(weights[n].shape) for n, p in parts.items() if p.any()}
    )
    code = unlearn(model, *loaders, method="random_mask", preset="authors_code", seed=9, ratio=0.05)
    assert same_masks(
        code.mask,
        with_norms(
            model,
            torch.randperm(channels, generator=torch.Generator().manual_seed(9))[
                : channels * 5 // 100
            ].tolist(),
        ),
    )
    before = model.state_dict()
    for n, v in code.model.state_dict().items():
        assert torch.equal(
            v, before[n].masked_fill(code.mask[n], 0) if n in code.mask else before[n]
        )
    assert code.changed.channels.sum() == channels * 5 // 100 and paper.changed.masked.sum() == len(
        drawn
    )


@pytest.fixture(scope="module")
def few(request_zero):
    """A handful of images of each set, so that loops over single images are quick; 3 images of
    zeros and 14 others."""
    return request_zero.forget[torch.arange(3)], request_zero.remain[torch.arange(0, 1169, 90)][
        torch.arange(13)
    ]


@pytest.mark.parametrize("network", ["resnet20", *LARGE])
@pytest.mark.parametrize("preset", READINGS)
def test_activation_mask_takes_the_top_of_the_slow_scores(network, preset):
    model, x, y, forget, remain = task(network)
    tables = [slow_table(model, x[part], True) for part in (y == 0, y > 0)]
    per = (4, 7) if preset == "paper" else (1, 1)  # images, or batches of 128
    scores = np.concatenate(
        [
            np.sum(tables[0][layer], 0) / per[0] - np.sum(tables[1][layer], 0) / per[1]
            for layer in tables[0]
        ]
    )
    assert list(tables[0]) == [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    count = len(scores) * 4 // 100
    result = unlearn(model, forget, remain, method="activation_mask", preset=preset, ratio=0.04)
    wanted = with_norms(model, np.argsort(-scores, kind="stable")[:count].tolist())
    if preset == "paper":
        wanted = {n: m for n, m in wanted.items() if m.ndim == 4}
    assert same_masks(result.mask, wanted) and result.changed.channels.sum() == count


@pytest.mark.parametrize("network", ["resnet20", *LARGE])
@pytest.mark.parametrize(
    "preset, batches, read",
    [("paper", None, 5), ("authors_code", None, 5), ("paper", 2, 10), ("authors_code", 0, 11)],
)
def test_tfidf_takes_the_highest_or_what_is_not_above_the_threshold(network, preset, batches, read):
    """Whole filters, with their biases where there are any; of the reference, as many batches as
    are to be read."""
    model, x, y, forget, remain = task(network)
    table = slow_table(model, x[:read], False)
    scores = {
        layer: np.array(slow_tfidf(rows, y[:read].tolist(), [0], 3))
        for layer, rows in table.items()
    }
    every = np.sort(np.concatenate(list(scores.values())))
    threshold = (
        every[-(len(every) * 96 // 100)]
        if preset == "authors_code"
        else every[-(len(every) * 4 // 100)]
    )
    taken = {
        layer: s <= threshold if preset == "authors_code" else s >= threshold
        for layer, s in scores.items()
    }
    if preset == "authors_code":
        taken = {layer: t for layer, t in taken.items() if len(t) * 4 // 100 >= 1}
    result = unlearn(
        model,
        forget,
        remain,
        method="tfidf",
        preset=preset,
        ratio=0.04,
        tfidf_batches=batches,
        reference=list(zip(x.split(5), y.split(5))),
    )
    wanted, state = {}, model.state_dict()
    for layer, t in taken.items():
        for entry in (f"{layer}.weight", f"{layer}.bias"):
            if entry in state and t.any():
                wanted[entry] = np.broadcast_to(
                    t.reshape(-1, *[1] * (state[entry].dim() - 1)), state[entry].shape
                )
    assert same_masks(result.mask, wanted) and any(n.endswith("bias") for n in wanted) == (
        network == "vgg16"
    )


@pytest.mark.parametrize(
    "preset, given",
    [("paper", {}), ("authors_code", {}), ("authors_code", {"alpha": 3e-6, "clamp": 50.0})],
)
def test_fisher_noise_is_its_formula_with_the_seeds_draws(original, few, preset, given):
    """The Fisher information by backward(), the spread by loops, and the draws of one generator
    in the order of declaration."""
    information = squared_gradients(original, few[1], "sample" if preset == "paper" else "batch")
    rule = (
        dict(alpha=1e-6, exponent=0.25, clamp=1e3, averaged=False, row=False)
        if preset == "paper"
        else dict(alpha=1e-6, exponent=0.5, clamp=1e3, averaged=True, row=True)
    )
    rule |= given
    result, generator = (
        unlearn(
            original,
            few[0].batches(2),
            few[1].batches(4),
            method="fisher_noise",
            preset=preset,
            seed=7,
            **{f"noise_{name}": value for name, value in given.items()},
        ),
        torch.Generator().manual_seed(7),
    )
    for (name, old), new in zip(original.named_parameters(), result.model.parameters()):
        head = name.startswith("classifier")
        std = slow_std(
            information[name] / (13 if preset == "paper" else 1), head=head, rows=[0], **rule
        )
        mean, drawn = (
            old.detach().double().numpy().copy(),
            torch.randn(old.shape, generator=generator).numpy(),
        )
        if head and preset == "authors_code":
            mean[0] = 0
        assert (
            np.abs(new.detach().numpy() - mean - std * drawn).max()
            <= 1e-4 * np.abs(std * drawn).max()
        ), name
    assert not difference(dict(original.named_buffers()), dict(result.model.named_buffers()))
    assert not result.mask and "masked 0," in result.note


@pytest.mark.parametrize("preset", READINGS)
def test_influence_is_the_recursion_with_the_whole_hessian(preset):
    torch.manual_seed(0)
    model, x, y = (
        Small().double(),
        torch.randn(9, 1, 4, 4).double(),
        torch.tensor([0, 0, 0, 1, 2, 1, 2, 1, 2]),
    )
    result = unlearn(
        model,
        [(x[:3], y[:3])],
        [(x[3:], y[3:])],
        method="influence",
        preset=preset,
        reference=[(x, y)],
        lissa_epochs=4,
        lissa_damping=0.1,
        lissa_scale=5.0,
    )
    hessian = hessian_of(model, x, y)[1].numpy()
    model.eval()
    g = flat(
        torch.autograd.grad(
            nn.functional.cross_entropy(model(x[:3]), y[:3], reduction="sum") / 9,
            list(model.parameters()),
            materialize_grads=True,
        )
    ).numpy()
    v = g
    for _ in range(4):
        v = g + 0.9 * v - hessian @ v / 5
    moved = (
        flat(result.model.parameters()).detach().numpy() - flat(model.parameters()).detach().numpy()
    )
    assert (
        np.allclose(moved, v / 5 / (3 if preset == "paper" else 1), atol=1e-13)
        and np.abs(moved).max() > 1e-3
    )
    assert "masked 0," in result.note and result.changed.distance.pow(
        2
    ).sum() ** 0.5 == pytest.approx(np.linalg.norm(moved))


@pytest.mark.parametrize(
    "method, preset",
    [
        ("fisher_mask", "paper"),
        ("activation_mask", "paper"),
        ("mask_classifier", "paper"),
        ("activation_mask", "authors_code"),
        ("random_mask", "authors_code"),
    ],
)
def test_hard_masks_hold_and_soft_ones_do_not(original, loaders, method, preset):
    """Through two epochs at the full rate, with decay and momentum, in convolutions and in
    BatchNorm's weights and biases; the rest of the model moves in both. Its running statistics
    are no weights, but of a channel that is held at zero they are zero too."""
    tune = TrainSettings(Schedule(epochs=2, drops=()), select="last", weight_decay=1e-2)
    hard, soft = (
        unlearn(
            original,
            *loaders,
            method=method,
            preset=preset,
            fine_tune=tune,
            hard=h,
            progress="none",
        )
        for h in (True, False)
    )
    assert set(hard.mask) == set(soft.mask) and all(
        torch.equal(hard.mask[n], soft.mask[n]) for n in hard.mask
    )
    ends = [
        torch.cat([r.model.state_dict()[n][m] for n, m in r.mask.items()]) for r in (hard, soft)
    ]
    back = (ends[1] != 0).float().mean()
    assert (ends[0] == 0).all() and (back > 0.5 if preset == "paper" else back > 0)
    assert (
        hard.model.state_dict()["features.1.0.0.conv1.weight"]
        != original.state_dict()["features.1.0.0.conv1.weight"]
    ).any()
    assert not any(p._backward_hooks for p in hard.model.parameters())


def narrow_stack():
    "Convolutions with biases before their BatchNorm, as VGG16 has them, of eight channels each."
    torch.manual_seed(0)
    blocks = [
        layer
        for width in (1, 8, 8, 8, 8, 8)
        for layer in (nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("method, preset", [("random_mask", "authors_code"), ("tfidf", "paper")])
def test_hard_masks_hold_the_biases_of_convolutions(method, preset):
    images = torch.randn(11, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model, x, y, forget, remain = task_of(narrow_stack(), images, torch.empty(11).long())
    tune = TrainSettings(Schedule(epochs=2, drops=()), select="last", weight_decay=1e-2)
    hard, soft = (
        unlearn(
            model,
            forget,
            remain,
            method=method,
            preset=preset,
            fine_tune=tune,
            hard=h,
            ratio=0.4,
            progress="none",
            reference=[(x, y)],
        )
        for h in (True, False)
    )
    biases = [
        n
        for n in hard.mask
        if n.endswith("bias") and f"{n[:-4]}running_var" not in hard.model.state_dict()
    ]
    assert len(biases) > 5 and all(
        (hard.model.state_dict()[n][hard.mask[n]] == 0).all()
        for n in hard.mask
        if not n.endswith(("running_mean", "running_var"))
    )
    assert preset != "paper" or any(
        (soft.model.state_dict()[n][soft.mask[n]] != 0).any() for n in biases
    )


def test_a_checkpoint_of_soft_fine_tuning_is_not_taken_for_a_hard_one(original, loaders, tmp_path):
    tune = TrainSettings(Schedule(epochs=1, drops=()), select="last")
    go = lambda hard: unlearn(
        original,
        *loaders,
        method="mask_classifier",
        fine_tune=tune,
        checkpoint=tmp_path / "p.safetensors",
        progress="none",
        hard=hard,
    )
    go(False)
    with pytest.raises(ValueError, match="another training run"):
        go(True)


def dumped(method, **options):
    return METHODS[method](**options).dump()


def test_keys_hold_the_options_of_a_method():
    "As they have since the first run, whatever was added later."
    reads = {m: set(kind.preset("authors_code").dump()) for m, kind in METHODS.items()}
    assert not reads["finetune"] and not reads["retrain"] and not reads["mask_classifier"]
    pooled = {"ratio", "unit", "classifier_in_pool"}
    assert reads["fisher_mask"] == pooled | {"fisher_labels", "fisher_per", "remain_weight"}
    assert reads["random_mask"] == pooled | {"reach"} and set(dumped("random_mask")) == pooled
    assert reads["activation_mask"] == {"ratio", "unit", "reach", "activation_per"}
    assert reads["tfidf"] == {
        "ratio",
        "unit",
        "reach",
        "tfidf_direction",
        "tfidf_gate",
        "tfidf_batches",
    }
    loud = {f.name for f in fields(METHODS["fisher_noise"]) if not f.metadata["quiet"]}
    assert reads["fisher_noise"] == loud
    assert reads["influence"] == {f.name for f in fields(METHODS["influence"])}
    assert dumped("fisher_mask")["remain_weight"] is None
    for m in MASKING:
        assert dumped(m, hard=True)["hard"] is True and "hard" not in reads[m]
    for m in ("activation_mask", "tfidf"):
        assert dumped(m, classifier_in_pool=True)["classifier_in_pool"] is True


def test_finetune_changes_nothing_and_says_so(original, loaders, sets):
    result = unlearn(original, *loaders, method="finetune", evaluate=sets)
    assert (
        not difference(original.state_dict(), result.model.state_dict())
        and result.note == "The method changed nothing."
        and len(result.history) == 1
    )


def test_ratio_0_changes_nothing_and_says_so(original, loaders):
    result = unlearn(original, *loaders, method="fisher_mask", ratio=0)
    said = "The method changed nothing: its ratio is 0."
    assert result.note == said and result.model is not original
    assert not difference(original.state_dict(), result.model.state_dict())


@pytest.mark.parametrize(
    "method, preset",
    [("fisher_mask", "paper"), ("fisher_mask", "authors_code"), ("tfidf", "authors_code")],
)
def test_ratio_0_then_fine_tuned_is_fine_tuning_alone(original, loaders, method, preset):
    tune = TrainSettings(Schedule(epochs=1, drops=()), select="last")

    def tuned(name, **options):
        return unlearn(
            original,
            *loaders,
            method=name,
            preset=preset,
            fine_tune=tune,
            reference=loaders[1],
            progress="none",
            **options,
        ).model.state_dict()

    masked, alone = tuned(method, ratio=0), tuned("finetune")
    assert difference(original.state_dict(), alone) and not difference(alone, masked)


def test_retrain_is_training_from_scratch_on_the_remain_set(
    original, loaders, digits, request_zero
):
    settings, build = (
        TrainSettings(Schedule(epochs=2, drops=(1,))),
        lambda: build_model("resnet20", 10, 1, seed=0),
    )
    result = unlearn(
        original,
        *loaders,
        method="retrain",
        build=build,
        fine_tune=settings,
        seed=5,
        progress="none",
    )
    plain = build()
    train_model(
        plain,
        request_zero.remain,
        TrainSettings(Schedule(epochs=2, drops=(1,)), select="last", seed=5),
        progress="none",
    )
    assert not difference(plain.state_dict(), result.model.state_dict())


def test_fine_tuning_replays_the_schedule_from_the_masked_model(original, loaders, sets):
    settings = TrainSettings(Schedule(epochs=160, drops=(80, 120)))
    result = unlearn(
        original,
        *loaders,
        method="mask_classifier",
        fine_tune=settings.replayed(5),
        evaluate=sets,
        seed=9,
        progress="none",
    )
    assert result.history.epoch.tolist() == list(range(6)) and result.history.lr.tolist()[
        1:
    ] == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])
    plain = unlearn(original, *loaders, method="mask_classifier").model
    train_model(
        plain,
        loaders[1],
        TrainSettings(settings.replayed(5).schedule, select="last", seed=9),
        progress="none",
    )
    assert not difference(plain.state_dict(), result.model.state_dict())
    scores = result.history.remain_acc / (1 + result.history.forget_acc / 100)
    assert np.allclose(result.history.unlearn_score, scores)


PAPERS = [*METHODS][:9]  # the paper's; the rivals have tests of their own
CASES = [(m, p) for m in PAPERS for p in METHODS[m].presets or ["paper"]]


@pytest.mark.parametrize(
    "network", [n if n == "resnet20" else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
@pytest.mark.parametrize("method, preset", CASES)
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_conformance(network, method, preset, device):
    """Every method on each of the paper's networks: the input is untouched, dtype, layout and
    device are kept, and the same seed changes and masks the same. `check_method` looks at the
    rest, on a small network."""
    g = torch.Generator().manual_seed(0)
    samples = Samples(
        torch.randint(256, (12, 1, 8, 8), generator=g).to(torch.uint8),
        torch.tensor([0] * 4 + [1] * 4 + [2] * 4),
        (0.5,),
        (0.25,),
        min_size(network),
    )
    forget, remain = (
        samples[samples.labels == 0].batches(3, device),
        samples[samples.labels > 0].batches(4, device),
    )
    build = lambda: build_model(network, 3, 1, seed=1).to(device)
    model = build().train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    tune = TrainSettings(Schedule(epochs=1, drops=()), select="last")
    a, b = (
        unlearn(
            model,
            forget,
            remain,
            method=method,
            preset=preset,
            fine_tune=tuned,
            build=build,
            reference=samples.batches(12, device),
            progress="none",
            **({"lissa_epochs": 1} if method == "influence" else {}),
        )
        for tuned in (tune, None)
    )
    assert model.training and not difference(before, model.state_dict())
    assert a.changed.equals(b.changed) and not difference(a.mask, b.mask)
    assert not a.model.training
    assert all(
        (v.dtype, v.shape, v.device) == (before[n].dtype, before[n].shape, before[n].device)
        for n, v in a.model.state_dict().items()
    )
    assert a.changed.masked.sum() == sum(int(m.sum()) for m in a.mask.values()) and bool(
        a.mask
    ) == (method in MASKING)
    same = method in (
        "finetune",
        "retrain",
    )  # the network of this test is fresh, as is the one that retraining starts from
    assert (a.note == "The method changed nothing.") == same == (len(a.changed) == 0)
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)]
    weights, kernels, channels, head = (
        sum(s.numel() for s in shapes),
        sum(s[0] * s[1] for s in shapes),
        sum(s[0] for s in shapes),
        model.classifier.weight.numel(),
    )
    count = {
        ("random_mask", "paper"): ("masked", weights),
        ("random_mask", "authors_code"): ("channels", channels + 3),
        ("activation_mask", "paper"): ("channels", channels),
        ("activation_mask", "authors_code"): ("channels", channels),
        ("tfidf", "paper"): ("channels", channels),
        ("fisher_mask", "paper"): ("masked", weights),
        ("fisher_mask", "authors_code"): ("kernels", kernels + head),
    }.get((method, preset))
    if count:
        assert a.changed[count[0]].sum() == quota(0.02, count[1])
    if method == "mask_classifier":
        assert a.changed.masked.tolist() == [head // 3, 1]


@pytest.mark.parametrize("method, preset", CASES)
def test_double_precision_stays_double(original, few, method, preset):
    """In a model of doubles nothing becomes single, and what is masked or moved is what single
    precision masks or moves, up to rounding."""

    def go(dtype):
        forget, remain = ([(x.to(dtype), y) for x, y in part.batches(4)] for part in few)
        model = copy.deepcopy(original).to(dtype)
        return unlearn(
            model,
            forget,
            remain,
            method=method,
            preset=preset,
            reference=[*forget, *remain],
            build=lambda: build_model("resnet20", 10, 1, seed=3).to(dtype),
            seed=4,
            **({"lissa_epochs": 1, "lissa_scale": 1000.0} if method == "influence" else {}),
        )

    double, single = go(torch.float64), go(torch.float32)
    assert all(
        v.dtype == torch.float64
        for v in double.model.state_dict().values()
        if v.is_floating_point()
    )
    for n, v in single.model.state_dict().items():
        if v.is_floating_point():
            assert (v - double.model.state_dict()[n]).abs().gt(
                1e-4 * v.abs().max() + 1e-12
            ).sum() <= 0.01 * v.numel() + 2, n


def test_frozen_layers_are_not_candidates(original, loaders):
    model = copy.deepcopy(original)
    for p in model.features[0].parameters():
        p.requires_grad_(False)
    mask = unlearn(model, *loaders, ratio=0.5).mask
    assert "features.0.0.weight" not in mask and len(mask) == 20


def test_a_checkpoint_of_another_method_is_refused(original, loaders, tmp_path):
    tune = TrainSettings(Schedule(epochs=1, drops=()), select="last")
    unlearn(
        original,
        *loaders,
        method="finetune",
        fine_tune=tune,
        checkpoint=tmp_path / "p.safetensors",
        progress="none",
    )
    with pytest.raises(ValueError, match="another training run"):
        unlearn(
            original,
            *loaders,
            method="mask_classifier",
            fine_tune=tune,
            checkpoint=tmp_path / "p.safetensors",
            progress="none",
        )


def test_a_layer_with_other_rows_than_classes_is_no_classifier(loaders):
    class Maxout(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Linear(64, 20)

        def forward(self, x):
            return self.rows(x.flatten(1)).reshape(-1, 10, 2).amax(2)

    with pytest.raises(ValueError, match="with 10 rows"):
        unlearn(Maxout(), *loaders, method="mask_classifier")


def test_presets_are_what_they_say():
    """All that the two readings say, against PROTOCOL's table; what is not said is the class's
    own default."""
    noise, lissa = (
        {"noise_alpha": 1e-6, "noise_clamp": 1e3},
        {"lissa_epochs": 30, "lissa_damping": 0.01, "lissa_scale": 20.0},
    )
    said = {
        "paper": {
            "random_mask": {"unit": "weight", "classifier_in_pool": False},
            "activation_mask": {"unit": "channel", "reach": "kernels", "activation_per": "sample"},
            "tfidf": {
                "unit": "channel",
                "reach": "bias",
                "tfidf_direction": "highest",
                "tfidf_gate": False,
                "tfidf_batches": 1,
            },
            "fisher_noise": noise
            | {
                "fisher_labels": "true",
                "fisher_per": "sample",
                "noise_exponent": 0.25,
                "noise_averaged": False,
                "noise_row": False,
            },
            "influence": lissa | {"lissa_divide": True},
            "fisher_mask": {
                "unit": "weight",
                "classifier_in_pool": False,
                "fisher_labels": "true",
                "fisher_per": "sample",
                "remain_weight": "sums",
            },
        },
        "authors_code": {
            "random_mask": {"unit": "channel", "reach": "norm", "classifier_in_pool": True},
            "activation_mask": {"unit": "channel", "reach": "norm", "activation_per": "batch"},
            "tfidf": {
                "unit": "channel",
                "reach": "bias",
                "tfidf_direction": "lowest",
                "tfidf_gate": True,
                "tfidf_batches": 1,
            },
            "fisher_noise": noise
            | {
                "fisher_labels": "expected",
                "fisher_per": "batch",
                "noise_exponent": 0.5,
                "noise_averaged": True,
                "noise_row": True,
            },
            "influence": lissa | {"lissa_divide": False},
            "fisher_mask": {
                "unit": "kernel",
                "classifier_in_pool": True,
                "fisher_labels": "expected",
                "fisher_per": "batch",
                "remain_weight": 1.0,
            },
        },
    }
    for preset, methods in said.items():
        assert set(methods) == {m for m in PAPERS if METHODS[m].presets}
        for method, options in methods.items():
            found = vars(METHODS[method].presets[preset])
            assert {name: found[name] for name in options} == options
    assert method_named("fisher_mask", "authors_code", remain_weight=None).remain_weight == 1.0
    assert method_named("fisher_mask", "authors_code", unit="weight").unit == "weight"


def test_a_method_by_value_is_the_method_by_name(original, loaders):
    "And what is given beside it is refused."
    named = unlearn(original, *loaders, method="fisher_mask", preset="authors_code", ratio=0.05)
    kind = METHODS["fisher_mask"]
    by_value = replace(kind.presets["authors_code"], ratio=0.05)
    valued = unlearn(original, *loaders, method=by_value)
    assert named.method == valued.method == by_value
    assert not difference(named.model.state_dict(), valued.model.state_dict())
    for beside in ({"preset": "paper"}, {"ratio": 0.05}, {"rati": 1}):
        with pytest.raises(ValueError, match=f"`{[*beside][0]}` is given beside `FisherMask"):
            unlearn(original, *loaders, method=by_value, **beside)


def test_what_cannot_work_is_refused_before_any_work(original, loaders, request_zero, sets):
    forget, remain = loaders
    before = {n: v.clone() for n, v in original.state_dict().items()}
    byte_batches = [(request_zero.forget.images, request_zero.forget.labels)]
    for bad, kind, message in [
        (
            lambda: unlearn(original, forget, remain, method="fisher-mask"),
            ValueError,
            "did you mean 'fisher_mask'",
        ),
        (
            lambda: unlearn(original, forget, remain, preset="author_code"),
            ValueError,
            "did you mean 'authors_code'",
        ),
        (lambda: unlearn(original, forget, remain, rati=0.1), ValueError, "did you mean 'ratio'"),
        (
            lambda: unlearn(original, forget, remain, ratio=1),
            ValueError,
            r"must be a finite number in \[0, 1\)",
        ),
        (lambda: unlearn(original, forget, remain, unit="layer"), ValueError, "`unit` is 'layer'"),
        (lambda: unlearn(original, byte_batches, remain), TypeError, "normalise"),
        (
            lambda: unlearn(original, iter(forget), remain),
            TypeError,
            "`forget` can be read only once",
        ),
        (lambda: unlearn(original, forget, []), ValueError, "`remain` is empty"),
        (
            lambda: unlearn(original, forget, None, method="finetune", fine_tune=TrainSettings()),
            ValueError,
            "needs a remain set",
        ),
        (
            lambda: unlearn(original, forget, [(x, y + 5) for x, y in remain]),
            ValueError,
            "`remain` has labels",
        ),
        (
            lambda: unlearn(
                original,
                forget,
                remain,
                evaluate={"test": [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())]},
            ),
            ValueError,
            "built for images of the shape",
        ),
        (
            lambda: unlearn(original, remain, forget, method="mask_classifier"),
            ValueError,
            "say which classes to forget",
        ),
        (
            lambda: unlearn(original, forget, remain, method="mask_classifier", classes=(10,)),
            ValueError,
            "do not all exist",
        ),
        (
            lambda: unlearn(original, forget, remain, classifier="head"),
            ValueError,
            "unknown classifier 'head'",
        ),
        (lambda: unlearn(original, forget, remain, method="retrain"), ValueError, "needs `build`"),
        (
            lambda: unlearn(original, forget, None, method="retrain", build=lambda: original),
            ValueError,
            "`retrain` needs a remain set",
        ),
        (
            lambda: unlearn(original, forget, None, method="fisher_noise"),
            ValueError,
            "`fisher_noise` needs a remain set",
        ),
        (
            lambda: unlearn(original, forget, remain, method="tfidf"),
            ValueError,
            "`tfidf` needs `reference`",
        ),
        (
            lambda: unlearn(original, forget, remain, method="influence"),
            ValueError,
            "`influence` needs `reference`",
        ),
        (
            lambda: unlearn(original, forget, remain, method="tfidf", reference=[]),
            ValueError,
            "`reference` is empty",
        ),
        (
            lambda: unlearn(
                original, forget, remain, method="tfidf", reference=forget, unit="weight"
            ),
            ValueError,
            "`unit` is 'weight': it must be 'channel'",
        ),
        (
            lambda: unlearn(
                original, forget, remain, method="tfidf", reference=forget, tfidf_direction="up"
            ),
            ValueError,
            "'highest' or 'lowest'",
        ),
        (
            lambda: unlearn(
                original, forget, remain, method="random_mask", reach="all", unit="channel"
            ),
            ValueError,
            "`reach` is 'all'",
        ),
        (
            lambda: unlearn(original, forget, remain, method="fisher_noise", noise_alpha=0.0),
            ValueError,
            "`noise_alpha` is 0.0: it must be a finite number above 0",
        ),
        (
            lambda: unlearn(original, forget, remain, method="finetune", hard=True),
            ValueError,
            "`finetune` has no options: leave `hard` out",
        ),
    ]:
        with pytest.raises(kind, match=message):
            bad()
    assert not difference(before, original.state_dict())


class Choosing(nn.Module):
    """Goes one way or another by what it sees, so that torch.fx can't trace it: channels and
    their BatchNorms are found by hooks, the classifier by name."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2, self.head = (
            nn.Conv2d(1, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 8, 3),
            nn.BatchNorm2d(8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        if x.sum() == float("inf"):
            return x
        return self.head(
            self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu().mean((2, 3))
        )


@pytest.mark.parametrize("preset", READINGS)
@pytest.mark.parametrize("method", [m for m in PAPERS if m not in ("retrain", "finetune")])
def test_a_network_that_cannot_be_traced_is_served_through_hooks(method, preset):
    torch.manual_seed(0)
    model, x, y = Choosing(), torch.randn(12, 1, 9, 9), torch.arange(12) % 3
    loaders = [(x[y == 0], y[y == 0])], [(x[y > 0], y[y > 0])]
    given = {
        "reference": [(x, y)],
        **({"lissa_epochs": 1} if method == "influence" else {}),
        **({"ratio": 0.2} if method in MASKING and method != "mask_classifier" else {}),
    }
    result = unlearn(model, *loaders, method=method, preset=preset, classifier="head", **given)
    assert len(result.changed) and bool(result.mask) == (method in MASKING)
    if preset == "authors_code" and method in ("activation_mask", "random_mask"):
        for layer, norm in (("conv1", "norm1"), ("conv2", "norm2")):
            rows = (
                result.mask[f"{layer}.weight"].flatten(1).all(1)
                if f"{layer}.weight" in result.mask
                else torch.zeros(len(model.get_submodule(layer).weight), dtype=torch.bool)
            )
            for part in ("weight", "bias", "running_mean", "running_var"):
                assert torch.equal(result.mask.get(f"{norm}.{part}", torch.zeros_like(rows)), rows)
    named = {
        "mask_classifier",
        "fisher_noise",
        *(
            ["random_mask", "activation_mask", "tfidf", "fisher_mask"]
            if preset == "paper"
            else ["activation_mask", "tfidf"]
        ),
    }
    if method in named:
        with pytest.raises(ValueError, match="classifier"):
            unlearn(model, *loaders, method=method, preset=preset, **given)


def test_any_classifier_and_any_loader_will_do():
    "A user's own network and DataLoader, not ours."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=g), torch.arange(60) % 3
    loader = lambda keep: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x[keep], y[keep]), 16, shuffle=True
    )
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    settings = TrainSettings(Schedule(epochs=4, drops=(2,)), select="last", seed=1)
    results = [
        unlearn(
            model,
            loader(y == 0),
            loader(y > 0),
            ratio=0.1,
            fine_tune=settings.replayed(2),
            evaluate={"remain": loader(y > 0), "forget": loader(y == 0)},
            progress="none",
        )
        for _ in range(2)
    ]
    assert sum(int(m.sum()) for m in results[0].mask.values()) == 4 and results[
        0
    ].history.epoch.tolist() == [0, 1, 2]
    assert not difference(results[0].model.state_dict(), results[1].model.state_dict())
