"Linear maps wherever they are, given masks, and what no mask reaches."

import pytest
import torch
from torch import nn

from fisher_unlearn import (
    FisherMask,
    candidates,
    diag_fisher,
    read_mask,
    select_top,
    unlearn,
    zero_,
)
from fisher_unlearn.methods.masking import compare_masks, left_out, mask_by_layer
from fisher_unlearn.methods.masks import GivenMask

TOKENS = torch.randint(0, 12, (24, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3
LOST, KEPT = (
    [(TOKENS[LABELS == 0], LABELS[LABELS == 0])],
    [(TOKENS[LABELS > 0], LABELS[LABELS > 0])],
)


class Reader(nn.Module):
    "Words, attention, a recurrent layer, a place of its own, and a classifier."

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.places = nn.Parameter(torch.randn(1, 6, 8))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recur = nn.LSTM(8, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens):
        x = self.words(tokens) + self.places
        x = self.attend(x, x, x, need_weights=False)[0]
        return self.head(self.recur(x)[0][:, -1])


@pytest.fixture
def reader():
    torch.manual_seed(0)
    return Reader().eval()


MAPS = [
    "words.weight",
    "attend.in_proj_weight",
    "attend.out_proj.weight",
    "recur.weight_ih_l0",
    "recur.weight_hh_l0",
]


def test_single_weights_of_all_linear_maps_are_in_the_pool(reader):
    pool = candidates(reader)
    assert list(pool.shapes) == MAPS
    assert list(candidates(reader, classifier=True).shapes) == [*MAPS, "head.weight"]
    assert list(candidates(reader, "kernel").shapes) == ["attend.out_proj.weight"]
    assert left_out(reader, pool) == ["places", "head.weight"]


def test_the_mask_goes_where_the_scores_are_highest(reader):
    "Against a selection by hand over all maps together."
    scores = diag_fisher(reader, LOST)
    mask = select_top(scores, 0.1, candidates(reader))
    flat = torch.cat([scores[name].flatten() for name in MAPS])
    highest = torch.zeros(len(flat), dtype=torch.bool)
    highest[flat.argsort(descending=True, stable=True)[: len(flat) // 10]] = True
    sizes = [scores[name].numel() for name in MAPS]
    for name, part in zip(MAPS, highest.split(sizes)):
        where = mask.get(name, torch.zeros_like(scores[name], dtype=torch.bool))
        assert torch.equal(where.flatten(), part)
    table = mask_by_layer(mask, reader).set_index("layer")
    assert table.masked.sum() == len(flat) // 10
    assert table.masked["attend.in_proj_weight"] == int(
        mask.get("attend.in_proj_weight", torch.zeros(1)).sum()
    )


@pytest.mark.parametrize(
    "module, names",
    [
        (nn.EmbeddingBag(5, 4), ["weight"]),
        (nn.GRU(3, 4, 2, bidirectional=True), None),
        (nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.LSTM(3, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (nn.ConvTranspose2d(2, 3, 3), ["weight"]),
        (nn.Bilinear(2, 3, 4), ["weight"]),
    ],
)
def test_each_kind_of_map(module, names):
    model = nn.Sequential(module, nn.Linear(4, 3))
    expected = names or [n for n, p in module.named_parameters() if p.dim() > 1]
    found = candidates(model, classifier_name="1")
    assert list(found.shapes) == [f"0.{name}" for name in expected]


def test_frozen_and_tied_maps():
    model = Reader()
    model.words.weight.requires_grad_(False)
    assert "words.weight" not in candidates(model).shapes

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.inner = nn.Linear(4, 4)
            self.head.weight = self.words.weight

        def forward(self, tokens):
            return self.head(self.inner(self.words(tokens).mean(1)))

    assert list(candidates(Tied()).shapes) == ["inner.weight"]  # the other is the classifier's
    assert list(candidates(Tied(), classifier=True).shapes) == ["words.weight", "inner.weight"]


def test_a_network_of_words_forgets(reader):
    result = unlearn(reader, LOST, KEPT, method=FisherMask(ratio=0.2))
    entries = sum(t.numel() for n, t in reader.named_parameters() if n in MAPS)
    assert sum(int(where.sum()) for where in result.mask.values()) == int(0.2 * entries)
    assert set(result.mask) <= set(MAPS)


# ---------------------------------------------------------------- masks that are given


def test_a_mask_is_applied_to_another_copy(reader, tmp_path):
    first = unlearn(reader, LOST, KEPT, method=FisherMask(ratio=0.1))
    first.save(tmp_path / "out")
    mask = read_mask(tmp_path / "out" / "mask.safetensors")
    for second in (
        unlearn(reader, LOST, KEPT, mask=mask),
        unlearn(reader, LOST, KEPT, method=GivenMask(mask)),
    ):
        state = second.model.state_dict()
        assert all(torch.equal(t, state[n]) for n, t in first.model.state_dict().items())
        assert set(second.mask) == set(mask) and "GivenMask(" in repr(second)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"method": "finetune"}, "a mask needs no method"),
        ({"preset": "paper"}, "`preset` is given beside"),
        ({"ratio": 0.1}, "`ratio` is given beside"),
    ],
)
def test_a_mask_with_more_beside_it_is_refused(reader, given, message):
    mask = {"head.weight": torch.ones(3, 5, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        unlearn(reader, LOST, KEPT, mask=mask, **given)


@pytest.mark.parametrize(
    "mask, message",
    [
        ({"hed.weight": torch.ones(3, 5, dtype=torch.bool)}, "did you mean 'head.weight'?"),
        ({"head.weight": torch.ones(3, 4, dtype=torch.bool)}, r"\(3, 4\)"),
        ({"head.weight": torch.ones(3, 5)}, "float32"),
    ],
)
def test_a_mask_of_something_else_is_refused(reader, mask, message):
    before = {n: t.clone() for n, t in reader.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        unlearn(reader, LOST, KEPT, mask=mask)
    assert all(torch.equal(t, reader.state_dict()[n]) for n, t in before.items())


def test_masks_are_compared():
    one = {"a": torch.tensor([True, True, False]), "b": torch.tensor([[True]])}
    other = {"a": torch.tensor([False, True, True]), "c": torch.tensor([False])}
    table = compare_masks(one, other)
    assert table.loc["a"].tolist() == [2, 2, 1, pytest.approx(100 / 3)]
    assert table.loc["b", ["one", "other", "both", "overlap"]].tolist() == [1, 0, 0, 0]
    assert table.loc["all", ["one", "other", "both"]].tolist() == [3, 2, 1]
    assert table.overlap.isna().tolist() == [False, False, True, False]
    assert compare_masks({}, {}).index.tolist() == ["all"]
    with pytest.raises(ValueError, match="in two shapes"):
        compare_masks(one, {"a": torch.ones(2, dtype=torch.bool)})


def test_zeroing_through_attention_changes_its_answers(reader):
    with torch.no_grad():
        before = reader(TOKENS)
        mask = {"attend.in_proj_weight": torch.ones(24, 8, dtype=torch.bool)}
        after = zero_(reader, mask)(TOKENS)
    assert not torch.allclose(before, after)
