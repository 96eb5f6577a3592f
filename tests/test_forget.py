"""Requests: a partition of the training set, checked against plain sets."""

import json
import math
import unicodedata
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fisher_unlearn.images.data import ImageData, Samples, digest, load_images
from fisher_unlearn.images.forget import (
    CORNERS,
    forget_class,
    forget_classes,
    forget_samples,
    mislabel,
    poison,
    random_subset,
)
from fisher_unlearn.lab.settings import resolve
from fisher_unlearn.lab.run import request_of

DIGITS = load_images("digits")


@given(st.sets(st.integers(0, 9), min_size=1, max_size=9))
@settings(max_examples=20)
def test_classes_split_training_and_test_set(classes):
    request = forget_classes(DIGITS, sorted(classes))
    labels = DIGITS.train.labels.tolist()
    assert request.forget_indices.tolist() == [i for i, y in enumerate(labels) if y in classes]
    assert request.remain_indices.tolist() == [i for i, y in enumerate(labels) if y not in classes]
    assert torch.equal(request.forget.images, DIGITS.train.images[request.forget_indices])
    assert (
        set(request.test_forget.labels.tolist()) == classes
        and not set(request.test_remain.labels.tolist()) & classes
    )
    assert len(request.test_forget) + len(request.test_remain) == 500


@given(st.sets(st.integers(0, 1296), min_size=1, max_size=50))
@settings(max_examples=20)
def test_samples_leave_and_the_test_set_stays(indices):
    request = forget_samples(DIGITS, list(indices))
    assert request.forget_indices.tolist() == sorted(indices) and len(request.remain) == 1297 - len(
        indices
    )
    assert not set(request.remain_indices.tolist()) & indices
    assert (
        torch.equal(request.test_forget.images, request.forget.images)
        and request.test_remain is DIGITS.test
    )


def test_digests_tell_requests_apart():
    digests = {forget_class(DIGITS, k).digest for k in range(10)} | {
        forget_samples(DIGITS, [k]).digest for k in range(5)
    }
    assert len(digests) == 15
    whole_class = forget_class(DIGITS, 0)
    assert (
        forget_samples(DIGITS, whole_class.forget_indices).digest != whole_class.digest
    )  # other test sets
    assert forget_class(DIGITS.subset(1000, 0), 0).digest != whole_class.digest


@pytest.mark.parametrize(
    "bad, message",
    [
        (10, "has the classes 0 to 9"),
        (-1, "class -1 does not exist"),
        ("zero", "unknown class 'zero'"),
    ],
)
def test_classes_that_do_not_exist_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        forget_class(DIGITS, bad)


def test_what_is_no_position_and_no_class_is_refused():
    with pytest.raises((TypeError, ValueError), match="whole number"):
        forget_class(DIGITS, 0.5)
    with pytest.raises((TypeError, ValueError), match="whole number"):
        forget_samples(DIGITS, [1.5])
    with pytest.raises(TypeError, match="whole numbers"):
        forget_samples(DIGITS, torch.ones(1297, dtype=torch.bool))


@pytest.mark.parametrize(
    "bad, message",
    [
        ([], "empty"),
        ([0, 0], "named twice"),
        ([-1], "sample -1 does not exist"),
        (range(1297), "remain set is empty"),
    ],
)
def test_samples_that_make_no_request_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        forget_samples(DIGITS, bad)


# ---------------------------------------------------------------- random subsets, poison, wrong
# labels, little remain data


def rows(*parts):
    "Images with labels as a multiset."
    return Counter(
        (image.numpy().tobytes(), label)
        for part in parts
        for image, label in zip(part.images, part.labels.tolist())
    )


def corner_of(corner, size, height, width):
    "The (row, column) pairs of a corner, by counting."
    return {
        (r, c)
        for r in range(height)
        for c in range(width)
        if (r < size if "upper" in corner else r >= height - size)
        and (c < size if "left" in corner else c >= width - size)
    }


def by_hand(image, corner, size, value):
    "A stamped copy of an image, pixel by pixel."
    copy = image.numpy().copy()
    for channel in range(copy.shape[0]):
        for r, c in corner_of(corner, size, *copy.shape[1:]):
            copy[channel, r, c] = value
    return copy


def tiny(corner_values, height=6, width=5, classes=3):
    """Colour images, 50 everywhere but for the lower right pixel of the last channel, with
    labels 0, 1, 2, 0, …; the test set is the same."""
    images = torch.full((len(corner_values), 3, height, width), 50, dtype=torch.uint8)
    images[:, :, -1, -1] = 0
    images[:, 2, -1, -1] = torch.tensor(corner_values, dtype=torch.uint8)
    samples = Samples(images, torch.arange(len(corner_values)) % classes, (0.5,) * 3, (0.2,) * 3, 8)
    return ImageData(
        "tiny",
        samples,
        samples,
        ("red", "green", "blue"),
        "made here",
        digest(samples.images, samples.labels),
    )


MANY = {
    "class": lambda seed: forget_classes(DIGITS, [seed % 10]),
    "samples": lambda seed: forget_samples(DIGITS, [seed, seed + 1]),
    "random": lambda seed: random_subset(DIGITS, 7 + seed, seed),
    "added": lambda seed: poison(DIGITS, 20, seed % 10, seed),
    "replaced": lambda seed: poison(DIGITS, 20, seed % 10, seed, replace=True),
    "uniform": lambda seed: mislabel(DIGITS, 0.1, seed),
    "permuted": lambda seed: mislabel(DIGITS, 0.1, seed, "permuted"),
}


def test_what_was_there_keeps_its_digest():
    "Records on disk hold these."
    assert (
        forget_class(DIGITS, 0).digest
        == "527b74be0a5ce25c01e3df954c570a06f39cf2198a58860d4870796949c28eef"
    )
    assert (
        forget_classes(DIGITS, [1, 3]).digest
        == "8d25d11b0c1453f31390237beb2a6d6bce6a95217bc398aaa8d79a9c15b7fa1e"
    )
    assert (
        forget_samples(DIGITS, [7, 3, 1000]).digest
        == "d08708ecb20ff94213a7a2eee07ec2acb2486038146b81fe58d8746a756bb7ea"
    )


@pytest.mark.parametrize("kind", MANY)
@given(seed=st.integers(0, 1000))
@settings(max_examples=8)
def test_forget_and_remain_are_what_was_trained(kind, seed):
    request, again, other = MANY[kind](seed), MANY[kind](seed), MANY[kind](seed + 1)
    assert rows(request.forget, request.remain) == rows(request.train) and len(
        request.forget
    ) == len(request.forget_indices)
    assert torch.equal(DIGITS.train.images[request.remain_indices], request.remain.images)
    assert torch.equal(DIGITS.train.labels[request.remain_indices], request.remain.labels)
    assert (
        request.digest == again.digest
        and rows(request.train) == rows(again.train)
        and request.details == again.details
    )
    assert (
        request.digest != other.digest
        and request.forget_indices.tolist() != other.forget_indices.tolist()
    )
    assert json.loads(json.dumps(request.details)) == request.details


@pytest.mark.parametrize("kind", MANY)
def test_the_data_set_is_never_changed(kind):
    MANY[kind](3).limit_remain(5, 0)
    assert (
        digest(DIGITS.train.images, DIGITS.train.labels, DIGITS.test.images, DIGITS.test.labels)
        == DIGITS.digest
    )


@given(n=st.integers(1, 1296), seed=st.integers(0, 2**40))
@settings(max_examples=20)
def test_a_random_subset_is_n_different_samples(n, seed):
    request = random_subset(DIGITS, n, seed)
    gone = request.forget_indices.tolist()
    assert (
        request.kind == "random"
        and request.classes == ()
        and len(set(gone)) == n
        and gone == sorted(gone)
    )
    assert request.remain_indices.tolist() == sorted(set(range(1297)) - set(gone))
    assert (
        request.test_forget is request.forget
        and request.test_remain is DIGITS.test
        and request.train is DIGITS.train
    )
    assert request.digest != forget_samples(DIGITS, gone).digest and request.details == {
        "n": n,
        "seed": seed,
    }


def test_every_sample_can_be_drawn():
    drawn = Counter(
        i for seed in range(100) for i in random_subset(DIGITS, 130, seed).forget_indices.tolist()
    )
    assert set(drawn) == set(range(1297)) and max(drawn.values()) < 30  # 10 are expected


patches = {
    "size": st.integers(1, 8),
    "value": st.sampled_from([0, 17, 128, 255]),
    "corner": st.sampled_from(CORNERS),
    "target": st.integers(0, 9),
}


@given(**patches, seed=st.integers(0, 100), in_place=st.booleans())
@settings(max_examples=60)
def test_poison_changes_the_corner_and_nothing_else(size, value, corner, target, seed, in_place):
    changed = lambda part: [
        i
        for i, x in enumerate(part.images)
        if part.labels[i] != target and (by_hand(x, corner, size, value) != x.numpy()).any()
    ]
    allowed, seen = changed(DIGITS.train), changed(DIGITS.test)
    n = 12
    assume(len(allowed) >= n and seen)
    request = poison(DIGITS, n, target, seed, size, value, corner, in_place)
    sources = request.forget_indices.tolist()
    assert len(set(sources)) == n and sources == sorted(sources) and set(sources) <= set(allowed)
    for image, i in zip(request.forget.images, sources):
        assert np.array_equal(image.numpy(), by_hand(DIGITS.train.images[i], corner, size, value))
    assert (
        request.forget.labels.tolist() == [target] * n
        and request.test_forget is request.forget
        and request.test_remain is DIGITS.test
    )
    kept = sorted(set(range(1297)) - set(sources)) if in_place else list(range(1297))
    assert request.remain_indices.tolist() == kept and len(request.train) == 1297 + (
        0 if in_place else n
    )
    trigger = request.test_more["trigger"]
    assert trigger.labels.tolist() == [target] * len(seen) and len(trigger) == len(seen)
    for image, i in zip(trigger.images, seen):
        assert np.array_equal(image.numpy(), by_hand(DIGITS.test.images[i], corner, size, value))
    others = [
        sum(y != target for y in part.labels.tolist()) for part in (DIGITS.train, DIGITS.test)
    ]
    assert request.details == {
        "n": n,
        "target": target,
        "seed": seed,
        "size": size,
        "value": value,
        "corner": corner,
        "replace": in_place,
        "unchanged": others[0] - len(allowed),
        "test_unchanged": others[1] - len(seen),
    }


def test_poison_is_added_behind_or_put_in_place():
    added, replaced = poison(DIGITS, 30, 3, 5), poison(DIGITS, 30, 3, 5, replace=True)
    where = added.forget_indices
    assert torch.equal(where, replaced.forget_indices) and torch.equal(
        added.forget.images, replaced.forget.images
    )
    assert torch.equal(added.train.images[:1297], DIGITS.train.images) and torch.equal(
        added.train.labels[:1297], DIGITS.train.labels
    )
    assert (
        torch.equal(added.train.images[1297:], added.forget.images)
        and added.train.labels[1297:].tolist() == [3] * 30
    )
    assert (
        torch.equal(replaced.train.images[where], added.forget.images)
        and replaced.train.labels[where].tolist() == [3] * 30
    )
    assert (added.kind, added.classes, replaced.kind) == ("poison", (), "poison")


def test_the_papers_defaults():
    request = poison(DIGITS)
    assert len(request.forget) == 200 and len(request.train) == 1497
    assert {
        k: request.details[k] for k in ("n", "target", "size", "value", "corner", "replace")
    } == {"n": 200, "target": 0, "size": 4, "value": 0, "corner": "lower right", "replace": False}
    assert (
        not request.forget.images[:, :, 4:, 4:].any()
        and not request.test_more["trigger"].images[:, :, 4:, 4:].any()
    )
    assert mislabel(DIGITS, 0.1).details["how"] == "uniform"


def test_every_image_that_may_be_poisoned_can_be_drawn():
    drawn = {
        i
        for seed in range(60)
        for i in poison(DIGITS, 20, size=1, seed=seed).forget_indices.tolist()
    }
    assert drawn == {
        i
        for i, x in enumerate(DIGITS.train.images)
        if DIGITS.train.labels[i] != 0 and x[0, 7, 7] != 0
    }


def test_a_target_may_be_a_name():
    images = tiny([9] * 12)
    assert poison(images, 3, "blue", size=1).digest == poison(images, 3, 2, size=1).digest
    assert poison(images, 3, "blue", size=1).details["target"] == 2
    with pytest.raises(ValueError, match="unknown class 'bleu': did you mean 'blue'"):
        poison(images, 3, "bleu", size=1)


def test_black_corners_are_not_poisoned_with_black():
    with pytest.raises(
        ValueError,
        match=r"1×1 pixels of 0 in the lower right corner change 0 training images .*\(8 "
        r"stay as they are\), fewer than the 2",
    ):
        poison(tiny([0] * 12), 2, size=1)
    partly = tiny(
        [0, 0, 9, 9, 0, 0, 0, 9, 0, 0, 7, 9]
    )  # of the classes 1 and 2: positions 2, 7, 10 and 11 are not black
    request = poison(partly, 4, size=1)
    assert (
        request.forget_indices.tolist() == [2, 7, 10, 11]
        and request.details["unchanged"] == request.details["test_unchanged"] == 4
    )
    assert len(request.test_more["trigger"]) == 4 and not request.forget.images[..., -1, -1].any()
    with pytest.raises(ValueError, match="change 4 training images"):
        poison(partly, 5, size=1)
    assert poison(partly, 8, size=1, value=255).details["unchanged"] == 0


def test_a_trigger_that_no_test_image_shows_is_refused():
    images = tiny([9] * 12)
    images = replace(images, test=tiny([0] * 12).test)
    with pytest.raises(
        ValueError, match="change 0 test images .* fewer than the 1 needed: take another patch.$"
    ):
        poison(images, 2, size=1)


@given(
    ratio=st.decimals("0.001", "0.999", places=3),
    seed=st.integers(0, 1000),
    how=st.sampled_from(["uniform", "permuted"]),
)
@settings(max_examples=40)
def test_wrong_labels(ratio, seed, how):
    request = mislabel(DIGITS, float(ratio), seed, how)
    gone, truth = request.forget_indices.tolist(), DIGITS.train.labels.tolist()
    assert len(set(gone)) == len(gone) == math.floor(ratio * 1297) and gone == sorted(gone)
    assert torch.equal(request.train.images, DIGITS.train.images) and torch.equal(
        request.forget.images, DIGITS.train.images[gone]
    )
    noisy = request.train.labels.tolist()
    assert request.forget.labels.tolist() == [noisy[i] for i in gone] and {
        i for i in range(1297) if noisy[i] != truth[i]
    } <= set(gone)
    assert request.test_more["truth"].labels.tolist() == [truth[i] for i in gone]
    assert torch.equal(request.test_more["truth"].images, request.forget.images)
    assert request.details == {
        "ratio": float(ratio),
        "n": len(gone),
        "seed": seed,
        "how": how,
        "kept_label": sum(noisy[i] == truth[i] for i in gone),
    }
    assert (
        request.test_forget is request.forget
        and request.test_remain is DIGITS.test
        and request.classes == ()
    )
    if how == "permuted":
        assert Counter(noisy) == Counter(truth)


def test_uniform_labels_are_uniform_and_permuted_ones_shuffled():
    uniform, permuted = (mislabel(DIGITS, 0.8, 1, how) for how in ("uniform", "permuted"))
    counts = Counter(uniform.forget.labels.tolist())
    assert (
        set(counts) == set(range(10)) and 70 < min(counts.values()) and max(counts.values()) < 140
    )  # 103.7 are expected
    assert 70 < uniform.details["kept_label"] < 140
    assert 70 < permuted.details["kept_label"] < 140 and torch.equal(
        uniform.forget_indices, permuted.forget_indices
    )
    assert set(mislabel(tiny([9] * 300), 0.9).forget.labels.tolist()) == {0, 1, 2}
    pairs = Counter(zip(uniform.forget.labels.tolist(), uniform.test_more["truth"].labels.tolist()))
    assert len(pairs) == 100  # every class is taken for every other


@pytest.mark.parametrize("ratio, n", [(0.29, 29), (0.07, 7), (0.57, 57), (0.999, 99), (0.01, 1)])
def test_a_share_is_counted_in_decimals(ratio, n):
    assert len(mislabel(tiny([9] * 100), ratio).forget) == n


@pytest.mark.parametrize("kind", MANY)
@given(k=st.integers(0, 60), seed=st.integers(0, 1000))
@settings(max_examples=6)
def test_a_limited_remain_set(kind, k, seed):
    whole = MANY[kind](2)
    part = whole.limit_remain(k, seed)
    kept = part.remain_indices.tolist()
    assert (
        len(part.remain) == k
        and len(set(kept)) == k
        and set(kept) <= set(whole.remain_indices.tolist())
    )
    assert torch.equal(part.remain.images, DIGITS.train.images[kept]) and torch.equal(
        part.remain.labels, DIGITS.train.labels[kept]
    )
    same = (
        "kind",
        "classes",
        "train",
        "forget",
        "test_forget",
        "test_remain",
        "forget_indices",
        "test_more",
    )
    assert all(getattr(part, name) is getattr(whole, name) for name in same)
    assert part.details == {**whole.details, "remain_limit": k, "remain_seed": seed}
    assert part.digest == whole.limit_remain(k, seed).digest != whole.digest
    assert "remain_limit" not in whole.details and len(whole.remain) > k


def test_limited_remain_sets_differ_by_seed_and_request():
    zero, one = forget_class(DIGITS, 0), forget_class(DIGITS, 1)
    parts = [
        zero.limit_remain(50, 0),
        zero.limit_remain(50, 1),
        zero.limit_remain(51, 0),
        one.limit_remain(50, 0),
    ]
    parts += [zero.limit_remain(0, 0), one.limit_remain(0, 0)]
    assert (
        len({p.digest for p in parts}) == 6
        and parts[0].remain_indices.tolist() != parts[1].remain_indices.tolist()
    )
    assert zero.limit_remain(1169, 0).remain_indices.tolist() == zero.remain_indices.tolist()
    assert list(parts[4].remain.batches()) == []
    assert {
        i for seed in range(200) for i in zero.limit_remain(100, seed).remain_indices.tolist()
    } == set(zero.remain_indices.tolist())


def test_digests_tell_every_single_change():
    base = {
        "n": 20,
        "target": 0,
        "seed": 0,
        "size": 3,
        "value": 0,
        "corner": "lower right",
        "replace": False,
    }
    changes = {
        "n": 21,
        "target": 1,
        "seed": 1,
        "size": 4,
        "value": 1,
        "corner": "lower left",
        "replace": True,
    }
    made = [
        poison(DIGITS, **base),
        *(poison(DIGITS, **base | {name: value}) for name, value in changes.items()),
    ]
    made += [
        mislabel(DIGITS, 0.1),
        mislabel(DIGITS, 0.2),
        mislabel(DIGITS, 0.1, 1),
        mislabel(DIGITS, 0.1, how="permuted"),
    ]
    made += [
        random_subset(DIGITS, 129, 0),
        random_subset(DIGITS, 129, 1),
        random_subset(DIGITS, 128, 0),
    ]
    made += [
        f(DIGITS.subset(1000, 0))
        for f in (
            lambda d: poison(d, **base),
            lambda d: mislabel(d, 0.1),
            lambda d: random_subset(d, 129, 0),
        )
    ]
    assert len({r.digest for r in made}) == len(made)


def test_the_same_sources_with_another_patch_have_another_digest():
    images = tiny([9] * 60)  # every patch changes all of them
    base = {"n": 20, "size": 2, "value": 255, "corner": "upper left"}
    changes = [
        {},
        {"size": 3},
        {"value": 254},
        {"corner": "upper right"},
        {"corner": "lower left"},
        {"corner": "lower right"},
        {"replace": True},
    ]
    made = [poison(images, **base | change) for change in changes]
    assert len({tuple(r.forget_indices.tolist()) for r in made}) == 1 and len(
        {r.digest for r in made}
    ) == len(made)


def test_the_digest_is_of_the_samples_not_of_the_way_to_them():
    images = tiny([9] * 100)
    assert (
        mislabel(images, 0.1).digest == mislabel(images, 0.101).digest
    )  # the same ten images with the same labels
    numpy = poison(DIGITS, np.int64(20), np.int64(0), np.int64(0), np.int64(3))
    assert numpy.digest == poison(DIGITS, 20, 0, 0, 3).digest and json.dumps(numpy.details)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"size": 9}, "`size` is 9: .* whole number from 1 to 8"),
        ({"size": 0}, "`size` is 0"),
        ({"size": 2.5}, "`size` is 2.5"),
        ({"value": 256}, "`value` is 256: a raw pixel .* 0 to 255"),
        ({"value": -1}, "`value` is -1"),
        ({"value": 0.5}, "`value` is 0.5"),
        ({"corner": "lower"}, "unknown corner 'lower'"),
        ({"corner": "center"}, "unknown corner"),
        ({"n": 0}, "`n` is 0"),
        ({"n": -3}, "`n` is -3"),
        ({"n": 1298}, "`n` is 1298"),
        ({"n": 1297}, "fewer than the 1297 needed: take another patch, or a smaller `n`"),
        ({"target": 10}, "class 10 does not exist"),
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": 0.5}, "`seed` is 0.5"),
        ({"size": 1}, "fewer than the 200 needed"),
    ],
)
def test_poison_that_makes_no_sense_is_refused(bad, message):
    with pytest.raises(ValueError, match=message) as said:
        poison(DIGITS, **bad)
    assert "\n" not in str(said.value)


def test_a_patch_fits_the_shorter_side():
    poison(tiny([9] * 12), 3, size=5)
    with pytest.raises(ValueError, match="on 6×5 pixels must be a whole number from 1 to 5"):
        poison(tiny([9] * 12), 3, size=6)


@pytest.mark.parametrize(
    "bad, message",
    [
        ((0,), "`ratio` is 0"),
        ((1,), "`ratio` is 1"),
        ((-0.1,), "`ratio` is -0.1"),
        ((1.5,), "`ratio` is 1.5"),
        ((float("nan"),), "`ratio` is nan"),
        ((0.0001,), "less than one of 1297 images, take a larger one"),
        ((0.1, -1), "`seed` is -1"),
        ((0.1, 0, "shuffled"), "unknown way to mislabel 'shuffled'"),
    ],
)
def test_wrong_labels_that_make_no_sense_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        mislabel(DIGITS, *bad)


@pytest.mark.parametrize("n", [0, -1, 1297, 2.5])
def test_random_subsets_that_are_none_are_refused(n):
    with pytest.raises(ValueError, match=f"`n` is {n}: .* whole number( from 1 to 1296|[.])"):
        random_subset(DIGITS, n, 0)


@pytest.mark.parametrize("k", [-1, 1170, 1.5])
def test_remain_sets_that_are_not_there_are_refused(k):
    with pytest.raises(ValueError, match=f"`k` is {k}: .* whole number( from 0 to 1169|[.])"):
        forget_class(DIGITS, 0).limit_remain(k, 0)


# ---------------------------------------------------------------- which class is meant


def named(*classes):
    "Three classes of those names."
    return replace(tiny([1, 2, 3] * 4), classes=classes)


@pytest.mark.parametrize(
    "classes, text, others",
    [
        (("crane", "owl", "crane"), "crane", (0, 2)),
        (("2", "3", "5"), "2", (0, 2)),
        (("1", "0", "2"), "1", (0, 1)),
        (("a", "a", "a"), "a", (0, 1, 2)),
    ],
)
def test_a_name_that_may_be_two_classes_is_refused(classes, text, others):
    images = named(*classes)
    for ask in (
        lambda: forget_class(images, text),
        lambda: forget_classes(images, [text]),
        lambda: poison(images, 1, text, size=1, value=9),
    ):
        with pytest.raises(
            ValueError, match=f"class '{text}' is ambiguous: in tiny it may be "
        ) as error:
            ask()
        assert all(
            f"class {index} (named {classes[index]!r})" in str(error.value) for index in others
        )
        assert "\n" not in str(error.value)


def test_what_means_one_class_only_is_that_class():
    images = named("2", "3", "5")
    for which, index in {"3": 1, "5": 2, "0": 0, "1": 1, 0: 0, 2: 2, np.int64(2): 2}.items():
        assert forget_class(images, which).classes == (index,)
    assert forget_class(named("a", "b", "a"), "b").classes == (1,)
    assert [forget_class(DIGITS, str(k)).classes for k in range(10)] == [(k,) for k in range(10)]


@pytest.mark.parametrize("written, asked", [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_class_is_found_however_its_accents_are_written(written, asked):
    lies, wanted = (unicodedata.normalize(form, "café") for form in (written, asked))
    assert lies != wanted and forget_class(named("a", lies, "b"), wanted).classes == (1,)
    with pytest.raises(ValueError, match="is ambiguous"):
        forget_class(named(lies, wanted, "b"), wanted)


def test_settings_may_mean_names_where_they_hold_numbers():
    chosen = resolve("quick", classes=["2"], device="cpu")
    with pytest.raises(ValueError, match="class '2' is ambiguous"):
        request_of(chosen, named("2", "3", "5"))
    assert request_of(
        resolve("quick", classes=["5"], device="cpu"), named("2", "3", "5")
    ).classes == (2,)


@pytest.mark.parametrize(
    "bad",
    [
        ["a.png"],
        "a.png",
        [True],
        3,
        None,
        [[1, 2]],
        np.array(["a.png"]),
        np.array([1.5]),
        torch.tensor([1j]),
        [2**70],
        {"a": 1},
    ],
)
def test_what_is_no_list_of_positions_is_one_sentence(bad):
    with pytest.raises((TypeError, ValueError), match="must be|named by whole numbers") as error:
        forget_samples(DIGITS, bad)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    "good",
    [
        [1, 2],
        (1, 2),
        np.array([1, 2]),
        np.array([[1], [2]]),
        torch.tensor([1, 2]),
        torch.tensor([[1], [2]], dtype=torch.uint8),
        range(1, 3),
        [np.int64(1), torch.tensor(2)],
    ],
)
def test_positions_may_come_in_any_kind_of_list(good):
    assert forget_samples(DIGITS, good).forget_indices.tolist() == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: forget_classes(DIGITS, "3"),
        lambda: forget_classes(DIGITS, 3),
        lambda: forget_class(DIGITS, True),
        lambda: forget_class(DIGITS, None),
        lambda: forget_classes(DIGITS, ()),
        lambda: forget_class("digits", 0),
        lambda: forget_class(DIGITS, wich=0),
        lambda: random_subset(DIGITS, 5, 2**70),
        lambda: random_subset(DIGITS, 5, math.nan),
        lambda: random_subset(DIGITS, True, 0),
        lambda: poison(DIGITS, value=True),
        lambda: poison(DIGITS, replace=1),
        lambda: mislabel(DIGITS, math.nan),
        lambda: mislabel(DIGITS, "x"),
        lambda: mislabel(DIGITS, True),
        lambda: forget_class(DIGITS, 0).limit_remain(1.0, 0),
    ],
)
def test_calls_that_make_no_sense_are_one_sentence(bad):
    with pytest.raises((TypeError, ValueError)) as error:
        bad()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
