"""What the mask removes, as a notebook on a short schedule: its table, its judgements and its
answers are what its records say."""

import json
import shutil
from pathlib import Path

import papermill
import numpy as np
import pandas as pd
import pytest

from fisher_unlearn.lab.experiments import MASKS_TO_TUNE, sweep
from fisher_unlearn.lab.settings import RunSettings, run_key, unusual_options
from fisher_unlearn.lab.notebook import find_notebook
from fisher_unlearn.lab.paper import row_label
from fisher_unlearn.lab.report import read_kept, restore
from fisher_unlearn.methods.unlearn import METHODS

pytestmark = pytest.mark.slow


def executed(name, base, **more):
    "The table, the records and the text that an experiment keeps."
    given = {
        "profile": "smoke",
        "device": "cpu",
        "runs": str(base / "runs"),
        "figures": str(base / "out"),
        **more,
    }
    papermill.execute_notebook(find_notebook(name), base / "x.ipynb", given, progress_bar=False)
    stem = Path(given["figures"]) / "smoke" / name
    return (
        pd.read_csv(f"{stem}.csv"),
        read_kept(f"{stem}.parquet"),
        stem.with_suffix(".md").read_text(encoding="utf-8"),
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return executed("what_the_mask_removes", tmp_path_factory.mktemp("masks"))


@pytest.fixture(scope="module")
def choice(tmp_path_factory):
    return executed("recommended", tmp_path_factory.mktemp("choice"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return tmp_path_factory.mktemp("rivals")


@pytest.fixture(scope="module")
def rivals(bench):
    return executed("rivals", bench)


def test_every_method_and_preset_has_its_row_as_its_record_has_it(rivals):
    table, records, text = rivals
    able = [kind for kind in METHODS.values() if "held_out" not in kind.needs]
    wanted = {(k.name, p) for k in able for p in k.presets or ["paper"]}
    settings = [r["settings"] for r in records]
    dumped = {(s["method"], json.dumps(s["options"], sort_keys=True)) for s in settings}
    assert {m for m, _ in wanted} == {m for m, _ in dumped}
    whole = [s for s in settings if s["request"] == "class"]
    assert len(whole) >= len({(m, str(METHODS[m].preset(p).dump())) for m, p in wanted})
    assert not {"unsir", "mask_classifier", "tfidf"} & {
        s["method"] for s in settings if s["request"] == "random"
    }
    by_key = {r["key"]: r for r in records}
    for row in table.itertuples():
        record = by_key[row.key]
        first, last = record["history"][0], record["history"][-1]
        assert row.forget_acc_last == last["forget_acc"]
        assert row.method == "retrain" or row.remain_acc_before == first["remain_acc"]
        of_weights = [r for r in record["changed"] if r["name"].endswith((".weight", ".bias"))]
        moved = sum(r["distance"] ** 2 for r in of_weights) ** 0.5
        if row.method == "retrain":  # it starts elsewhere, and no length is said of it
            assert np.isnan(row.moved) and not moved
        else:
            assert row.moved == pytest.approx(moved)
        epochs = [e["seconds"] for e in record["history"] if e["seconds"]]
        tuned = np.median(epochs) * len(epochs) if epochs else 0
        own = record["seconds"]["method"] + record.get("spared", 0)
        assert row.seconds == pytest.approx(own + tuned)
    marked = {line.split("|")[2].strip() for line in text.splitlines() if "×" in line}
    idle = {row.name for row in table[table["changed nothing"]].itertuples(index=False)}
    assert marked == idle and not {"Finetune", "Retrain"} & marked
    names = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| class")]
    assert names == sorted(names, key=str.lower)  # by nothing but the name


def test_a_page_of_rivals_that_runs_nothing_trains_nothing_for_its_overlaps(bench, rivals):
    place = bench / "out" / "smoke" / "rivals_masks.csv"
    overlap = pd.read_csv(place, index_col=0)
    assert [*overlap] == [*overlap.index] == sorted(overlap, key=str.lower)
    values = overlap.to_numpy()
    assert len(values) > 5 and (values == values.T).all() and (np.diag(values) == 100).all()
    assert (values >= 0).all() and (values <= 100).all() and (values < 100).any()
    without = {"on": "none", "runs": str(bench / "records")}
    restore(bench / "out" / "smoke" / "rivals.parquet", bench / "records")
    before = place.read_bytes()
    executed("rivals", bench, **without)
    assert place.read_bytes() == before
    executed("rivals", bench, **without, figures=str(bench / "elsewhere"))
    assert not (bench / "elsewhere" / "smoke" / "rivals_masks.csv").exists()
    assert not [*(bench / "records").glob("train-*")]  # no w* was trained for them


@pytest.fixture(scope="module")
def kicks(tmp_path_factory):
    base = tmp_path_factory.mktemp("kick")
    return base, executed("the_kick", base)


def test_the_kick_is_judged_by_its_rule(kicks):
    _, (points, records, text) = kicks
    by_key = {r["key"]: r for r in records}
    assert {*points.key} == {*by_key} and {*points.request} == {"a class", "samples"}
    for row in points.itertuples():
        history = by_key[row.key]["history"]
        assert row.loss == history[1]["train_loss"] and row.left == history[-1]["forget_acc"]
    for _, group in points.groupby("request"):
        drawn = group[group.kind == "kick, all"].sort_values("loss")
        assert (drawn.curve.diff().dropna() <= 1e-9).all()  # it never rises
        assert drawn.curve.mean() == pytest.approx(drawn.left.mean())  # as least squares have it
        others = group[group.kind != "kick, all"]
        near = int(((others.left - others.curve).abs() <= 10).sum())
        assert f"{near} of {len(others)} other points within ten points" in text
    kicks = points[(points.kind == "kick, all") & (points.request == "a class")]
    mask = by_key[points[points.label == "FisherMask (paper)"].key.iloc[0]]
    length = sum(r["distance"] ** 2 for r in mask["changed"]) ** 0.5
    assert kicks.moved.tolist() == pytest.approx([s * length for s in kicks.scale], rel=1e-4)


def test_kicks_of_a_class_are_read_before_those_of_samples_are_done(kicks, tmp_path):
    base, (points, records, _) = kicks
    shutil.copytree(base / "runs", tmp_path / "runs")
    of_samples = points[(points.request == "samples") & (points.kind != "a method")]
    for key in of_samples.key:
        shutil.rmtree(tmp_path / "runs" / key)
    fewer, _, text = executed("the_kick", tmp_path, on="none")
    assert {*fewer.request} == {"a class"} and "missing: " in text
    assert "* a class: " in text and "* samples: " not in text


def test_the_audit_puts_each_method_beside_the_floor(tmp_path_factory):
    table, records, text = executed("audit", tmp_path_factory.mktemp("audit"))
    retrained = [r for r in records if r["settings"]["method"] == "retrain"]
    assert {r["settings"]["seed"] for r in retrained} == {666, 777}
    ends = [r["history"][-1]["forget_acc"] for r in retrained]
    rows = table[table.readout == "accuracy, test_forget"].set_index("method")
    assert rows.low.unique() == pytest.approx([min(ends)])
    assert rows.high.unique() == pytest.approx([max(ends)])
    for r in records:
        if r["settings"]["method"] != "retrain":
            tuned = "" if r["settings"]["fine_tune_epochs"] else ", not fine-tuned"
            name = row_label(RunSettings.of(**r["settings"])) + tuned
            assert rows.model[name] == pytest.approx(r["history"][-1]["forget_acc"])
            assert rows.w_star[name] == pytest.approx(rows.w_star.iloc[0])
            assert f"**{name}** stands outside of them in" in text
    assert "2 retrained models for each w*" in text


def test_every_class_is_masked_by_itself_and_counted_by_the_rule(tmp_path_factory):
    table, records, text = executed("every_class", tmp_path_factory.mktemp("every"))
    assert {*table["class"]} == {0, 1} and {*table[table.tuned]["class"]} == {0}
    by_case = {
        (
            r["settings"]["classes"][0],
            r["settings"]["method"],
            r["settings"]["preset"],
            r["settings"]["options"].get("classifier_in_pool"),
            bool(r["settings"]["fine_tune_epochs"]),
        ): r
        for r in records
    }
    assert len(by_case) == len(records) == len(table) == 21
    masked = table[~table.tuned].set_index(["what", "class"]).forget
    gone, both = 0, 0
    for c in (0, 1):
        inside, outside = (
            by_case[c, "fisher_mask", "paper", pool, False]["history"][0]["forget_acc"]
            for pool in (True, False)
        )
        w_star = by_case[c, "finetune", "paper", None, False]["history"][0]["forget_acc"]
        assert masked["as in the text, with the classifier", c] == inside
        assert masked["as in the text, without it", c] == outside and masked["w*", c] == w_star
        gone += inside < 5
        both += inside < 5 and abs(outside - w_star) <= 10
    assert f"In {gone} of 2 pairs of class and seed the class is gone" in text
    assert f", in {both} both." in text
    row = table[table.what == "the row zeroed"]
    assert row["masked in the row"].nunique() == 1 and (row[~row.tuned].forget == 0).all()


def start(record):
    return record["history"][0]["remain_acc"], record["history"][0]["forget_acc"]


def alone(records, method):
    "The record of a method without fine-tuning."
    return next(
        r
        for r in records
        if r["settings"]["method"] == method and not r["settings"]["fine_tune_epochs"]
    )


def test_each_mask_is_in_the_table_as_its_record_has_it(kept):
    table, records, _ = kept
    masks = [
        r
        for r in records
        if r["settings"]["method"] == "fisher_mask" and not r["settings"]["fine_tune_epochs"]
    ]
    assert len(table) == len(masks) == 4 * 2 * 2 * 2 * 2 and len(records) == len(masks) + 2 + 10
    w_star, control = start(alone(records, "finetune")), start(alone(records, "mask_classifier"))
    for r in masks:
        s = r["settings"] | r["settings"]["options"]
        pool = "in the pool" if s["classifier_in_pool"] else "not in the pool"
        mine = table[
            (table.estimator == f"{s['fisher_labels']} labels, per {s['fisher_per']}")
            & (table.unit == s["unit"])
            & (table.classifier == pool)
            & (table["λ"] == s["remain_weight"])
            & (table.R == s["ratio"])
        ]
        assert len(mine) == 1
        (_, m), (remain, forget) = next(mine.iterrows()), start(r)
        assert (m.remain, m.forget) == pytest.approx((remain, forget))
        assert (
            m.masked == sum(part["masked"] for part in r["changed"])
            and m["in row"] == r["masked_rows"][0]
            and m["in other rows"] == sum(r["masked_rows"][1:])
        )
        assert pool == "in the pool" or m["in row"] == m["in other rows"] == 0
        assert m["does nothing"] == (
            max(abs(remain - w_star[0]), abs(forget - w_star[1])) <= 1
        ) and m["is the control"] == (max(abs(remain - control[0]), abs(forget - control[1])) <= 1)
        assert (
            m.forgets == (forget < 5)
            and m.keeps == (remain >= w_star[0] - 1)
            and m.printed == (forget < 0.05 and abs(remain - w_star[0] - 1.2) <= 0.5)
        )


def test_the_eight_are_named_and_told_at_their_last_epoch(kept):
    _, records, text = kept
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|") and line.count("|") == 11
    }
    assert {"retrained", "fine-tuned only", *MASKS_TO_TUNE} <= set(lines)
    for name, case in MASKS_TO_TUNE.items():
        (key,) = map(run_key, sweep("smoke", [case], device="cpu"))
        r = next(r for r in records if r["key"] == key)
        before, last = start(r), r["history"][-1]
        assert [float(x) for x in lines[name][:4]] == pytest.approx(
            [*before, last["remain_acc"], last["forget_acc"]], abs=0.0501
        ), name


def told(part):
    "How many masks there are, and how many distinct pairs of accuracies."
    count, pairs = len(part), len({*zip(part.remain, part.forget)})
    return (
        f"{count} mask{'' if count == 1 else 's'} "
        f"({pairs} distinct outcome{'' if pairs == 1 else 's'})"
    )


def test_the_answers_count_what_the_table_holds(kept):
    table, records, text = kept
    for pool, words in (
        ("in the pool", "with the classifier in the pool"),
        ("not in the pool", "Without the classifier"),
    ):
        part = table[(table.classifier == pool) & ~table["equals w*"]]
        assert f"{words} it is that of {told(part[part.printed])} of {told(part)}" in text
    out = table[table.classifier == "not in the pool"]
    left = out[~out["equals w*"]]
    assert f"(forget below 5 %): {told(left[left.forgets])} of {told(left)}" in text
    assert f"{out['equals w*'].sum()} of {len(out)} without it equal w* in both" in text
    gap = out.forget.mean() - table[table.classifier == "in the pool"].forget.mean()
    assert (
        f"raises the forget accuracy by {gap:.0f} points on average over all {len(out)} pairs"
        in text
    )
    for labels, unit, weight in (
        ("expected labels, per batch", "kernel", 1),
        ("true labels, per sample", "weight", 9),
    ):
        own = table[(table.estimator == labels) & (table.unit == unit) & (table["λ"] == weight)]
        usual = own[(own.R == 0.02) & (own.classifier == "in the pool")].iloc[0]
        assert (
            f"it masks {usual['in row']:.0f} of the row's 64 weights and "
            f"{usual['in other rows']:.0f} of all other rows, and has "
            f"{usual.remain:.1f} / {usual.forget:.1f} " in text
        )
        assert (
            "it does nothing in "
            f"{own[own.classifier == 'not in the pool']['does nothing'].sum()} of 2 "
            "masks without the classifier, and is the control in "
            f"{own[own.classifier == 'in the pool']['is the control'].sum()} of 2 with "
            "it" in text
        )


def made(record):
    "What makes a mask."
    return tuple(
        record["settings"]["options"][name]
        for name in ("fisher_labels", "fisher_per", "unit", "remain_weight", "ratio")
    )


def unusual(record):
    "Is it that of the mask that was chosen, and not of a preset?"
    return bool(unusual_options(RunSettings.of(**record["settings"])))


def test_what_is_judged_is_chosen_by_the_rule_on_other_images_and_classes(choice):
    table, records, text = choice
    trials, judged = (
        [r for r in records if bool(r["settings"]["held_out"]) == which] for which in (True, False)
    )
    classes = [{c for r in part for c in r["request"]["classes"]} for part in (trials, judged)]
    assert classes == [{1, 2}, {3, 5}] and all(
        r["settings"]["train"]["select"] == "last" for r in records
    )
    masks = [r for r in trials if r["settings"]["method"] == "fisher_mask"]
    assert not any(sum(r["masked_rows"]) for r in masks) and all(
        r["settings"]["remain_limit"] == 50 for r in trials
    )
    scores = (
        pd.DataFrame([(made(r), r["history"][-1]["unlearn_score"]) for r in masks])
        .groupby(0)[1]
        .agg(["mean", "size"])
    )
    assert len(scores) == 12 and set(scores["size"]) == {2}
    chosen = [r for r in judged if unusual(r)]
    assert len(chosen) == 4 and {scores["mean"][made(r)] for r in chosen} == {scores["mean"].max()}
    assert len(table) == len(judged) == 2 * 10 and (table.name == "FisherMask (chosen)").sum() == 4


def test_the_verdict_is_what_the_judged_runs_say(choice):
    table, records, text = choice
    judged = {
        (
            r["settings"]["method"],
            r["settings"]["preset"],
            unusual(r),
            r["request"]["classes"][0],
            str(r["settings"]["remain_limit"] or "all"),
        ): r["history"][-1]
        for r in records
        if not r["settings"]["held_out"]
    }
    for _, m in table.iterrows():
        last = judged[m.method, m.preset, m["name"] == "FisherMask (chosen)", m["class"], m.data]
        assert (m.remain, m.forget) == pytest.approx((last["remain_acc"], last["forget_acc"]))
    yard = table[table.method == "retrain"].set_index("class")
    good = [
        m["forget"] <= 0.05
        and m["remain"] >= yard.remain[m["class"]] - 0.5
        and all(m[c] >= yard[c][m["class"]] for c in table.columns if c.startswith("re-learned"))
        for _, m in table.iterrows()
    ]
    assert table.reaches.tolist() == good
    counts = [
        [ok for ok, m in zip(good, table.itertuples()) if (m.name, m.data) == case]
        for case in (
            ("FisherMask (chosen)", "50"),
            ("FisherMask (chosen)", "all"),
            ("Finetune", "all"),
        )
    ]
    worth = all(counts[0]) or all(counts[1]) and not all(counts[2])
    assert (
        f"in {sum(counts[0])} of 2 cases with 50 remain images and in {sum(counts[1])} "
        f"of 2 with all, by fine-tuning alone on all in {sum(counts[2])} of 2" in text
    )
    assert ("**recommended**" in text) == worth and ("**not recommended**" in text) != worth
