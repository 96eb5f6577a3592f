"A card is made once, kept beside its run, and read without weights."

import shutil

import pandas as pd
import pytest

from fisher_unlearn.audit.report_card import Auditor
from fisher_unlearn.lab.cards import cards_of
from fisher_unlearn.lab.run import run, with_readouts
from fisher_unlearn.lab.settings import resolve, run_key
from fisher_unlearn.lab.store import card_name, check_record, read_record, write_record

SMALL = {"dataset": "digits", "subset": 128, "epochs": 1, "fine_tune_epochs": 1}
RUNS = [resolve("smoke", method=m, **SMALL) for m in ("finetune", "mask_classifier")]
FLOOR = [resolve("smoke", method="retrain", seed=s, data_seed=666, **SMALL) for s in (666, 777)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Runs, and how many networks were looked at to make their cards."
    place, looks = tmp_path_factory.mktemp("runs"), []
    look = Auditor._look
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Auditor, "_look", lambda self, model: looks.append(1) or look(self, model))
        cards = [card for _, card in cards_of(RUNS, FLOOR, place, cap=1)]
        again = [card for _, card in cards_of(RUNS, FLOOR, place, cap=1)]
    return place, cards, again, len(looks)


def same(one, other):
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)
    return one.missing == other.missing


def alike(some, others):
    return len(some) == len(others) == len(RUNS) and all(map(same, some, others))


def test_what_stands_beside_is_asked_once_and_a_card_is_made_once(folder):
    _, cards, again, looks = folder
    assert looks == len(RUNS) + 1 + len(FLOOR)
    assert alike(cards, again)


def test_cards_are_read_without_weights_and_travel_with_the_record(folder, tmp_path):
    place, cards, *_ = folder
    shutil.copytree(place, tmp_path / "runs")
    for weights in (tmp_path / "runs").rglob("*.safetensors"):
        weights.unlink()
    read = [card for _, card in cards_of(RUNS, FLOOR, tmp_path / "runs", on="none", cap=1)]
    assert alike(cards, read)
    record = read_record(tmp_path / "runs" / run_key(RUNS[0]) / "record.json")
    both = with_readouts(record, tmp_path / "runs")
    assert card_name(map(run_key, FLOOR), 1) in both["readouts"] and check_record(both)


def test_cards_beside_other_models_are_others_and_nobody_makes_them_unasked(folder):
    place, *_ = folder
    assert not [*cards_of(RUNS, FLOOR[:1], place, on="none", cap=1)]
    assert not [*cards_of(RUNS, FLOOR, place, on="none", cap=2)]


def test_a_card_says_what_a_run_ended_with(folder):
    place, cards, *_ = folder
    for settings, card in zip(RUNS, cards):
        end = run(settings, place, progress="none")["history"][-1]
        assert card.table.model["accuracy, test_forget"] == pytest.approx(end["forget_acc"])
        assert card.table.model["accuracy, test_remain"] == pytest.approx(end["remain_acc"])


def test_a_card_of_other_parts_is_refused(folder):
    place, *_ = folder
    name = card_name(map(run_key, FLOOR), 1)
    record = read_record(place / run_key(RUNS[0]) / f"{name}.json")
    del record["digest"]
    for change in ({"beside": None}, {"epochs": 2, "losses": [0.1]}, {"table": None}):
        with pytest.raises(ValueError, match="the parts are not those of the readout card"):
            check_record(record | change)


def test_a_card_of_another_recipe_is_not_read_as_todays(folder, tmp_path):
    place, cards, *_ = folder
    runs, beside = tmp_path / "runs", [*map(run_key, FLOOR)]
    shutil.copytree(place, runs)
    path = runs / run_key(RUNS[0]) / f"{card_name(beside, 1)}.json"
    old = {name: part for name, part in read_record(path).items() if name != "digest"}
    del old["recipe"]
    path.unlink()
    before = path.with_stem(card_name(beside, 1, recipe=1))
    assert before.stem == check_record(old).name != path.stem
    write_record(before, old)
    read = [settings for settings, _ in cards_of(RUNS, FLOOR, runs, on="none", cap=1)]
    assert read == RUNS[1:]
    with pytest.raises(ValueError, match="it is the readout card_1_"):
        write_record(path, old)
    assert alike(cards, [card for _, card in cards_of(RUNS, FLOOR, runs, cap=1)])
