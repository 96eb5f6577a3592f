"""What a deletion claims must be true: of whole classes that are listed by file, of networks that
never knew the images, of earlier requests, and of images that were seen."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from fisher_unlearn.cli import app
from fisher_unlearn.images.data import ImageData, Samples
from fisher_unlearn.images.folders import read_folder
from fisher_unlearn.images.sources import asked_for, hashes_of, places_of, source_of
from fisher_unlearn.lab import deletion
from fisher_unlearn.lab.deletion import Earlier, delete, tried, without_earlier
from fisher_unlearn.lab.deletion_order import _tuning, forget, order_of, recommended
from fisher_unlearn.lab.deletion_report import read_requests
from fisher_unlearn.lab.notebook import find_notebook
from fisher_unlearn.methods.retraining import Finetune
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, load_weights, save_weights, train_model

NAMES = ("ant", "bee", "cat", "dog")
COLOURS = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220], [200, 200, 30]])
MODULE = """
from torch import nn

def net(num_classes):
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""
QUIET = {"fine_tune": None, "control": False, "progress": "none"}


def draw(folder, seed=0):
    "Ten pictures of each class, by its colour and some noise."
    numbers = np.random.default_rng(seed)
    for name, colour in zip(NAMES, COLOURS.numpy()):
        (folder / name).mkdir(parents=True)
        for place in range(10):
            noise = numbers.integers(-30, 30, (8, 8, 3))
            pixels = (colour + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{place}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with pictures to train and to test on, a module with a network, and its weights."
    place = tmp_path_factory.mktemp("toy")
    draw(place / "plain")
    draw(place / "held", 1)
    (place / "toy_net.py").write_text(MODULE, encoding="utf-8")
    sys.path.insert(0, str(place))
    model = made()
    settings = TrainSettings(Schedule(lr=0.1, epochs=30, drops=(20,)), select="last", batch_size=8)
    train_model(model, read_folder(place / "plain", size=8).images.train, settings, progress="none")
    save_weights(model, place / "w.safetensors")
    yield place
    sys.path.remove(str(place))


def made():
    import toy_net

    torch.manual_seed(0)
    return toy_net.net(4)


@pytest.fixture
def model(place):
    found = made()
    load_weights(found, place / "w.safetensors")
    return found.eval()


@pytest.fixture
def source(place):
    return source_of(read_folder(place / "plain", size=8, test=place / "held"))


@pytest.fixture
def order(place, tmp_path):
    "An order on that folder; each has a folder of its own for what comes out."

    def named(**more):
        named.count += 1
        plain = {"model": "toy_net:net", "data": str(place / "plain"), "size": 8, "epochs": 0}
        plain |= {"checkpoint": str(place / "w.safetensors"), "control": False}
        plain |= {"out": str(tmp_path / f"out{named.count}"), **more}
        return order_of(**plain)

    named.count = 0
    return named


class Sets(Finetune):
    "A method that does what a test wants, in place."

    def __call__(self, model, task):
        with torch.no_grad():
            self.change(model)
        return {}

    @staticmethod
    def change(model):
        pass


class Loses(Sets):
    "Class 2 is never answered again."

    @staticmethod
    def change(model):
        model[-1].bias[2] = -1e4


class Returns(Sets):
    "Class 2 is answered as it was before `Loses`."

    @staticmethod
    def change(model):
        model[-1].bias[2] += 1e4


# ------------------------------------------------------------------- whole classes, by their files


def all_of(name):
    return [f"{name}/{n}.png" for n in range(10)]


def test_all_files_of_a_class_are_that_class(source, model, tmp_path):
    listed = tmp_path / "all_cat.csv"
    listed.write_text("\n".join(["file", *all_of("cat")]), encoding="utf-8")
    by_name = asked_for(source, classes=["cat"])
    for given in ({"files": all_of("cat")}, {"listed": listed}, {"samples": range(20, 30)}):
        asked = asked_for(source, **given)
        assert asked.classes == by_name.classes == (2,)
        assert torch.equal(asked.forget, by_name.forget)
        one, other = (
            delete(model, source, a, method="finetune", **QUIET) for a in (asked, by_name)
        )
        assert one.verdict == other.verdict and one.verdict.forgotten is False
        assert "test_forget" in one.accs.index and one.what == other.what
    two = asked_for(source, files=all_of("cat") + all_of("ant"))
    assert two.classes == (0, 2)
    assert asked_for(source, files=all_of("cat")[1:]).classes == ()


def test_a_class_and_some_images_more_have_no_verdict_in_common(source, model):
    asked = asked_for(source, files=[*all_of("cat"), "dog/1.png"])
    assert asked.classes == ()
    mixed = delete(model, source, asked, method="finetune", **QUIET)
    assert mixed.verdict.forgotten is None and "all of class cat" in mixed.verdict.said[0]
    assert mixed.accs.original["test_forget"] == 100.0
    assert len(mixed.accs.loc[["test_remain"]]) == 1


def test_the_rest_of_a_class_that_an_earlier_request_began_is_the_class(source, model):
    some = asked_for(source, files=all_of("cat")[:4])
    first = Earlier("0", tuple(hashes_of(source.train, some.forget)), "some of cat")
    rest = asked_for(source, files=all_of("cat")[4:])
    less, _ = without_earlier(source, rest, [first])
    assert less.classes == (2,)
    left = delete(model, source, rest, method="finetune", earlier=[first], **QUIET)
    assert left.verdict.forgotten is False and "never saw the class" in left.verdict.said[0]


# ----------------------------------------------------------------- networks that never knew these


def test_what_was_never_known_is_not_forgotten(source, model):
    "The labels of the folder and of the model are in another order."
    swapped = torch.tensor([2, 1, 0, 3])
    with torch.no_grad():
        for tensor in (model[-1].weight, model[-1].bias):
            tensor.copy_(tensor[swapped])
    found = delete(model, source, asked_for(source, classes=["cat"]), method="finetune", **QUIET)
    assert found.accs.result["forget"] == 0 and found.verdict.forgotten is None
    assert "the original already" in found.verdict.said[0]
    (note,) = [n for n in found.notes if "in the order" in n]
    assert "class ant (0.0 %)" in note and "class cat (0.0 %)" in note and "bee" not in note


def test_an_untrained_network_has_forgotten_nothing(source):
    fresh = made().eval()
    found = delete(fresh, source, asked_for(source, classes=["cat"]), method=Loses(), **QUIET)
    known = found.accs.original["forget"]
    assert found.verdict.forgotten is (None if known <= 5 else True)
    assert any("chance" in note for note in found.notes)


def test_samples_that_are_answered_as_unseen_ones_are_not_said_to_be_forgotten(source, model):
    asked = asked_for(source, files=["cat/0.png", "dog/1.png"])
    found = delete(model, source, asked, method="finetune", **QUIET)
    assert found.accs.original["forget"] == found.accs.original["test_remain"] == 100
    assert found.verdict.forgotten is None


# ------------------------------------------------------------------------------- earlier requests


def test_a_hash_is_of_the_image_and_not_of_how_it_is_normalised(place):
    one, other = (
        source_of(read_folder(place / "plain", size=8, mean=mean)).train
        for mean in ((0.0,), (0.01,))
    )
    every = torch.arange(len(one))
    assert hashes_of(one, every) == hashes_of(other, every)
    assert len({*hashes_of(one, every)}) == len(one)


def test_a_chain_from_before_is_still_found(place, source):
    "Hashes of normalised images, as they were once written."
    from fisher_unlearn.images.overlap import sample_hashes

    cats = asked_for(source, classes=["cat"]).forget
    old = [mark.hex() for mark, _ in sample_hashes(source.train.held[cats].batches())]
    assert old != hashes_of(source.train, cats)
    assert torch.equal(places_of(source.train, old), cats)


def test_images_of_an_earlier_request_are_left_out_whatever_they_are_normalised_by(order):
    first = order(classes="cat")
    forget(first, "none")
    second = order(
        classes="ant", checkpoint=f"{first.out}/model.safetensors", mean=(0.01,), epochs=1
    )
    found = forget(second, "none")
    assert len(found.asked.remain) == 20 and "earlier_1" in found.accs.index
    assert not any("not there" in note for note in found.notes)


def test_images_in_another_size_can_not_be_recognised(order):
    first = order(classes="cat")
    forget(first, "none")
    second = order(classes="ant", checkpoint=f"{first.out}/model.safetensors", size=16)
    with pytest.raises(ValueError, match=r"3 × 8 × 8.*3 × 16 × 16.*read them as before"):
        forget(second, "none")
    assert not Path(second.out).exists()


def test_weights_without_the_requests_that_they_went_through_are_refused(order, tmp_path):
    first = order(classes="cat")
    forget(first, "none")
    shutil.copy(f"{first.out}/model.safetensors", tmp_path / "alone.safetensors")
    second = order(classes="ant", checkpoint=str(tmp_path / "alone.safetensors"))
    for carry_out in (lambda: forget(second, "none"), lambda: recommended(second)):
        with pytest.raises(ValueError, match=r"requests\.json.*put it (back )?beside"):
            carry_out()
    text = Path(first.out, "requests.json").read_text(encoding="utf-8")
    chain = json.loads(text)
    chain[0]["hashes"] = chain[0]["hashes"][1:]
    for other in (chain, []):
        (tmp_path / "requests.json").write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(ValueError, match="are not the weights that"):
            forget(second, "none")
    (tmp_path / "requests.json").write_text(text, encoding="utf-8")
    assert len(forget(second, "none").earlier) == 1


def test_a_chain_from_before_is_read(order, tmp_path):
    "Neither the names of classes nor a digest in the weights: so it was once."
    first = order(classes="cat")
    done = forget(first, "none")
    weights = save_weights(done.result.model, tmp_path / "model.safetensors")
    old = {"digest": done.digest, "hashes": done.hashes, "said": done.what, "weights": weights}
    (tmp_path / "requests.json").write_text(json.dumps([old]), encoding="utf-8")
    (found,) = read_requests(tmp_path / "model.safetensors")
    assert (found.digest, found.hashes, found.weights) == (done.digest, done.hashes, weights)


def test_an_earlier_request_that_comes_back_is_in_the_verdict(source, model):
    cats = asked_for(source, classes=["cat"])
    gone = delete(model, source, cats, method=Loses(), **QUIET)
    assert gone.verdict.forgotten is True
    first = Earlier(gone.digest, gone.hashes, gone.what)
    asked = asked_for(source, classes=["ant"])

    class Both(Returns):
        @staticmethod
        def change(model):
            Returns.change(model)
            model[-1].bias[0] = -1e4

    again = delete(gone.result.model, source, asked, method=Both(), earlier=[first], **QUIET)
    assert again.accs.result["earlier_1"] == 100 and again.accs.result["forget"] == 0
    assert again.verdict.forgotten is False
    (said,) = [s for s in again.verdict.said if "earlier request 1" in s]
    assert "100.0 %" in said and "0.0 %" in said and said.startswith("Not forgotten")
    kept = delete(gone.result.model, source, asked, method=Loses(), earlier=[first], **QUIET)
    assert not any("earlier request" in s for s in kept.verdict.said)


def test_a_forgotten_class_is_no_part_of_what_should_stay(source, model):
    "Its return would raise what is kept; its images are in no set that a verdict rests on."
    gone = delete(model, source, asked_for(source, classes=["cat"]), method=Loses(), **QUIET)
    first = Earlier(gone.digest, gone.hashes, gone.what)
    asked = asked_for(source, classes=["ant"])
    again = delete(gone.result.model, source, asked, method="finetune", earlier=[first], **QUIET)
    assert again.accs.original["test_remain"] == 100 and again.accs.original["class cat"] == 0
    assert not any("in the order" in note for note in again.notes)
    assert any("class cat" in note and "no training image" in note for note in again.notes)


def test_a_second_request_is_made_after_the_class_is_gone_from_the_disk(order, place, tmp_path):
    data = tmp_path / "mine"
    shutil.copytree(place / "plain", data)
    first = order(data=str(data), classes="cat", test=str(place / "held"))
    forget(first, "none")
    weights = f"{first.out}/model.safetensors"
    for leave in (lambda: [p.unlink() for p in (data / "cat").iterdir()], (data / "cat").rmdir):
        leave()
        second = order(data=str(data), classes="ant", checkpoint=weights, test=str(place / "held"))
        found = forget(second, "none")
        assert found.source.classes == NAMES and found.asked.classes == (0,)
        assert len(found.asked.remain) == 20 and "class cat" in found.accs.index
        assert any("class cat" in note and "no training image" in note for note in found.notes)
        assert found.earlier[0].classes == NAMES
    (data / "dodo").mkdir()
    shutil.copy(data / "dog" / "0.png", data / "dodo")
    with pytest.raises(ValueError, match="dodo"):
        forget(order(data=str(data), classes="ant", checkpoint=weights), "none")


# ---------------------------------------------------------------------- what was seen, and by whom


def test_test_images_that_were_trained_on_are_no_test(order, place):
    plain = str(place / "plain")
    words = f"forget --model toy_net:net --data {plain} --test {plain} --size 8 --epochs 0".split()
    out = order(classes="cat").out
    words += ["--checkpoint", str(place / "w.safetensors"), "--files", "cat/0.png,cat/1.png"]
    ended = CliRunner().invoke(app, [*words, "--out", out])
    assert ended.exit_code == 0, ended.output
    assert "Forgotten, by" not in ended.output and "never saw" not in ended.output
    record = json.loads(Path(out, "record.json").read_text(encoding="utf-8"))
    assert record["verdict"]["forgotten"] is None
    assert "test_remain" not in record["accuracies"]["original"]
    assert any("40 of 40 test images" in note for note in record["notes"])
    assert "40 of 40 test images" in ended.output


def test_test_images_that_are_some_of_the_others_are_left_out(model, place, tmp_path):
    held = tmp_path / "held"
    shutil.copytree(place / "held", held)
    shutil.copy(place / "plain" / "cat" / "3.png", held / "cat" / "seen.png")
    source = source_of(read_folder(place / "plain", size=8, test=held))
    asked = asked_for(source, files=["cat/0.png"])
    found = delete(model, source, asked, method="finetune", **QUIET)
    assert len(found.source.test) == 40 and any("1 of 41 test images" in n for n in found.notes)
    without = delete(model, source, asked, method="finetune", **QUIET)
    assert without.accs.original["test_remain"] == 100


def test_a_retrained_model_that_is_the_original_is_refused(order, place):
    same = str(place / "w.safetensors")
    with pytest.raises(ValueError, match="retrained model is the original.*without"):
        forget(order(classes="cat", retrained=same), "none")


def test_a_retrained_model_that_knows_the_class_is_no_reference(source, model):
    saw = made()
    saw.load_state_dict(model.state_dict())
    with torch.no_grad():
        saw[-1].bias += 1e-3
    asked = asked_for(source, classes=["cat"])
    for method in ("finetune", Loses()):
        found = delete(model, source, asked, method=method, retrained=saw.eval(), **QUIET)
        assert found.verdict.forgotten is None
        assert "answers 100.0 % of a class that it never saw" in found.verdict.said[0]


# ------------------------------------------------------------------- what answers do not give away


def noise(seed, shift=0.0):
    "A hundred images of each of four classes, which are much alike."
    drawn = torch.Generator().manual_seed(seed)
    centres = 8 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(400) % 4
    images = 128 + shift + centres[labels] + 50 * torch.randn(400, 1, 8, 8, generator=drawn)
    return Samples(images.clamp(0, 255).round().byte(), labels, (0.5,), (0.25,), 8)


def by_heart(seed, samples):
    "A network that has learned its images by heart."
    torch.manual_seed(seed)
    first = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU()]
    model = nn.Sequential(*first, nn.Linear(64, len(NAMES)))
    settings = TrainSettings(
        Schedule(lr=0.1, epochs=15, drops=(12,)), select="last", batch_size=32, weight_decay=0.0
    )
    train_model(model, samples, settings, progress="none")
    return model.eval()


@pytest.fixture(scope="module")
def learned():
    "Images, a network that knows them by heart, and one that never saw class 2."
    source = source_of(ImageData("noise", noise(1), noise(2), NAMES, "made", "0"))
    train = source.train.held
    return source, by_heart(0, train), by_heart(1, train[(train.labels != 2).nonzero()[:, 0]])


def becomes(other):
    "A method that puts another network's weights in place."

    class Becomes(Sets):
        @staticmethod
        def change(model):
            model.load_state_dict(other.state_dict())

    return Becomes()


def asks(learned, method, source=None, **more):
    "The verdict on class 2 after a method, and what is said of membership."
    source, model = source or learned[0], learned[1]
    asked = asked_for(source, classes=["cat"])
    verdict = delete(model, source, asked, method=method, **QUIET, **more).verdict
    (said,) = (line for line in verdict.said if "membership" in line or "Membership" in line)
    return verdict, said


def test_a_deleted_row_is_not_forgotten_whatever_it_answers(learned):
    _, _, without = learned
    for method, retrained in ((Loses(), None), (Loses(), without)):
        verdict, said = asks(learned, method, retrained=retrained)
        assert verdict.said[0].startswith("Forgotten, by its answers: forget set 0.0 %")
        assert verdict.forgotten is False and said.startswith("Not forgotten, by membership")
        assert "area by loss 0.50" in said and "by chance up to 0.61" in said
        assert said.endswith("of another kind.") is (retrained is None)


def test_a_network_that_never_saw_the_class_has_forgotten_it(learned):
    verdict, said = asks(learned, becomes(learned[2]))
    assert verdict.forgotten is True and said.startswith("Nothing found by membership")


def test_where_the_original_gives_nothing_away_membership_shows_nothing(learned):
    source, _, without = learned
    blind = (source, without, without)  # it was never trained on the class
    verdict, said = asks(blind, "finetune")
    assert said.startswith("Membership shows nothing: not even the original")
    assert verdict.forgotten is None  # and its answers show nothing, either


def test_test_images_of_another_kind_are_no_evidence(learned):
    "Even a network that never saw the class tells them: their values are shifted."
    source, model, without = learned
    shifted = source_of(ImageData("noise", noise(1), noise(2, 60.0), NAMES, "made", "0"))
    verdict, said = asks(learned, Loses(), shifted, retrained=without)
    assert said.startswith("Membership shows nothing: the retrained model, too")
    assert verdict.forgotten is True  # by its answers, and by nothing else


def test_samples_that_are_still_known_by_heart_are_told(learned):
    source, model, _ = learned
    asked = asked_for(source, samples=range(80))
    found = delete(model, source, asked, method="finetune", **QUIET)
    assert found.verdict.forgotten is False
    assert found.verdict.said[2].startswith("Not forgotten, by membership")


def test_nothing_is_said_of_membership_without_unseen_images(source, model):
    few = asked_for(source, files=["cat/0.png", "cat/1.png"])
    verdict = delete(model, source, few, method="finetune", **QUIET).verdict
    assert not any("embership" in line for line in verdict.said)


# ----------------------------------------------------------------------------------- recommendation


@pytest.mark.parametrize(
    "given",
    [{"options": "nonsense"}, {"method": "ssd"}, {"preset": "paper"}, {"retrained": "nofile"}],
)
def test_a_recommendation_refuses_what_it_would_not_use(order, given):
    with pytest.raises(ValueError, match=f"`{next(iter(given))}`.*`recommend`.*leave"):
        recommended(order(classes="cat", recommend=True, **given))


def test_a_recommendation_knows_of_earlier_requests(order, monkeypatch):
    first = order(classes="cat")
    forget(first, "none")
    weights = f"{first.out}/model.safetensors"
    seen = []
    whole = deletion._able
    monkeypatch.setattr(deletion, "_able", lambda asked: seen.append(asked) or whole(asked))
    table = recommended(order(classes="ant", checkpoint=weights, recommend=True))
    (asked,) = seen
    assert len(table) and not {*range(20, 30)} & {*asked.remain.tolist()}


def test_a_recommendation_without_test_images_of_what_stays(model, place, tmp_path):
    "All that is held out is of the class that goes: then some training images are held out."
    for name in NAMES:
        (tmp_path / "held" / name).mkdir(parents=True)
    shutil.copytree(place / "held" / "cat", tmp_path / "held" / "cat", dirs_exist_ok=True)
    whole = source_of(read_folder(place / "plain", size=8, test=place / "held"))
    cats = whole.test.labels == 2
    test = type(whole.test)(whole.test.held[cats], whole.test.labels[cats])
    source = type(whole)("toy", whole.train, test, NAMES)
    table = tried(model, source, asked_for(source, classes=["cat"]), fine_tune=None)
    assert len(table) and table.stays.notna().all()


# -------------------------------------------------------------------------- what it took, and names


def test_the_time_is_that_of_all_and_the_expectation_comes_first(source, model, monkeypatch):
    audited, tried_out = deletion.audit, deletion.expected_cost
    said = []
    monkeypatch.setattr(deletion, "audit", lambda *a, **k: time.sleep(1) or audited(*a, **k))
    monkeypatch.setattr(deletion, "unlearn", lambda *a, **k: said.append("work") or done(*a, **k))
    monkeypatch.setattr(
        deletion, "expected_cost", lambda *a: said.append("expected") or tried_out(*a)
    )
    from fisher_unlearn.methods.unlearn import unlearn as done

    found = delete(model, source, asked_for(source, classes=["cat"]), method="finetune", **QUIET)
    assert found.seconds > 1 and said == ["expected", "work"]


def test_what_is_said_before_is_what_is_written(order, capsys):
    first = order(classes="cat")
    forget(first, "none")
    second = order(classes="ant", checkpoint=f"{first.out}/model.safetensors")
    done = forget(second, "lines")
    said = capsys.readouterr().out
    assert "10 images to forget, 20 to remain" in said and str(done.cost) in said
    assert "fine-tun" not in str(done.cost)


def test_names_stay_as_they_are(source, model):
    named = type(source)("toy", source.train, source.test, ("ant", "bee", "cat", "NaN_class"))

    class Breaks(Sets):
        @staticmethod
        def change(model):
            model[-1].bias[3] = -1e4

    found = delete(model, named, asked_for(named, classes=["cat"]), method=Breaks(), **QUIET)
    assert any(note.startswith("Class NaN_class fell") for note in found.notes)


def test_two_classes_of_one_name_are_refused(source):
    with pytest.raises(ValueError, match="'ant' twice"):
        type(source)("toy", source.train, None, ("ant", "bee", "ant", "dog"))


@pytest.mark.parametrize("share", [0.0, 0.04, 0.05, 0.16, 0.2, 0.95])
def test_warm_up_is_exactly_the_share_that_was_asked(order, share):
    schedule = _tuning(order(classes="cat", epochs=5, warmup=share)).schedule
    assert schedule.warmup / schedule.epochs == pytest.approx(share)
    assert schedule.epochs == (10 if share in (0.0, 0.2) else 100)
    ways = [d / schedule.epochs for d in schedule.drops]
    assert ways == [0.5, 0.7] and schedule.length == 5


@pytest.mark.parametrize("share", [0.001, 0.125, 0.995])
def test_warm_up_that_can_not_be_had_is_refused(order, share):
    with pytest.raises(ValueError, match="`warmup` of the order is .* hundredths"):
        forget(order(classes="cat", epochs=5, warmup=share), "none")


@pytest.mark.parametrize("given", [{"data": "plain", "model": "toy_net:net"}, {"epochs": 1}])
def test_the_notebook_never_puts_its_example_in_place_of_what_is_given(given, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("fisher_unlearn.lab.deletion_order.example", lambda _: {"seed": "example"})
    nb = parameterize_notebook(load_notebook_node(str(find_notebook("forget_your_own"))), given)
    space = {"In": [""]}
    with pytest.raises(ValueError, match="no checkpoint is given|nothing is named"):
        for cell in nb.cells:
            if cell.cell_type == "code":
                exec(cell.source, space)
    assert space["given"]["seed"] is None and "done" not in space
