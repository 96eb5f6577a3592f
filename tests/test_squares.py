"""The sums of squared per-sample gradients: rules and paths against autograd, one sample at a
time."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import foreign
import torchvision
from fisher_unlearn.scores import fused, squares
from fisher_unlearn.scores.fisher import diag_fisher
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.scores.squares import RULES, gradient_paths
from foreign import Recipe, batches, build


def one_at_a_time(model, inputs, labels):
    "Σᵢ (∂ log p(yᵢ)/∂w)² in double precision, by backward() on one sample after the other."
    model = copy.deepcopy(model).double().eval()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    for x, y in zip(inputs, labels):
        model.zero_grad()
        one = x[
            None
            # torch 2.14 has wrong float64 gradients of grouped convolutions for some strides of a
            # batch
            # of one
        ].contiguous()
        z = model(one.double() if x.is_floating_point() else one)[0]
        (torch.logsumexp(z, 0) - z[y]).backward()
        for n, p in model.named_parameters():
            if p.requires_grad and p.grad is not None:
                total[n] += p.grad**2
    return total


def largest_difference(a, b):
    "No number if one isn't."
    assert set(a) == set(b)
    errors = [(a[n].double() - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-300) for n in b]
    return torch.stack(errors).max().item()


def agree(model, inputs, classes, tol=1e-10, float32=1e-3):
    "In double and in single precision; returns the paths."
    labels = torch.arange(len(inputs)) % classes
    wanted = one_at_a_time(model, inputs, labels)
    double = copy.deepcopy(model).double()
    assert (
        largest_difference(
            diag_fisher(
                double, [(inputs.double() if inputs.is_floating_point() else inputs, labels)]
            ),
            wanted,
        )
        <= tol
    )
    assert largest_difference(diag_fisher(model, [(inputs, labels)]), wanted) <= float32
    return gradient_paths(model, inputs)


@given(foreign.convolutions(), st.booleans())
@settings(max_examples=120)
def test_convolutions_of_any_geometry(drawn, loop):
    model, x = drawn
    with pytest.MonkeyPatch.context() as patch:
        if not loop:
            patch.setattr(squares, "_loop_fits", lambda *_: False)
        assert set(agree(model, x, 3).values()) == {"rule"}


@pytest.mark.parametrize(
    "layer, shape, fits",
    [
        (nn.Conv2d(16, 16, 3), (16, 6, 6), True),
        (nn.Conv2d(3, 16, 3), (3, 5, 5), True),
        (nn.Conv1d(20, 6, 1, stride=2), (20, 5), True),
        (nn.Conv3d(3, 16, 2), (3, 4, 4, 4), True),
        (nn.Linear(7, 5), (6, 7), True),
        (nn.Conv2d(16, 16, 3), (16, 3, 3), False),
        (nn.Conv2d(32, 64, 3, groups=2), (32, 8, 8), False),
        (nn.Linear(7, 5), (7,), False),
        (nn.Linear(7, 5).bfloat16(), (6, 7), False),
    ],
)
def test_squares_are_added_up_in_registers_where_there_is_a_loop_for_them(
    monkeypatch, layer, shape, fits
):
    "Not for one position, for groups of channels, nor in half precision."
    taken, loop = [], fused.squared_products
    monkeypatch.setattr(
        fused, "squared_products", lambda *given: taken.append(True) or loop(*given)
    )
    x = torch.randn(5, *shape).to(layer.weight.dtype)
    found = RULES[type(layer)]["weight"](layer, x, [torch.randn_like(layer(x)) for _ in range(2)])
    assert len(taken) == fits and found.shape == layer.weight.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(5, 5, 3, stride=2, padding=1, dilation=2, groups=5), (5, 9, 8)),
        (nn.Conv2d(37, 37, 7, padding=3, groups=37), (37, 6, 7)),
        (nn.Conv2d(16, 16, (5, 2), padding="valid", groups=16), (16, 5, 2)),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", groups=8), (8, 4, 4)),
        (nn.Conv1d(20, 20, 11, padding=5, groups=20), (20, 1)),
        (nn.Conv3d(3, 3, 2, groups=3), (3, 3, 4, 2)),
    ],
    ids=repr,
)
def test_depthwise_convolutions_are_summed_channel_by_channel(monkeypatch, layer, shape, dtype):
    "Two directions, images in both layouts, against one sample at a time."
    layer, taken, loop = copy.deepcopy(layer).to(dtype), [], fused.squares_by_channel
    monkeypatch.setattr(
        fused, "squares_by_channel", lambda *given: taken.append(True) or loop(*given)
    )
    x = torch.randn(5, *shape, dtype=dtype)
    gs = [torch.randn_like(layer(x)) for _ in range(2)]
    exact = copy.deepcopy(layer).double()
    wanted = sum(
        torch.autograd.grad(
            exact(x[i : i + 1].double().contiguous()), exact.weight, g[i : i + 1].double()
        )[0].square()
        for g in gs
        for i in range(5)
    )
    for images in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        found = RULES[type(layer)]["weight"](layer, images, gs)
        error = (found - wanted).abs().max() / wanted.max()
        assert error < (1e-12 if dtype == torch.float64 else 1e-5)
    assert len(taken) == 4


@pytest.mark.parametrize(
    "layer, shape, last, fits",
    [
        (nn.BatchNorm2d(20), (20, 5, 4), True, True),
        (nn.BatchNorm2d(20), (20, 5, 4), False, False),
        (nn.BatchNorm1d(20), (20,), False, False),
        (nn.BatchNorm2d(20).double(), (20, 3, 3), True, True),
        (nn.GroupNorm(2, 20), (20, 5, 4), True, False),
    ],
)
def test_the_scale_of_batchnorm_is_summed_in_one_reading_where_channels_are_last(
    monkeypatch, layer, shape, last, fits
):
    """As by the definition, sample by sample; with a mean far from zero and slopes that are not
    laid out so."""
    taken, loop = [], fused.summed_products
    monkeypatch.setattr(fused, "summed_products", lambda *given: taken.append(True) or loop(*given))
    x, gs = (torch.randn(n, 7, *shape, dtype=layer.weight.dtype) for n in (1, 2))
    x = x[0] * 3 + 50
    layer(x)
    layer.eval()
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    wanted = sum(
        torch.autograd.grad(layer(x[i : i + 1]), layer.weight, g[i : i + 1])[0].double().square()
        for g in gs
        for i in range(7)
    )
    found = RULES[type(layer)]["weight"](layer, x, list(gs))
    assert len(taken) == 2 * fits and found.dtype == layer.weight.dtype
    assert (found - wanted).abs().max() < (
        1e-12 if found.dtype == torch.float64 else 1e-4
    ) * wanted.max()


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(5, 7, 3, padding=1), (5, 6, 5)),
        (nn.Linear(11, 3), (13, 11)),
        (nn.BatchNorm2d(1).eval(), (1, 6, 5)),
    ],
)
def test_a_default_device_is_not_where_the_loop_reads(layer, shape):
    "Addresses of another device's memory would crash the process."
    x, rule = torch.randn(4, *shape), RULES[type(layer)]["weight"]
    g = torch.randn_like(layer(x))
    with torch.device("meta"):
        found = rule(layer, x, [g])
    assert torch.equal(found, rule(layer, x, [g]))


@given(foreign.other_layers())
@settings(max_examples=100)
def test_other_rules_on_any_shape(drawn):
    assert set(agree(*drawn, 3).values()) == {"rule"}


@given(foreign.embeddings())
def test_embeddings_whose_rows_repeat(drawn):
    assert set(agree(*drawn, 3).values()) == {"rule"}


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("entries", [1, 300, 20_000])
def test_chunks_of_any_size_give_the_same(monkeypatch, entries, loop):
    "One sample and one row at a time, and everything between."
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    ).eval()
    x = torch.randn(11, 2, 8, 8)
    monkeypatch.setattr(squares, "_budget", lambda tensor: entries)
    monkeypatch.setattr(fused, "_NEAR", 8 * entries)
    monkeypatch.setattr(fused, "_NEAREST", entries)
    if not loop:
        monkeypatch.setattr(squares, "_loop_fits", lambda *_: False)
    monkeypatch.setattr(squares, "_SAMPLES", 4)
    agree(model, x, 3)


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 2, 2), (3, 5, 3, 4)])
def test_expanded_and_direct_products_are_the_same(monkeypatch, pays, shape):
    monkeypatch.setattr(squares, "_loop_fits", lambda *_: False)
    monkeypatch.setattr(squares, "_expansion_pays", lambda *_: pays)
    agree(foreign.Over(nn.Conv2d(5, 4, 3, padding=1), 4), torch.randn(shape), 3)
    agree(
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)),
        torch.randn(3, 6, 5),
        3,
    )


def test_squares_are_never_negative(monkeypatch):
    """Two positions that cancel: the expanded products add up to 0 and a rounding error of
    either sign."""
    monkeypatch.setattr(squares, "_loop_fits", lambda *_: False)
    monkeypatch.setattr(squares, "_expansion_pays", lambda *_: True)
    x, g = torch.randn(64, 1, 8).repeat(1, 2, 1), torch.randn(64, 1, 8)
    found = squares._linear(nn.Linear(8, 8), x, [torch.cat([g, -g * (1 + 1e-6)], 1)])
    assert (found >= 0).all() and found.max() < 1e-3


class Transformer(nn.Module):
    """Tokens, positions outside of any module, an encoder that may keep the sequence first, and
    a head."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first, self.tokens, self.positions = (
            batch_first,
            nn.Embedding(11, 8),
            nn.Parameter(torch.randn(4, 8)),
        )
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.encoder, self.head = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.tokens(x) + self.positions
        return self.head(
            (
                self.encoder(x)
                if self.batch_first
                else self.encoder(x.transpose(0, 1)).transpose(0, 1)
            ).mean(1)
        )


class Looked(nn.Module):
    "Adds rows of a table that are the same for all samples: one twice, one counted from the end."

    def __init__(self, padding=None, function=False, scaled=False):
        super().__init__()
        self.table = nn.Embedding(7, 6, padding_idx=padding, scale_grad_by_freq=scaled)
        self.head, self.function = nn.Linear(24, 3), function
        self.index = torch.tensor([[0, 2, 2, 5]])

    def forward(self, x):
        rows = self.table.weight[self.index - 3] if self.function else self.table(self.index)
        return self.head((x + rows).tanh().flatten(1))


@pytest.mark.parametrize("padding, function", [(None, False), (2, False), (0, False), (None, True)])
def test_rows_that_all_samples_look_up(padding, function):
    model = Looked(padding, function)
    nn.init.normal_(model.table.weight)
    paths = agree(model, torch.randn(5, 4, 6), 3)
    assert paths["table.weight"] == "rule"


def test_rows_whose_slopes_are_divided_by_their_count():
    agree(Looked(scaled=True), torch.randn(5, 4, 6), 3)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "n", [4, 5]
)  # 4 is also the length of the sequence: shapes alone of one batch would not tell
def test_a_transformer_encoder(batch_first, n):
    paths = agree(Transformer(batch_first).eval(), torch.randint(11, (n, 4)), 3)
    assert set(paths.values()) == {"rule"}


def test_a_vision_transformer():
    model = torchvision.models.VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
        num_classes=3,
    )
    nn.init.normal_(model.heads.head.weight)  # torchvision starts with zeros
    paths = agree(model.eval(), torch.randn(3, 3, 8, 8), 3)
    assert set(paths.values()) == {"rule"}


def test_mobilenet_v3():
    model = torchvision.models.mobilenet_v3_small(num_classes=3)
    for _ in range(20):
        model(torch.randn(8, 3, 32, 32))  # statistics that keep the signal alive
    assert set(agree(model.eval(), torch.randn(2, 3, 32, 32), 3, tol=1e-9).values()) == {"rule"}


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "googlenet", "densenet"])
def test_every_parameter_of_the_papers_networks_has_a_rule(name):
    assert set(
        gradient_paths(build_model(name, 10, 3, seed=0), torch.randn(2, 3, 32, 32)).values()
    ) == {"rule"}


class Ties(nn.Module):
    "An embedding whose weight is also the output layer's, and an inner layer that is called twice."

    def __init__(self):
        super().__init__()
        self.tokens, self.inner = nn.Embedding(6, 5), nn.Linear(5, 5)
        self.out = nn.Linear(5, 6)
        self.out.weight = self.tokens.weight

    def forward(self, x):
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(self.tokens(x))))).mean(1))


def test_tied_weights_and_repeated_calls():
    paths = agree(Ties(), torch.randint(6, (5, 4)), 6)
    assert paths == {
        "tokens.weight": "rule",
        "inner.weight": "rule",
        "inner.bias": "rule",
        "out.bias": "rule",
    }


class Checkpointed(nn.Module):
    """Activation checkpointing that hides its parameters from the graph, behind a layer that
    does not."""

    def __init__(self, hides):
        super().__init__()
        self.hides, self.first, self.inner, self.head = (
            hides,
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        return self.head(
            checkpoint(lambda x: torch.tanh(self.inner(x)), self.first(x), use_reentrant=self.hides)
        )


@pytest.mark.parametrize(
    "recipe, wanted",
    [
        (Recipe(images=("CalledAndRead",)), {"1.conv.weight": "rule", "1.conv.bias": "rule"}),
        (Recipe(images=("SharedTwice",)), {"1.conv.weight": "rule", "1.conv.bias": "rule"}),
        (Recipe(images=("TiedConvs",)), {"1.a.weight": "rule", "1.b.bias": "rule"}),
        (Recipe(images=("Standardised",)), {"1.weight": "rule"}),
        (Recipe(images=("Checkpointed",)), {"1.conv.weight": "rule"}),
        (Recipe(images=("conv_weight_norm",)), {"1.0.bias": "rule", "0.conv.weight": "rule"}),
        (Recipe(images=("prelu",)), {"1.weight": "rule", "0.conv.weight": "rule"}),
        (
            Recipe(images=("conv_transposed", "instance_norm")),
            {"1.0.weight": "rule", "2.bias": "vmap"},
        ),
        (Recipe(images=("conv_tanh",), edits=(("masked_forward", 1),)), {"1.0.weight": "rule"}),
        (Recipe(images=("conv_tanh",), edits=(("no_padding", 1),)), {"1.0.weight": "rule"}),
        (
            Recipe(start="series", series=("Folded",)),
            {"1.linear.weight": "rule", "3.weight": "rule"},
        ),
        (Recipe(start="series", series=("Mingled",)), {"1.linear.weight": "vmap"}),
        (Recipe(start="series", series=("Recurrent",)), {"1.rnn.weight_hh_l0": "vmap"}),
        (
            Recipe(start="tokens", series=("SequenceFirst",)),
            {
                "0.tokens.weight": "rule",
                "1.layer.linear1.weight": "rule",
                "1.layer.norm2.bias": "rule",
            },
        ),
        (
            Recipe(start="tokens", series=("attention_layer",)),
            {
                "1.self_attn.in_proj_weight": "rule",
                "1.linear1.weight": "rule",
                "1.norm2.bias": "rule",
            },
        ),
        (Recipe(start="vectors", vectors=("Branch",)), {"1.a.weight": "loop", "2.weight": "rule"}),
        (
            Recipe(start="vectors", vectors=("Scaled", "Keyword")),
            {"1.scale": "rule", "2.linear.weight": "rule"},
        ),
        (Recipe(images=("Detached",)), {"1.scale": "unused", "1.spare": "unused"}),
    ],
    ids=repr,
)
def test_the_path_of_each_parameter(recipe, wanted):
    "That the scores are right in each is shown in test_foreign."
    paths = gradient_paths(build(recipe), batches(recipe)[0][0])
    assert wanted.items() <= paths.items() and paths[list(paths)[-1]] == "rule"


def test_hidden_parameters_are_not_taken_for_unused():
    """A Python function in the graph hides what it reads, so those parameters are differentiated
    and not skipped."""
    model, x = Checkpointed(True).double(), torch.randn(5, 4).double()
    labels = torch.arange(5) % 3
    plain = copy.deepcopy(model)
    plain.hides = False
    wanted = one_at_a_time(plain, x, labels)
    try:
        found = diag_fisher(model, [(x, labels)])
    except RuntimeError as error:
        assert "heckpoint" in str(error)
    else:
        assert largest_difference(found, wanted) < 1e-10


def test_unused_parameters_are_zero():
    model = nn.Sequential(nn.Linear(4, 3))
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[0](x)
    assert gradient_paths(model, torch.randn(2, 4)) == {
        "0.weight": "rule",
        "0.bias": "rule",
        "spare.weight": "unused",
        "spare.bias": "unused",
    }
    found = diag_fisher(model, [(torch.randn(5, 4), torch.arange(5) % 3)])
    assert not found["spare.weight"].any() and found["0.weight"].all()


def test_hooks_of_the_user_count_and_stay():
    "A hook that changes an output is part of the model."
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    hooks = [len(m._forward_hooks) for m in model.modules()]
    assert set(agree(model, torch.randn(5, 4), 3).values()) == {"rule"}
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_inputs_that_are_changed_in_place_are_not_trusted():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.head = (
                nn.Linear(4, 4),
                nn.LayerNorm(4, bias=False),
                nn.Linear(4, 3),
            )
            self.norm.weight.requires_grad_(False)

        def forward(self, x):
            x = torch.tanh(self.first(x)) * 1
            out = self.head(x)
            x += 1
            return out

    model, x = Changes(), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="inplace"):
        model(x).sum().backward()
    with pytest.raises(RuntimeError):
        diag_fisher(model, [(x, torch.arange(5) % 3)])


def test_frozen_parts_cost_nothing_and_change_nothing():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    for p in model[0].parameters():
        p.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    assert agree(model, torch.randn(5, 1, 6, 6), 3) == {
        "1.weight": "rule",
        "1.bias": "rule",
        "4.bias": "rule",
    }


def test_an_inplace_activation_right_after_the_first_layer():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    assert set(agree(model, torch.randn(5, 1, 6, 6), 3).values()) == {"rule"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rough_but_right(dtype):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x, labels = torch.randn(8, 1, 6, 6), torch.arange(8) % 3
    wanted = one_at_a_time(model, x, labels)
    found = diag_fisher(copy.deepcopy(model).to(dtype), [(x.to(dtype), labels)])
    assert all(f.dtype == torch.float32 for f in found.values())  # in which nothing overflows
    assert largest_difference(found, wanted) < 0.1


def test_a_rule_names_only_parameters_that_its_module_has():
    samples = {
        nn.Linear: nn.Linear(2, 2),
        nn.Embedding: nn.Embedding(2, 2),
        nn.GroupNorm: nn.GroupNorm(1, 2),
        nn.LayerNorm: nn.LayerNorm(2),
    }
    samples |= {kind: kind(2) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)} | {
        kind: kind(2, 2, 1) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    }
    assert {kind: set(rules) for kind, rules in RULES.items()} == {
        kind: {n for n, _ in m.named_parameters()} for kind, m in samples.items()
    }


@pytest.mark.slow
def test_many_small_numbers_add_up():
    """Single precision over many samples stays close to double: 50,000 samples, in batches of
    one and of many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(50_000, 5), torch.randint(3, (50_000,))
    wanted = diag_fisher(copy.deepcopy(model).double(), [(x.double(), y)])
    for size in (7, 128, 50_000):
        assert (
            largest_difference(diag_fisher(model, list(zip(x.split(size), y.split(size)))), wanted)
            < 1e-5
        )


def test_torch_func_agrees_on_resnet20():
    model = build_model("resnet20", 10, 3, seed=0).eval()
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6)

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(
            torch.func.functional_call(model, parameters, (x[None],)), y[None]
        )

    slopes = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(
        {n: p.detach() for n, p in model.named_parameters()}, x, y
    )
    assert (
        largest_difference(
            diag_fisher(model, [(x, y)]), {n: g.double().square().sum(0) for n, g in slopes.items()}
        )
        < 2e-4
    )


def test_backpack_agrees_on_resnet20():
    import backpack  # here, since it warns while it is imported
    from backpack import extensions

    model = build_model("resnet20", 10, 3, seed=0).eval()
    for m in model.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6)
    found = diag_fisher(model, [(x, y)])
    extended, loss = (
        backpack.extend(copy.deepcopy(model), use_converter=True),
        backpack.extend(nn.CrossEntropyLoss(reduction="sum")),
    )
    with backpack.backpack(extensions.SumGradSquared()):
        loss(extended(x), y).backward()
    theirs = [p.sum_grad_squared for p in extended.parameters()]
    assert Counter(p.shape for p in theirs) == Counter(f.shape for f in found.values())
    for f, t in zip(found.values(), theirs):
        assert (f - t).abs().max() <= 2e-4 * t.abs().max()
