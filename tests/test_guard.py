"""The guard: whatever runs within it, model and process are afterwards as they were before."""

import random
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from fisher_unlearn.networks.guard import untouched


class Half(nn.Module):
    def forward(self, w):
        return w / 2


class Foreign(nn.Module):
    "Aliased and tied modules, parametrisations, an expanded buffer, attributes of every kind."

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.alias = self.a
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.a.weight
        self.halved = nn.Linear(3, 3)
        register_parametrization(self.halved, "weight", Half())
        self.old = weight_norm(nn.Linear(3, 3))
        self.new = parametrizations.weight_norm(nn.Linear(3, 3))
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("wide", torch.zeros(3, 1).expand(3, 4))
        self.register_buffer("steps", torch.tensor(0))
        self.loose = torch.arange(4.0)
        self.window = self.loose[1:3]
        self.position = None
        self.count = 0
        self.seen = []
        self.table = {"deep": [{1, 2}]}
        self.config = SimpleNamespace(size=3, calls=[])
        self.array = np.zeros(2)
        self.generator = torch.Generator().manual_seed(1)
        self.hidden = [nn.Linear(2, 2)]
        self.norm.eval()
        self.a.weight.grad = torch.ones(3, 3)

    def forward(self, x):
        for layer in (self.a, self.tied, self.halved, self.old, self.new, self.norm):
            x = layer(x)
        return self.alias(x)


def replace_parameter(m):
    m.a.weight = nn.Parameter(torch.zeros(3, 3))


def delete(m):
    del m.position
    del m.norm


def cache(m):
    m.position = torch.arange(5)
    m.features = m(torch.ones(2, 3))


def count(m):
    m.count += 1
    m.steps += 1
    m.array += 1
    m.config.size = 4
    m.config.calls.append(1)
    m.config.more = 2


def nest(m):
    m.seen.append(m)
    m.table["deep"][0].add(3)
    m.table.pop("deep")


def hook(m):
    m.register_forward_hook(lambda *ignored: None)
    m.a.register_full_backward_hook(lambda *ignored: None)
    m.a.weight.register_hook(lambda g: g * 0)


def global_hook(m):
    nn.modules.module.register_module_forward_hook(lambda *ignored: None)


def freeze(m):
    for p in m.parameters():
        p.requires_grad_(False)


def backward(m):
    with torch.enable_grad():
        m(torch.ones(2, 3)).sum().backward()


def write(m):
    m.a.weight.data.mul_(3)
    m.loose.data.fill_(float("nan"))
    m.hidden[0].weight.data.zero_()
    with torch.no_grad():
        m.halved.parametrizations.weight.original.add_(1)


def swap_data(m):
    m.a.weight.data = torch.zeros(2, 2)
    m.norm.running_mean = torch.ones(3)


def resize(m):
    m.loose.resize_(100).fill_(1)


def into_graph(m):
    with torch.enable_grad():
        m.norm.running_mean.mul_(m.a.weight.sum())


def move(m):
    m.double()


def grad_in_place(m):
    m.a.weight.grad.zero_()
    m.tied.bias.grad = torch.ones(3)


def drop_grad(m):
    m.a.weight.grad = None


def modes(m):
    m.train()
    m.hidden[0].eval()


def draw(m):
    torch.rand(3)
    random.random()
    np.random.rand()
    torch.rand(2, generator=m.generator)


def process(m):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_autocast_enabled("cpu", True)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark


def trace(m):
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = m

        def forward(self, x):
            self.inner.features = x * 2
            return self.inner.features

    fx.symbolic_trace(Moving())


def map_over(m):
    def along(w, x):
        m.features = x * w
        m.seen.append(m.features)
        return m.features.sum()

    vmap(grad(along), (None, 0))(torch.ones(3), torch.ones(2, 3))


def call(m):
    functional_call(m, {n: p.detach() * 2 for n, p in m.named_parameters()}, (torch.ones(2, 3),))


def alias_call(m):
    m(torch.ones(2, 3))


def become(m):
    m.a.__class__ = nn.Identity


def fail(m):
    raise RuntimeError("in the middle")


ACTS = [
    replace_parameter,
    delete,
    cache,
    count,
    nest,
    hook,
    global_hook,
    freeze,
    backward,
    write,
    swap_data,
    resize,
    into_graph,
    move,
    grad_in_place,
    drop_grad,
    modes,
    draw,
    process,
    trace,
    map_over,
    call,
    alias_call,
    become,
    fail,
]


def of_tensor(t):
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        return id(t)
    return (
        id(t),
        type(t),
        t.detach().clone().contiguous().view(-1).numpy().tobytes(),
        t.shape,
        t.stride(),
        t.dtype,
        t.requires_grad,
        t.is_leaf,
        t.untyped_storage()._cdata,
        t.storage_offset(),
        list(t._backward_hooks or ()),
        None if t.grad is None else (id(t.grad), t.grad.clone().numpy().tobytes()),
    )


def seen(value, done):
    "A description by value and identity, written without a look at how the guard works."
    if id(value) in done:
        return id(value)
    done.add(id(value))
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    if isinstance(value, nn.Module):
        return id(value), type(value), seen(vars(value), done)
    if isinstance(value, SimpleNamespace):
        return seen(vars(value), done)
    if isinstance(value, dict):
        return id(value), [(k, seen(v, done)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return id(value), [seen(v, done) for v in value]
    if isinstance(value, set):
        return id(value), sorted(map(repr, value))
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().numpy().tobytes()
    return value


def of_process():
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_deterministic_debug_mode(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        np.random.get_state()[2],
        list(nn.modules.module._global_forward_hooks),
    )


@settings(max_examples=120)
@given(
    st.lists(st.sampled_from(ACTS), max_size=5),
    st.sampled_from([None, "eval", "train"]),
    st.booleans(),
)
def test_whatever_happens_model_and_process_are_as_before(acts, mode, gradients):
    with torch.set_grad_enabled(gradients):
        model = Foreign()
        before, process_before = seen(model, set()), of_process()
        try:
            with untouched(model, mode):
                for act in acts:
                    act(model)
        except (RuntimeError, AttributeError, TypeError, ValueError, LookupError):
            pass  # the acts may well disagree with each other
        assert seen(model, set()) == before
        assert of_process() == process_before


@pytest.mark.parametrize("act", ACTS)
def test_each_act_alone_changes_something_and_is_undone(act):
    model = Foreign()
    before, process_before = seen(model, set()), of_process()
    with untouched(model, "eval"):
        try:
            act(model)
        except RuntimeError as error:
            assert act is fail and str(error) == "in the middle"
        if act not in (draw, process, global_hook, trace):
            assert seen(model, set()) != before  # the description sees it
    assert seen(model, set()) == before
    assert of_process() == process_before


def test_errors_pass_through():
    with pytest.raises(RuntimeError, match="in the middle"), untouched(Foreign()) as _:
        fail(None)


def test_nothing_is_written_where_nothing_has_changed():
    model = Foreign()
    loss = model(torch.ones(4, 3)).square().sum()
    versions = [p._version for p in model.parameters()]
    with untouched(model, "eval") as before, torch.no_grad():
        model.a(torch.ones(1, 3))
        assert not before.put_model_back()
        assert not model.training
    assert versions == [p._version for p in model.parameters()]
    loss.backward()


def test_the_model_can_be_put_back_in_between():
    model = Foreign()
    with untouched(model, "eval") as before:
        model.count = 7
        assert before.put_model_back()
        assert model.count == 0
        assert not any(m.training for m in model.modules())
    assert model.training
    assert not model.norm.training


def test_in_inference_mode_of_the_users():
    model = Foreign()
    with torch.inference_mode():
        with untouched(model, "eval"):
            cache(model)
            assert not model.position.is_inference()
            kept = model.position
        assert torch.is_inference_mode_enabled()
    assert model.position is None
    assert not kept.is_inference()


def test_lazy_modules_stay_lazy():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with untouched(model, "eval"):
        model(torch.ones(2, 4))
    assert type(model[0]) is nn.LazyLinear
    assert nn.parameter.is_lazy(model[0].weight)
    model(torch.ones(2, 5))
    assert model[0].weight.shape == (3, 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with untouched(model, "train"):
        model(torch.randn(4, 3))
        next(model.parameters()).data.zero_()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_numbers_of_every_kind_come_back_bit_for_bit():
    model = nn.Module()
    for k, dtype in enumerate(
        (torch.bfloat16, torch.float16, torch.complex64, torch.int8, torch.bool)
    ):
        model.register_buffer(f"b{k}", torch.ones(3, dtype=dtype))
    model.register_buffer("nan", torch.full((2,), float("nan")))
    model.register_buffer("empty", torch.empty(0))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    bits = [b.clone() for b in model.buffers()]
    with untouched(model):
        for b in model.buffers():
            (b._values() if b.is_sparse else b).zero_()
    assert all(
        torch.equal(a.to_dense().isnan(), b.to_dense().isnan())
        for a, b in zip(bits, model.buffers())
    )
    assert all(
        torch.equal(a.to_dense().nan_to_num(), b.to_dense().nan_to_num())
        for a, b in zip(bits, model.buffers())
        if not a.is_complex()
    )


class Keeping(nn.Module):
    "Draws and counts in what is neither a tensor nor an array of NumPy."

    def __init__(self):
        super().__init__()
        self.layer, self.drawn = nn.Linear(3, 3), np.random.RandomState(0)
        self.numbers, self.bytes = array("d", [0, 1]), bytearray(2)

    def forward(self, x):
        self.numbers[0] += self.drawn.rand()
        self.numbers.append(2)
        self.bytes[1] += 1
        return self.layer(x)


def test_arrays_and_generators_of_other_kinds():
    model = Keeping()
    numbers, held = model.numbers, model.bytes
    with untouched(model) as before:
        model(torch.ones(1, 3))
        assert before.put_model_back()
        assert not before.put_model_back()
        model(torch.ones(1, 3))
    assert model.numbers is numbers and model.bytes is held
    assert list(numbers) == [0, 1] and held == bytes(2)
    assert model.drawn.rand() == np.random.RandomState(0).rand()


def test_variables_of_a_function_in_place_of_a_method():
    layer, calls, count = nn.Linear(3, 3), [0], 0
    old = layer.forward

    def forward(x):
        nonlocal count, later
        count, later = count + 1, 1
        calls[0] += 1
        return old(x)

    later = None
    layer.forward = forward
    with untouched(nn.Sequential(layer)) as before:
        layer(torch.ones(1, 3))
        assert (count, calls, later) == (1, [1], 1)
        assert before.put_model_back()
        layer(torch.ones(1, 3))
    assert (count, calls, later) == (0, [0], None)
    assert layer.forward is forward
