"""What a result says, shows and writes."""

import json
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from fisher_unlearn import FisherMask, read_mask, unlearn, zero_
from fisher_unlearn.networks.metrics import accuracy
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, load_weights

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


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (0, "changed nothing: its ratio is 0."),
        (1e-4, "changed nothing: its ratio of 0.0001 makes less than one weight to mask."),
    ],
)
@pytest.mark.filterwarnings("ignore:.*less than one")
def test_a_ratio_that_changes_nothing_is_named(ratio, said):
    assert said in unlearn(net(), LOST, KEPT, method=FisherMask(ratio=ratio)).note
    assert "changed nothing." in unlearn(net(), LOST, KEPT, method="finetune").note


def tuned(lr):
    settings = TrainSettings(Schedule(lr=lr, epochs=2, drops=()), select="last")
    sets = {"remain": KEPT, "forget": LOST}
    return unlearn(net(), LOST, KEPT, method="finetune", fine_tune=settings, evaluate=sets)


def test_a_first_epoch_that_loses_much_is_pointed_out(monkeypatch):
    calm = tuned(1e-4)
    assert calm.shaken == "" and repr(calm).endswith("%.")
    history = pd.DataFrame(
        {"epoch": [0, 1], "remain_acc": [90.0, 84.9], "lr": [float("nan"), 0.25]}
    )
    shaken = replace(calm, history=history)
    assert "from 90.0 to 84.9 %: its rate of 0.25 is too high" in shaken.shaken
    assert shaken.shaken in repr(shaken) and shaken.shaken in shaken._repr_html_()
    assert replace(calm, history=history.assign(remain_acc=[90.0, 85.0])).shaken == ""
    assert replace(calm, history=history.drop(columns="remain_acc")).shaken == ""


def test_the_unlearn_score_is_left_out_where_samples_of_remaining_classes_go():
    "There the retrained model answers the forget set, too."
    assert "unlearn_score" in tuned(1e-4).history
    samples, rest = [(X[:8], Y[:8])], [(X[8:], Y[8:])]
    sets = {"remain": rest, "forget": samples}
    assert "unlearn_score" not in unlearn(net(), samples, rest, evaluate=sets, ratio=0.1).history


def test_what_scoring_takes_is_said_first_where_it_is_much(monkeypatch):
    head = nn.Linear(4, 60)
    wide = nn.Sequential(*[*net()][:-1], head)
    with pytest.warns(UserWarning, match="takes 60 forward and backward passes of each batch"):
        unlearn(wide, LOST, KEPT, preset="authors_code", ratio=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unlearn(wide, LOST, KEPT, ratio=0.3)


def test_statistics_and_counters_are_no_distance():
    """A method that trains moves the counters of BatchNorm by hundreds, which is no way that the
    weights went."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 4))
    found = unlearn(model, LOST, KEPT, method="ct")
    far = sum(
        float((new - old).detach().double().square().sum())
        for new, old in zip(found.model.parameters(), model.parameters())
    )
    assert found.moved == pytest.approx(far**0.5)
    assert f"moved the model by {found.moved:.3g}." in found.note
    assert "1.num_batches_tracked" in set(found.changed.name) - set(found.weights.name)
    assert "num_batches_tracked" not in found._repr_html_()
