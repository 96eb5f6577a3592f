"""Networks that seem to treat each sample by itself, until a batch comes that shows otherwise."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fisher_unlearn.networks.logits import close, logits_of
from fisher_unlearn.scores.fisher import diag_fisher
from fisher_unlearn.scores.gradients import logit_sensitivity, loss_gradient
from fisher_unlearn.scores.leaves import Graph, worked_along
from fisher_unlearn.networks.models import build_model


def one_by_one(model, x, y):
    "Σ g² by plain autograd, each sample in a batch of its own."
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        for sums, g in zip(total.values(), torch.autograd.grad(loss, list(parameters.values()))):
            sums += g**2
    return total


def check_scores(model, x, y, size):
    "Scores in batches of a size are those of single samples."
    model = model.double().eval()
    x = x.double() if x.is_floating_point() else x
    got = diag_fisher(model, list(zip(x.split(size), y.split(size))))
    for name, wanted in one_by_one(model, x, y).items():
        torch.testing.assert_close(got[name], wanted, rtol=1e-8, atol=1e-12 * float(wanted.max()))


class Deduplicated(nn.Module):
    "Looks each token of a batch up once."

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        found, place = tokens.unique(return_inverse=True)
        return self.head(self.table(found)[place].sum(1).tanh())


def test_as_many_tokens_as_samples_are_no_samples():
    tokens = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [0, 1], [4, 5]])  # six, of six samples
    torch.manual_seed(0)
    check_scores(Deduplicated(), tokens, torch.arange(6) % 3, 6)


def test_as_many_tokens_as_samples_in_a_later_batch():
    tokens = torch.arange(6)[:, None].expand(6, 2)  # one of each sample, for the time being
    later = torch.tensor([[0, 1], [1, 1], [2, 3], [3, 3], [4, 5], [5, 0]])
    torch.manual_seed(0)
    check_scores(Deduplicated(), torch.cat([tokens, later]), torch.arange(12) % 3, 6)


class Routed(nn.Module):
    "Sends each token to one of some experts, by a module or by a function."

    def __init__(self, function):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.gate, self.head, self.function = nn.Linear(4, 4), nn.Linear(4, 3), function

    def forward(self, x):
        rows = x.reshape(-1, 4)
        weight, chosen = self.gate(rows).softmax(1).max(1)
        out = torch.zeros_like(rows)
        for k, expert in enumerate(self.experts):
            own = (chosen == k).nonzero()[:, 0]
            given = F.linear(rows[own], expert.weight, expert.bias) if self.function else None
            given = expert(rows[own]) if given is None else given
            out = out.index_add(0, own, given.tanh() * weight[own, None])
        return self.head(out.view(x.shape).sum(1))


@pytest.mark.parametrize("function", [False, True])
def test_experts_that_get_as_many_tokens_as_there_are_samples(function):
    torch.manual_seed(26)
    model, x = Routed(function).double(), torch.randn(64, 4, 4).double()
    counts = [
        model.gate(part.reshape(-1, 4)).argmax(1).bincount(minlength=4) for part in x.split(8)
    ]
    assert any(8 in count for count in counts[1:])  # there is such a batch
    check_scores(model, x, torch.arange(64) % 3, 8)


class Longest(nn.Module):
    "Averages over the longest sequence of its batch."

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, tokens):
        longest = int((tokens != 0).sum(1).max())
        return self.head(self.table(tokens[:, :longest]).tanh().mean(1))


def sequences(lengths, width=6):
    "Tokens in rows of a width, zeros behind."
    torch.manual_seed(0)
    lengths = torch.tensor(lengths)
    tokens = torch.randint(1, 11, (len(lengths), width))
    return tokens.where(torch.arange(width) < lengths[:, None], 0)


@pytest.mark.parametrize(
    "lengths, size",
    [
        ([6] * 8 + [4] * 4 + [1] * 4, 16),  # sorted, longest first
        ([6] * 8 + [3, 6, 3, 3, 3, 3, 3, 3], 8),  # in a later batch
        ([3] * 9 + [6] + [3] * 6, 16),
    ],
)
def test_the_longest_sequence_of_a_batch_decides_for_none(lengths, size):
    tokens, labels = sequences(lengths), torch.arange(len(lengths)) % 3
    with pytest.raises(ValueError, match="depend on the other samples"):
        diag_fisher(Longest(), list(zip(tokens.split(size), labels.split(size))))


class Masked(nn.Module):
    "A network with one class masked, and something before the head."

    def __init__(self, middle, fill):
        super().__init__()
        self.body, self.middle, self.head = nn.Linear(6, 8), middle, nn.Linear(8, 4)
        self.fill = fill

    def forward(self, x):
        logits = self.head(self.middle(self.body(x)))
        return logits.masked_fill(torch.arange(4) == 3, self.fill)


class Noise(nn.Module):
    "Dropout that nothing switches off."

    def forward(self, x):
        return F.dropout(x, 0.5)


FILLS = [-1e9, -torch.inf, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    "middle, said",
    [
        (Noise(), "drawn at random"),
        (nn.BatchNorm1d(8, track_running_stats=False, affine=False), "depend on the other samples"),
    ],
)
def test_a_masked_class_hides_nothing(fill, middle, said):
    torch.manual_seed(0)
    model = Masked(middle, fill)
    model.body.requires_grad_(False)
    with pytest.raises(ValueError, match=said):
        diag_fisher(model, [(torch.randn(10, 6), torch.arange(10) % 3)])


@pytest.mark.parametrize("fill", FILLS)
def test_a_masked_class_is_no_hindrance(fill):
    torch.manual_seed(0)
    model, x = Masked(nn.Tanh(), fill), torch.randn(10, 6)
    plain = nn.Sequential(model.body, nn.Tanh(), nn.Linear(8, 3))
    plain[2].weight.data, plain[2].bias.data = model.head.weight.data[:3], model.head.bias.data[:3]
    y = torch.arange(10) % 3
    scores, wanted = (diag_fisher(m, [(x, y)]) for m in (model, plain))
    torch.testing.assert_close(scores["body.weight"], wanted["0.weight"])


def test_a_class_of_which_a_network_is_sure_may_round():
    sure = torch.tensor([[-1e-7, -16.0], [-3e-7, -15.0]])
    assert close(sure + torch.tensor([1e-7, 0]), sure, 1e-4)
    assert not close(sure + torch.tensor([0.1, 0]), sure, 1e-4)


class Squeezes(nn.Module):
    "Can't take a batch of one, and mixes the samples of others, behind a masked class."

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        assert len(x) > 1
        z = self.layer(x)
        return (z - z.mean(0)).masked_fill(torch.arange(3) == 2, -1e9)


def test_a_single_sample_behind_a_masked_class():
    with pytest.raises(ValueError, match="depends on the others"):
        logits_of(Squeezes(), torch.randn(1, 4))


class Counted(nn.Module):
    "Scales its inputs by something that moves when it meets a large one."

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 3), 1.0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        z = self.layer(x / (self.scale * self.seen))
        if bool((x.abs() > 50).any()):
            self.scale.mul_(3)
            self.seen *= 2
        return z


def test_a_state_that_moves_late_is_put_back():
    torch.manual_seed(0)
    first, second, third = torch.randn(3, 6, 4)
    second[5] *= 1000
    model, y = Counted(), torch.arange(6) % 3
    scores = [diag_fisher(model, [(x, y) for x in each])["layer.weight"] for each in (
        (first, second, third), (first, third, second), (third, first, second)
    )]  # fmt: skip
    for found in scores[1:]:
        torch.testing.assert_close(found, scores[0])
    assert float(model.scale) == model.seen == 1


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "googlenet", "densenet"])
def test_in_the_papers_networks_each_sample_stays_in_its_place(name):
    model = build_model(name, 10).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    found = [
        worked_along(Graph(model(torch.randn(n, 3, 32, 32)).grad_fn)) for n in (3, 4)
    ]  # fmt: skip
    assert found[0] is not None
    assert found[0] == found[1]


class Without(nn.Linear):
    "Gives logits that no gradient leaves."

    def __init__(self, way):
        super().__init__(4, 3)
        self.way = way

    def forward(self, x):
        with self.way():
            return super().forward(x).detach()


@pytest.mark.parametrize("way", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("score", [diag_fisher, loss_gradient, logit_sensitivity])
def test_logits_without_a_gradient_are_refused_in_a_sentence(way, score):
    with pytest.raises(ValueError, match="no gradient comes from the model's logits"):
        score(Without(way), [(torch.randn(6, 4), torch.arange(6) % 3)])
