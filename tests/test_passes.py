"""What networks compute for a sample of a batch: dependence, batches of one, ways to the
squares."""

import pytest
import torch
from torch import nn

from fisher_unlearn.scores.fisher import diag_fisher
from fisher_unlearn.networks.guard import untouched
from fisher_unlearn.scores import passes, squares
from fisher_unlearn.scores.passes import Passes, check_independent
from fisher_unlearn.scores.squares import gradient_paths


def in_batch(model, inputs, labels):
    "Σᵢ (∂ log p(yᵢ)/∂w)² by autograd through one batch, in the network's own precision."
    model.eval()
    with torch.enable_grad():
        logits = model(inputs.clone())
    free = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in free.items()}
    for row, label in zip(logits, labels):
        loss = row.logsumexp(0) - row[label]
        slopes = torch.autograd.grad(
            loss, list(free.values()), retain_graph=True, allow_unused=True
        )
        for name, g in zip(total, slopes):
            if g is not None:
                total[name] += g.double().square()
    return total


def off(found, wanted):
    "The largest relative error; no number if one isn't."
    errors = [
        (found[n].double() - w).abs().max() / w.abs().max().clamp_min(1e-30)
        for n, w in wanted.items()
    ]
    return torch.stack(errors).max().item()


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Twice(nn.Module):
    "The same module under two names."

    def __init__(self):
        super().__init__()
        self.n = small()
        self.n2 = self.n
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.n(x) * self.scale + 0.1 * self.n2(x.flip(-1))


def test_aliases_keep_their_parameters_and_have_right_scores_in_each_batch():
    model, x, y = Twice(), torch.randn(8, 3, 9, 9), torch.arange(8) % 5
    before = {n: p for n, p in model.named_parameters(remove_duplicate=False)}
    found = diag_fisher(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert all(
        p is before[n] and p.requires_grad
        for n, p in model.named_parameters(remove_duplicate=False)
    )
    assert off(found, in_batch(model, x, y)) < 1e-3


def edited_padding(model):
    model[2].padding = (0, 0)


def masked_forward(model):
    mask = (torch.rand_like(model[2].weight) > 0.5).float()
    model[2].forward = lambda x: nn.functional.conv2d(
        x, model[2].weight * mask, model[2].bias, padding=1
    )


def doubled(model):
    forward = model[6].forward
    model[6].forward = lambda x: 2 * forward(x)


def inner(model):
    forward = model[0]._conv_forward
    model[0]._conv_forward = lambda x, weight, bias: 3 * forward(x, weight, bias)


def stale(model):
    model[6].out_features = model[0].out_channels = 99
    model[2].kernel_size = (5, 5)


@pytest.mark.parametrize("edit", [edited_padding, masked_forward, doubled, inner, stale])
def test_what_forward_computes_counts_and_not_what_the_constructor_said(edit):
    model, x, y = small(), torch.randn(8, 3, 9, 9), torch.arange(8) % 5
    edit(model)
    found = diag_fisher(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert off(found, in_batch(model, x, y)) < 1e-3


@pytest.mark.parametrize("place", ["class", "everywhere"])
def test_a_forward_replaced_in_torchs_class_or_a_global_hook(monkeypatch, place):
    model, x, y = small(), torch.randn(6, 3, 9, 9), torch.arange(6) % 5
    forward = nn.Linear.forward
    if place == "class":
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
        hook = None
    else:
        hook = nn.modules.module.register_module_forward_hook(
            lambda m, args, out: 3 * out if isinstance(m, nn.Conv2d) else None
        )
    try:
        assert off(diag_fisher(model, [(x, y)]), in_batch(model, x, y)) < 1e-3
    finally:
        if hook:
            hook.remove()


def test_hooks_on_gradients_count():
    model, x, y = small(), torch.randn(6, 3, 9, 9), torch.arange(6) % 5
    model[0].weight.register_hook(lambda g: g * (torch.arange(8).view(-1, 1, 1, 1) > 3))
    model[4].register_full_backward_hook(lambda m, into, out: (2 * into[0],))
    found = diag_fisher(model, [(x, y)])
    assert not found["0.weight"][:4].any() and found["0.weight"][4:].any()
    assert off(found, in_batch(model, x, y)) < 1e-3


class Squeezed(nn.Module):
    "What follows the squeeze is another thing for a batch of one."

    def __init__(self):
        super().__init__()
        self.features, self.scale, self.head = (
            small()[:5],
            nn.Parameter(torch.ones(8)),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        return self.head((self.features(x).squeeze() * self.scale).softmax(-1) * 8)


@pytest.mark.parametrize("n", [5, 65, 66])
def test_networks_that_squeeze(n):
    model, x, y = Squeezed(), torch.randn(n, 3, 6, 6), torch.arange(n) % 5
    assert off(diag_fisher(model, [(x, y)]), in_batch(model, x, y)) < 1e-3


def test_a_last_batch_of_one_is_fed_twice():
    model, x, y = Squeezed(), torch.randn(5, 3, 6, 6), torch.arange(5) % 5
    found = diag_fisher(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert off(found, in_batch(model, x, y)) < 1e-3


class Mixed(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.first, self.last, self.share = nn.Linear(6, 6), nn.Linear(6, 5), share

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.tanh(x + self.share * x.mean(0, keepdim=True)))


@pytest.mark.parametrize("share", [1e-3, 0.01, 1.0])
@pytest.mark.parametrize(
    "x", [torch.randn(9, 6), torch.randn(1, 6).repeat(3, 1), torch.randn(1, 6)], ids=len
)
def test_a_small_dependence_on_the_batch_is_refused(share, x):
    y = torch.zeros(len(x), dtype=torch.long)
    with pytest.raises(ValueError, match="depend on the other samples"):
        diag_fisher(Mixed(share), [(x, y)])


@pytest.mark.parametrize("x", [torch.randn(1, 6), torch.randn(1, 6).repeat(3, 1)], ids=len)
def test_batchnorm_without_statistics_is_refused_whatever_the_first_batch_holds(x):
    model = nn.Sequential(
        nn.Conv1d(1, 4, 1),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    with pytest.raises(ValueError, match="depend on the other samples"):
        diag_fisher(model, [(x[:, None], torch.zeros(len(x), dtype=torch.long))])


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_logits_that_are_drawn_are_refused_and_the_generator_stays(per):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    model, x = Noisy(6, 5), torch.ones(4, 6)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="drawn at random"):
        diag_fisher(model, [(x, torch.arange(4))], per=per)
    assert torch.equal(state, torch.get_rng_state())


def test_few_logits_that_are_drawn_twice_in_a_row_are_found_all_the_same():
    "Two passes of this network agree in one case of 256."
    torch.manual_seed(0)
    found, rows = Passes(nn.Sequential(nn.Linear(3, 2), nn.Dropout())), torch.randn(4, 3)
    for seed in range(1000):
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match="drawn at random"):
            passes.check_repeats(found, rows)


class Counting(nn.Module):
    "Counts its passes and caches, so that no pass is like the one before."

    def __init__(self):
        super().__init__()
        self.layer, self.passes, self.kept = nn.Linear(6, 5), 0, None
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x):
        self.passes += 1
        self.kept = torch.ones(1) if self.kept is None else self.kept
        x -= 0.5
        return self.layer(x) * self.gain * self.passes * self.kept


def test_each_pass_starts_from_the_same_state_with_inputs_of_its_own():
    model, x, y = Counting(), torch.randn(70, 6), torch.arange(70) % 5
    given = x.clone()
    found = diag_fisher(model, list(zip(x.split(9), y.split(9))))
    assert torch.equal(x, given) and model.passes == 0 and model.kept is None
    assert off(found, in_batch(model, x, y)) < 1e-3


def test_single_indices_go_into_an_embedding():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Tanh(), nn.Linear(6, 5))
    x, y = torch.randint(7, (9,)), torch.arange(9) % 5
    assert off(diag_fisher(model, [(x, y)]), in_batch(model, x, y)) < 1e-3
    assert set(gradient_paths(model, x).values()) == {"rule"}


def test_expanded_buffers():
    model = small()
    model.register_buffer("wide", torch.zeros(3, 1).expand(3, 4))
    x, y = torch.randn(6, 3, 9, 9), torch.arange(6) % 5
    assert off(diag_fisher(model, [(x, y)]), in_batch(model, x, y)) < 1e-3


def test_complex_weights_are_refused():
    model = nn.Linear(6, 5)
    model.turn = nn.Parameter(torch.tensor(1 + 2j))
    with pytest.raises(ValueError, match="`turn` is complex"):
        diag_fisher(model, [(torch.randn(4, 6), torch.arange(4))])


def test_in_the_users_inference_mode():
    model, x, y = small(), torch.randn(6, 3, 9, 9), torch.arange(6) % 5
    wanted = in_batch(model, x, y)
    with torch.inference_mode():
        found = diag_fisher(model, [(x.clone(), y.clone())])
    assert off(found, wanted) < 1e-3


def test_an_output_that_is_changed_in_place_and_one_that_is_dropped():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x):
            x = torch.tanh(self.first(x))
            self.linear(x + 1)
            out = self.linear(x)
            out += x
            return self.head(out.mean(1))

    model, x, y = Teacher(), torch.randn(6, 3, 6), torch.arange(6) % 5
    assert off(diag_fisher(model, [(x, y)]), in_batch(model, x, y)) < 1e-3


def test_the_check_leaves_no_trace():
    model, rows = Twice(), torch.randn(4, 3, 9, 9)
    with untouched(model, "eval") as before:
        check_independent(Passes(model, before), rows)
        assert not before.put_model_back()


NAN = lambda found: torch.full_like(found, torch.nan)


@pytest.mark.parametrize("spoil", [NAN, torch.zeros_like, lambda found: 1.01 * found])
@pytest.mark.parametrize("name", ["0.weight", "6.bias"])
def test_a_way_that_is_wrong_for_one_parameter_is_not_taken(monkeypatch, name, spoil):
    first, copies = passes.WAYS[0]

    def wrong(*given):
        found = first(*given)
        return found | {name: spoil(found[name])}

    monkeypatch.setattr(passes, "WAYS", ((wrong, copies), *passes.WAYS[1:]))
    model = small().eval()
    found = passes.find_way(Passes(model), dict(model.named_parameters()), torch.randn(4, 3, 9, 9))
    assert found > 0


@pytest.mark.parametrize("spoil", [NAN, torch.zeros_like, lambda found: 1.01 * found])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_rule_that_is_wrong_is_not_followed(monkeypatch, part, spoil):
    rule = squares.RULES[nn.Linear][part]
    monkeypatch.setitem(squares.RULES[nn.Linear], part, lambda *given: spoil(rule(*given)))
    model, x, y = small().eval(), torch.randn(6, 3, 9, 9), torch.arange(6) % 5
    assert off(diag_fisher(model, [(x, y)]), in_batch(model, x, y)) < 1e-3
    paths = gradient_paths(model, x)
    assert [n for n, path in paths.items() if path != "rule"] == [f"6.{part}"]
