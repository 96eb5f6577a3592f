"""Networks as other people write them: a grammar from which hypothesis draws.

A `Recipe` says in a few words what a network is made of; `build` makes it, always the same.
Everything that people do to networks is a block that keeps the shape of what runs through it, or an
edit of a network that is made. Nothing here knows how the package scores."""

import copy
import math
import random
import types
from collections import Counter, deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.checkpoint import checkpoint

WIDTH = 4  # channels of images, features of vectors and of the elements of a series
COLOURS = 3
SIDE = 8
STEPS = 5  # of a series
WORDS = 7  # of the vocabulary


class Wanted(Exception):
    "What a network of ours raises itself."


# -------------------------------------------------------------- blocks for images (n, WIDTH, h, w)
IMAGES = {}
SERIES = {}
VECTORS = {}
ANY = {}  # for any shape whose first dimension is the batch


def block(*tables):
    "Enter a class or function without arguments that makes a block."

    def enter(make):
        for table in tables:
            table[make.__name__] = make
        return make

    return enter


def conv(**options):
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, **options)


@block(IMAGES)
def conv_tanh():
    return nn.Sequential(conv(), nn.Tanh())


@block(IMAGES)
def conv_relu_in_place():
    return nn.Sequential(conv(), nn.ReLU(inplace=True))


@block(IMAGES)
def conv_in_groups():
    return nn.Sequential(conv(groups=2, bias=False), nn.GELU())


@block(IMAGES)
def conv_depthwise():
    return nn.Sequential(conv(groups=WIDTH), nn.Conv2d(WIDTH, WIDTH, 1), nn.SiLU())


@block(IMAGES)
def conv_circular():
    return nn.Sequential(conv(padding_mode="circular"), nn.Tanh())


@block(IMAGES)
def conv_same():
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 2, padding="same"), nn.Tanh())


@block(IMAGES)
def conv_transposed():
    return nn.Sequential(nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1), nn.Tanh())


@block(IMAGES)
def batch_norm():
    norm = nn.BatchNorm2d(WIDTH)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


@block(IMAGES)
def batch_norm_without_scale():
    return nn.Sequential(nn.BatchNorm2d(WIDTH, affine=False), conv())


@block(IMAGES)
def group_norm():
    return nn.GroupNorm(2, WIDTH)


@block(IMAGES)
def instance_norm():
    return nn.InstanceNorm2d(WIDTH, affine=True)


@block(IMAGES)
def instance_norm_with_statistics():
    return nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True)


@block(IMAGES)
def dropout():
    return nn.Sequential(conv(), nn.Dropout2d(0.3), nn.Softplus())


@block(IMAGES)
def prelu():
    return nn.PReLU(WIDTH)


@block(IMAGES)
class ChannelsLast(nn.Module):
    "A layer norm and a linear layer on the channels of every pixel."

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(self.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


@block(IMAGES)
class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(conv(), nn.ReLU(), conv())

    def forward(self, x):
        x = x + self.inner(x)
        return x.relu_()


@block(IMAGES)
class Squeezed(nn.Module):
    "Squeeze and excitation, with a squeeze of whatever is one."

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        share = self.fc(F.adaptive_avg_pool2d(x, 1).squeeze()).sigmoid()
        return x * share.view(-1, WIDTH, 1, 1)


@block(IMAGES)
class SharedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return torch.tanh(self.conv(torch.tanh(self.conv(x))))


@block(IMAGES)
class TiedConvs(nn.Module):
    "Two convolutions with one weight."

    def __init__(self):
        super().__init__()
        self.a = conv()
        self.b = conv()
        self.b.weight = self.a.weight

    def forward(self, x):
        return torch.tanh(self.b(torch.tanh(self.a(x))))


@block(IMAGES)
class Functional(nn.Module):
    "A convolution that is never called: others use its parameters."

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return torch.tanh(F.conv2d(x, self.conv.weight, self.conv.bias, padding=1))


@block(IMAGES)
class CalledAndRead(nn.Module):
    "A convolution that is called, and whose weight is also read."

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return torch.tanh(self.conv(x)) * self.conv.weight.mean()


@block(IMAGES)
def conv_weight_norm():
    return nn.Sequential(parametrizations.weight_norm(conv()), nn.Tanh())


@block(IMAGES)
def conv_weight_norm_old():
    return nn.Sequential(nn.utils.weight_norm(conv()), nn.Tanh())


@block(IMAGES)
def conv_spectral_norm():
    return nn.Sequential(parametrizations.spectral_norm(conv()), nn.Tanh())


@block(IMAGES)
def conv_spectral_norm_old():
    return nn.Sequential(nn.utils.spectral_norm(conv()), nn.Tanh())


@block(IMAGES)
def conv_pruned():
    layer = conv()
    prune.l1_unstructured(layer, "weight", 0.4)
    return nn.Sequential(layer, nn.Tanh())


@block(IMAGES)
class Standardised(nn.Conv2d):
    "Weight standardisation: a subclass that computes something else from its weight."

    def __init__(self):
        super().__init__(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / 0.2, self.bias).tanh()


@block(IMAGES)
class OnlyPatches(nn.Module):
    "A convolution of windows, which are samples to it."

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        n, c, h, w = x.shape
        half = h // 2
        parts = torch.cat([x[:, :, :half], x[:, :, h - half :]])
        top, bottom = torch.tanh(self.conv(parts)).chunk(2)
        return torch.cat([top, x[:, :, half : h - half], bottom], 2)


@block(IMAGES)
class DynamicPadding(nn.Module):
    "The pass sets the padding that the size of the images needs."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3)

    def forward(self, x):
        self.conv.padding = (1 + x.shape[2] % 2, 1)
        return torch.tanh(self.conv(x))


@block(IMAGES)
class Meanwhile(nn.Module):
    "Layers are others for the time of a call only."

    def __init__(self):
        super().__init__()
        self.conv = conv()
        self.norm = nn.GroupNorm(2, WIDTH)

    def forward(self, x):
        self.conv.padding = (2, 0)
        self.norm.eps = 0.5
        self.norm.num_groups = 1
        x = self.norm(self.conv(x))
        self.conv.padding = (1, 1)
        self.norm.eps = 1e-5
        self.norm.num_groups = 2
        return torch.tanh(x)


@block(IMAGES)
class OtherStatistics(nn.Module):
    "Statistics that belong to the domain are put in for a call, and out again."

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        kept = self.norm.running_mean
        self.norm.running_mean = kept + 1
        x = self.norm(x)
        self.norm.running_mean = kept
        return torch.tanh(x)


@block(IMAGES)
def scripted():
    inner = torch.jit.script(nn.Sequential(conv(), nn.Tanh()))
    return nn.Sequential(inner, nn.Conv2d(WIDTH, WIDTH, 1))


@block(IMAGES)
class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return torch.tanh(checkpoint(self.conv, x, use_reentrant=False))


@block(IMAGES)
class OneByOne(nn.Module):
    "Images one at a time, without a batch dimension."

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return torch.stack([torch.tanh(self.conv(image)) for image in x])


@block(IMAGES)
class OwnKernels(nn.Module):
    "Kernels made from each image, all applied in one call with as many groups as images."

    def __init__(self):
        super().__init__()
        self.kernels = nn.Linear(WIDTH, WIDTH * 9)

    def forward(self, x):
        n, c, h, w = x.shape
        kernels = self.kernels(x.mean((2, 3))).view(n * c, 1, 3, 3)
        return torch.tanh(
            F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n * c)
        ).view(n, c, h, w)


@block(IMAGES)
class Fourier(nn.Module):
    "Complex weights, kept as pairs of real ones."

    def __init__(self):
        super().__init__()
        self.pairs = nn.Parameter(torch.randn(WIDTH, 1, 1, 2))

    def forward(self, x):
        return torch.tanh(
            torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(self.pairs), s=x.shape[2:])
        )


@block(IMAGES)
class Unpooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        x, where = F.max_pool2d(self.conv(x), 2, return_indices=True, ceil_mode=True)
        return F.interpolate(torch.tanh(x), scale_factor=2) + where.to(x).mean() * 0


@block(IMAGES)
def local_response():
    return nn.Sequential(nn.LocalResponseNorm(2), conv())


# ------------------------------------------------------------- blocks for series (n, STEPS, WIDTH)
@block(SERIES)
def attention_layer():
    return nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)


@block(SERIES)
class SequenceFirst(nn.Module):
    "The batch is the second dimension."

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, activation="gelu")

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@block(SERIES)
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = self.norm(x)
        return x + self.attention(x, x, x)[0]


@block(SERIES)
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


@block(SERIES)
class BothWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH // 2, bidirectional=True)

    def forward(self, x):
        return self.rnn(x.transpose(0, 1))[0].transpose(0, 1)


@block(SERIES)
class Folded(nn.Module):
    "Every element of a series is a sample to the layers."

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x.reshape(-1, WIDTH))).view(x.shape)


@block(SERIES)
class Mingled(nn.Module):
    "As many rows as samples, but a row is no sample; afterwards everything is in its place."

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        n, steps, width = x.shape
        rows = x.transpose(0, 1).reshape(n, steps, width)
        return torch.tanh(self.linear(rows)).view(steps, n, width).transpose(0, 1)


@block(SERIES)
class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return torch.tanh(self.norm(self.conv(x.mT))).mT


@block(SERIES)
class Positions(nn.Module):
    "Positions that are made in the first pass and kept."

    def __init__(self):
        super().__init__()
        self.pos = None
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        if self.pos is None or self.pos.shape[0] < x.shape[1]:
            self.pos = torch.linspace(0, 1, x.shape[1]).to(x)[:, None]
        return x + self.pos * self.scale


@block(SERIES)
class Learned(nn.Module):
    "Positions from an embedding that is called with a series of numbers, not with a batch."

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(STEPS + 3, WIDTH)

    def forward(self, x):
        return x + self.positions(torch.arange(x.shape[1]))


@block(SERIES)
class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x[:, 1:]], 1)
        return torch.tanh(self.linear(x))


@block(SERIES)
class Queries(nn.Module):
    "What is asked is the same for all samples, and goes through a layer first."

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, STEPS, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        asked = self.linear(self.queries.expand(len(x), -1, -1))
        return F.scaled_dot_product_attention(asked, x, x)


@block(SERIES)
class Cell(nn.Module):
    "A recurrent network step by step; its state is kept in an attribute, and begins anew."

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.state = None

    def forward(self, x):
        self.state = x.new_zeros(len(x), WIDTH)
        seen = []
        for step in x.unbind(1):
            self.state = self.cell(step, self.state)
            seen.append(self.state)
        return torch.stack(seen, 1)


@block(SERIES)
class SometimesTwice(nn.Module):
    "How often a layer runs depends on the data."

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.more = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = torch.tanh(self.linear(x))
        return torch.tanh(self.more(self.linear(x))) if x.shape[1] % 2 else x


@block(SERIES)
def rms_norm():
    return nn.RMSNorm(WIDTH)


# ------------------------------------------------------------------- blocks for vectors (n, WIDTH)
@block(VECTORS, SERIES)
def linear_tanh():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


@block(VECTORS)
def linear_batch_norm():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())


@block(VECTORS, SERIES)
def layer_norm():
    return nn.LayerNorm(WIDTH)


@block(VECTORS, SERIES)
def linear_parametrised():
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh())


@block(VECTORS)
def linear_spectral_norm():
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


@block(VECTORS, SERIES)
def linear_pruned():
    layer = nn.Linear(WIDTH, WIDTH)
    prune.random_unstructured(layer, "weight", 0.3)
    return nn.Sequential(layer, nn.Tanh())


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


@block(VECTORS)
class Experts(nn.Module):
    "Each sample goes to one of two layers."

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x):
        first = x[:, 0] > x[:, 1]
        out = torch.zeros_like(x)
        for here, expert in zip((first, ~first), self.experts):
            out[here] = torch.tanh(expert(x[here]))
        return out + x


@block(VECTORS)
class Branch(nn.Module):
    "A decision about each sample, taken in Python."

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.stack([torch.tanh(self.a(v) if v[0].item() > 0 else self.b(v)) for v in x])


@block(VECTORS)
class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.both(x, x))


class Sign(torch.autograd.Function):
    "A straight-through estimator."

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class Reversal(torch.autograd.Function):
    "The gradient turns round, as in domain adaptation."

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


@block(VECTORS)
class Adversary(nn.Module):
    def forward(self, x):
        return Reversal.apply(x)


@block(VECTORS)
class Binary(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(F.linear(x, Sign.apply(self.linear.weight), self.linear.bias))


@block(VECTORS, SERIES)
class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(input=x))


@block(VECTORS, SERIES)
class Bypassed(nn.Module):
    "A layer's forward is called, so that its hooks are not; and then the layer itself."

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = torch.tanh(self.first.forward(x))
        return torch.tanh(self.second(x) + self.second.forward(x.square()))


@block(VECTORS, SERIES)
class Teacher(nn.Module):
    "Two calls of which only one has a gradient, and one whose result is dropped."

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        with torch.no_grad():
            target = self.linear(x.square())
        self.linear(x + 1)
        out = self.linear(x)
        out += target
        return torch.tanh(out)


@block(VECTORS, SERIES)
class Added(nn.Module):
    "A layer's result is changed in place; that of a linear layer on a series is a view."

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        out = self.linear(x)
        out += x
        out = self.norm(out)
        out *= 1.1
        return torch.tanh(out)


@block(VECTORS)
class Energy(nn.Module):
    "A gradient inside of the forward pass."

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, x):
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            energy = torch.tanh(self.linear(at)).square().sum()
            return x - torch.autograd.grad(energy, at, create_graph=True)[0]


@block(VECTORS)
class Numpy(nn.Module):
    "A detour that no tracer follows."

    def forward(self, x):
        return x * torch.from_numpy(np.sign(x.detach().numpy())).to(x)


@block(VECTORS)
class Lora(nn.Linear):
    "A low-rank change of a weight that is merged into it in evaluation, as loralib does."

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.down = nn.Parameter(torch.randn(1, WIDTH) / 2)
        self.up = nn.Parameter(torch.randn(WIDTH, 1) / 2)
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return self

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        return torch.tanh(out if self.merged else out + x @ (self.up @ self.down).mT)


# --------------------------------------------- blocks of any shape, most of them with side effects
@block(ANY)
class Scaled(nn.Module):
    "A scale outside of any layer."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return x * self.scale


@block(ANY)
class Cached(nn.Module):
    "A cache made in the first pass."

    def __init__(self):
        super().__init__()
        self.factor = None

    def forward(self, x):
        if self.factor is None:
            self.factor = torch.full((), 1.5).to(x)
        return x * self.factor


@block(ANY)
class CachedBySize(nn.Module):
    "A cache that is made anew for another size of the batch."

    def __init__(self):
        super().__init__()
        self.made = {}

    def forward(self, x):
        if len(x) not in self.made:
            self.made[len(x)] = torch.ones(len(x), *[1] * (x.dim() - 1)).to(x) * 1.5
        return x * self.made[len(x)]


@block(ANY)
class Keeps(nn.Module):
    "Activations are kept in an attribute, with their graph."

    def __init__(self):
        super().__init__()
        self.features = None

    def forward(self, x):
        self.features = x
        return x * 1.1


@block(ANY)
class KeepsLate(nn.Module):
    "The attribute comes with the first pass."

    def forward(self, x):
        self.seen = {"last": [x.detach()]}
        return torch.sin(x)


@block(ANY)
class Logs(nn.Module):
    "A list that grows, also inside of another."

    def __init__(self):
        super().__init__()
        self.log = []
        self.nested = {"means": [[0.0]]}

    def forward(self, x):
        self.log.append(x.detach().mean())
        self.nested["means"][0].append(len(x))
        return x * 0.9


@block(ANY)
class Counts(nn.Module):
    "Counters: a number, and a buffer that is added to."

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        self.passes += 1
        return x.exp().log1p()


@block(ANY)
class Moves(nn.Module):
    "A running mean that moves in evaluation, too, and that nothing reads."

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return x.sigmoid() - 0.5


@block(ANY)
class Assigns(nn.Module):
    "The same by assignment: the buffer becomes another tensor."

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x.sigmoid() - 0.5


@block(ANY)
class Expanded(nn.Module):
    "Buffers that are views, empty, or no numbers."

    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.ones(1).expand(3, 3))
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x):
        return x * self.grid[0, 0]


@block(ANY)
class InPlace(nn.Module):
    "A result of its own, changed in place."

    def forward(self, x):
        x = x * 1.2
        x += 0.1
        return x.sub_(0.2)


@block(ANY)
class Clamps(nn.Module):
    "A parameter that every pass clamps, as weight clipping does."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        self.scale.data.clamp_(-1.5, 1.5)
        return x * self.scale


@block(ANY)
class Hidden(nn.Module):
    "A module in a list is not registered; nothing puts it in evaluation mode but its owner."

    def __init__(self):
        super().__init__()
        self.others = [Counts(), Keeps()]

    def forward(self, x):
        for other in self.others:
            x = other(x)
        return x


@block(ANY)
class Detached(nn.Module):
    "A parameter without influence on the gradient, and one that is never used."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.2))
        self.spare = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return x * self.scale.detach()


@block(ANY)
class Ringed(nn.Module):
    "It holds itself, and things that can't be copied."

    def __init__(self):
        super().__init__()
        self.me = [self]
        self.random = random.Random(0)
        self.generator = (i for i in range(10))

    def forward(self, x):
        self.last = next(self.generator, None)
        return x.atan()


@block(ANY)
class Extra(nn.Module):
    "State that is no tensor."

    def __init__(self):
        super().__init__()
        self.words = ["a"]

    def get_extra_state(self):
        return {"words": self.words}

    def set_extra_state(self, state):
        self.words = state["words"]

    def forward(self, x):
        return x * len(self.words)


@block(ANY)
class OwnMode(nn.Module):
    "A part that stays in evaluation mode, whatever it is told."

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout(0.5)

    def train(self, mode=True):
        super().train(mode)
        self.inner.eval()
        return self

    def forward(self, x):
        return self.inner(x)


class Meter:
    "No module, no tensor, no container: an object that counts."

    def __init__(self):
        self.sum = 0.0
        self.last = None


@block(ANY)
class Meters(nn.Module):
    def __init__(self):
        super().__init__()
        self.meter = Meter()
        self.array = np.zeros(2)
        self.queue = deque(maxlen=2)
        self.seen = Counter()
        self.sizes = set()

    def forward(self, x):
        self.meter.sum += float(x.detach().sum())
        self.meter.last = x
        self.array[0] += 1
        self.queue.append(x.detach())
        self.seen[len(x)] += 1
        self.sizes.add(len(x))
        return x * 0.9


@block(ANY)
class Bank(nn.Module):
    "A tensor that is no buffer, written in place."

    def __init__(self):
        super().__init__()
        self.bank = torch.zeros(3)

    def forward(self, x):
        self.bank[1] = x.detach().mean()
        return x * 1.1


@block(ANY)
class Shared(nn.Module):
    "A cache that belongs to the class."

    made = {}

    def forward(self, x):
        key = (tuple(x.shape[1:]), x.dtype)
        if key not in self.made:
            self.made[key] = torch.ones_like(x[:1]) * 1.2
        return x * self.made[key]


@block(ANY)
class Gradients(nn.Module):
    "Gradients are kept as they pass, as for Grad-CAM."

    def __init__(self):
        super().__init__()
        self.gradient = None
        self.inner = nn.Identity()
        self.inner.register_full_backward_hook(self.keep)

    def keep(self, module, before, after):
        self.latest = after[0]

    def see(self, gradient):
        self.gradient = gradient

    def forward(self, x):
        x = self.inner(x * 1.1)
        if x.requires_grad:
            x.register_hook(self.see)
            x.retain_grad()
        return x


@block(ANY)
class Locked(nn.Module):
    "Attributes can't be set, but for the mode."

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.1))
        self.locked = True

    def __setattr__(self, name, value):
        if name != "training" and self.__dict__.get("locked"):
            raise AttributeError(f"{name} is locked")
        super().__setattr__(name, value)

    def forward(self, x):
        return x * self.factor


@block(ANY)
class Unfreezes(nn.Module):
    "A pass that thaws a parameter and freezes another."

    def __init__(self):
        super().__init__()
        self.cold = nn.Parameter(torch.tensor(1.1), requires_grad=False)
        self.table = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x):
        out = x * self.cold.detach() + self.table[0]
        self.cold.requires_grad_(True)
        return out


@block(ANY)
class OneShot(nn.Module):
    "A hook that removes itself."

    def __init__(self):
        super().__init__()
        self.handle = self.register_forward_pre_hook(OneShot.once)

    @staticmethod
    def once(module, args):
        module.handle.remove()

    def forward(self, x):
        return x.view_as(x)


# blocks whose result for a sample depends on the rest of the batch
DEPENDENT = {}


@block(DEPENDENT)
class BatchMean(nn.Module):
    def forward(self, x):
        return x - 0.003 * x.mean(0, keepdim=True)


@block(DEPENDENT)
class NoStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)

    def forward(self, x):
        if x.dim() == 3:
            return self.norm(x.mT).mT
        return self.norm(x.flatten(2)).view(x.shape) if x.dim() > 3 else self.norm(x)


@block(DEPENDENT)
class BatchMaximum(nn.Module):
    def forward(self, x):
        return x / x.detach().abs().max()


@block(DEPENDENT)
class Neighbour(nn.Module):
    def forward(self, x):
        return x + 0.05 * x.roll(1, 0)


@block(DEPENDENT)
class Contrast(nn.Module):
    "Only batches of four or more are mixed."

    def forward(self, x):
        return x - 0.1 * x.mean(0, keepdim=True) if len(x) > 3 else x


# blocks for which nobody can say what is right; but the model stays as it was
UNSURE = {}


@block(UNSURE)
class Decays(nn.Module):
    "A parameter that every pass changes, and the pass reads."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        self.scale.data.mul_(0.9)
        return x * self.scale


@block(UNSURE)
class Starts(nn.Module):
    "Parameters that the first batch determines."

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.ready = False

    def forward(self, x):
        if not self.ready:
            self.shift.data = -x.detach().mean()
            self.ready = True
        return x + self.shift


@block(UNSURE)
class Stateful(nn.Module):
    "A state that goes on from batch to batch."

    def __init__(self):
        super().__init__()
        self.last = 1.0

    def forward(self, x):
        x = x * self.last
        self.last = 0.9 * self.last
        return x


@block(UNSURE)
class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.tensor(1 + 2j))

    def forward(self, x):
        return (x * self.turn.to(torch.complex128 if x.dtype == torch.float64 else None)).abs()


# blocks whose result is drawn
DRAWN = {}


@block(DRAWN)
class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


@block(DRAWN)
class AlwaysDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


OTHER = DEPENDENT | UNSURE | DRAWN


# ------------------------------------------------------------------------- edits of a made network
EDITS = {}


def edit(*kinds):
    "Enter a function that changes a module of certain kinds."

    def enter(change):
        EDITS[change.__name__] = (kinds, change)
        return change

    return enter


ANY_CONV = (nn.Conv1d, nn.Conv2d)
LAYERS = (nn.Linear, *ANY_CONV)
SCALED = (*LAYERS, nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


@edit(nn.Conv2d)
def no_padding(conv):
    if conv.padding == (1, 1) and conv.padding_mode == "zeros" and conv.kernel_size == (3, 3):
        conv.padding = (0, 0)


@edit(nn.Conv2d)
def more_padding(conv):
    if conv.padding_mode == "zeros" and conv.padding != "same":
        conv.padding = (2, 1)


@edit(nn.Conv2d)
def stride_of_two(conv):
    if conv.padding != "same":
        conv.stride = (2, 2)


@edit(nn.Conv2d)
def dilation_of_two(conv):
    if conv.kernel_size == (3, 3) and conv.padding_mode == "zeros":
        conv.dilation = (2, 2)
        conv.padding = (2, 2)


@edit(nn.Conv2d)
def circles(conv):
    conv.padding_mode = "circular"


@edit(nn.Linear)
def stale_out_features(linear):
    linear.out_features = 1000
    linear.in_features = 3


@edit(*ANY_CONV)
def stale_out_channels(conv):
    conv.out_channels = 999
    conv.in_channels = 5


@edit(nn.BatchNorm1d, nn.BatchNorm2d)
def stale_num_features(norm):
    norm.num_features = 77


@edit(nn.Conv2d)
def stale_kernel_size(conv):
    conv.kernel_size = (5, 5)


@edit(nn.BatchNorm2d, nn.BatchNorm1d, nn.GroupNorm, nn.LayerNorm)
def other_eps(norm):
    norm.eps = 0.3


@edit(nn.GroupNorm)
def other_groups(norm):
    norm.num_groups = 1


@edit(*LAYERS)
def masked_forward(layer):
    "As pruning codes do it: the forward of one instance."
    mask = torch.arange(layer.weight.numel()).view(layer.weight.shape) % 3 > 0

    def forward(self, input):
        if isinstance(self, nn.Linear):
            return F.linear(input, self.weight * mask, self.bias)
        return self._conv_forward(input, self.weight * mask, self.bias)

    layer.forward = types.MethodType(forward, layer)


@edit(*LAYERS)
def swapping_forward(layer):
    "A forward that puts another weight in the place of the parameter for a while."
    mask = torch.arange(layer.weight.numel()).view(layer.weight.shape) % 3 > 0
    call = type(layer).forward

    def forward(self, input):
        kept = self.weight
        del self._parameters["weight"]
        self.weight = kept * mask
        try:
            return call(self, input)
        finally:
            del self.weight
            self._parameters["weight"] = kept

    layer.forward = types.MethodType(forward, layer)


@edit(nn.Linear)
def masked_linear_forward(layer):
    mask = torch.arange(layer.weight.numel()).view(layer.weight.shape) % 3 > 0
    layer.forward = lambda input: F.linear(input, layer.weight * mask, layer.bias)


@edit(*LAYERS)
def doubled_forward(layer):
    call = type(layer).forward
    layer.forward = types.MethodType(lambda self, input: 2 * call(self, input), layer)


@edit(nn.Conv2d)
def inner_forward(conv):
    "What the forward of a convolution calls."
    call = conv._conv_forward
    conv._conv_forward = lambda x, weight, bias: call(x, weight * weight.abs(), bias)


@edit(*SCALED)
def subclassed(layer):
    "Another class for an instance that is made."
    base = type(layer)
    if base.__module__.startswith("torch.nn.modules"):
        layer.__class__ = type(
            "Other" + base.__name__,
            (base,),
            {
                "forward": lambda self, input: base.forward(self, input) * 1.5,
                "__module__": __name__,
            },
        )


@edit(*SCALED)
def hooked_output(layer):
    layer.register_forward_hook(lambda module, args, output: output * 1.5 + 0.1)


@edit(*SCALED)
def hooked_output_squared(layer):
    layer.register_forward_hook(lambda module, args, output: output + output.square() * 0.1)


@edit(*SCALED)
def hooked_input(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.7,) if args else None)


@edit(*LAYERS)
def hooked_weight(layer):
    "A hook that computes the weight before every pass."
    if "raw" in layer._parameters:
        return
    raw = nn.Parameter(layer.weight.detach().clone())
    del layer._parameters["weight"]
    layer.register_parameter("raw", raw)

    def renew(module, args):
        module.weight = module.raw * module.raw.abs().mean()

    layer.register_forward_pre_hook(renew)
    renew(layer, ())


@edit(*SCALED)
def watched(layer):
    "Hooks that only look."
    held = []
    layer.register_forward_hook(lambda module, args, output: held.append(output.detach()))
    if layer.weight.requires_grad:
        layer.weight.register_hook(lambda grad: None)
    layer.register_full_backward_hook(lambda module, before, after: None)


@edit(*SCALED)
def hooked_gradient(layer):
    "Gradients that come out of a layer are halved."
    layer.register_full_backward_hook(
        lambda module, before, after: tuple(None if g is None else g / 2 for g in before)
    )


@edit(*SCALED)
def hooked_parameter(layer):
    "The gradient of some weights is held at zero, as codes do that train a part of a layer."
    if layer.weight.requires_grad:
        layer.weight.register_hook(lambda g: g * (torch.arange(g.numel()).view(g.shape) % 2))


@edit(*SCALED)
def frozen(layer):
    layer.weight.requires_grad_(False)


@edit(*SCALED)
def frozen_bias(layer):
    if layer.bias is not None:
        layer.bias.requires_grad_(False)


@edit(*SCALED)
def with_gradient(layer):
    for p in layer.parameters(recurse=False):
        if p.requires_grad:
            p.grad = torch.ones_like(p)


@edit(*LAYERS)
def flattened(layer):
    "Parameters that are views of one vector, as wrappers lay them out."
    own = list(layer.parameters(recurse=False))
    if all(p.requires_grad for p in own):
        vector = nn.utils.parameters_to_vector(own).detach().clone()
        nn.utils.vector_to_parameters(vector, own)


@edit(*LAYERS)
def turned_weight(layer):
    "A weight that isn't contiguous."
    layer.weight.data = layer.weight.data.transpose(0, 1).contiguous().transpose(0, 1)


@edit(*SCALED)
def other_mode(layer):
    layer.train(not layer.training)


# ------------------------------------------------------------ what is around: torch itself changed
AROUND = {}


def around(make):
    AROUND[make.__name__] = contextmanager(make)
    return make


@around
def global_hook():
    def change(module, args, output):
        return output * 1.5 if isinstance(module, (nn.Conv2d, nn.Linear)) else None

    handle = nn.modules.module.register_module_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@around
def global_pre_hook():
    def change(module, args):
        return (args[0] * 0.8,) if args and isinstance(module, (nn.Conv2d, nn.Linear)) else None

    handle = nn.modules.module.register_module_forward_pre_hook(change)
    try:
        yield
    finally:
        handle.remove()


@around
def conv_class_changed():
    "The forward of torch's own class."
    yield from _replaced(nn.Conv2d, "forward", lambda call, self, x: 2 * call(self, x))


@around
def linear_class_changed():
    yield from _replaced(nn.Linear, "forward", lambda call, self, x: call(self, x) * 1.5)


@around
def inner_class_changed():
    yield from _replaced(
        nn.Conv2d,
        "_conv_forward",
        lambda call, self, x, weight, bias: call(self, x, weight * weight.abs(), bias),
    )


def _replaced(kind, name, forward):
    call = getattr(kind, name)
    setattr(kind, name, lambda self, *args, **named: forward(call, self, *args, *named.values()))
    try:
        yield
    finally:
        setattr(kind, name, call)


# ----------------------------------------------------- where the caller is when he asks for scores
CALLER = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "anomalies": torch.autograd.detect_anomaly,
    "on_cpu": lambda: torch.device("cpu"),
    "saved": torch.autograd.graph.save_on_cpu,
}


def caller(make):
    CALLER[make.__name__] = contextmanager(make)
    return make


@caller
def doubles():
    "Another default type."
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@caller
def sure():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@caller
def no_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --------------------------------------------------------------------- beginnings, necks and heads
class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(COLOURS, WIDTH, 3, padding=1)

    def forward(self, x):
        return torch.tanh(self.conv(x))


class Normalising(nn.Module):
    "It normalises what it is given in place, and so changes the user's batch."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(COLOURS, WIDTH, 3, padding=1)

    def forward(self, x):
        x.sub_(0.3).div_(0.7)
        return torch.tanh(self.conv(x))


class Shifted(nn.Module):
    "The same for vectors, by an operator."

    def forward(self, x):
        x += 0.5
        return x


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH, **options)

    def forward(self, x):
        return self.tokens(x)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(WORDS, WIDTH)

    def forward(self, x):
        return self.bag(x)


class Single(nn.Module):
    "One word a sample, whose index has no further dimension."

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH)

    def forward(self, x):
        return self.tokens(x)


STARTS = {
    "images": ("images", Stem),
    "images_in_place": ("images", Normalising),
    "vectors": ("vectors", nn.Identity),
    "vectors_in_place": ("vectors", Shifted),
    "series": ("series", nn.Identity),
    "tokens": ("series", Words),
    "tokens_padded": ("series", lambda: Words(padding_idx=0)),
    "tokens_bounded": ("series", lambda: Words(max_norm=1.0)),
    "tokens_sparse": ("series", lambda: Words(sparse=True)),
    "tokens_bag": ("vectors", Bag),
    "tokens_single": ("vectors", Single),
    "tokens_by_count": ("series", lambda: Words(scale_grad_by_freq=True)),
}


class ToSeries(nn.Module):
    "Patches of images become a series."

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 2).flatten(2).mT


class Mean(nn.Module):
    "From images or series to vectors."

    def forward(self, x):
        return x.flatten(2).mean(2) if x.dim() == 4 else x.mean(1)


class Squeeze(nn.Module):
    "A batch of one is a vector."

    def forward(self, x):
        return (F.adaptive_avg_pool2d(x, 1) if x.dim() == 4 else x.mean(1, keepdim=True)).squeeze()


class Largest(nn.Module):
    def forward(self, x):
        return x.flatten(2).amax(2) if x.dim() == 4 else x.amax(1)


class First(nn.Module):
    def forward(self, x):
        return x.flatten(2)[:, :, 0] if x.dim() == 4 else x[:, 0]


NECKS = {"mean": Mean, "squeeze": Squeeze, "largest": Largest, "first": First}


class TwoNames(nn.Module):
    "One module under two names, of which both are called or one."

    def __init__(self, classes, twice):
        super().__init__()
        self.n = nn.Linear(WIDTH, WIDTH)
        self.n2 = self.n
        self.head = nn.Linear(WIDTH, classes)
        self.twice = twice

    def forward(self, x):
        x = torch.tanh(self.n(x))
        return self.head(torch.tanh(self.n2(x)) if self.twice else x)


class SecondName(nn.Module):
    "Only the second name is called, from a parent of its own."

    def __init__(self, classes):
        super().__init__()
        self.outer = nn.ModuleDict({"shared": nn.Linear(WIDTH, WIDTH)})
        self.body = nn.Sequential(self.outer["shared"], nn.Tanh(), nn.Linear(WIDTH, classes))

    def forward(self, x):
        return self.body(x) + x.new_ones(())


class TiedHead(nn.Module):
    "The head's weight is used again, transposed."

    def __init__(self, classes):
        super().__init__()
        self.inner = nn.Linear(WIDTH, classes, bias=False)
        self.out = nn.Linear(classes, classes)

    def forward(self, x):
        return self.out(
            torch.tanh(
                F.linear(torch.tanh(self.inner(x)), self.inner.weight.mT) @ self.inner.weight.mT
            )
        )


class SameWeight(nn.Module):
    "A Parameter under two names of one module."

    def __init__(self, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, WIDTH))
        self.again = self.weight

    def forward(self, x):
        return F.linear(x, self.weight) + F.linear(x.square(), self.again)


class Lists(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.some = nn.ParameterList([nn.Parameter(torch.randn(classes, WIDTH)) for _ in range(2)])

    def forward(self, x):
        return x @ self.some[0].mT + x.square() @ self.some[1].mT


HEADS = {
    "linear": lambda c: nn.Linear(WIDTH, c),
    "mlp": lambda c: nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, c)),
    "two_names": lambda c: TwoNames(c, False),
    "two_names_called": lambda c: TwoNames(c, True),
    "second_name": SecondName,
    "tied": TiedHead,
    "same_weight": SameWeight,
    "lists": Lists,
    "no_bias": lambda c: nn.Linear(WIDTH, c, bias=False),
    "weight_norm": lambda c: nn.utils.weight_norm(nn.Linear(WIDTH, c)),
}


class Output:
    "As of transformers."

    def __init__(self, logits):
        self.logits = logits


class Net(nn.Module):
    "The parts one after the other, with an output of some kind."

    def __init__(self, parts, output):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.output = output

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        kinds = {"dict": {"logits": x}, "tuple": (x, x.detach()), "object": Output(x)}
        return kinds.get(self.output, x)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **options):
        return self.module(*args, **options)


ROOTS = ("sequential", "net", "wrapped", "parallel", "replaced", "graph", "dict", "tuple", "object")


# ----------------------------------------------------------------------------------------- recipes
@dataclass(frozen=True, repr=False)
class Recipe:
    "What a network is made of, what it is fed, and what is around it."

    start: str = "images"
    images: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    neck: str = "mean"
    head: str = "linear"
    root: str = "sequential"
    edits: tuple[tuple[str, int], ...] = ()  # an edit, and which of the modules it fits
    around: tuple[str, ...] = ()  # what is changed in torch
    caller: str = ""  # from where scores are asked for
    sizes: tuple[int, ...] = (5,)  # of the batches
    classes: int = 3
    double: bool = False
    layout: str = "plain"  # of the inputs
    ragged: bool = False  # is each batch of another length or size?
    carried: str = "pairs"  # how a batch comes
    labels: torch.dtype = torch.int64
    training: bool = False
    raises: int = 0  # the call in which the network fails; 0: none
    seed: int = 0

    def __repr__(self):
        "Only what isn't as it is by default, ready to be pasted."
        said = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"Recipe({', '.join(said)})"

    @property
    def blocks(self):
        return self.images + self.series + self.vectors

    @property
    def dependent(self):
        "Do the logits of a sample depend on its batch?"
        return any(b in DEPENDENT for b in self.blocks) and max(self.sizes) > 3

    @property
    def unsure(self):
        return any(b in UNSURE for b in self.blocks) or self.start == "tokens_by_count"

    @property
    def drawn(self):
        return any(b in DRAWN for b in self.blocks)


class Fails(nn.Module):
    "The n-th call fails; the count is kept in a function, outside of the network."

    def __init__(self, number):
        super().__init__()
        left = iter([False] * (number - 1) + [True])
        self.fails = lambda: next(left, False)

    def forward(self, x):
        if self.fails():
            raise Wanted("the network's own failure")
        return x


def fresh():
    "Forget what classes hold."
    Shared.made.clear()


def build(recipe):
    "The network of a recipe; the same each time."
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = _rooted(recipe, _parts(recipe))
        _edit(recipe, model)
    model.train(recipe.training)
    if recipe.double:
        model.double()
    if recipe.layout == "channels_last":
        model.to(memory_format=torch.channels_last)
    return model


def _parts(recipe):
    kind, start = STARTS[recipe.start]
    parts = [start()]
    if kind == "images":
        parts += [(IMAGES | ANY | OTHER)[b]() for b in recipe.images]
    if recipe.series and kind == "images":
        parts.append(ToSeries())
    if kind != "vectors":
        parts += [(SERIES | ANY | OTHER)[b]() for b in recipe.series]
        parts.append(NECKS[recipe.neck]())
    if recipe.raises:
        parts.append(Fails(recipe.raises))
    parts += [(VECTORS | ANY | OTHER)[b]() for b in recipe.vectors]
    return [*parts, HEADS[recipe.head](recipe.classes)]


def _rooted(recipe, parts):
    if recipe.root == "sequential":
        return nn.Sequential(*parts)
    if recipe.root == "wrapped":
        return Wrapper(nn.Sequential(*parts))
    if recipe.root == "parallel":
        return nn.DataParallel(Net(parts, "tensor"))
    if recipe.root == "replaced":
        model = nn.Sequential(*parts)
        model.forward = lambda x: nn.Sequential.forward(model, x) * 1.5
        return model
    if recipe.root == "graph":
        return _as_graph(nn.Sequential(*parts))
    return Net(parts, recipe.root)


def _as_graph(model):
    "What torch.fx makes of it, where it can."
    try:
        return fx.symbolic_trace(copy.deepcopy(model))
    except Exception:  # noqa: BLE001
        # whatever a forward pass says to symbols, or a copy to what can't be copied
        return model


def _edit(recipe, model):
    for name, which in recipe.edits:
        kinds, change = EDITS[name]
        found = [m for m in model.modules() if isinstance(m, kinds) and _plain(m)]
        if found:
            change(found[which % len(found)])


def _plain(module):
    "Can it be edited without a fault of our own?"
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def batches(recipe, more=0):
    "The data of a recipe: a list of (inputs, labels); other data for another number."
    generator = torch.Generator().manual_seed(recipe.seed + more)
    found = []
    for k, n in enumerate(recipe.sizes):
        shape = (n, *_shape(recipe, k * recipe.ragged))
        if recipe.start.startswith("tokens"):
            x = torch.randint(WORDS, shape, generator=generator)
        else:
            x = torch.randn(shape, generator=generator)
            x = x.double() if recipe.double else x
        y = torch.randint(recipe.classes, (n,), generator=generator)
        found.append((_laid_out(x, recipe.layout), y))
    return found


def _shape(recipe, more):
    "Of a sample, in a batch that is longer or larger by so much."
    if recipe.start == "tokens_single":
        return ()
    if recipe.start.startswith("tokens"):
        return (STEPS + more,)
    kind, _ = STARTS[recipe.start]
    return {
        "images": (COLOURS, SIDE + more, SIDE),
        "vectors": (WIDTH,),
        "series": (STEPS + more, WIDTH),
    }[kind]


def carried(recipe, data):
    "The batches as the user's loader yields them."
    data = [(x, y.to(recipe.labels)) for x, y in data]
    first, *_, last = (*recipe.sizes, recipe.sizes[-1])
    regular = set(recipe.sizes[:-1]) <= {first} and last <= first  # as a loader cuts them
    if recipe.carried == "loader" and regular and len({x.shape[1:] for x, _ in data}) == 1:
        whole = [torch.cat(parts).detach() for parts in zip(*data)]
        return DataLoader(TensorDataset(*whole), batch_size=recipe.sizes[0])
    kinds = {
        "lists": list,
        "triples": lambda b: (*b, torch.arange(len(b[1]))),
        "dicts": lambda b: {"inputs": b[0], "labels": b[1]},
        "numpy": lambda b: tuple(t.detach().numpy() for t in b),
    }
    return [kinds.get(recipe.carried, tuple)(b) for b in data]


CARRIERS = ("pairs", "lists", "loader", "triples", "dicts", "numpy")


LAYOUTS = ("plain", "channels_last", "strided", "expanded", "differentiable")


def _laid_out(x, layout):
    "The same numbers otherwise in memory; `expanded`: the same sample again and again."
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x.requires_grad_() if layout == "differentiable" and x.is_floating_point() else x


@contextmanager
def surroundings(recipe):
    "What a recipe changes in torch itself."
    with ExitStack() as stack:
        for name in recipe.around:
            stack.enter_context(AROUND[name]())
        yield


def _some(*tables, size=3):
    names = [name for table in tables for name in table]
    return st.lists(st.sampled_from(names), max_size=size).map(tuple)


@st.composite
def recipes(draw, **fixed):
    "Recipes, with some fields fixed or drawn otherwise; only the blocks that are used are drawn."
    start = draw(fixed.get("start", st.sampled_from(list(STARTS))))
    kind, _ = STARTS[start]
    odd = _some(DEPENDENT, UNSURE, DRAWN, size=1)
    sizes = st.lists(st.sampled_from([5, 1, 2, 3, 4, 8]), min_size=1, max_size=3)
    seldom = st.sampled_from([(65,), (64, 1), (70,)])
    drawn = {
        "start": st.just(start),
        "images": _some(IMAGES, ANY) if kind == "images" else st.just(()),
        "series": _some(SERIES, ANY, size=2) if kind != "vectors" else st.just(()),
        "vectors": st.one_of(*[_some(VECTORS, ANY, size=2)] * 8, odd),
        "neck": st.sampled_from(list(NECKS)),
        "head": st.sampled_from(list(HEADS)),
        "root": st.sampled_from([*ROOTS[:6] * 4, *ROOTS]),
        "edits": st.lists(
            st.tuples(st.sampled_from(list(EDITS)), st.integers(0, 3)), max_size=2
        ).map(tuple),
        "around": st.one_of(*[st.just(())] * 6, st.sampled_from(list(AROUND)).map(lambda a: (a,))),
        "caller": st.sampled_from([""] * 9 + list(CALLER)),
        "sizes": st.one_of(*[sizes.map(tuple)] * 6, seldom),
        "classes": st.integers(2, 4),
        "double": st.booleans(),
        "layout": st.sampled_from(LAYOUTS),
        "training": st.booleans(),
        "raises": st.sampled_from([0] * 9 + [1, 2, 3, 5]),
        "seed": st.integers(0, 99),
        "ragged": st.booleans(),
        "carried": st.sampled_from(["pairs"] * 5 + list(CARRIERS)),
        "labels": st.sampled_from([torch.int64] * 5 + [torch.int32, torch.uint8, torch.float32]),
    }
    recipe = draw(st.builds(Recipe, **drawn | fixed))
    if {"Teacher", "Added", "conv_relu_in_place"} & set(recipe.blocks):
        # torch itself refuses to change in place what a layer with backward hooks returns
        kept = [e for e in recipe.edits if e[0] not in ("watched", "hooked_gradient")]
        recipe = replace(recipe, edits=tuple(kept))
    if recipe.carried == "numpy":  # arrays are read in the default precision
        recipe = replace(recipe, double=False, caller="")
    if recipe.caller == "anomalies":  # which takes long
        recipe = replace(recipe, sizes=(5,))
    return replace(recipe, ragged=False) if "Queries" in recipe.series else recipe


def one_of_each():
    "A recipe for each kind by itself, so that none is left to chance."
    found = [Recipe(start=start) for start in STARTS]
    found += [Recipe(images=(b,)) for b in IMAGES | ANY | OTHER]
    found += [Recipe(start="tokens", series=(b,)) for b in SERIES | ANY]
    found += [Recipe(start="vectors", vectors=("linear_tanh", b)) for b in VECTORS | ANY | OTHER]
    found += [Recipe(neck=neck, sizes=sizes) for neck in NECKS for sizes in ((3, 1), (65,))]
    found += [Recipe(head=head) for head in HEADS]
    found += [Recipe(root=root, training=True) for root in ROOTS]
    found += [Recipe(images=("Residual",), around=(a,)) for a in AROUND]
    for name in CALLER:
        found += [
            Recipe(images=("Residual",), caller=name),
            Recipe(start="tokens", series=("attention_layer",), caller=name),
        ]
    for layout in LAYOUTS:
        found += [
            Recipe(images=("Residual",), layout=layout),
            Recipe(start="series", series=("Recurrent",), layout=layout),
        ]
    for name, (kinds, _) in EDITS.items():
        found += [Recipe(images=(b,), edits=((name, k),)) for b, kind, k in EDITED if kind in kinds]
    found += [Recipe(images=("Residual",), carried=c) for c in CARRIERS]
    found += [Recipe(labels=kind) for kind in (torch.int32, torch.uint8, torch.float32)]
    found += [
        Recipe(start="tokens", series=(b,), ragged=True, sizes=(2, 4))
        for b in ("Learned", "SometimesTwice", "linear_tanh", "Mingled")
    ]
    found += [
        Recipe(images=(b,), ragged=True, sizes=(2, 4)) for b in ("conv_tanh", "DynamicPadding")
    ]
    return found + [Recipe(raises=k) for k in range(1, 7)]


EDITED = (
    ("conv_relu_in_place", nn.Conv2d, 0),
    ("conv_tanh", nn.Conv2d, 1),
    ("ChannelsLast", nn.Linear, 0),
    ("batch_norm", nn.BatchNorm2d, 0),
    ("group_norm", nn.GroupNorm, 0),
    ("ChannelsLast", nn.LayerNorm, 0),
)


# ------------------------------------------------------------------ single layers of any geometry
class Over(nn.Module):
    "A layer, something smooth, the mean over all but the first two dimensions, and a classifier."

    def __init__(self, layer, width, classes=3):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = torch.tanh(self.layer(x))
        return self.head(x.flatten(2).square().mean(2) if x.dim() > 2 else x)


@st.composite
def convolutions(draw):
    "A convolution with all its options below a classifier, and images that are large enough."
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    inside = groups * draw(st.sampled_from([1, 2, 17, 40]))
    outside = groups * draw(st.integers(1, 3))
    kernel = draw(st.integers(1, 3))
    dilation = draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, 1, 2, "same"]))
    same = padding == "same"
    stride = 1 if same else draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    mode = "circular" if same and mode == "reflect" else mode
    border = dilation * (kernel - 1) // 2 + 1 if same else padding
    needed = dilation * (kernel - 1) + 1 - 2 * (0 if same else padding)
    size = max(draw(st.integers(1, 7)), needed, border + 1 if mode != "zeros" else 1)
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 99)))
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        layer = kind(
            inside, outside, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode
        )
        model = Over(layer, outside)
        x = torch.randn(draw(st.integers(1, 9)), inside, *[size + k for k in range(dims)])
    if dims == 2 and draw(st.booleans()):
        last = torch.channels_last
        return model.to(memory_format=last), x.contiguous(memory_format=last)
    return model, x


@st.composite
def other_layers(draw):
    "A linear layer or a norm on inputs of any shape, below a classifier."
    kind = draw(st.sampled_from(["linear", "batch", "group", "layer"]))
    middle = draw(st.lists(st.integers(1, 4), max_size=3))
    n = draw(st.integers(1, 9))
    bias = draw(st.booleans())
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 99)))
        if kind in ("linear", "layer"):
            layer = nn.Linear(5, 4, bias) if kind == "linear" else nn.LayerNorm([4], bias=bias)
            x = torch.randn(n, *middle, 5 if kind == "linear" else 4)
            head = nn.Linear(4 * math.prod(middle), 3)
            flat = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), head)
            return (flat if middle else Over(layer, 4)), x
        if kind == "group":
            return Over(nn.GroupNorm(2, 4), 4), torch.randn(n, 4, *middle, 2)
        layer = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(middle)](4)
        layer(torch.randn(9, 4, *middle) + 1)
        x = torch.randn(n, 4, *middle)
    last = len(middle) == 2 and draw(st.booleans())
    return Over(layer, 4), x.contiguous(memory_format=torch.channels_last) if last else x


@st.composite
def embeddings(draw):
    "Words that come again, below a classifier."
    row = st.lists(st.integers(0, 4), min_size=6, max_size=6)
    words = torch.tensor(draw(st.lists(row, min_size=1, max_size=8)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, padding_idx=draw(st.sampled_from([None, 0, 3])))
        return nn.Sequential(table, nn.Flatten(), nn.Tanh(), nn.Linear(18, 3)), words
