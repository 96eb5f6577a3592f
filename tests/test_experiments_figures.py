"Figures 1 to 4 as notebooks, on a short schedule: what they keep is what their records say."

import papermill
import pandas as pd
import pytest

from fisher_unlearn.lab.notebook import find_notebook
from fisher_unlearn.lab.settings import profiles
from fisher_unlearn.lab.report import read_kept
from verdicts import lacking_line, verdicts

pytestmark = pytest.mark.slow
SHORT = {"profile": "smoke", "fine_tune_epochs": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "The four notebooks, one after the other, on one folder of runs."
    base, found = tmp_path_factory.mktemp("figures"), {}
    for name in ("figure1", "figure2", "figure3", "figure4"):
        papermill.execute_notebook(
            find_notebook(name),
            base / f"{name}.ipynb",
            {**SHORT, "runs": str(base / "runs"), "figures": str(base / "out")},
            progress_bar=False,
        )
        folder = base / "out" / "smoke"
        found[name] = (
            pd.read_csv(folder / f"{name}.csv"),
            read_kept(folder / f"{name}.parquet"),
            (folder / f"{name}.md").read_text(encoding="utf-8"),
            folder / f"{name}.png",
        )
    return found


@pytest.mark.parametrize(
    "name, runs", [("figure1", 5), ("figure2", 8), ("figure3", 20), ("figure4", 13)]
)
def test_figures_are_kept_with_their_records_and_no_verdict_from_digits(kept, name, runs):
    table, records, text, picture = kept[name]
    assert len(table) and len(records) == runs and 5_000 < picture.stat().st_size < 200_000
    rows = verdicts(text)
    assert len(rows) >= 3 and {row["says"] for row in rows} <= {"towards", "away"}
    assert f"in {len(rows)} of {len(rows)} rows: " in lacking_line(text)
    assert "departures from the paper's protocol" in text


def test_figure_1_has_a_point_for_each_epoch_and_each_pass_of_lissa(kept):
    table, records, text, _ = kept["figure1"]
    assert (
        "A stand-in: the paper's figure is of ResNet50 on CIFAR100, with 30 epochs of "
        "fine-tuning and 30 passes of LiSSA; this one is of ResNet20 on Digits, with 8 "
        "epochs of fine-tuning and 2 passes of LiSSA." in text
    )
    w_star = next(
        record["history"][0] for record in records if record["settings"]["method"] == "finetune"
    )
    for record in records:
        chosen = record["settings"]
        points = (
            [w_star, *record["steps"]] if chosen["method"] == "influence" else record["history"]
        )
        assert len(points) == (
            3 if chosen["method"] == "influence" else 9
        )  # the profile: 2 passes or 8 epochs, and the start
        name = {
            "finetune": "Finetune",
            "influence": f"Influence ({chosen['preset']})",
            "fisher_mask": f"FisherMask ({chosen['preset']})",
        }[chosen["method"]]
        assert table[table.method == name].forget_acc.tolist() == pytest.approx(
            [p["forget_acc"] for p in points]
        )


def test_figure_2_has_both_scopes_of_each_method(kept):
    table, records, _, _ = kept["figure2"]
    assert len(table) == 2 * len(records) and set(table.scope) == {"classifier", "all"}
    caps = profiles()["smoke"]["tasks"]["relearn"]
    assert (table["at least"] == table.epochs.fillna(table.scope.map(caps) + 1)).all()
    assert table.epochs.astype(object).where(table.epochs.notna(), None).tolist() == [
        record["readouts"][f"relearn_{scope}_{cap}"]["epochs"]
        for record in records
        for scope, cap in caps.items()
    ]
    assert (
        table[table.method == "MaskClassifier"]["at least"].max()
        <= table[table.method == "Retrain"]["at least"].max()
    )


def test_figure_3_has_four_rates_and_figure_4_four_ratios(kept):
    table, records, _, _ = kept["figure3"]
    assert table.groupby("label").rate.nunique().eq(4).all() and len(table) == sum(
        len(r["history"]) for r in records
    )
    table, records, _, _ = kept["figure4"]
    assert sorted(table.ratio.unique()) == [0, 0.04, 0.08, 0.12] and set(table.key) == {
        r["key"] for r in records
    }
    before = {r["key"]: r["history"][0]["forget_acc"] for r in records}
    assert table.forget_acc_before.tolist() == pytest.approx([before[k] for k in table.key])
