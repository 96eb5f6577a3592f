"""Other people's networks: scores against autograd in float64, or one sentence; nothing is damaged.

The oracle shares no code with the package: a twin of the network in double precision is fed whole
batches, and each sample's own loss is differentiated. A batch of one is fed together with another
sample, since networks that squeeze compute something else from a single one."""

import copy
import io
import random
import re
from collections import deque
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import foreign
from fisher_unlearn.scores.activation import activation_scores
from fisher_unlearn.scores.fisher import diag_fisher
from fisher_unlearn.scores.graph import find_readers
from fisher_unlearn.methods.influence import forget_gradient, lissa
from fisher_unlearn.methods.masking import candidates
from fisher_unlearn.networks.metrics import evaluate, mean_loss
from fisher_unlearn.networks.models import check_batches, find_classifier
from fisher_unlearn.methods.unlearn import unlearn
from foreign import Recipe, Wanted, batches, build, recipes, surroundings

RAW = re.compile(
    r"functorch|vmap|Proxy|Traceback|NoneType|object has no attribute|Tensor object|"
    r"BatchedTensor|GradTracking|functional_call|0x[0-9a-f]{6}|"
    r"size mismatch|must match"
)


# -------------------------------------------------------------------------------------- the oracle
def twin(recipe):
    "The same network in double precision and in evaluation mode."
    return build(recipe).double().eval()


def logits_of(output):
    "The logits in what a network returns."
    if isinstance(output, dict):
        return output["logits"]
    if isinstance(output, tuple):
        return output[0]
    return output.logits if hasattr(output, "logits") else output


def slopes(recipe, x, y):
    "For each batch: probabilities (n, C), and for each class in `y` (n, k) a list of gradients."
    model = twin(recipe)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    x = (x.double() if x.is_floating_point() else x).detach()
    squeezes = recipe.neck == "squeeze" and foreign.STARTS[recipe.start][0] != "vectors"
    fed = torch.cat([x, x.flip(-1)]) if len(x) == 1 and squeezes else x
    with torch.enable_grad():
        logits = logits_of(model(fed.clone()))[: len(x)].double()
    found = []
    for row, labels in zip(logits, y):
        found.append([])
        for label in labels:
            loss = torch.logsumexp(row, 0) - row[label]
            grads = torch.autograd.grad(
                loss, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            found[-1].append(
                {
                    n: torch.zeros_like(p) if g is None else g.to_dense()
                    for (n, p), g in zip(parameters.items(), grads)
                }
            )
    return logits.detach().softmax(1), found


def _alone(recipe, per, more):
    "The batches; single samples where the gradient of one depends on what is beside it."
    found = batches(recipe, more)
    if per == "sample" and recipe.start == "tokens_by_count":
        return [(x[None], y[None]) for xs, ys in found for x, y in zip(xs, ys)]
    return found


def oracle(recipe, labels="true", per="sample", reduction="sum", more=0):
    "The formulas, one sample and one label at a time."
    total, terms = {}, 0
    for x, y in _alone(recipe, per, more):
        wanted = y[:, None] if labels == "true" else torch.arange(recipe.classes).expand(len(y), -1)
        p, grads = slopes(recipe, x, wanted)
        weights = torch.ones(len(y), 1).double() if labels == "true" else p
        for k in range(wanted.shape[1]):
            for name in grads[0][0]:
                g = torch.stack([sample[k][name] for sample in grads])
                w = weights[:, k].view(-1, *[1] * (g.dim() - 1))
                square = (w * g**2).sum(0) if per == "sample" else w.mean(0) * g.mean(0) ** 2
                total[name] = total.get(name, 0) + square
        terms += len(y) if per == "sample" else 1
    return {n: t / terms if reduction == "mean" else t for n, t in total.items()}


def agree(found, wanted, double):
    "In double precision to 9 digits, in single precision to 3; a parameter may have several names."
    assert set(wanted) <= set(found)
    tol, floor = (1e-8, 1e-22) if double else (2e-3, 1e-9)
    most = max((w.abs().max().item() for w in wanted.values() if w.numel()), default=0)
    for name, w in wanted.items():
        f = found[name].double()
        assert f.shape == w.shape, name
        if w.numel():
            error = (f - w).abs().max().item()
            largest = w.abs().max().item()
            assert error <= tol * largest + floor * most, (
                f"{name}: off by {error / max(largest, 1e-300):.3g} of its largest, {largest:.3g}"
            )


# ---------------------------------------------------------------------------------- what must stay
class Identity:
    "An object of which only the identity counts; it is held, so that no other gets its place."

    def __init__(self, what):
        self.what = what

    def __eq__(self, other):
        return self.what is other.what

    def __repr__(self):
        return f"<{type(self.what).__name__} at {id(self.what)}>"


def tensor_leaves(value):
    "A tensor: its identity, its storage, its content, its hooks and its gradient."
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        yield "", "what torch.func left behind"
        return
    yield (
        "",
        (
            Identity(value),
            value.data_ptr(),
            value.requires_grad,
            Identity(value.grad_fn),
            value.is_inference(),
            value.stride(),
            value.dtype,
        ),
    )
    yield ".value", value.detach().clone()
    yield ".hooks", list(map(Identity, (value._backward_hooks or {}).values()))
    if value.is_leaf and value.grad is not None:
        yield ".grad", (Identity(value.grad), value.grad.clone())


def insides(value):
    "What a value is made of, each by its part of a path."
    if isinstance(value, dict):
        return [(f"[{key!r}]", inner) for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"[{k}]", inner) for k, inner in enumerate(value)]
    if isinstance(value, (nn.Module, foreign.Meter)):
        return [(f".{key}", inner) for key, inner in vars(value).items()]
    return []


def content(value):
    "What is in a value that is compared as a whole."
    if isinstance(value, (set, deque)):
        yield ".content", list(map(Identity, value))
    elif isinstance(value, np.ndarray):
        yield ".content", value.tolist()
    elif isinstance(value, random.Random):
        yield ".state", hash(value.getstate())


def leaves(value, seen, depth=0):
    "Everything that an attribute holds, by a path: identities, and what is in tensors and objects."
    if isinstance(value, torch.Tensor):
        yield from tensor_leaves(value)
        return
    known = isinstance(value, (int, float, str, bool, type(None)))
    yield "", value if known else Identity(value)
    if id(value) in seen or depth > 5:
        return
    seen.add(id(value))
    yield from content(value)
    for part, inner in insides(value):
        for path, what in leaves(inner, seen, depth + 1):
            yield part + path, what


def picture(model):
    "Names of a model's modules, all that their attributes hold, and classes."
    found = {}
    for name, module in model.named_modules():
        found[f"{name}.class"] = id(type(module))
        found[f"{name}.keys"] = list(vars(module))
        for key, value in vars(module).items():
            for path, what in leaves(value, {id(m) for m in model.modules()}):
                found[f"{name}.{key}{path}"] = what
    return found


def globals_of_torch():
    "What torch holds for the whole process."
    module = torch.nn.modules.module
    hooks = {
        n: [id(h) for h in value.values()]
        for n, value in vars(module).items()
        if n.startswith("_global") and isinstance(value, dict)
    }
    return {
        **hooks,
        "python": random.getstate(),
        "rng": hash(tuple(torch.get_rng_state().tolist())),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "anomaly": torch.is_anomaly_enabled(),
        "fast": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        "autocast": torch.is_autocast_enabled("cpu"),
        "sure": torch.are_deterministic_algorithms_enabled(),
        "func": torch._C._functorch.peek_interpreter_stack() is None,
        "forwards": [id(k.forward) for k in (nn.Conv2d, nn.Linear, nn.MultiheadAttention)],
    }


def bits(tensor):
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def unchanged(before, after):
    assert list(before) == list(after), f"gone or new: {set(before) ^ set(after)}"
    for name, value in before.items():
        assert same(value, after[name]), f"{name} was {value}, is {after[name]}"


def as_bytes(model):
    "What `torch.save` makes of a model; None if it can't be saved."
    try:
        torch.save(model, file := io.BytesIO())
    except Exception:  # noqa: BLE001  # whatever pickle says of hooks, closures, generators
        return None
    return file.getbuffer().nbytes


def copied(model):
    try:
        return copy.deepcopy(model)
    except Exception:  # noqa: BLE001  # whatever can't be copied: the model's own matter
        return None


def trained(model, optimiser, data):
    "A step of training; the class of what it ends in, if not well."
    torch.manual_seed(0)
    model.train()
    optimiser.zero_grad()
    x, y = data[0]
    try:
        nn.functional.cross_entropy(logits_of(model(x.detach().clone())), y).backward()
        optimiser.step()
    except Exception as error:  # noqa: BLE001  # of the twin, too, or else the test fails
        return type(error).__name__
    return [p.detach().clone() for p in model.parameters()]


def sgd(model):
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad] or [torch.zeros(1, requires_grad=True)],
        lr=0.1,
        momentum=0.9,
    )


class Watched:
    "A model, what must stay of it, and what it must still be able to do."

    def __init__(self, recipe):
        self.recipe, self.model, self.data = recipe, build(recipe), batches(recipe)
        self.held = list(self.model.parameters())
        self.optimiser = sgd(self.model)
        self.inputs = [x.clone() for x, _ in self.data]
        self.could_save, self.could_copy = as_bytes(self.model), copied(self.model) is not None
        self.before, self.torch = picture(self.model), globals_of_torch()

    def check(self):
        unchanged(self.torch, globals_of_torch())
        unchanged(self.before, picture(self.model))
        assert all(a is b for a, b in zip(self.held, self.model.parameters()))
        for k, (x, was) in enumerate(zip(self.data, self.inputs)):
            assert torch.equal(x[0], was), f"the inputs of batch {k} were changed"
            assert x[0].grad is None
        assert as_bytes(self.model) == self.could_save, "it can't be saved as before"
        assert (copied(self.model) is not None) == self.could_copy, "it can't be copied"
        state = self.model.state_dict()
        assert all(not v.is_inference() for v in state.values() if isinstance(v, torch.Tensor))

    def check_training(self):
        "It learns, bit for bit, as a twin that was never scored."
        if self.recipe.raises:
            return
        other = build(self.recipe)
        wanted = trained(other, sgd(other), self.data)
        found = trained(self.model, self.optimiser, self.data)
        assert same(wanted, found), "it is trained otherwise than before"


# ------------------------------------------------------------------------------------- one example
def sentence(error):
    "Is this one sentence that a user can read?"
    text = str(error)
    assert "\n" not in text and text.endswith(".") and len(text) < 600, text
    assert not RAW.search(re.sub(r"\(.*\)", "", text)), text  # but for a cause that is quoted


def may_be_refused(recipe, labels, per):
    "Why a network may be refused, in words; None if it must be scored."
    if recipe.root in ("dict", "tuple", "object"):
        return "output"
    if recipe.raises:
        return "raises"
    if recipe.start == "tokens_by_count" or any(b in foreign.OTHER for b in recipe.blocks):
        return "no one can say, or the logits depend on the batch"
    if recipe.layout in ("differentiable", "expanded") and recipe.start.endswith("in_place"):
        return "not even the user can run it"
    if recipe.carried == "numpy" and recipe.double:
        return "arrays are read in the default precision"
    return None


def asked(recipe, call, why=None):
    """What `call` returns for a recipe's network and data, or None where it is refused in one
    sentence, which needs a reason `why`; whatever happens, the model stays."""
    foreign.fresh()
    watched = Watched(recipe)
    try:
        with foreign.CALLER.get(recipe.caller, nullcontext)():
            before = globals_of_torch()
            try:
                found = call(watched.model, foreign.carried(recipe, watched.data))
            finally:
                unchanged(before, globals_of_torch())
    except (ValueError, TypeError, FloatingPointError) as error:
        assert why, f"refused: {error}"
        if why != "raises":
            sentence(error)
        found = None
    except Wanted:
        assert recipe.raises
        found = None
    watched.check()
    watched.check_training()
    return found


def depends(recipe):
    "Do the logits of some samples change by more than rounding if others of their batch do?"
    if not recipe.start.startswith(("images", "series", "vectors")) or recipe.layout == "expanded":
        return False
    x = max((x for x, _ in batches(recipe)), key=len).detach().double()[:4]
    other = torch.cat([x[:2], x[2:].roll(1, 0) / 2])
    with torch.no_grad():
        a, b = (logits_of(twin(recipe)(rows.clone()))[:2] for rows in (x, other))
    return bool((a - b).abs().max() > 1e-4 * a.abs().max())


def hold(recipe, labels="true", per="sample", reduction="sum"):
    "Scores are those of the oracle, or refused for a reason; the model stays."

    def call(model, data):
        return diag_fisher(model, data, labels, per, reduction)

    with surroundings(recipe):
        found = asked(recipe, call, may_be_refused(recipe, labels, per))
        if recipe.dependent and per == "sample" and depends(recipe):
            assert found is None, "the logits depend on the batch, and were scored"
        if recipe.drawn:
            assert found is None, "the logits are drawn, and were scored"
        if found is not None and not recipe.unsure and not (recipe.dependent and per == "sample"):
            wanted = oracle(recipe, labels, per, reduction)
            agree(found, wanted, recipe.double)


# ----------------------------------------------------------------------------- the other functions
def head_of(model):
    "The name of the last linear layer; None if there is none."
    return next(
        (n for n, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear)), None
    )


def first_inputs(data):
    batch = next(iter(data))
    return torch.as_tensor(batch["inputs"] if isinstance(batch, dict) else batch[0])


def few_steps(model, data):
    gradient = forget_gradient(model, data, 50)
    return list(lissa(model, gradient, data, epochs=1, scale=1e4))


OTHERS = {
    "find_classifier": lambda model, data: find_classifier(model),
    "candidates": lambda model, data: candidates(model, classifier=True),
    "channels": lambda model, data: candidates(
        model, "channel", reach="norm", inputs=first_inputs(data)
    ),
    "find_readers": lambda model, data: find_readers(model, first_inputs(data)),
    "check_batches": lambda model, data: check_batches(model, data, "batches"),
    "evaluate": lambda model, data: evaluate(model, {"all": data})["all_acc"],
    "mean_loss": mean_loss,
    "activations": lambda model, data: activation_scores(model, data, data),
    "gradient": lambda model, data: forget_gradient(model, data, 50),
    "influence": few_steps,
}


def expected(recipe, name):
    "What a function should return, computed otherwise; None if nothing is known."
    fused = {"attention_layer", "SequenceFirst"} & set(recipe.blocks)
    passed_over = fused and (recipe.around or recipe.edits)  # torch's fused kernels don't see it
    if name not in ("evaluate", "mean_loss", "gradient") or passed_over:
        return None
    right, loss, total, number = 0, 0, {}, 0
    for x, y in batches(recipe):
        p, grads = slopes(recipe, x, y[:, None])
        right += (p.argmax(1) == y).sum().item()
        loss -= p.log()[torch.arange(len(y)), y].sum().item()
        number += len(y)
        for (sample,) in grads:
            total = {n: total.get(n, 0) + g / 50 for n, g in sample.items()}
    return {"evaluate": 100 * right / number, "mean_loss": loss / number, "gradient": total}[name]


def hold_other(recipe, name):
    "The model stays; where it is known what comes out, that comes out."
    if recipe.start == "tokens_bag" and name == "influence":
        return  # torch has no second derivative of it
    if recipe.caller == "inference":
        recipe = replace(recipe, caller="no_grad")
    if recipe.dependent or "NoStatistics" in recipe.blocks:
        return
    if recipe.carried == "loader":  # whose reading draws from torch's generator
        recipe = replace(recipe, carried="pairs")
    why = may_be_refused(recipe, "true", "batch")
    if name not in ("evaluate", "mean_loss", "check_batches", "gradient"):
        why = why or "these need more of a network"
    with surroundings(recipe):
        found = asked(recipe, OTHERS[name], why)
        wanted = None if found is None or recipe.unsure or recipe.drawn else expected(recipe, name)
    if isinstance(wanted, dict):
        agree(
            {n: g.square() for n, g in found.items()},
            {n: g.square() for n, g in wanted.items()},
            recipe.double,
        )
    elif wanted is not None:
        assert found == pytest.approx(wanted, rel=1e-4)


def masked_twin(recipe, mask):
    "Another build of the network with the masked entries at zero."
    model = build(recipe)
    inner = model.module if recipe.root == "parallel" else model  # what comes back has no wrapper
    with torch.no_grad():
        for name, where in mask.items():
            inner.state_dict()[name].masked_fill_(where, 0)
    return model.eval()


def hold_unlearning(recipe, method):
    """What comes back is a copy with the logits of a network with the masked entries at zero.

    A forward that is a closure over its own network is left out: no copy of it can be made."""
    closures = recipe.root == "replaced" or "masked_linear_forward" in dict(recipe.edits)
    if recipe.raises or closures:
        return
    if recipe.caller == "inference":  # a copy made in it could not be trained
        recipe = replace(recipe, caller="no_grad")
    remain = batches(recipe, more=100)

    def call(model, data):
        options = {"classes": (0,)} if method == "mask_classifier" else {"ratio": 0.1}
        return unlearn(model, data, remain, method=method, classifier=head_of(model), **options)

    with surroundings(recipe):
        found = asked(recipe, call, "the classifier is another layer, or nothing can be masked")
        if found is None or recipe.unsure or recipe.drawn or recipe.dependent:
            return
        x = batches(recipe)[0][0].detach()
        with torch.no_grad():
            wanted = logits_of(masked_twin(recipe, found.mask)(x.clone()))
            same_logits = torch.equal(logits_of(found.model(x.clone())), wanted)
        assert same_logits, "the copy is another model"
        if method == "fisher_mask":
            highest(recipe, found.mask)


def highest(recipe, mask):
    "The masked entries have the highest differences of scores, as far as digits tell."
    forget, remain = (
        {
            n.removeprefix("module.") if recipe.root == "parallel" else n: t
            for n, t in oracle(recipe, more=more).items()
        }
        for more in (0, 100)
    )
    model = build(recipe)
    model = model.module if recipe.root == "parallel" else model
    pool = candidates(model, classifier_name=head_of(model))
    names = [n for n in pool.shapes if n in forget]
    score = torch.cat([(forget[n] - remain[n]).flatten() for n in names])
    chosen = torch.cat(
        [mask.get(n, torch.zeros(pool.shapes[n], dtype=torch.bool)).flatten() for n in names]
    )
    assert chosen.sum() == int(len(chosen) * 0.1)
    if chosen.any():
        slack = 4e-3 * max(t.abs().max() for t in (*forget.values(), *remain.values()))
        assert score[chosen].min() >= score[~chosen].max() - slack


# ------------------------------------------------------------------------------------------- tests
ESTIMATORS = st.tuples(
    st.sampled_from(["true", "expected"]),
    st.sampled_from(["sample", "batch"]),
    st.sampled_from(["sum", "mean"]),
)


@pytest.mark.parametrize("recipe", foreign.one_of_each(), ids=repr)
def test_each_kind_by_itself(recipe):
    hold(recipe)
    hold(replace(recipe, sizes=(4, 1), double=True, training=True), "expected", "batch", "mean")


@pytest.mark.parametrize("first", ["one image", "copies", "images"])
@pytest.mark.parametrize("block", foreign.DEPENDENT)
def test_a_dependence_on_the_batch_is_seen_whatever_comes_first(block, first):
    "In later batches, too, and however small."
    recipe = Recipe(images=("conv_tanh", block), sizes=(6, 6))
    (x, y), other = batches(recipe)
    start = {
        "one image": [(x[:1], y[:1])],
        "copies": [(x[:1].expand(3, -1, -1, -1), y[:3])],
        "images": [(x, y)],
    }[first]
    with pytest.raises(ValueError, match="depend on the other samples") as caught:
        diag_fisher(build(recipe), [*start, other])
    sentence(caught.value)


def test_a_batch_of_one_before_larger_ones():
    "It is not taken for the beginning of the next."
    for head in ("linear", "two_names_called"):
        hold(Recipe(start="vectors", head=head, sizes=(1, 5, 2)))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(images=("conv_tanh", b), start=start)
        for b in (
            "Cached",
            "Keeps",
            "KeepsLate",
            "Logs",
            "Counts",
            "Assigns",
            "conv_weight_norm_old",
            "conv_tanh",
        )
        for start in ("images", "images_in_place")
    ],
    ids=repr,
)
def test_every_function_leaves_the_model(recipe, name):
    hold_other(recipe, name)


@pytest.mark.parametrize("sizes", [(3, 1), (1,), (1, 3)])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(neck="squeeze"),
        Recipe(start="series", neck="squeeze", vectors=("linear_batch_norm",)),
    ],
    ids=["images", "series"],
)
def test_a_network_that_squeezes_takes_a_batch_of_one(recipe, sizes):
    for per in ("sample", "batch"):
        hold(replace(recipe, sizes=sizes), "true", per)
    for name in OTHERS:
        hold_other(replace(recipe, sizes=sizes), name)


@given(recipes(), ESTIMATORS)
@settings(max_examples=200, derandomize=True, database=None, report_multiple_bugs=True)
def test_any_network(recipe, how):
    hold(recipe, *how)


@pytest.mark.slow
@given(recipes(), ESTIMATORS)
@settings(max_examples=1000, derandomize=True, database=None)
def test_many_networks(recipe, how):
    hold(recipe, *how)


SERVED = st.sampled_from(list(OTHERS))


@given(recipes(), SERVED)
@settings(max_examples=100, derandomize=True, database=None)
def test_other_functions(recipe, name):
    hold_other(recipe, name)


@pytest.mark.slow
@given(recipes(), SERVED)
@settings(max_examples=500, derandomize=True, database=None)
def test_other_functions_on_many_networks(recipe, name):
    hold_other(recipe, name)


@given(
    recipes(sizes=st.just((5, 3)), carried=st.sampled_from(["pairs", "dicts", "numpy"])),
    st.sampled_from(["fisher_mask", "mask_classifier"]),
)
@settings(max_examples=40, derandomize=True, database=None)
def test_unlearning(recipe, method):
    hold_unlearning(recipe, method)
