"""Networks written at random, from a grammar of layers, of bare parameters, of functions and of
sharing: their scores are those of loops over single samples, to nine digits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from fisher_unlearn.scores.fisher import diag_fisher, naive_diag_fisher
from fisher_unlearn.scores.squares import gradient_paths

STEPS, WIDTH, CLASSES = 3, 4, 3  # every part takes and gives (n, STEPS, WIDTH)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape) * 0.7)


class Part(nn.Module):
    "Parameters by name, and what is done with them."

    def __init__(self, does, **held):
        super().__init__()
        self.does = does
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.does(self, x)


def attention(**options):
    return nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)


def biased(s, x):
    "Attention with a table of relative positions, looked up for each pair."
    at = torch.arange(STEPS)
    bias = s.table[(at[:, None] - at + STEPS - 1).flatten()].view(STEPS, STEPS)
    return torch.softmax(x @ x.mT + bias[None], -1) @ x


def with_token(s, x):
    "A token of the network's own comes first, and is taken away again."
    x = torch.cat([s.token.expand(len(x), -1, -1), x], 1)
    return x[:, 1:] * torch.tanh(x[:, :1])


def first(s, x):
    "The positions come before the samples."
    return s.layer(x.transpose(0, 1)).transpose(0, 1)


def several(s, x):
    "One matrix, cut into what three products multiply with."
    a, b, c = s.w.chunk(3)
    return x @ a.T + torch.tanh(x @ b) * (x @ c.mT)


def twice(s, x):
    return s.layer(torch.tanh(s.layer(x)))


def pictures(does):
    "A function of images (n, WIDTH, STEPS, 1)."
    return lambda s, x: does(s, x.mT[..., None])[..., 0].mT


def parts():
    "The words of the grammar, each with a fresh set of parameters."
    wide, n = (WIDTH, WIDTH), nn

    def linear():
        return n.Linear(*wide)

    return {
        "linear": linear,
        "linear without bias": lambda: n.Linear(*wide, bias=False),
        "functional linear": lambda: Part(
            lambda s, x: F.linear(x, s.w, s.b), w=parameter(*wide), b=parameter(WIDTH)
        ),
        "matmul": lambda: Part(lambda s, x: x @ s.w, w=parameter(*wide)),
        "matmul from the left": lambda: Part(lambda s, x: s.w @ x, w=parameter(STEPS, STEPS)),
        "einsum": lambda: Part(
            lambda s, x: torch.einsum("nlc,co->nlo", x, s.w), w=parameter(*wide)
        ),
        "einsum of heads": lambda: Part(
            lambda s, x: torch.einsum("nlhc,hco->nlho", x.unflatten(2, (2, 2)), s.w).flatten(2),
            w=parameter(2, 2, 2),
        ),
        "scale": lambda: Part(lambda s, x: x * s.w, w=parameter(WIDTH)),
        "layer scale": lambda: Part(lambda s, x: s.w * torch.tanh(x) + x, w=parameter(1, 1, WIDTH)),
        "one number": lambda: Part(lambda s, x: x * s.w, w=parameter()),
        "divided": lambda: Part(lambda s, x: s.w / (1 + x**2), w=parameter(STEPS, 1)),
        "positions": lambda: Part(lambda s, x: x + s.w, w=parameter(1, STEPS, WIDTH)),
        "positions off": lambda: Part(lambda s, x: x - s.w, w=parameter(STEPS, WIDTH)),
        "positions looked up": lambda: Part(
            lambda s, x: x + s.table(torch.arange(STEPS)[None]), table=n.Embedding(5, WIDTH)
        ),
        "token": lambda: Part(with_token, token=parameter(1, 1, WIDTH)),
        "repeated": lambda: Part(
            lambda s, x: x + s.w.repeat(len(x), STEPS, 2), w=parameter(1, 1, WIDTH // 2)
        ),
        "relative positions": lambda: Part(biased, table=parameter(2 * STEPS - 1, 1)),
        "attention": lambda: Part(lambda s, x: s.layer(x, x, x)[0], layer=attention()),
        "attention without weights": lambda: Part(
            lambda s, x: s.layer(x, torch.tanh(x), x, need_weights=False)[0], layer=attention()
        ),
        "attention with biases": lambda: Part(
            lambda s, x: s.layer(x, x, x)[0], layer=attention(add_bias_kv=True)
        ),
        "encoder": lambda: n.TransformerEncoderLayer(WIDTH, 2, 6, 0.0, batch_first=True),
        "encoder, positions first": lambda: Part(
            first, layer=n.TransformerEncoderLayer(WIDTH, 2, 6, 0.0)
        ),
        "positions first": lambda: Part(first, layer=linear()),
        "layer norm": lambda: n.LayerNorm(WIDTH),
        "norm of all": lambda: n.LayerNorm((STEPS, WIDTH)),
        "functional norm": lambda: Part(
            lambda s, x: F.layer_norm(x, (WIDTH,), s.w, s.b), w=parameter(WIDTH), b=parameter(WIDTH)
        ),
        "root mean square": lambda: Part(
            lambda s, x: x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * s.w,
            w=parameter(WIDTH),
        ),
        "group norm": lambda: Part(lambda s, x: s.layer(x.mT).mT, layer=n.GroupNorm(2, WIDTH)),
        "functional group norm": lambda: Part(
            lambda s, x: F.group_norm(x.mT, 2, s.w, s.b).mT, w=parameter(WIDTH), b=parameter(WIDTH)
        ),
        "prelu": lambda: Part(lambda s, x: s.layer(x.mT).mT, layer=n.PReLU(WIDTH)),
        "prelu of one": lambda: n.PReLU(),
        "convolution": lambda: Part(
            pictures(lambda s, x: s.layer(x)), layer=n.Conv2d(WIDTH, WIDTH, (3, 1), padding=(1, 0))
        ),
        "depthwise": lambda: Part(
            pictures(lambda s, x: s.layer(x)),
            layer=n.Conv2d(WIDTH, WIDTH, (3, 1), padding=(1, 0), groups=WIDTH),
        ),
        "functional convolution": lambda: Part(
            lambda s, x: F.conv1d(x.mT, s.w, s.b, padding=1, groups=2).mT,
            w=parameter(WIDTH, WIDTH // 2, 3),
            b=parameter(WIDTH),
        ),
        "transposed convolution": lambda: Part(
            lambda s, x: s.layer(x.mT).mT[:, 1:-1], layer=n.ConvTranspose1d(WIDTH, WIDTH, 3)
        ),
        "transposed with strides": lambda: Part(
            lambda s, x: s.layer(x.mT).mT[:, ::2],
            layer=n.ConvTranspose1d(WIDTH, WIDTH, 2, 2, padding=0, output_padding=0, groups=2),
        ),
        "bilinear": lambda: Part(
            lambda s, x: s.layer(x, torch.tanh(x)), layer=n.Bilinear(WIDTH, WIDTH, WIDTH)
        ),
        "weight norm": lambda: parametrizations.weight_norm(linear()),
        "weight norm of a convolution": lambda: Part(
            lambda s, x: s.layer(x.mT).mT,
            layer=parametrizations.weight_norm(n.Conv1d(WIDTH, WIDTH, 3, padding=1)),
        ),
        "standardised": lambda: Part(
            lambda s, x: F.linear(x, (s.w - s.w.mean(1, keepdim=True)) / s.w.std(1, keepdim=True)),
            w=parameter(*wide),
        ),
        "one matrix for three": lambda: Part(several, w=parameter(3 * WIDTH, WIDTH)),
        "parts of a matrix": lambda: Part(
            lambda s, x: x @ s.w[:WIDTH] + s.w[WIDTH], w=parameter(WIDTH + 2, WIDTH)
        ),
        "twice": lambda: Part(twice, layer=linear()),
        "a matrix and its transpose": lambda: Part(
            lambda s, x: torch.tanh(x @ s.w) @ s.w.T, w=parameter(*wide)
        ),
        "a matrix, also added": lambda: Part(
            lambda s, x: x @ s.w + s.w[:STEPS], w=parameter(*wide)
        ),
        "recurrent": lambda: Part(
            lambda s, x: s.layer(x)[0], layer=n.GRU(WIDTH, WIDTH, batch_first=True)
        ),
        "kronecker": lambda: Part(
            lambda s, x: x @ torch.kron(s.a, s.b), a=parameter(2, 2), b=parameter(2, 2)
        ),
        "for the first half": lambda: Part(
            lambda s, x: torch.cat([x[..., :2] @ s.w, x[..., 2:]], -1), w=parameter(2, 2)
        ),
    }  # fmt: skip


NAMES = list(parts())


class Written(nn.Module):
    "Parts one after the other, some of which come again or share what they hold; then a head."

    def __init__(self, words, again, tied, residual):
        super().__init__()
        made = [parts()[word]() for word in words]
        self.parts = nn.ModuleList(made + [made[k % len(made)] for k in again])
        self.head = nn.Linear(WIDTH, CLASSES)
        self.residual, self.tied = residual, tied
        if tied:
            self.out = parameter(WIDTH, WIDTH)
            self.parts.append(Part(lambda s, x: F.linear(x, s.w), w=self.out))

    def forward(self, x):
        if self.tied:
            x = x @ self.out
        for part in self.parts:
            x = torch.tanh(part(x)) + (x if self.residual else 0)
        return self.head(x.mean(1))


@st.composite
def sentences(draw):
    "A network, and samples for it."
    words = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3))
    again = draw(st.lists(st.integers(0, 2), max_size=1))
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 99)))
        model = Written(words, again, draw(st.booleans()), draw(st.booleans())).double().eval()
        x = torch.randn(draw(st.sampled_from([5, 1, 2, 7])), STEPS, WIDTH, dtype=torch.float64)
    return words, model, x


def agree(model, x, labels="true", tolerance=1e-9):
    "The scores are those of loops, and the network is what it was."
    y = torch.arange(len(x)) % CLASSES
    before = copy.deepcopy(model.state_dict())
    wanted = naive_diag_fisher(model, [(x, y)], labels)
    found = diag_fisher(model, [(x, y)], labels)
    most = max(float(w.max()) for w in wanted.values())
    for name, w in wanted.items():
        off = float((found[name] - w).abs().max())
        assert off <= tolerance * float(w.max()) + 1e-16 * most, (name, off, float(w.max()))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())


@given(sentences(), st.sampled_from(["true", "true", "expected"]))
@settings(max_examples=30)
def test_any_network_that_is_written(sentence, labels):
    agree(*sentence[1:], labels)


@pytest.mark.slow
@given(sentences(), st.sampled_from(["true", "true", "expected"]))
@settings(max_examples=200)
def test_many_networks_that_are_written(sentence, labels):
    agree(*sentence[1:], labels)


@pytest.mark.parametrize("word", NAMES)
def test_each_word_by_itself_has_a_rule(word):
    "After a layer that needs slopes to pass on, and as the first of a network."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            parts()[word](), nn.Tanh(), parts()[word](), nn.Flatten(), nn.Linear(12, CLASSES)
        )
        model, x = model.double().eval(), torch.randn(5, STEPS, WIDTH, dtype=torch.float64)
    agree(model, x)
    assert set(gradient_paths(model, x).values()) == {"rule"}
