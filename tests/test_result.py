"""What a result says, shows and writes."""

import json

import pytest
import torch
from torch import nn

from fisher_unlearn import FisherMask, read_mask, unlearn, zero_
from fisher_unlearn.networks.metrics import accuracy
from fisher_unlearn.networks.train import load_weights

X = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 4
LOST, KEPT = [(X[Y == 0], Y[Y == 0])], [(X[Y > 0], Y[Y > 0])]


def net():
    torch.manual_seed(0)
    head = nn.Linear(4, 4)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


@pytest.fixture(scope="module")
def result():
    return unlearn(net(), LOST, KEPT, method=FisherMask(ratio=0.3), evaluate={"forget": LOST})


def test_what_is_left_is_the_accuracy_on_the_forget_set(result):
    assert result.forget_acc == (accuracy(net(), LOST), accuracy(result.model, LOST))
    assert f"{result.forget_acc[1]:.1f} % as labelled" in result.left
    gone = unlearn(net(), LOST, KEPT, method="mask_classifier")
    assert gone.forget_acc[1] == accuracy(gone.model, LOST)


def test_it_is_short_in_text_and_on_a_page(result):
    assert len(repr(result)) < 600 and result.left in repr(result)
    page = result._repr_html_()
    assert result.left in page and result.note in page and len(page) < 5000
    assert "<script" not in page and page.count("<table") == 2


def test_a_model_whose_answers_are_no_numbers_is_said_to_be_so():
    class Breaks(FisherMask):
        def __call__(self, model, task):
            with torch.no_grad():
                model[-1].bias.fill_(torch.nan)
            return {}

    broken = unlearn(net(), LOST, KEPT, method=Breaks())
    assert "answers are no numbers" in broken.left


def test_files_hold_what_came_out_and_load_into_the_users_class(result, tmp_path):
    folder = result.save(tmp_path / "new" / "result")
    assert sorted(p.name for p in folder.iterdir()) == [
        "mask.safetensors",
        "model.safetensors",
        "result.json",
    ]
    again = net()
    load_weights(again, folder / "model.safetensors")
    assert all(torch.equal(again(x), result.model(x)) for x, _ in LOST)
    mask = read_mask(folder / "mask.safetensors")
    assert mask.keys() == result.mask.keys()
    assert all(torch.equal(mask[n], result.mask[n]) for n in mask)
    masked = zero_(net(), mask)
    assert all(torch.equal(masked(x), result.model(x)) for x, _ in LOST)
    said = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert said["options"] == result.method.dump() and said["left"] == result.left
    assert said["forget_acc"]["result"] == pytest.approx(result.forget_acc[1])
    assert [row["name"] for row in said["changed"]] == result.changed.name.tolist()


def test_a_folder_that_holds_anything_is_left_alone(result, tmp_path):
    (tmp_path / "mine").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="holds mine: name an empty one"):
        result.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(OSError, match="cannot write in the folder"):
        result.save(tmp_path / "mine")


def test_other_files_are_no_mask(result, tmp_path):
    folder = result.save(tmp_path / "result")
    with pytest.raises(ValueError, match="a mask is bool"):
        read_mask(folder / "model.safetensors")
    (folder / "mask.safetensors").write_bytes(b"\x80a pickle")
    with pytest.raises(ValueError, match="never opened"):
        read_mask(folder / "mask.safetensors")
