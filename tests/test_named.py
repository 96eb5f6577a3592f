"Networks by name, and checkpoints of whoever."

import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fisher_unlearn.networks.foreign import load_checkpoint, network_named, read_checkpoint

MODULE = """
import torch
from torch import nn

def net(num_classes=3):
    head = nn.Linear(64, num_classes)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), head)

def fixed():
    return nn.Linear(2, 2)

def text():
    return "a network"

def fails():
    raise RuntimeError("no weights\\nhere")

def wants(width):
    return nn.Linear(width, 2)

def with_a_sibling():
    import layers_beside
    return layers_beside.layer
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    beside = "from torch import nn\nlayer = nn.Linear(2, 2)\n"
    (tmp_path / "layers_beside.py").write_text(beside, encoding="utf-8")
    return name


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))


def test_a_function_gets_the_number_of_classes_if_it_takes_it(module):
    assert network_named(f"{module}:net", 5)[3].out_features == 5
    assert network_named(f"{module}:fixed", 5).out_features == 2


def test_a_function_may_import_what_lies_beside_it_when_it_is_called(module):
    assert network_named(f"{module}:with_a_sibling", 2).out_features == 2


def test_networks_of_libraries():
    assert network_named("torchvision:mobilenet_v3_small", 7).classifier[-1].out_features == 7
    assert network_named("resnet20", 7, 1)(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(
    "name, message",
    [
        ("{}:text", "must return the model"),
        ("{}:fails", "no weights here"),
        ("{}:wants", "can't be built"),
        ("{}:nett", "did you mean 'net'?"),
        ("{}", "module:function"),
        ("torchvision:resnet19", "did you mean 'resnet"),
        ("resnet21", "module:function"),
        ("transformers:no/such/folder", "can't be built"),
        (":net", "module:function"),
    ],
)
def test_names_that_build_nothing(module, name, message):
    with pytest.raises(ValueError) as refused:
        network_named(name.format(module), 3)
    assert message in str(refused.value) and "\n" not in str(refused.value)


WRITERS = {
    "w.safetensors": lambda state, path: save_file(state, path),
    "state.pt": torch.save,
    "container.pth": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "nested.ckpt": lambda state, path: torch.save({"model": {"state_dict": state}}, path),
}
PREFIXES = ("", "module.", "_orig_mod.", "model.", "module.model.", "model._orig_mod.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("file", WRITERS)
def test_weights_are_read_from_whatever_wrote_them(tmp_path, file, prefix):
    torch.manual_seed(1)
    trained, empty = net(), net()
    state = {f"{prefix}{name}": t.clone() for name, t in trained.state_dict().items()}
    WRITERS[file](state, tmp_path / file)
    said = load_checkpoint(empty, tmp_path / file)
    assert all(torch.equal(t, empty.state_dict()[n]) for n, t in trained.state_dict().items())
    assert (prefix in said) if prefix else said == ""


def test_a_network_in_a_wrapper_takes_plain_names_and_the_other_way_round(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = net()

    trained = net()
    save_file(dict(trained.state_dict()), tmp_path / "w.safetensors")
    wrapped = Wrapper()
    assert "backbone." in load_checkpoint(wrapped, tmp_path / "w.safetensors")
    assert torch.equal(wrapped.backbone[3].weight, trained[3].weight)
    several = nn.DataParallel(net())
    load_checkpoint(several, tmp_path / "w.safetensors")
    assert torch.equal(several.module[3].weight, trained[3].weight)


def test_half_precision_is_said(tmp_path):
    torch.save(net().half().state_dict(), tmp_path / "half.pt")
    empty = net()
    said = load_checkpoint(empty, tmp_path / "half.pt")
    assert "float16 became float32" in said and empty[3].weight.dtype == torch.float32


def test_counts_of_batches_may_be_missing(tmp_path):
    state = {n: t for n, t in net().state_dict().items() if "num_batches" not in n}
    torch.save(state, tmp_path / "old.pt")
    load_checkpoint(net(), tmp_path / "old.pt")


TRAP = Path(tempfile.gettempdir()) / f"written_by_a_checkpoint_{os.getpid()}"


class Opens:
    def __reduce__(self):
        return open, (str(TRAP), "w")


def other(path):
    torch.save({**net().state_dict(), "extra": torch.ones(1)}, path)


WRONG = {
    "could run code": lambda path: torch.save(net(), path),
    "holds more than tensors": lambda path: torch.save({"state_dict": Opens()}, path),
    "no checkpoint": lambda path: path.write_text("weights"),
    "holds no state of a network": lambda path: torch.save({"epoch": 3}, path),
    "holds no state of a network but list": lambda path: torch.save([1, 2], path),
    "`extra` is not in the network": other,
    "(5, 64), not (3, 64)": lambda path: torch.save(
        nn.Sequential(*net()[:3], nn.Linear(64, 5)).state_dict(), path
    ),
    "and 6 more": lambda path: torch.save({"other.weight": torch.ones(2)}, path),
}


@pytest.mark.parametrize("message", WRONG)
def test_files_of_something_else_are_refused_and_change_nothing(tmp_path, message):
    WRONG[message](path := tmp_path / "file.pt")
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError) as refused:
        load_checkpoint(model, path)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert not TRAP.exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
