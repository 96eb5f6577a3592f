"""Each method against an independent computation of what it must change, and the promise that the input stays as it was."""
import copy

import numpy as np
import pytest
import torch
from torch import nn

from fisher_unlearn.data import Samples
from fisher_unlearn.fisher import diag_fisher
from fisher_unlearn.masking import quota
from fisher_unlearn.models import NETWORKS, build_model, min_size
from fisher_unlearn.schedule import Schedule
from fisher_unlearn.train import TrainSettings, train_model
from fisher_unlearn.unlearn import METHODS, PRESETS, MethodOptions, fisher_scores, method_options, unlearn


@pytest.fixture(scope="module")
def sets(request_zero):
    return {"remain": request_zero.test_remain.batches(500), "forget": request_zero.test_forget.batches(500)}


@pytest.fixture(scope="module")
def loaders(request_zero):
    return request_zero.forget.batches(128), request_zero.remain.batches(128)


def difference(before, after):
    return {n: (v != before[n]) for n, v in after.items() if not torch.equal(v, before[n])}


def top_by_numpy(scores, ratio):
    "The positions of the highest of all scores, by a stable sort in NumPy."
    flat = np.concatenate([np.ravel(s) for s in scores.values()])
    chosen = np.zeros(len(flat), bool)
    chosen[np.argsort(-flat, kind="stable")[:quota(ratio, len(flat))]] = True
    parts = np.split(chosen, np.cumsum([s.size for s in scores.values()])[:-1])
    return {n: p.reshape(s.shape) for (n, s), p in zip(scores.items(), parts)}


def squared_gradients(model, samples, per):
    "Per image with its true label, or per batch of 128 with all labels weighted by their mean probability: by backward()."
    model = copy.deepcopy(model).eval()
    batches = list(samples.batches(1 if per == "sample" else 128))
    total = {n: 0 for n, _ in model.named_parameters()}
    for x, y in batches:
        p = model(x).softmax(1).mean(0).detach()
        for c in [None] if per == "sample" else range(10):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y if c is None else torch.full_like(y, c)).backward()
            for n, w in model.named_parameters(): total[n] = total[n] + (1 if c is None else p[c]) * w.grad.double() ** 2
    return {n: t.numpy() / (len(batches) if per == "batch" else 1) for n, t in total.items()}


def test_fisher_mask_paper_is_the_difference_of_sums_of_squares(original, request_zero):
    "Independent of the engine: one image at a time, single weights, without the classifier."
    few = request_zero.remain[torch.arange(0, 1169, 23)]
    forget, remain = request_zero.forget[torch.arange(20)], few
    result = unlearn(original, forget.batches(7), remain.batches(9), "fisher_mask", "paper", ratio=.05)
    names = [n for n, p in original.named_parameters() if p.dim() == 4]
    f, r = (squared_gradients(original, part, "sample") for part in (forget, remain))
    wanted = top_by_numpy({n: f[n] - r[n] for n in names}, .05)
    found = {n: result.mask[n].numpy() if n in result.mask else np.zeros_like(wanted[n]) for n in names}
    apart = sum((found[n] != wanted[n]).sum() for n in names)
    assert apart <= .002 * sum(w.sum() for w in wanted.values())  # float32 may swap neighbours at the threshold
    assert set(result.mask) <= set(names) and sum(m.sum() for m in found.values()) == sum(m.sum() for m in wanted.values())


def test_fisher_mask_authors_code_is_the_difference_of_batch_means(original, request_zero):
    "Kernels of convolutions and single weights of the classifier, whatever batches the caller's loader gives."
    result = unlearn(original, request_zero.forget.batches(50), request_zero.remain.batches(33), "fisher_mask", "authors_code", ratio=.02)
    f, r = (squared_gradients(original, part, "batch") for part in (request_zero.forget, request_zero.remain))
    scores = {n: (f[n] - r[n]).mean((2, 3)) if p.dim() == 4 else f[n] - r[n] for n, p in original.named_parameters() if p.dim() in (2, 4)}
    wanted = top_by_numpy(scores, .02)
    found = {n: (result.mask[n].flatten(2).all(2) if result.mask[n].dim() == 4 else result.mask[n]).numpy() if n in result.mask else np.zeros_like(w) for n, w in wanted.items()}
    assert sum(f.sum() for f in found.values()) == 658  # floor(.02 · 32,912)
    assert sum((found[n] != wanted[n]).sum() for n in wanted) <= 14
    for m in result.mask.values():
        if m.dim() == 4: assert torch.equal(m.flatten(2).all(2), m.flatten(2).any(2))


@pytest.mark.parametrize("weight", [0., 1., 2.5])
def test_the_family_between_sums_and_means(original, loaders, weight):
    forget, remain = loaders
    scores = fisher_scores(original, forget, remain, MethodOptions(remain_weight=weight))
    f, r = diag_fisher(original, forget), diag_fisher(original, remain)
    for n in scores: assert torch.allclose(scores[n], f[n] / 128 - weight * r[n] / 1169, rtol=1e-4, atol=1e-9)


def test_remain_weight_none_ranks_like_n_r_over_n_f(original, loaders):
    masks = [unlearn(original, *loaders, remain_weight=w).mask for w in (None, 1169 / 128)]
    assert set(masks[0]) == set(masks[1])
    assert sum((masks[0][n] != masks[1][n]).sum() for n in masks[0]) <= .002 * sum(m.sum() for m in masks[0].values())


def test_without_remain_data_the_forget_set_alone_decides(original, loaders):
    scores = fisher_scores(original, loaders[0], None, MethodOptions())
    f = diag_fisher(original, loaders[0])
    assert all(torch.equal(scores[n], f[n]) for n in f)
    assert unlearn(original, loaders[0], None).note.startswith("The method changed 5,")


def test_mask_classifier_zeroes_one_row_and_nothing_else(original, loaders, sets):
    result = unlearn(original, *loaders, "mask_classifier", evaluate=sets)
    after = result.model.state_dict()
    changed = difference(original.state_dict(), after)
    assert set(changed) == {"classifier.weight", "classifier.bias"}
    assert (after["classifier.weight"][0] == 0).all() and after["classifier.bias"][0] == 0
    assert all(not c[1:].any() for c in changed.values())
    assert result.changed.set_index("name").masked.to_dict() == {"classifier.weight": 64, "classifier.bias": 1}
    rows = unlearn(original, *loaders, "mask_classifier", classes=(3, 5)).mask["classifier.weight"]
    assert rows.any(1).nonzero()[:, 0].tolist() == [3, 5]


def test_finetune_changes_nothing_and_says_so(original, loaders, sets):
    result = unlearn(original, *loaders, "finetune", evaluate=sets)
    assert not difference(original.state_dict(), result.model.state_dict()) and result.note == "The method changed nothing." and len(result.history) == 1


def test_ratio_0_changes_nothing_and_says_so(original, loaders):
    result = unlearn(original, *loaders, "fisher_mask", ratio=0)
    assert result.note == "The method changed nothing." and result.model is not original
    assert not difference(original.state_dict(), result.model.state_dict())


def test_retrain_is_training_from_scratch_on_the_remain_set(original, loaders, digits, request_zero):
    settings, build = TrainSettings(Schedule(epochs=2, drops=(1,))), lambda: build_model("resnet20", 10, 1, seed=0)
    result = unlearn(original, *loaders, "retrain", build=build, fine_tune=settings, seed=5, progress="none")
    plain = build()
    train_model(plain, request_zero.remain, TrainSettings(Schedule(epochs=2, drops=(1,)), select="last", seed=5), progress="none")
    assert not difference(plain.state_dict(), result.model.state_dict())


def test_fine_tuning_replays_the_schedule_from_the_masked_model(original, loaders, sets):
    settings = TrainSettings(Schedule(epochs=160, drops=(80, 120)))
    result = unlearn(original, *loaders, "mask_classifier", fine_tune=settings.replayed(5), evaluate=sets, seed=9, progress="none")
    assert result.history.epoch.tolist() == list(range(6)) and result.history.lr.tolist()[1:] == pytest.approx([.1, .1, .01, .001, .001])
    plain = unlearn(original, *loaders, "mask_classifier").model
    train_model(plain, loaders[1], TrainSettings(settings.replayed(5).schedule, select="last", seed=9), progress="none")
    assert not difference(plain.state_dict(), result.model.state_dict())
    scores = result.history.remain_acc / (1 + result.history.forget_acc / 100)
    assert np.allclose(result.history.unlearn_score, scores)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_conformance(network, method, preset):
    "Every method on every network: the input is untouched, dtype and layout are kept, and the same seed gives the same result."
    g = torch.Generator().manual_seed(0)
    samples = Samples(torch.randint(256, (12, 1, 8, 8), generator=g).to(torch.uint8), torch.tensor([0] * 4 + [1] * 4 + [2] * 4), (.5,), (.25,), min_size(network))
    forget, remain = samples[samples.labels == 0].batches(3), samples[samples.labels > 0].batches(4)
    build = lambda: build_model(network, 3, 1, seed=1)
    model = build().train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    tune = TrainSettings(Schedule(epochs=1, drops=()), select="last")
    a, b = (unlearn(model, forget, remain, method, preset, tune, {"all": samples.batches(6)}, build=build, progress="none") for _ in range(2))
    assert model.training and not difference(before, model.state_dict())
    assert not difference(a.model.state_dict(), b.model.state_dict()) and not a.model.training
    assert all(v.dtype == before[n].dtype and v.shape == before[n].shape for n, v in a.model.state_dict().items())
    if method == "fisher_mask": assert len(a.mask) and a.changed.masked.sum() == sum(int(m.sum()) for m in a.mask.values())
    if method == "finetune": assert not a.mask and not len(a.changed)


def test_frozen_layers_are_not_candidates(original, loaders):
    model = copy.deepcopy(original)
    for p in model.features[0].parameters(): p.requires_grad_(False)
    mask = unlearn(model, *loaders, ratio=.5).mask
    assert "features.0.0.weight" not in mask and len(mask) == 20


def test_a_checkpoint_of_another_method_is_refused(original, loaders, tmp_path):
    tune = TrainSettings(Schedule(epochs=1, drops=()), select="last")
    unlearn(original, *loaders, "finetune", fine_tune=tune, checkpoint=tmp_path / "p.safetensors", progress="none")
    with pytest.raises(ValueError, match="another training run"): unlearn(original, *loaders, "mask_classifier", fine_tune=tune, checkpoint=tmp_path / "p.safetensors", progress="none")


def test_a_layer_with_other_rows_than_classes_is_no_classifier(loaders):
    class Maxout(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Linear(64, 20)
        def forward(self, x): return self.rows(x.flatten(1)).reshape(-1, 10, 2).amax(2)
    with pytest.raises(ValueError, match="with 10 rows"): unlearn(Maxout(), *loaders, "mask_classifier")


def test_presets_are_what_they_say():
    assert method_options("fisher_mask", "authors_code", remain_weight=None).remain_weight == 1.0
    paper, code = (method_options("fisher_mask", p) for p in ("paper", "authors_code"))
    assert (paper.unit, paper.classifier_in_pool, paper.fisher_labels, paper.fisher_per, paper.remain_weight) == ("weight", False, "true", "sample", None)
    assert (code.unit, code.classifier_in_pool, code.fisher_labels, code.fisher_per, code.remain_weight) == ("kernel", True, "expected", "batch", 1.0)
    assert method_options("fisher_mask", "authors_code", unit="weight").unit == "weight"


def test_what_cannot_work_is_refused_before_any_work(original, loaders, request_zero, sets):
    forget, remain = loaders
    before = {n: v.clone() for n, v in original.state_dict().items()}
    byte_batches = [(request_zero.forget.images, request_zero.forget.labels)]
    for bad, kind, message in [
        (lambda: unlearn(original, forget, remain, "fisher-mask"), ValueError, "did you mean 'fisher_mask'"),
        (lambda: unlearn(original, forget, remain, preset="author_code"), ValueError, "did you mean 'authors_code'"),
        (lambda: unlearn(original, forget, remain, rati=.1), ValueError, "did you mean 'ratio'"),
        (lambda: unlearn(original, forget, remain, ratio=1), ValueError, r"must be in \[0, 1\)"),
        (lambda: unlearn(original, forget, remain, unit="layer"), ValueError, "`unit` is 'layer'"),
        (lambda: unlearn(original, byte_batches, remain), TypeError, "normalise"),
        (lambda: unlearn(original, iter(forget), remain), TypeError, "`forget` can be read only once"),
        (lambda: unlearn(original, forget, []), ValueError, "`remain` is empty"),
        (lambda: unlearn(original, forget, None, "finetune", fine_tune=TrainSettings()), ValueError, "needs a remain set"),
        (lambda: unlearn(original, forget, [(x, y + 5) for x, y in remain]), ValueError, "`remain` has labels"),
        (lambda: unlearn(original, forget, remain, evaluate={"test": [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())]}), ValueError, "built for images of the shape"),
        (lambda: unlearn(original, remain, forget, "mask_classifier"), ValueError, "say which classes to forget"),
        (lambda: unlearn(original, forget, remain, "mask_classifier", classes=(10,)), ValueError, "do not all exist"),
        (lambda: unlearn(original, forget, remain, classifier="head"), ValueError, "unknown classifier 'head'"),
        (lambda: unlearn(original, forget, remain, "retrain"), ValueError, "needs `build`"),
    ]:
        with pytest.raises(kind, match=message): bad()
    assert not difference(before, original.state_dict())


def test_any_classifier_and_any_loader_will_do():
    "A user's own network and DataLoader, not ours."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=g), torch.arange(60) % 3
    loader = lambda keep: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[keep], y[keep]), 16, shuffle=True)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    settings = TrainSettings(Schedule(epochs=4, drops=(2,)), select="last", seed=1)
    results = [unlearn(model, loader(y == 0), loader(y > 0), ratio=.1, fine_tune=settings.replayed(2), evaluate={"remain": loader(y > 0), "forget": loader(y == 0)}, progress="none") for _ in range(2)]
    assert sum(int(m.sum()) for m in results[0].mask.values()) == 4 and results[0].history.epoch.tolist() == [0, 1, 2]
    assert not difference(results[0].model.state_dict(), results[1].model.state_dict())
