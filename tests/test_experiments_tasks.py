"""Tables 3, 4 and 5, executed on a short schedule: their numbers and sentences against a
calculation from the kept records."""

import json
import re
from functools import cache
from statistics import fmean

import nbformat
import pandas as pd
import pytest

from fisher_unlearn.lab.experiments import needed
from fisher_unlearn.lab.notebook import execute, find_notebook
from fisher_unlearn.lab.plans import label
from made import listed
from verdicts import lacking_line, verdicts

pytestmark = pytest.mark.slow

SHORT = {"profile": "smoke", "epochs": 3, "fine_tune_epochs": 2}
CLAIMS = {"table3": 13, "table4": 8, "table5": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that executes a table's notebook once, and returns the folder of all and the
    executed notebook."""

    @cache
    def make(name):
        base = tmp_path_factory.mktemp(name)
        return base, start(name, base, **{"count": 12} if name == "table3" else {})

    return make


def start(name, base, figures="figures", **more):
    "Execute a notebook, with its folders given by the environment; the executed notebook."
    with pytest.MonkeyPatch.context() as patch:
        for variable, folder in (("RUNS", "runs"), ("FIGURES", figures)):
            patch.setenv(f"FISHER_UNLEARN_{variable}", str(base / folder))
        execute(find_notebook(name), base / f"{name}.ipynb", {**SHORT, **more}, echo=False)
    return nbformat.read(base / f"{name}.ipynb", 4)


each = pytest.mark.parametrize("name", CLAIMS)


def kept(base, name):
    "The records that were kept, read without the package."
    rows = pd.read_parquet(base / "figures" / "smoke" / f"{name}.parquet").to_dict("records")
    records = [
        {
            part: text if part == "key" else json.loads(text)
            for part, text in row.items()
            if isinstance(text, str)
        }
        for row in rows
    ]
    for record in records:
        record["settings"] |= record["settings"].pop("options")
    return records


def printed(history, by):
    """The epoch that is printed: of fine-tuning, the one with the largest value, the first of
    equals."""
    return max(history[1:], key=lambda row: (row[by], -row["epoch"]))


def cell(record):
    "Setting, method, phase and column by which the best is chosen, in the paper's words."
    s, details = record["settings"], record["request"]["details"]
    fresh, masks = (
        s["method"] == "retrain",
        s["method"] in ("random_mask", "activation_mask", "fisher_mask"),
    )
    setting = "ResNet20/Digits"
    if s["request"] == "poison":
        setting += ", poison" + (f", R = {s['ratio']:g}" if masks else "")
    if s["request"] == "mislabel":
        setting += f", {100 * details['ratio']:g}% label noise"
    if s["remain_limit"] is not None:
        setting += ", 50 remain images" if s["remain_limit"] else ", no remain data"
    named = {
        "retrain": "Retrain",
        "finetune": "Finetune",
        "mask_classifier": "MaskClassifier",
        "random_mask": "RandomMask",
        "tfidf": "TF-IDF",
        "fisher_noise": "FisherNoise",
        "activation_mask": "ActivationMask",
        "fisher_mask": "FisherMask",
    }[s["method"]]
    both = masks or s["method"] in ("tfidf", "fisher_noise")
    by = "accuracy" if fresh or s["request"] == "mislabel" else "unlearn_score"
    return (
        setting,
        f"{named} ({s['preset']})" if both else named,
        "retrained" if fresh else "after_ft",
        by,
    )


@each
def test_the_table_says_what_the_kept_records_say(made, name):
    base, _ = made(name)
    table, records = pd.read_csv(base / "figures" / "smoke" / f"{name}.csv"), kept(base, name)
    cells = table.set_index(["setting", "method", "phase", "metric"])
    metrics = [
        "remain_acc",
        "forget_acc",
        *{"table3": ["trigger_acc"], "table4": ["truth_acc", "accuracy"], "table5": []}[name],
    ]
    checked = 0
    for record in records:
        setting, method, phase, by = cell(record)
        history = [
            row | {"unlearn_score": row["remain_acc"] / (1 + row["forget_acc"] / 100)}
            for row in record["history"]
        ]
        if len(history) > 1:
            best = printed(history, by)
            found = [cells.loc[(setting, method, phase, metric), "mean"] for metric in metrics]
            assert found == pytest.approx([best[metric] for metric in metrics], abs=1e-9)
            checked += 1
        if phase == "after_ft":
            before = "w*" if method == "Finetune" else method
            found = [
                cells.loc[(setting, before, "before_ft", metric), "mean"] for metric in metrics
            ]
            assert found == pytest.approx([history[0][metric] for metric in metrics], abs=1e-9)
    assert checked == {"table3": 20, "table4": 24, "table5": 17}[name]
    assert (
        table["mean"].notna().sum() == table.n.sum()
        and table.paper_mean.notna().sum() == {"table3": 30, "table4": 13, "table5": 33}[name]
    )
    assert not (
        table["mean"].notna() & table.paper_mean.notna()
    ).any()  # digits are not the paper's: nothing may stand beside its numbers


@each
def test_one_short_seed_on_digits_says_nothing_about_the_paper(made, name):
    base, nb = made(name)
    text = (base / "figures" / "smoke" / f"{name}.md").read_text(encoding="utf-8")
    rows, lacks = verdicts(text), lacking_line(text)
    assert len(rows) == CLAIMS[name] and all(re.search(r"\d", row["here"]) for row in rows)
    assert {row["says"] for row in rows} <= {"towards", "away"} and "nan" not in text
    assert f"in {len(rows)} of {len(rows)} rows" in lacks and re.search("3 seeds|departure", lacks)
    assert "**departures from the paper's protocol: digits is not among" in text
    shown = "\n".join(
        output.get("data", {}).get("text/markdown", "")
        for c in nb.cells
        for output in c.get("outputs", [])
    )
    assert verdicts(shown) == rows and lacks in shown


@each
def test_a_table_leaves_its_files_a_figure_and_no_path(made, name):
    base, nb = made(name)
    folder = base / "figures" / "smoke"
    assert listed(folder) == [f"{name}.{ending}" for ending in ("csv", "md", "parquet", "png")]
    assert 10_000 < (folder / f"{name}.png").stat().st_size < 200_000
    assert any(
        "image/png" in output.get("data", {}) for c in nb.cells for output in c.get("outputs", [])
    )
    for text in (
        (base / f"{name}.ipynb").read_text(encoding="utf-8"),
        (folder / f"{name}.md").read_text(encoding="utf-8"),
    ):
        assert str(base) not in text and not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert not any(
        output.get("name") == "stderr" for c in nb.cells for output in c.get("outputs", [])
    )


def value(records, method, preset, column, **where):
    "Mean at the printed epoch of the runs of a method."
    where = {
        "method": method,
        **({} if method in ("finetune", "mask_classifier") else {"preset": preset}),
        **where,
    }
    found = [
        r for r in records if all(r["settings"][name] == wanted for name, wanted in where.items())
    ]
    values = []
    for record in found:
        history = [
            row | {"unlearn_score": row["remain_acc"] / (1 + row["forget_acc"] / 100)}
            for row in record["history"]
        ]
        values.append(
            (printed(history, cell(record)[3]) if len(history) > 1 else history[0])[column]
        )
    return fmean(values)


@each
@pytest.mark.parametrize("preset", ["paper", "authors_code"])
def test_verdicts_point_where_the_records_do(made, name, preset):
    base, _ = made(name)
    text = (base / "figures" / "smoke" / f"{name}.md").read_text(encoding="utf-8")
    records, rows = kept(base, name), verdicts(text)
    get = lambda method, column, **where: value(records, method, preset, column, **where)
    others = ("random_mask", "activation_mask")
    if name == "table3":
        score = {
            m: [get(m, "unlearn_score", ratio=r) for r in (0.15, 0.2, 0.25)]
            for m in (*others, "fisher_mask")
        }
        best = all(
            row[-1] > max(get("finetune", "unlearn_score"), *row[:-1])
            for row in zip(*score.values())
        )
        middle = all(row[1] > max(row[0], row[2]) for row in score.values())
        larger = all(
            get(m, "forget_acc", ratio=0.25) > get(m, "forget_acc", ratio=0.2) for m in others
        )
        wanted = {
            "FisherMask has the best unlearn score": best,
            "best at a ratio of 0.20": middle,
            "get a larger forget accuracy": larger,
        }
    elif name == "table4":
        table = {
            m: [get(m, "accuracy", mislabel_ratio=r) for r in (0.1, 0.3, 0.5)]
            for m in ("finetune", *others, "fisher_mask")
        }
        wanted = {
            "Finetune is the worst": all(
                min(rest) > least for least, *rest in zip(*table.values())
            ),
            "FisherMask is the best": all(row[-1] > max(row[:-1]) for row in zip(*table.values())),
            "the accuracy falls": all(a > b > c for a, b, c in table.values()),
        }
    else:
        none, some = (
            {
                m: get(m, "unlearn_score", remain_limit=limit)
                for m in (*others, "tfidf", "fisher_mask")
            }
            for limit in (0, 50)
        )
        rest = [get(m, "unlearn_score", remain_limit=50) for m in ("finetune", "fisher_noise")]
        first = none["tfidf"] > max(v for m, v in none.items() if m != "tfidf")
        wanted = {
            "(a) TF-IDF has the highest": first and get("tfidf", "forget_acc", remain_limit=0) > 50,
            "(b) FisherMask has the best": some["fisher_mask"]
            > max(*rest, *(v for m, v in some.items() if m != "fisher_mask")),
            "FisherMask has the same unlearn score": abs(
                some["fisher_mask"] - get("fisher_mask", "unlearn_score", remain_limit=None)
            )
            < 0.05,
        }
    for claim, holds in wanted.items():
        (said,) = [
            row["says"]
            for row in rows
            if row["claim"].startswith(f"Reading `{preset}`: ") and claim in row["claim"]
        ]
        assert said == ("towards" if holds else "away")


def test_table_3_says_what_the_patch_does_not_change(made):
    base, _ = made("table3")
    text, details = (
        (base / "figures" / "smoke" / "table3.md").read_text(encoding="utf-8"),
        kept(base, "table3")[0]["request"]["details"],
    )
    assert (
        f"Seed 666: {details['n']} of 128 training images poisoned (added to their originals)"
        in text
    )
    assert (
        f"would not change {details['unchanged']} training and "
        f"{details['test_unchanged']} test images" in text
    )


def test_table_5_says_why_fisher_noise_is_missing_and_compares_with_the_control(made):
    base, _ = made("table5")
    text, records = (
        (base / "figures" / "smoke" / "table5.md").read_text(encoding="utf-8"),
        kept(base, "table5"),
    )
    assert (
        "* FisherNoise without remain data is refused: `fisher_noise` can't be "
        "calculated without remain data" in text
    )
    wanted = {"method": "fisher_mask", "preset": "authors_code", "remain_limit": 50}
    (mine,) = [r for r in records if {name: r["settings"][name] for name in wanted} == wanted]
    share = 100 * mine["masked_rows"][0] / 64  # of the 64 features of ResNet-20
    masked = sum(part["masked"] for part in mine["changed"])
    assert (
        f"FisherMask (authors_code) zeroed {share:.0f} % of the forgotten class's row "
        f"and {masked:,} weights" in text
    )
    assert {
        r["settings"]["fine_tune_epochs"] for r in records if r["settings"]["remain_limit"] == 0
    } == {0}


def test_a_run_that_fails_is_named_and_the_others_are_told(made):
    """A w* that was made from other images stops one run: the rest is read, and verdicts that
    need it have no numbers."""
    base, _ = made("table4")
    wanted = {"method": "fisher_mask", "preset": "paper", "mislabel_ratio": 0.3}
    (lost,) = [
        r for r in kept(base, "table4") if {name: r["settings"][name] for name in wanted} == wanted
    ]
    run, training = (
        base / "runs" / folder / "record.json"
        for folder in (lost["key"], f"train-{lost['training']}")
    )
    texts = run.read_text(encoding="utf-8"), training.read_text(encoding="utf-8")
    run.unlink()
    training.write_text(
        texts[1].replace(json.loads(texts[1])["data"]["digest"], "0" * 64), encoding="utf-8"
    )
    try:
        start("table4", base, "again")
    finally:
        for path, text in zip((run, training), texts):
            path.write_text(text, encoding="utf-8")
    text = (base / "again" / "smoke" / "table4.md").read_text(encoding="utf-8")
    assert "23 of 24 runs are done.\n\n* failed: digits resnet20 666: fisher_mask, paper" in text
    assert text.count("\n* failed: ") == 1 and "nan" not in text
    assert len(pd.read_parquet(base / "again" / "smoke" / "table4.parquet")) == 23
    rows = verdicts(text)
    assert len(rows) == 8 and all(
        (row["says"] == "numbers missing") == ("`paper`" in row["claim"]) for row in rows
    )


def test_the_plan_counts_what_a_table_needs():
    assert [len({label(s) for s in needed(name, "quick")}) for name in CLAIMS] == [20, 24, 27]
