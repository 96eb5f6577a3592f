"A deletion on other people's networks: the input is untouched, the evidence there, and it loads."

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fisher_unlearn.images.data import ImageData, Samples
from fisher_unlearn.images.sources import asked_for, source_of
from fisher_unlearn.lab.deletion import delete
from fisher_unlearn.lab.deletion_report import save_deletion
from fisher_unlearn.methods.masks import FisherMask
from fisher_unlearn.networks.foreign import load_checkpoint, network_named
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings

TUNE = TrainSettings(Schedule(lr=1e-3, epochs=1, drops=()), select="last", optimizer="adamw")


class TwoNames(nn.Module):
    "The same layer under two names."

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.and_again = self.again
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.and_again(torch.relu(self.again(x))))
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    "Two layers with one weight."

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(48, 48), nn.Linear(48, 48, bias=False)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(48, 3)

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.head(torch.tanh(self.outer(torch.tanh(self.inner(x)))))


def vit_of_torchvision():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)


def small_convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3)


def googlenet_with_heads():
    from torchvision.models import googlenet

    return googlenet(num_classes=3, aux_logits=True, init_weights=False)


def of_transformers():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **sizes))


def of_timm():
    import timm

    sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, **sizes)


NETS = {
    "resnet18": lambda: network_named("torchvision:resnet18", 3),
    "mobilenet": lambda: network_named("torchvision:mobilenet_v3_small", 3),
    "convnext": small_convnext,
    "vit": vit_of_torchvision,
    "googlenet": googlenet_with_heads,
    "transformers vit": of_transformers,
    "timm vit": of_timm,
    "timm resnet": lambda: network_named("timm:test_resnet", 3),
    "two names": TwoNames,
    "tied": Tied,
}
SIDES = {"googlenet": 96}  # its heads need room
HEADS = {"transformers vit": "classifier"}  # torch.fx can't trace its forward pass


def pictures(side):
    "Thirty pictures of three colours, and nine others for a test."
    numbers = torch.Generator().manual_seed(0)
    labels = torch.arange(39) % 3
    images = torch.randint(0, 120, (39, 3, side, side), generator=numbers, dtype=torch.uint8)
    images[torch.arange(39), labels] += 100
    every = Samples(images, labels, (0.5,) * 3, (0.25,) * 3, side)
    parts = every[torch.arange(30)], every[torch.arange(30, 39)]
    return source_of(ImageData("colours", *parts, ("red", "green", "blue"), "made", "0"))


def state_of(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_a_deletion_on_anyones_network(name, tmp_path):
    torch.manual_seed(0)
    model, source = NETS[name]().train(), pictures(SIDES.get(name, 32))
    before = state_of(model)
    asked = asked_for(source, classes=["green"])
    ways = {"method": FisherMask(ratio=0.05), "fine_tune": TUNE, "batch_size": 10}
    ways["classifier"] = HEADS.get(name)
    done = delete(model, source, asked, progress="none", control=False, **ways)
    assert model.training and all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert sum(int(where.sum()) for where in done.result.mask.values()) > 0
    out = save_deletion(done, tmp_path / "out")
    assert "Deletion of class green" in (out / "report.html").read_text(encoding="utf-8")
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert len(record["accuracies"]["result"]) == 4 + 3
    again = NETS[name]()
    load_checkpoint(again, out / "model.safetensors")
    state = done.result.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())
    assert set(load_file(out / "model.safetensors")) == set(before)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, pytest.param(torch.compile, marks=pytest.mark.slow)]
)
def test_wrappers_are_seen_through(wrap, tmp_path):
    torch.manual_seed(0)
    plain, source = TwoNames(), pictures(16)
    wrapped, asked = wrap(copy.deepcopy(plain)), asked_for(source, classes=["green"])
    ways = {"method": FisherMask(ratio=0.1), "fine_tune": None, "control": False}
    ours, theirs = (delete(m, source, asked, progress="none", **ways) for m in (plain, wrapped))
    assert ours.accs.equals(theirs.accs)
    for done, folder in ((ours, "a"), (theirs, "b")):
        save_deletion(done, tmp_path / folder)
    states = [load_file(tmp_path / folder / "model.safetensors") for folder in ("a", "b")]
    assert states[0].keys() == states[1].keys() == plain.state_dict().keys()
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
