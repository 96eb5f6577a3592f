"""A deletion from a program, a command and a notebook: what is measured, judged, written, refused,
and found again by the next request."""

import copy
import hashlib
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import papermill
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from fisher_unlearn.cli import app
from fisher_unlearn.images.data import load_images
from fisher_unlearn.images.sources import (
    Part,
    asked_for,
    hashes_of,
    source_named,
    source_of,
)
from fisher_unlearn.lab.deletion import Earlier, Margins, delete, expected_cost, tried
from fisher_unlearn.lab.deletion_order import command_of, example, forget, order_of, order_types
from fisher_unlearn.lab.deletion_report import _Block, read_requests, save_deletion
from fisher_unlearn.lab.notebook import find_notebook
from fisher_unlearn.methods.masks import FisherMask
from fisher_unlearn.methods.retraining import Finetune
from fisher_unlearn.methods.unlearn import METHODS
from fisher_unlearn.networks.metrics import accuracy, evaluate
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, load_weights, train_model

FILES = {
    "model.safetensors",
    "mask.safetensors",
    "record.json",
    "requests.json",
    "report.html",
    "report.md",
    "where_the_mask_fell.png",
    "answers_before_and_after.png",
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "An example: the network, its weights, the images, what to forget."
    return example(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def digits():
    return source_of(load_images("digits"))


@pytest.fixture(scope="module")
def model(given):
    made = build_model("resnet20", 10, 1)
    load_weights(made, given["checkpoint"])
    return made.eval()


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    "That example, carried out, and its folder."
    out = tmp_path_factory.mktemp("done") / "result"
    return forget(order_of(**given, options="ratio=0.05", epochs=1, out=str(out)), "none"), out


def test_every_number_is_the_accuracy_of_a_model_on_a_set(done, digits, model):
    found, _ = done
    labels, held = digits.train.labels, digits.test
    sets = {
        "forget": digits.train.held[labels == 4].batches(),
        "remain": digits.train.held[labels != 4].batches(),
        "test_forget": held.held[held.labels == 4].batches(),
        "test_remain": held.held[held.labels != 4].batches(),
        "class 7": held.held[held.labels == 7].batches(),
    }
    for column, network in (("original", model), ("result", found.result.model)):
        wanted = evaluate(network, sets)
        assert {n: found.accs[column][n] for n in sets} == {n: wanted[f"{n}_acc"] for n in sets}
    assert len(found.accs) == 4 + 10
    assert list(found.accs) == ["original", "after_method", "result", "control"]


def test_the_masked_model_is_what_was_measured_after_the_method(done, digits, model):
    from fisher_unlearn.methods.masking import zero_

    found, _ = done
    masked = zero_(build_model("resnet20", 10, 1), {})
    masked.load_state_dict(model.state_dict())
    zero_(masked, found.result.mask)
    forget = digits.train.held[digits.train.labels == 4].batches()
    assert found.accs.after_method["forget"] == accuracy(masked, forget)


def test_the_folder_holds_all_and_the_weights_fit_the_users_class(done):
    found, out = done
    assert {p.name for p in out.iterdir()} == FILES
    again = build_model("resnet20", 10, 1)
    again.load_state_dict(load_file(out / "model.safetensors"))
    state = found.result.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert record["asked"]["digest"] == found.digest
    assert record["positions"] == found.asked.forget.tolist()
    assert record["accuracies"]["result"]["forget"] == found.accs.result["forget"]
    assert record["options"]["ratio"] == 0.05 and record["repeat"].startswith(
        "fisher-unlearn forget"
    )
    assert (out.stat().st_mode & 0o777) == 0o755


class Texts(HTMLParser):
    "The text of a page, and how its tags are nested."

    def __init__(self):
        super().__init__()
        self.open, self.text, self.pictures = [], "", 0

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures += dict(attributes)["src"].startswith("data:image/png;base64,")
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_says_what_was_asked_done_and_measured(done):
    found, out = done
    page, text = Texts(), (out / "report.md").read_text(encoding="utf-8")
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    assert not page.open and page.pictures == 2
    for said in (page.text, text):
        assert found.digest in said and found.what in said and found.result.note in said
        assert all(line in said for line in (*found.verdict.said, *found.notes))
        assert "no certified deletion" in said and "a model that was retrained" in said
        assert f"{found.accs.result['remain']:.1f}" in said
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {title}"
        for title in (
            "What was asked",
            "What came of it",
            "Is it gone?",
            "What was done",
            "What it cost",
            "How to repeat it",
            "What this is not",
        )
    ]
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_command_of_the_report_does_it_again(done, tmp_path, monkeypatch):
    found, out = done
    repeat = json.loads((out / "record.json").read_text(encoding="utf-8"))["repeat"]
    text, words = (out / "report.md").read_text(encoding="utf-8"), shlex.split(repeat)[1:]
    assert f"    {repeat}\n\nIts results need a new folder: name one after --out" in text
    refused = CliRunner().invoke(app, words)  # as it is printed, over what it made
    assert refused.exit_code == 2 and "name a new folder" in refused.output
    words[words.index(str(out))] = str(tmp_path / "again")
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    ours, theirs = (load_file(o / "model.safetensors") for o in (out, tmp_path / "again"))
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())
    assert "Deletion of class 4" in ended.output and "about" in ended.output


@pytest.mark.parametrize(
    "given",
    [
        {"files": ("a, b.png", " c.png", "[d].png", "é.png")},
        {"files": ("[d].png",)},
        {"classes": ("cat", "dog")},
        {"samples": (3, 1, 2), "mean": (0.5, -1.25), "std": (1e-3, 2.0)},
        {"options": ("ratio=0.1", "unit=channel"), "warmup": 0.2, "control": False},
    ],
)
def test_an_order_is_typed_so_that_it_is_read_again(given):
    words = shlex.split(command_of(order_of(**given)))[2:]
    read = {}
    while words:
        flag = words.pop(0).removeprefix("--")
        off = flag.startswith("no-")
        read[flag.removeprefix("no-").replace("-", "_")] = False if off else words.pop(0)
    numbers = {"warmup": float}
    meant = {n: numbers.get(n, lambda v: v)(v) for n, v in read.items()}
    assert order_of(**meant) == order_of(**given)


def test_warm_up_is_a_share_of_fine_tuning(given, tmp_path):
    "A rate that rises in two of ten tenths, so in two of ten steps."
    order = order_of(**given, out=str(tmp_path / "x"), warmup=0.2, epochs=1, control=False)
    made = forget(order, "none")
    assert made.fine_tune.schedule.warmup == 2
    rates = [made.fine_tune.schedule.rate(step, 10) for step in range(10)]
    assert rates[:5] == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01])


def test_a_second_request_goes_on_from_the_first(done, given, tmp_path):
    found, out = done
    named = {**given, "classes": None, "samples": "0,1,2", "epochs": 1, "control": False}
    weights = str(out / "model.safetensors")
    after = forget(order_of(**{**named, "checkpoint": weights}, out=str(tmp_path / "b")), "none")
    assert [e.digest for e in after.earlier] == [found.digest]
    both = {*after.asked.forget.tolist(), *found.asked.forget.tolist()}
    assert not both & {*after.asked.remain.tolist()}
    assert after.accs.original["earlier_1"] == found.accs.result["forget"]
    chain = read_requests(tmp_path / "b" / "model.safetensors")
    assert [e.digest for e in chain] == [found.digest, after.digest]
    assert "Earlier request 1: class 4" in (tmp_path / "b" / "report.md").read_text()


def test_weights_that_the_chain_does_not_speak_of_are_refused(done, given, tmp_path):
    _, out = done
    (tmp_path / "requests.json").write_bytes((out / "requests.json").read_bytes())
    (tmp_path / "w.safetensors").write_bytes(Path(given["checkpoint"]).read_bytes())
    with pytest.raises(ValueError, match="are not the weights"):
        read_requests(tmp_path / "w.safetensors")


@pytest.mark.parametrize("text", ["{", "[1]", '[{"digest": "0"}]', "3"])
def test_a_damaged_chain_is_said_to_be_so(given, tmp_path, text):
    (tmp_path / "requests.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="is no chain of requests"):
        read_requests(tmp_path / "w.safetensors")


def test_weights_saved_by_torch_are_not_taken_for_safetensors(given, tmp_path):
    "An empty chain says nothing of them, and one that speaks of others is named."
    weights, chain = tmp_path / "w.pt", tmp_path / "requests.json"
    torch.save(load_file(given["checkpoint"]), weights)
    chain.write_text("[]", encoding="utf-8")
    assert read_requests(weights) == ()
    one = {"digest": "0", "hashes": ["0"], "said": "a class", "weights": "0"}
    chain.write_text(json.dumps([one]), encoding="utf-8")
    with pytest.raises(ValueError, match="requests.json speaks of weights in safetensors") as no:
        read_requests(weights)
    assert "pickle" not in str(no.value)


def test_images_that_are_gone_since_are_told(digits, model):
    first = Earlier("0", ("0" * 32,), "a request of old")
    asked = asked_for(digits, samples=[1, 2])
    ways = {"method": "finetune", "fine_tune": None, "control": False, "progress": "none"}
    made = delete(model, digits, asked, earlier=[first], **ways)
    assert any("earlier request 1 can't be measured" in note for note in made.notes)


def test_images_of_which_some_are_gone_since_are_counted(digits):
    marks = (*hashes_of(digits.train, torch.tensor([3, 7])), "0" * 32)
    twice = (*hashes_of(digits.train, torch.tensor([5])), "1" * 32)
    earlier = [
        Earlier("0", marks, "three"),
        Earlier("1", marks[:2], "two"),
        Earlier("2", twice, ""),
    ]
    ways = {"method": "finetune", "fine_tune": None, "control": False, "progress": "none"}
    train = digits.train.held[torch.tensor([*range(20), 5])]
    source = replace(digits, train=Part(train, train.labels), test=None)
    asked, model = asked_for(source, samples=[1, 2]), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    made = delete(model, source, asked, earlier=earlier, **ways)
    notes = [note for note in made.notes if "can't be measured" in note]
    assert ["1 of its 3 images" in notes[0], "1 of its 2 images" in notes[1]] == [True, True]
    assert len(notes) == 2


def test_a_report_without_a_known_classifier_lacks_a_picture_and_nothing_else(
    digits, model, tmp_path
):
    class Hidden(nn.Module):
        "torch.fx can't trace it, so that its classifier isn't found."

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x) if bool(x.isfinite().all()) else x

    asked = asked_for(digits, classes=[4])
    how = FisherMask(ratio=0.01, classifier_in_pool=True)
    ways = {"fine_tune": None, "control": False, "progress": "none"}
    made = delete(Hidden().eval(), digits, asked, method=how, **ways)
    out = save_deletion(made, tmp_path / "out")
    assert {p.name for p in out.iterdir()} == FILES - {"where_the_mask_fell.png"}
    (tmp_path / "empty").mkdir()
    assert save_deletion(made, tmp_path / "empty").is_dir()


ODD = ("banana", "a|b", "<b>", "$5__old", "$10__old")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    "A deletion of two files out of a folder whose classes have names full of marks."
    from PIL import Image

    folder, draws = tmp_path_factory.mktemp("odd") / "images", torch.Generator().manual_seed(0)
    for place, name in enumerate(ODD):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 40, (6, 6, 3), generator=draws) + 50 * place
            Image.fromarray(pixels.byte().numpy()).save(folder / name / f"{number}.png")
    source = source_named(str(folder), size=6)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, len(ODD)))
    ways = {"fine_tune": None, "control": False, "progress": "none", "ratio": 0.1}
    return lambda **asked: delete(net, source, asked_for(source, **asked), **ways)


def cells(line):
    "The cells of a row of a table, with what stands for a mark as it was."
    return [re.sub(r"\\(.)", r"\1", part).strip() for part in re.split(r"(?<!\\)\|", line)][1:-1]


def test_names_come_unchanged_into_the_report(odd, tmp_path):
    "No letters are lost, no name adds a column, and none is taken for a mark."
    made = odd(classes=["a|b"])
    out = save_deletion(made, tmp_path / "out")
    text = (out / "report.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in text.splitlines() if line.startswith("| class ")]
    assert [row[0] for row in rows] == [f"class {name}" for name in sorted(ODD)]
    assert {len(row) for row in rows} == {1 + len(made.accs.columns)}
    assert not re.search(r"(?<!\\)<b>|\bnan\b", text)
    page = Texts()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    assert not page.open and all(f"class {name}" in page.text for name in ODD)


def test_a_layers_name_is_no_number_and_what_is_missing_is_empty():
    table = pd.DataFrame({"a": [1.0, None], "b": [2, 3]}, index=["1.10", "nan_head"])
    lines = _Block("table", table).as_markdown().splitlines()
    assert [cells(line) for line in lines[2:]] == [["1.10", "1", "2"], ["nan_head", "", "3"]]


def test_a_dollar_in_a_name_costs_no_picture(odd, tmp_path):
    out = save_deletion(odd(classes=["$5__old"]), tmp_path / "out")
    assert {p.name for p in out.iterdir()} == FILES


def test_a_picture_that_fails_is_left_out_and_said(odd, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no font\nwas found")

    made = odd(classes=["banana"])
    monkeypatch.setattr("fisher_unlearn.lab.deletion_report._draw_answers", broken)
    out = save_deletion(made, tmp_path / "out")
    assert {p.name for p in out.iterdir()} == FILES - {"answers_before_and_after.png"}
    said = (out / "report.md").read_text(encoding="utf-8")
    assert "left out, because it can't be drawn: no font was found." in said


def test_weights_and_record_are_there_before_any_picture_is_drawn(odd, tmp_path, monkeypatch):
    seen = []

    def look(done):
        (part,) = tmp_path.iterdir()
        seen.extend(p.name for p in part.iterdir())
        return {}, []

    monkeypatch.setattr("fisher_unlearn.lab.deletion_report._pictures", look)
    save_deletion(odd(classes=["banana"]), tmp_path / "out")
    first = {"model.safetensors", "mask.safetensors", "record.json", "requests.json"}
    assert {*seen} == first


def test_the_record_names_the_files_and_the_report_the_first(odd, done, tmp_path, monkeypatch):
    read = lambda out: json.loads((out / "record.json").read_text(encoding="utf-8"))["files"]
    assert read(done[1]) is None  # the digits are no files
    some = [f"{name}/{n}.png" for name in ("$10__old", "banana") for n in range(3)]
    out = save_deletion(odd(files=some), tmp_path / "some")
    digest = hashlib.sha256("\n".join(some).encode()).hexdigest()
    asked = {"number": 6, "digest": digest, "names": some}
    assert {name: read(out)[name] for name in asked} == asked
    text = (out / "report.md").read_text(encoding="utf-8")
    assert f"Files: {', '.join(some[:5])} and 1 more, as the record says." in text
    whole = [f"banana/{n}.png" for n in range(4)]
    assert read(save_deletion(odd(classes=["banana"]), tmp_path / "class"))["names"] == whole
    monkeypatch.setattr("fisher_unlearn.lab.deletion_report._MANY", 3)
    many = read(save_deletion(odd(classes=["banana"]), tmp_path / "many"))
    assert many["names"] is None and many["number"] == 4
    assert many["digest"] == hashlib.sha256("\n".join(whole).encode()).hexdigest()
    assert len(read(save_deletion(odd(files=some), tmp_path / "all"))["names"]) == 6


def test_a_report_explains_the_rows_and_columns_that_are_there_and_no_others(
    odd, digits, model, tmp_path
):
    def said(made, name):
        text = (save_deletion(made, tmp_path / name) / "report.md").read_text(encoding="utf-8")
        (line,) = (line for line in text.splitlines() if line.startswith("Accuracies in percent"))
        return line

    bare = said(odd(files=["banana/0.png"]), "bare")
    assert "control" not in bare and "retrained" not in bare and "test_" not in bare
    assert "training images of each class" in bare and "earlier" not in bare
    first = Earlier("0", tuple(hashes_of(digits.train, torch.tensor([5]))), "the sixth image")
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.classifier.bias[4] = -50.0
    ways = {"retrained": without, "earlier": [first], "fine_tune": None, "progress": "none"}
    asked = asked_for(digits, classes=[4])
    full = said(delete(model, digits, asked, method="mask_classifier", **ways), "full")
    assert "retrained, a model that never saw" in full and "control" not in full
    assert "earlier_1, the images of earlier request 1" in full and "test_forget" in full


@pytest.fixture(scope="module")
def judged(digits, model):
    "Deletions that are cheap to carry out, by method."
    asked = asked_for(digits, classes=[4])
    return lambda method, **more: delete(
        model, digits, asked, method=method, fine_tune=None, control=False, progress="none", **more
    )


def test_a_model_that_still_knows_has_not_forgotten(judged):
    kept = judged("finetune")
    assert (kept.verdict.forgotten, kept.verdict.kept) == (False, True)
    gone = judged("mask_classifier", margins=Margins(20.0, 5.0))  # where all others are below 0
    assert gone.verdict.forgotten is True and gone.accs.result["forget"] < 20
    broken = judged(FisherMask(ratio=0.9))
    assert broken.verdict.kept is False and "Not kept" in broken.verdict.said[1]


def test_a_retrained_model_is_what_a_result_is_compared_with(judged, model):
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.classifier.bias[4] = -50.0
    same = judged("finetune", retrained=without)
    assert same.verdict.forgotten is False and "the retrained model 0.0 %" in same.verdict.said[0]
    gone = judged("mask_classifier", retrained=without, margins=Margins(20.0, 5.0))
    assert gone.verdict.forgotten is True and gone.accs.retrained["forget"] == 0


def test_margins_are_kept_and_decide(judged):
    masked = judged("mask_classifier")
    left, lost = masked.accs.result["forget"], masked.accs.original["test_remain"]
    lost -= masked.accs.result["test_remain"]
    wide, tight = Margins(left, max(lost, 0.0)), Margins(max(left - 0.1, 0.0), 0.0)
    within = judged("mask_classifier", margins=wide).verdict
    assert (within.forgotten, within.kept) == (True, True)
    assert left == 0 or judged("mask_classifier", margins=tight).verdict.forgotten is False


def test_samples_are_compared_with_test_images_or_with_nothing(digits, model):
    asked = asked_for(digits, samples=[1, 2, 3])
    ways = {"method": "finetune", "fine_tune": None, "control": False, "progress": "none"}
    there = delete(model, digits, asked, **ways)
    assert "on test images" in there.verdict.said[0]
    images = load_images("digits")
    alone = source_of(
        type(images)(
            images.name, images.train, images.test[[]], images.classes, images.source, images.digest
        )
    )
    nothing = delete(model, alone, asked, **ways)
    assert nothing.verdict.forgotten is None and "test_remain" not in nothing.accs.index


@pytest.mark.parametrize(
    ("lr", "trained", "note"),
    [(0.01, False, "chance is 10.0 %"), (3.0, True, "rate of 3 is too high")],
)
def test_what_makes_numbers_worthless_is_pointed_out(digits, model, lr, trained, note):
    start = model if trained else build_model("resnet20", 10, 1, seed=5)
    tune = TrainSettings(Schedule(lr=lr, epochs=1, drops=()), select="last")
    ways = {"fine_tune": tune, "control": False, "progress": "none"}
    made = delete(start, digits, asked_for(digits, classes=[4]), method="finetune", **ways)
    assert any(note in said for said in made.notes)


def test_a_class_that_fell_is_named_though_the_mean_stays(digits, model):
    "A verdict on the mean can hide it: here one class is given up for nothing."

    class Breaks(Finetune):
        def __call__(self, model, task):
            with torch.no_grad():
                model.classifier.bias[7] = -50.0
            return {}

    wide = Margins(kept=30.0)
    asked = asked_for(digits, classes=[4])
    ways = {"method": Breaks(), "fine_tune": None, "control": False, "margins": wide}
    made = delete(model, digits, asked, **ways, progress="none")
    assert made.verdict.kept
    (note,) = [n for n in made.notes if "fell from" in n]
    assert note.startswith("Class 7 fell from") and "to 0.0 %" in note
    assert not any("Class 4" in n for n in made.notes)


def test_cost_is_a_trial_times_what_is_read(digits, model, monkeypatch):
    "A batch takes a tenth of a second, by decree: what a machine takes is its own affair."
    batches = digits.train.batches(torch.arange(128), 128)
    tune = TrainSettings(Schedule(epochs=4, drops=()), select="last")
    real = expected_cost(model, batches, (128, 1280), FisherMask(), tune)
    assert real.score > 0 and real.fine_tune > 0 and "parameters" in str(real)
    monkeypatch.setattr("fisher_unlearn.lab.deletion._step_seconds", lambda *_: (0.1, 128))

    def cost(method, tuning, times=1):
        made = expected_cost(model, batches, (128, 1281), method, tuning, times)
        return pytest.approx(made.score), pytest.approx(made.fine_tune)

    assert cost(FisherMask(), tune) == (1.2, 4.4)  # 1 and 11 batches; four epochs of 11
    assert cost(FisherMask(), tune, 2) == (1.2, 8.8)
    assert cost(FisherMask.preset("authors_code"), tune) == (12.0, 4.4)  # ten classes
    assert cost(METHODS["finetune"](), None) == (0, 0)


def test_a_text_classifier_over_tokens_has_a_report_without_pictures_of_samples(tmp_path):
    "A network of anyone, on a data set of anyone: whole numbers go in."
    from torch.utils.data import TensorDataset

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.EmbeddingBag(20, 8), nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.words(tokens))

    numbers = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    tokens = torch.randint(0, 6, (90, 5), generator=numbers) + 6 * labels[:, None]
    torch.manual_seed(0)
    net = Net()
    settings = TrainSettings(Schedule(lr=0.5, epochs=6, drops=()), select="last")
    train_model(net, [(tokens, labels)] * 20, settings, progress="none")
    source = source_of_pairs(TensorDataset(tokens, labels), labels)
    made = delete(
        net,
        source,
        asked_for(source, classes=["ham"]),
        method=FisherMask(ratio=0.2),
        progress="none",
    )
    assert made.accs.original["forget"] > 80
    out = save_deletion(made, tmp_path / "out")
    assert {p.name for p in out.iterdir()} == FILES - {"answers_before_and_after.png"}
    assert "How to repeat it" not in (out / "report.md").read_text()


def source_of_pairs(data, labels):
    from fisher_unlearn.images.sources import Part, Source

    return Source("mails", Part(data, labels), None, ("ham", "spam", "other"))


# ---------------------------------------------------------------- what is refused, before any work

WRONG = {
    "no checkpoint is given": {"checkpoint": None},
    "there is no checkpoint": {"checkpoint": "none.safetensors"},
    "is of another network": {"model": "torchvision:resnet18"},
    "module:function": {"model": "resnet"},
    "can't be imported": {"model": "no_such_module:net"},
    "did you mean 'digits'?": {"data": "digit"},
    "there is no folder": {"data": "./photos"},
    "unknown class 'cat'": {"classes": "cat"},
    "nothing is named": {"classes": None},
    "`classes` and `samples`": {"samples": "1,2"},
    "has no files": {"classes": None, "files": "a.png"},
    "did you mean 'fisher_mask'?": {"method": "fisher_mas"},
    "did you mean 'ratio'?": {"options": "rato=1"},
    "given as NAME=VALUE": {"options": "ratio"},
    "`ratio`": {"options": "ratio=2"},
    "unknown preset": {"preset": "papers"},
    "`epochs` of the order is -1": {"epochs": -1},
    "`lr` of the order is 0": {"lr": 0.0},
    "torch knows no such device": {"device": "gpu"},
    "did you mean 'checkpoint'?": {"checkpoints": "w"},
    "exists and is not empty": {"out": "full"},
    "that needs no method": {"classes": "0,1,2,3,4,5,6,7,8,9"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_can_not_be_is_refused_in_a_sentence_and_nothing_is_written(
    message, given, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    monkeypatch.setattr("fisher_unlearn.lab.deletion_order.delete", None)
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as refused:
        forget(order_of(**{**given, **WRONG[message]}), "none")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]


def test_a_failure_while_writing_leaves_nothing(done, tmp_path, monkeypatch):
    found, _ = done

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fisher_unlearn.lab.deletion_report.save_tensors", full)
    with pytest.raises(OSError):
        save_deletion(found, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_and_the_notebook_take_what_an_order_has():
    said = "".join(CliRunner().invoke(app, ["forget", "--help"]).output.split())
    known = papermill.inspect_notebook(str(find_notebook("forget_your_own")))
    assert list(known) == list(order_types())
    for name, (_, comment) in order_types().items():
        assert f"--{name.replace('_', '-')}" in said and "".join(comment[1:].split()) in said
        assert known[name]["help"] == comment


def test_the_command_ends_in_one_line_for_what_can_not_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["forget", "--data", "./none", "--checkpoint", "x"])
    assert ended.exit_code == 2 and ended.output == ("fisher-unlearn: there is no folder ./none.\n")


@pytest.mark.slow
def test_the_notebook_runs_without_any_file(tmp_path):
    papermill.execute_notebook(
        find_notebook("forget_your_own"),
        tmp_path / "x.ipynb",
        {"out": str(tmp_path / "out")},
        progress_bar=False,
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES


def test_methods_are_tried_on_images_that_no_trial_sees(digits, model):
    "A row for each method that can do it, the best of those first that keep the rest."
    few = type(digits)(digits.name, digits.test, None, digits.classes)
    ways = {"fine_tune": None, "margins": Margins(kept=5.0)}
    table = tried(model, few, asked_for(few, classes=[4]), **ways)
    able = {"finetune", "mask_classifier", "random_mask", "activation_mask", "fisher_mask"}
    assert set(table.method) == {*able, "fisher_noise"}
    assert not table.duplicated(["method", "preset"]).any()
    kept = table[table.keeps]
    assert table.keeps.tolist() == sorted(table.keeps, reverse=True)
    assert kept.forget.tolist() == sorted(kept.forget) and "mask_classifier" in set(kept.method)
    samples = tried(model, few, asked_for(few, samples=[1, 2]), **ways)
    assert set(samples.method) == able - {"mask_classifier"}  # the others forget whole classes
