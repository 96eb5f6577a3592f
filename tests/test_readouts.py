"""Agreement against SciPy, and re-learn time against a loop in plain PyTorch that freezes all
but the classifier."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_unlearn.images.data import load_images
from fisher_unlearn.images.forget import forget_class, forget_samples, random_subset
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.audit.readouts import agreement, jensen_shannon, relearn_time
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, epoch_seed, train_model
from fisher_unlearn.methods.unlearn import unlearn

QUIET = {"progress": "none"}


@pytest.fixture(scope="module")
def sets(request_zero):
    return request_zero.train.batches(128), request_zero.forget.batches(50)


@pytest.fixture(scope="module")
def masked(original, request_zero):
    return unlearn(
        original, request_zero.forget.batches(128), None, method="mask_classifier", **QUIET
    ).model


@pytest.fixture(scope="module")
def fresh():
    return build_model("resnet20", 10, 1, seed=5)


def state_of(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )


def equal(a, b):
    return all(torch.equal(v, b[0][k]) for k, v in a[0].items()) and a[1:] == b[1:]


def images(batches):
    parts = list(batches)
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def loss_of(model, batches):
    "Image by image, in double precision, with NumPy."
    x, y = images(batches)
    with torch.no_grad():
        z = copy.deepcopy(model).eval()(x).double().numpy()
    return float(
        np.mean(
            [
                math.log(np.exp(row - row.max()).sum()) + row.max() - row[c]
                for row, c in zip(z, y.tolist())
            ]
        )
    )


# ---- agreement


@pytest.mark.parametrize("scale", [0.1, 3, 60])
def test_divergence_is_the_square_of_scipys_distance(scale):
    p, q = (scale * torch.randn(200, 7, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    wanted = (
        jensenshannon(p.double().softmax(1).numpy(), q.double().softmax(1).numpy(), axis=1) ** 2
    )
    assert np.allclose(jensen_shannon(p, q).numpy(), wanted, rtol=1e-6, atol=1e-12)
    assert torch.allclose(jensen_shannon(p, q), jensen_shannon(q, p), rtol=1e-12)


def test_divergence_of_nearly_equal_answers_is_exact():
    "Far below the rounding of log(p) - log(m): the limit is Σ (dp)² / 8p."
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    d = torch.tensor([[1.0, -0.6, -0.4]], dtype=torch.float64) * 1e-7
    assert jensen_shannon(p.log(), (p + d).log()).item() == pytest.approx(
        (d**2 / (8 * p)).sum().item(), rel=1e-2
    )


def test_certain_answers_and_infinite_logits_have_a_finite_divergence():
    inf = math.inf
    p = torch.tensor([[1e4, 0, 0], [0, -inf, -inf], [0, 0, -inf], [2000.0, 0, 0], [0, 720.0, -inf]])
    q = torch.tensor([[0, 1e4, 0], [0, -inf, -inf], [-inf, 0, 0], [0, 0, 2000.0], [720.0, 0, -inf]])
    assert jensen_shannon(p, q).tolist() == pytest.approx(
        [math.log(2), 0, math.log(2) / 2, math.log(2), math.log(2)]
    )
    assert jensen_shannon(torch.tensor([[math.nan, 0]]), torch.zeros(1, 2)).isnan().all()


def test_agreement_is_the_mean_over_images_whatever_the_batches(original, fresh, sets):
    x, y = images(sets[0])
    with torch.no_grad():
        p, q = (copy.deepcopy(m).eval()(x).double().softmax(1).numpy() for m in (original, fresh))
    wanted = np.mean(jensenshannon(p, q, axis=1) ** 2)
    for batches in (sets[0], DataLoader(TensorDataset(x, y), 999)):
        found = agreement(original, fresh, batches)
        assert found.divergence == pytest.approx(wanted, rel=1e-5) and found.images == len(y)
        assert found.same_top1 == pytest.approx(100 * np.mean(p.argmax(1) == q.argmax(1)), abs=1e-9)
    assert 0 < found.divergence < math.log(2) and 0 < found.same_top1 < 100


def test_a_model_agrees_with_itself_and_its_copy_exactly(original, sets):
    for other in (original, copy.deepcopy(original)):
        found = agreement(original, other, sets[0])
        assert found.divergence == 0 and found.same_top1 == 100


def test_agreement_leaves_both_models_as_they_were(original, fresh, sets):
    fresh.train(), original.eval()
    before = state_of(original), state_of(fresh)
    agreement(original, fresh, sets[1])
    assert equal(before[0], state_of(original)) and equal(before[1], state_of(fresh))


def test_models_of_other_classes_and_misfitting_batches_are_refused(original, sets):
    with pytest.raises(ValueError, match="10 and 11 classes"):
        agreement(original, build_model("resnet20", 11, 1), sets[0])
    with pytest.raises(ValueError, match="can't take the inputs"):
        agreement(original, nn.Linear(3, 10), sets[0])
    with pytest.raises(TypeError, match="only once"):
        agreement(original, original, iter(sets[0]))


# ---- re-learn time


def frozen_losses(model, train, forget, settings, epochs):
    """The full network in evaluation mode, in which only the classifier's parameters get
    gradients, trained image batch by image batch."""
    model = copy.deepcopy(model).eval()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("classifier."))
    x, y = images(train)
    optimizer = torch.optim.SGD(model.classifier.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    losses = [loss_of(model, forget)]
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.1 ** sum(epoch >= drop for drop in settings.schedule.drops)
        order = torch.randperm(
            len(y), generator=torch.Generator().manual_seed(epoch_seed(settings.seed, epoch))
        )
        for part in order.split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
        losses.append(loss_of(model, forget))
    return losses


def test_cached_features_give_the_losses_of_the_frozen_network(original, fresh, sets):
    """The network to learn anew is one that never learned, so that the losses are far from 0; a
    drop of the rate after epoch 2."""
    settings = TrainSettings(Schedule(epochs=4, drops=(2,)))
    found = relearn_time(fresh, original, *sets, settings, "classifier", cap=4, **QUIET)
    wanted = frozen_losses(fresh, *sets, settings, 4)
    assert found.losses.epoch.tolist() == [0, 1, 2, 3, 4]
    assert found.losses.forget_loss.tolist() == pytest.approx(wanted, rel=1e-4)
    assert not found.reached and found.epochs is None and found.note == "more than 4 epochs"


def test_all_parameters_are_trained_as_in_training(fresh, original, sets):
    """A plain loop over the full network in training mode; few steps, since rounding grows in
    training."""
    settings = TrainSettings(Schedule(epochs=4, drops=(1,)), layout="contiguous")
    x, y = (t[:384] for t in images(sets[0]))
    model = copy.deepcopy(fresh).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    wanted = [loss_of(model, [(x.double(), y)])]
    for epoch in range(2):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if epoch < 1 else 0.01
        for a, b in zip(x.double().split(128), y.split(128)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(a), b).backward()
            optimizer.step()
        wanted.append(loss_of(model, [(x.double(), y)]))
    loader, doubled = (
        DataLoader(TensorDataset(x.double(), y), 128),
        [copy.deepcopy(m).double() for m in (fresh, original)],
    )
    found = relearn_time(*doubled, loader, [(x.double(), y)], settings, "all", cap=2, **QUIET)
    assert (
        found.losses.forget_loss.tolist() == pytest.approx(wanted, rel=1e-6)
        and found.epochs is None
    )


def test_the_time_is_counted_in_steps_of_w_stars_optimizer(fresh, original, sets):
    "An epoch of one batch, beside a step of torch's AdamW."
    settings = TrainSettings(
        Schedule(lr=0.01, epochs=2, drops=()), optimizer="adamw", layout="contiguous"
    )
    x, y = images(sets[0])
    plain, batch = copy.deepcopy(fresh).double().train(), (x[:64].double(), y[:64])
    step = torch.optim.AdamW(plain.parameters(), 0.01, weight_decay=1e-4)
    nn.functional.cross_entropy(plain(batch[0]), batch[1]).backward()
    step.step()
    doubled = [copy.deepcopy(m).double() for m in (fresh, original)]
    found = relearn_time(*doubled, [batch], [batch], settings, "all", cap=1, **QUIET)
    assert found.losses.forget_loss[1] == pytest.approx(loss_of(plain, [batch]), rel=1e-6)


@pytest.mark.parametrize("scope", ["classifier", "all"])
def test_what_was_never_forgotten_takes_no_epoch(original, sets, scope):
    found = relearn_time(original, original, *sets, scope=scope, **QUIET)
    assert (
        found.epochs == 0 and found.reached and len(found.losses) == 1 and found.note == "0 epochs"
    )
    assert found.threshold == pytest.approx(loss_of(original, sets[1]) + 1e-5, abs=1e-7)


@pytest.mark.parametrize("excess, epochs", [(5e-6, 0), (1.5e-5, 1), (4e-3, 1)])
def test_the_loss_is_back_if_it_is_1e_5_above_or_less(excess, epochs):
    """Two classes, of which only the first occurs, and inputs of 0: the loss is log(1 + exp(-b))
    with the bias b."""

    def of_loss(loss):
        model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
        with torch.no_grad():
            (
                model[1].weight.zero_(),
                model[1].bias.copy_(torch.tensor([-math.log(math.expm1(loss)), 0])),
            )
        return model

    loader = [(torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64))] * 50
    assert (
        relearn_time(of_loss(0.01 + excess), of_loss(0.01), loader, loader, cap=3, **QUIET).epochs
        == epochs
    )


@pytest.mark.parametrize("scope", ["classifier", "all"])
def test_the_time_is_the_first_epoch_at_the_threshold(masked, original, sets, scope):
    settings = TrainSettings(Schedule(epochs=4, drops=(2,)))
    found = relearn_time(masked, original, *sets, settings, scope, cap=20, **QUIET)
    losses = found.losses.forget_loss.to_numpy()
    assert found.reached and found.epochs == len(losses) - 1 >= 1
    assert losses[-1] <= found.threshold and (losses[:-1] > found.threshold).all()
    exact = relearn_time(masked, original, *sets, settings, scope, cap=found.epochs, **QUIET)
    assert exact.epochs == found.epochs  # reached in the last epoch that is allowed
    if found.epochs > 1:
        assert (
            relearn_time(
                masked, original, *sets, settings, scope, cap=found.epochs - 1, **QUIET
            ).epochs
            is None
        )


@pytest.mark.parametrize("scope", ["classifier", "all"])
def test_the_models_stay_as_they_were_and_a_repetition_gives_the_same(fresh, original, sets, scope):
    fresh.train(), original.eval()
    before = (
        state_of(fresh),
        state_of(original),
        [len(m._forward_pre_hooks) for m in fresh.modules()],
    )
    first = relearn_time(fresh, original, *sets, scope=scope, cap=2, **QUIET)
    assert (
        equal(before[0], state_of(fresh))
        and equal(before[1], state_of(original))
        and before[2] == [len(m._forward_pre_hooks) for m in fresh.modules()]
    )
    torch.rand(3)
    again = relearn_time(fresh, original, *sets, scope=scope, cap=2, **QUIET)
    other = relearn_time(fresh, original, *sets, TrainSettings(seed=1), scope, cap=2, **QUIET)
    assert first.losses.equals(again.losses) and not first.losses.equals(other.losses)


def test_a_model_that_was_read_from_a_file_gives_the_same(masked, original, sets):
    """Its weights lie in memory otherwise than those of the trained one; rounding would grow in
    training."""
    read = build_model("resnet20", 10, 1)
    read.load_state_dict(masked.state_dict())
    assert read[0][1][1][0].conv2.weight.stride() != masked[0][1][1][0].conv2.weight.stride()
    settings = TrainSettings(Schedule(epochs=4, drops=(1,)))
    times = [
        relearn_time(
            model, original, *sets, settings, "all", cap=1, **QUIET
        ).losses.forget_loss.tolist()
        for model in (masked, read)
    ]
    assert times[0][1] == times[1][1] and times[0][0] == pytest.approx(times[1][0], rel=1e-6)


def test_a_shuffled_loader_repeats_and_frozen_parameters_are_freed(fresh, original, sets):
    loader, frozen = (
        DataLoader(TensorDataset(*images(sets[0])), 128, shuffle=True),
        copy.deepcopy(fresh).requires_grad_(False),
    )
    for scope in ("classifier", "all"):
        torch.manual_seed(3)
        first = relearn_time(frozen, original, loader, sets[1], scope=scope, cap=1, **QUIET)
        torch.manual_seed(3)
        assert first.losses.equals(
            relearn_time(frozen, original, loader, sets[1], scope=scope, cap=1, **QUIET).losses
        )
        assert first.losses.forget_loss.nunique() == 2


@pytest.mark.parametrize(
    "tail",
    [nn.Linear(4, 3), nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 3, 1), nn.Flatten())],
)
def test_ones_own_network_with_a_linear_or_1x1_classifier(tail):
    torch.manual_seed(1)
    points, kinds = torch.randn(90, 2), torch.arange(90) % 3
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), tail)
    sure = copy.deepcopy(model)
    with torch.no_grad():
        sure[-1].load_state_dict(
            {k: 0 * v for k, v in tail.state_dict().items()}
        )  # ln 3 for every image
    loader = [(points[:50], kinds[:50]), (points[50:], kinds[50:])]
    found = relearn_time(model, sure, loader, loader, cap=3, **QUIET)
    assert found.threshold == pytest.approx(math.log(3) + 1e-5) and found.losses.forget_loss[
        0
    ] == pytest.approx(loss_of(model, loader))


class Twice(nn.Module):
    "Applies its last layer twice."

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.last(x))


class ByName(Twice):
    "Gives its last layer the input by name, which the hook can't see."

    def forward(self, x):
        return self.last(input=x)


def test_networks_whose_logits_are_more_than_the_classifiers_output_are_refused():
    loader = [(torch.randn(6, 3), torch.arange(6) % 3)]
    pooled = nn.Sequential(
        nn.Unflatten(1, (1, 3, 1)), nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    for model in (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), Twice(), ByName(), pooled):
        with pytest.raises(ValueError, match='alone: re-learn with scope="all"'):
            relearn_time(model, model, loader, loader, **QUIET)
        assert relearn_time(model, model, loader, loader, scope="all", **QUIET).epochs == 0
    with pytest.raises(ValueError, match="did you mean 'last'"):
        relearn_time(Twice(), Twice(), loader, loader, classifier="lust", **QUIET)


def test_nonsense_is_refused_before_any_training(original, fresh, sets, monkeypatch):
    monkeypatch.setattr(
        "fisher_unlearn.audit.readouts.train_epoch", lambda *_: pytest.fail("trained")
    )
    train, forget = sets
    with pytest.raises(
        ValueError, match="`scope` is 'everything': it must be 'classifier' or 'all'"
    ):
        relearn_time(fresh, original, train, forget, scope="everything")
    with pytest.raises(ValueError, match="`cap` is 0"):
        relearn_time(fresh, original, train, forget, cap=0)
    with pytest.raises(TypeError, match="`train` can be read only once"):
        relearn_time(fresh, original, iter(train), forget)
    with pytest.raises(ValueError, match="`forget` is empty"):
        relearn_time(fresh, original, train, [])
    with pytest.raises(ValueError, match="10 and 11 classes"):
        relearn_time(fresh, build_model("resnet20", 11, 1), train, forget)
    late = [next(iter(train)), (torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]))]
    with pytest.raises(ValueError, match="`train` has labels from 0 to 10"):
        relearn_time(fresh, original, late, forget)
    broken = copy.deepcopy(original)
    with torch.no_grad():
        broken.classifier.bias[3] = math.nan
    with pytest.raises(FloatingPointError, match="nan of `original`"):
        relearn_time(fresh, broken, train, forget)
    with pytest.raises(FloatingPointError, match="nan before re-learning"):
        relearn_time(broken, original, train, forget)


def test_divergence_in_training_is_said(fresh, original, sets):
    with pytest.raises(FloatingPointError, match="after epoch 1 of re-learning"):
        relearn_time(
            fresh,
            original,
            *sets,
            TrainSettings(Schedule(lr=1e12, epochs=3, drops=())),
            "all",
            cap=3,
            **QUIET,
        )


def test_an_epoch_is_a_line_where_there_is_no_terminal(fresh, original, sets, capsys):
    relearn_time(fresh, original, *sets, cap=2, progress="lines")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("re-learning epoch 2  forget loss ")


@pytest.mark.slow
def test_forgetting_the_copies_of_what_remains_changes_nothing():
    """Every image twice, and one copy of each is forgotten: w* and the retrained model answer
    alike on the copies, as a class that is forgotten does not."""
    images = load_images("digits").subset(400, seed=0)
    twice = replace(
        images,
        train=replace(
            images.train,
            images=torch.cat([images.train.images] * 2),
            labels=torch.cat([images.train.labels] * 2),
        ),
    )
    trained = {}
    for name, request in (
        ("copies", forget_samples(twice, range(400, 800))),
        ("class", forget_class(twice, 0)),
    ):
        models = [build_model("resnet20", 10, 1, seed=0) for _ in range(2)]
        for model, part in zip(models, (request.train, request.remain)):
            train_model(
                model,
                part,
                TrainSettings(Schedule(epochs=12, drops=(8,)), batch_size=64, select="last"),
                progress="none",
            )
        trained[name] = agreement(*models, request.forget.batches(200))
    assert trained["copies"].same_top1 >= 98 and trained["copies"].divergence < 0.02
    assert trained["class"].same_top1 == 0 and trained["class"].divergence > 0.5


@pytest.mark.slow
def test_a_random_subset_whose_twins_stay_is_answered_as_before():
    """Every image twice, and 150 of them are drawn: where the other copy stays, the retrained
    model answers as w* does (the paper's footnote 1)."""
    images = load_images("digits").subset(400, seed=0)
    twice = replace(
        images,
        train=replace(
            images.train,
            images=torch.cat([images.train.images] * 2),
            labels=torch.cat([images.train.labels] * 2),
        ),
    )
    request = random_subset(twice, 150, seed=3)
    drawn = set(request.forget_indices.tolist())
    stays = torch.tensor([(k + 400) % 800 not in drawn for k in request.forget_indices.tolist()])
    assert 90 < stays.sum() < 150
    models = [build_model("resnet20", 10, 1, seed=0) for _ in range(2)]
    for model, part in zip(models, (request.train, request.remain)):
        train_model(
            model,
            part,
            TrainSettings(Schedule(epochs=12, drops=(8,)), batch_size=64, select="last"),
            progress="none",
        )
    found = agreement(*models, request.forget[stays].batches(200))
    assert found.images == stays.sum() and found.same_top1 >= 98 and found.divergence < 0.02


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_models_whose_answers_are_no_numbers_do_not_agree(fresh, sets, value, which):
    "Both would say class 0 for each image: an agreement of 100 %."
    broken = copy.deepcopy(fresh)
    with torch.no_grad():
        broken.classifier.bias[3] = value
    pair = (broken, fresh) if which == 0 else (fresh, broken)
    with pytest.raises(
        FloatingPointError,
        match=f"the logits of the {('first', 'second')[which]} model are not finite for",
    ):
        agreement(*pair, sets[1])


class Moody(nn.Module):
    "A network that remembers, counts and caches, and returns a dictionary."

    def __init__(self):
        super().__init__()
        self.line, self.seen, self.scale = nn.Linear(4, 3), 0, None

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.ones(1)
        self.seen, self.last = self.seen + 1, self.line(x) * self.scale
        return {"logits": self.last}


@pytest.mark.parametrize("scope", ["all", "classifier"])
def test_foreign_networks_are_read_out_and_left_as_they_were(scope):
    model, other = Moody(), Moody()
    batches = [
        {"inputs": np.ones((3, 4), dtype=np.float32), "labels": np.array([0, 1, 2])}
        for _ in range(2)
    ]
    before = [state_of(m) for m in (model, other)]
    assert 0 <= agreement(model, other, batches).same_top1 <= 100
    found = relearn_time(
        model,
        other,
        batches,
        batches,
        TrainSettings(Schedule(epochs=2, drops=()), layout="contiguous"),
        scope,
        cap=2,
        classifier="line",
        **QUIET,
    )
    assert found.cap == 2
    for m, old in zip((model, other), before):
        assert (
            equal(state_of(m), old) and m.seen == 0 and m.scale is None and not hasattr(m, "last")
        )
        m(torch.ones(2, 4))["logits"].sum().backward()


def test_readouts_check_their_arguments(fresh, sets):
    for bad in (
        lambda: agreement(fresh, 3, sets[1]),
        lambda: agreement(fresh, fresh, "x"),
        lambda: relearn_time(fresh, fresh, *sets, cap=True),
        lambda: relearn_time(fresh, fresh, *sets, progress="x"),
        lambda: relearn_time(fresh, fresh, *sets, cap=2**70),
        lambda: relearn_time(fresh, fresh, *sets, settings=3),
        lambda: relearn_time(fresh, fresh, *sets, scop="all"),
        lambda: jensen_shannon(torch.ones(2, 3), torch.ones(2, 4)),
        lambda: jensen_shannon([1], [2]),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            bad()
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
