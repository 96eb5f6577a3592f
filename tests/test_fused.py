"""The compiled loop that multiplies, squares and adds up in registers, against the definition."""

import ctypes
import os
import platform
import re
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisher_unlearn.scores import fused
from fisher_unlearn.scores.fused import Tile, Windows, plan_tiles, squared_products, summed_products


PRODUCT = r"v?fn?madd|fmla|v?mulp"


def definition(windows, x, gs):
    "Σᵢ Σ_g (Σ_l g[i, l, o] x[i, origins[tap] + places[l], c])², a sum after the other."
    total = torch.zeros(gs[0].shape[2], len(windows.origins), x.shape[2], dtype=torch.float64)
    for g, i, (tap, origin) in product(gs, range(len(x)), enumerate(windows.origins.tolist())):
        total[:, tap] += (g[i].double().T @ x[i, origin + windows.places].double()).square()
    return total


def example(n, inputs, outputs, taps, positions, directions=1, seed=0, blanks=0.3):
    "Any windows of twelve pixels, some of which are blank."
    generator = torch.Generator().manual_seed(seed)

    def pick(high, count):
        return torch.randint(high, (count,), generator=generator)

    windows = Windows(
        pick(5, taps), pick(8, positions), torch.rand(12, generator=generator) < blanks
    )
    x = torch.randn(n, 12, inputs, generator=generator, dtype=torch.float64)
    x[:, windows.blank] = 0
    return (
        windows,
        x,
        [
            torch.randn(n, positions, outputs, generator=generator, dtype=torch.float64)
            for _ in range(directions)
        ],
    )


def difference(found, wanted, most=None):
    "The largest difference, beside the largest value, or that of sums in which nothing cancels."
    most = wanted if most is None else most
    return ((found - wanted).abs().max() / most.max().clamp_min(1e-300)).item()


SIZES = {
    "n": st.integers(1, 20),
    "inputs": st.integers(1, 40),
    "outputs": st.integers(1, 11),
    "taps": st.integers(1, 5),
    "positions": st.integers(1, 9),
    "directions": st.integers(1, 3),
    "seed": st.integers(0, 99),
}
sizes = st.fixed_dictionaries(SIZES)


@given(
    sizes, st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 5), st.sampled_from([1, 2000, 2**21])
)
@settings(max_examples=100)
@hypothesis.example({**dict.fromkeys(SIZES, 1), "positions": 5}, 1, 1, 1)  # its sums cancel
def test_any_windows_with_the_tiles_of_any_processor(size, lanes, threads, near):
    "Whatever a processor's registers, the number of threads, and the images that a call gets."
    windows, x, gs = example(**size)
    wanted = definition(windows, x, gs)
    most = definition(windows, x.abs(), [g.abs() for g in gs])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tile, "of", lambda dtype: Tile(dtype, lanes))
            patch.setattr(fused, "_NEAR", near)
            patch.setattr(fused, "_NEAREST", near)
            planned = plan_tiles(windows, size["inputs"], size["outputs"], dtype, threads)
            found = squared_products(planned, x.to(dtype), [g.to(dtype) for g in gs])
            assert difference(found, wanted, most) < tolerance


@pytest.mark.parametrize(
    "features, size",
    [
        ({"avx": True, "avx512f": True}, 64),
        ({"avx": True, "avx512f": False}, 32),
        ({"sse2": True}, 16),
        ({"neon": True}, 16),
    ],
)
def test_vectors_are_the_longest_of_the_processor(monkeypatch, features, size):
    monkeypatch.setattr(fused.llvm, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(fused, "_longest_vector", fused._longest_vector.__wrapped__)
    assert Tile.of(torch.float32) == (torch.float32, size // 4) and Tile.of(torch.float64) == (
        torch.float64,
        size // 8,
    )


def loops(assembly):
    "The blocks that jump back to where they begin."
    blocks = re.findall(r"^(\.LBB\w+):(.*?)(?=^\.LBB|\Z)", assembly, re.M | re.S)
    return [block for label, block in blocks if re.search(rf"\s{re.escape(label)}$", block, re.M)]


@pytest.mark.parametrize(
    "processor, size",
    [("this", 0), *([("znver3", 32), ("znver4", 64)] if platform.machine() == "x86_64" else [])],
)  # AVX2 with 16 registers, AVX-512 with 32
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_innermost_loop_keeps_its_sums_in_registers(processor, size, dtype, monkeypatch):
    """Nothing is written, and nothing is read from the stack. Sums over images, outside of it,
    may wait in memory."""
    if size:
        monkeypatch.setattr(fused.llvm, "get_host_cpu_name", lambda: processor)
        monkeypatch.setattr(
            fused.llvm, "get_host_cpu_features", lambda: SimpleNamespace(flatten=str)
        )
    tile = Tile(dtype, size // dtype.itemsize) if size else Tile.of(dtype)
    inner = max(
        loops(fused._compiled.__wrapped__(fused._squares, tile).assembly),
        key=lambda block: len(re.findall(PRODUCT, block)),
    )
    lines = [line.split("#")[0].strip() for line in inner.splitlines()]
    assert sum(bool(re.match(PRODUCT, line)) for line in lines) == 12
    assert not any("rsp" in line or "[sp" in line for line in lines)
    assert not any(
        re.match(r"v?mov\S*\s+%[xyz]mm\d+, \S*\(", line) or re.match(r"st[rp]\b", line)
        for line in lines
    )


def test_threads_do_each_job_once(monkeypatch):
    "PyTorch's or Python's, fewer than the jobs or more: the same digits."
    windows, x, gs = example(30, 33, 12, 4, 6)
    planned = plan_tiles(windows, 33, 12, torch.float64, 2)
    wanted = squared_products(planned, x, gs)
    assert difference(wanted, definition(windows, x, gs)) < 1e-12
    for team, threads in product((fused._team(), fused._python_threads), (1, 2, 64)):
        monkeypatch.setattr(fused, "_team", lambda team=team: team)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(squared_products(planned, x, gs), wanted)


@pytest.mark.parametrize(
    "absent", [AttributeError("no such symbol"), TypeError("a name is needed")]
)
def test_without_openmp_pythons_threads_do_it(monkeypatch, absent):
    def refuse(name):
        raise absent

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert fused._team.__wrapped__() is fused._python_threads


def test_views_and_other_types_are_brought_into_form():
    windows, x, gs = example(9, 20, 8, 3, 5)
    planned, wanted = plan_tiles(windows, 20, 8, torch.float64, 2), definition(windows, x, gs)
    wide, turned = (
        torch.cat([x, x], 2)[..., 20:],
        gs[0].transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert difference(squared_products(planned, wide, [turned]), wanted) < 1e-12
    assert difference(squared_products(planned, x.float(), [gs[0].float()]), wanted) < 1e-5
    assert torch.equal(
        squared_products(planned, x[:0], [gs[0][:0]]), torch.zeros(8, 3, 20, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda x, g: (x[:, :11], g),
        (lambda x, g: (x, g[..., :7])),
        (lambda x, g: (x, g[:8])),
        (lambda x, g: (x[..., :19], g)),
    ],
)
def test_images_of_another_layer_are_refused(other):
    windows, x, (g,) = example(9, 20, 8, 3, 5)
    x, g = other(x, g)
    with pytest.raises(ValueError, match=r"planned for \(12, 20\) and \(5, 8\)"):
        squared_products(plan_tiles(windows, 20, 8, torch.float64, 2), x, [g])


def test_another_device_is_refused():
    windows, x, gs = example(4, 5, 3, 2, 4)
    with pytest.raises(ValueError, match="the memory of a CPU, and a tensor is on meta"):
        squared_products(plan_tiles(windows, 5, 3, torch.float32, 2), x.to("meta"), gs)


def test_all_blank_is_zero():
    windows, x, gs = example(4, 5, 3, 2, 4, blanks=2)
    assert not squared_products(plan_tiles(windows, 5, 3, torch.float32, 2), x, gs).any()


@given(
    st.integers(0, 7),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_sums_of_products_for_any_channels_and_vectors(n, positions, channels, lanes, seed):
    """Whole vectors, and the channels that are left of them; as views whose channels are not
    side by side, too."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (
        torch.randn(n, channels, positions, generator=generator, dtype=torch.float64).mT
        for _ in range(2)
    )
    shift = 100 + torch.randn(channels, generator=generator, dtype=torch.float64)
    wanted = (
        torch.stack([sum(g[i, p] * (x[i, p] - shift) for p in range(positions)) for i in range(n)])
        if n
        else x.new_zeros(0, channels)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tile, "of", lambda dtype: Tile(dtype, lanes))
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-3)):
            found = summed_products(x.to(dtype), g.to(dtype), shift.to(dtype))
            assert (
                found.dtype == dtype
                and found.shape == wanted.shape
                and ((found - wanted).abs() <= tolerance).all()
            )


def test_sums_refuse_what_does_not_fit():
    x = torch.randn(3, 4, 5)
    for bad in (
        (x, x[:2], x[0, 0]),
        (x, x[..., :4], x[0, 0]),
        (x, x, x[0, 0, :4]),
        (x[0], x[0], x[0, 0]),
    ):
        with pytest.raises(ValueError, match="they must be"):
            summed_products(*bad)
    with pytest.raises(ValueError, match="a tensor is on meta"):
        summed_products(x, x.to("meta"), x[0, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_numbers_of_another_type_are_refused_before_memory_is_read(dtype):
    x = torch.ones(3, 4, 5, dtype=dtype)
    with pytest.raises(ValueError, match=f"not {dtype}"):
        summed_products(x, x, x[0, 0])
    windows = Windows(torch.arange(1), torch.arange(4), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"not {dtype}"):
        squared_products(plan_tiles(windows, 5, 5, dtype, 2), x, [x])


SCORE = """
import sys
if "without" in sys.argv: sys.modules["llvmlite"] = None
import torch
from torch import nn
from fisher_unlearn import diag_fisher
from fisher_unlearn.networks.machine import provenance
generator = torch.Generator().manual_seed(0)
batch = torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6)
torch.manual_seed(0)
body = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
scores = diag_fisher(nn.Sequential(*body, nn.Flatten(), nn.Linear(288, 6)), [batch])
torch.save(scores, sys.argv[1])
print(provenance()["fused"], "fisher_unlearn.scores.fused" in sys.modules)
"""


def test_scores_are_the_same_without_llvmlite_and_with_the_loops_turned_off(tmp_path):
    "Up to rounding; and where the loops are not wanted, nothing of them is imported."
    found = []
    ways = ([], "", "True True"), (["without"], "", "False False"), ([], "0", "False False")
    for k, (words, off, said) in enumerate(ways):
        file = str(tmp_path / f"{k}.pt")
        done = subprocess.run(
            [sys.executable, "-c", SCORE, file, *words],
            env={**os.environ, "FISHER_UNLEARN_FUSED": off},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.stdout.strip() == said, done.stderr
        found.append(torch.load(file))
    for other in found[1:]:
        for name, scores in found[0].items():
            assert (scores - other[name]).abs().max() <= 1e-5 * scores.abs().max(), name


FENCED = """
import ctypes, mmap, sys
import torch
sys.path.insert(0, sys.argv[1])
from fisher_unlearn.scores import fused
from test_fused import example

libc, kept = ctypes.CDLL(None, use_errno=True), []
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
whole = {"filled": fused._filled, "zeros": torch.Tensor.new_zeros}


def fenced(tensor):
    "The same numbers between two pages that nobody may touch, up against one of them."
    size, page = max(1, tensor.numel() * tensor.element_size()), mmap.PAGESIZE
    pages = -(-size // page) + 2
    memory = mmap.mmap(-1, pages * page)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end = start + (pages - 1) * page
    for fence in (start, end):
        assert libc.mprotect(fence, page, 0) == 0
    at = end - size if sys.argv[2] == "end" else start + page
    place = (ctypes.c_char * size).from_address(at)
    copy = torch.frombuffer(place, dtype=tensor.dtype)[: tensor.numel()].view(tensor.shape)
    return copy.copy_(tensor)


def among_fences(work, *given):
    "What a loop finds, and what it finds between fences."
    wanted = work(*given)
    fused._filled = lambda *told: fenced(whole["filled"](*told))
    torch.Tensor.new_zeros = lambda *told, **named: fenced(whole["zeros"](*told, **named))
    found = work(*given)
    fused._filled, torch.Tensor.new_zeros = whole["filled"], whole["zeros"]
    assert torch.equal(wanted, found)


for n, inputs, outputs, taps, positions in ((3, 5, 7, 4, 6), (2, 16, 8, 9, 3), (5, 33, 1, 1, 5)):
    for dtype in (torch.float32, torch.float64):
        windows, x, (g,) = example(n, inputs, outputs, taps, positions)
        planned = fused.plan_tiles(windows, inputs, outputs, dtype, 2)
        among_fences(fused.squared_products, planned, x.to(dtype), [g.to(dtype)])
        windows, x, (g,) = example(n, inputs, inputs, taps, positions)
        among_fences(fused.squares_by_channel, windows, x.to(dtype), g.to(dtype))
        rows = [fenced(part[:, :positions].to(dtype)) for part in (x, g)]
        among_fences(fused.summed_products, *rows, fenced(x[0, 0].to(dtype)))
print("whole")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows protects pages by other calls")
@pytest.mark.parametrize("side", ["start", "end"])
def test_loops_touch_nothing_before_or_after_their_tensors(side):
    "A read or a write one place further ends the process: there is a guard page."
    words = [sys.executable, "-c", FENCED, os.path.dirname(__file__), side]
    done = subprocess.run(words, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr[-2000:]
