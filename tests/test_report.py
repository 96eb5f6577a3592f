"""Records to tables, verdicts and files, against plain Python over records written by hand."""

import copy
import csv
import hashlib
import json
import statistics
from pathlib import Path

import matplotlib
import matplotlib.figure
import pandas as pd
import pytest

import fisher_unlearn
from fisher_unlearn.lab.experiments import sweep
from fisher_unlearn.lab.settings import RunSettings
from fisher_unlearn.lab.paper import AVERAGE, CELLS, PAPER_SETTINGS, departures, paper_numbers
from fisher_unlearn.lab.paper import row_label, setting_name
from fisher_unlearn.lab.report import Verdict, answer, bullets, conditions, keep, lacking
from fisher_unlearn.lab.report import read_kept, verdict, verdict_table
from fisher_unlearn.lab.results import beside, histories, missing_cells, outcomes, printable
from fisher_unlearn.lab.results import summary, with_average
from fisher_unlearn.lab.store import record_digest
from fisher_unlearn.methods.unlearn import METHODS
from made import listed
from verdicts import lacking_line, verdicts

matplotlib.use("Agg")
ROOT = Path(fisher_unlearn.__file__).parent
SIZES = {
    "digits": (1297, 500),
    "mnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "tinyimagenet": (100_000, 10_000),
}
HISTORY = [
    (80.0, 90.0),
    (70.0, 10.0),
    (82.0, 0.0),
    (82.0, 0.0),
    (60.0, 20.0),
    (81.0, 1.0),
]  # remain and forget accuracy of the epochs 0 to 5


def rows(pairs, more=None):
    "A history as records hold it; the scores by the paper's formula."
    return [
        {
            "epoch": e,
            "remain_acc": r,
            "forget_acc": f,
            "accuracy": (9 * r + f) / 10,
            "lr": 0.1 if e else None,
            "train_loss": 0.5 if e else None,
            "seconds": 1.0 if e else None,
            "unlearn_score": r / (1 + f / 100),
            **(more or {}),
        }
        for e, (r, f) in enumerate(pairs)
    ]


def record(
    method="fisher_mask", seed=666, pairs=HISTORY, profile="paper", history=None, **parameters
):
    "A record written by hand, as the protocol wants it unless parameters say otherwise."
    (s,) = sweep(profile, [{"method": method, "seed": seed, **parameters}], device="cpu")
    train, test = SIZES[s.data.dataset]
    request = {
        "kind": s.request.kind,
        "classes": [0] if s.request.kind == "class" else [],
        "forget": 200,
        "remain": 45_000,
        "digest": "d",
        "details": {"target": 0},
    }
    settings = json.loads(json.dumps(s.flat))
    made = {
        "commit": "0123456789abcdef",
        "clean": True,
        "torch": "2.9.9",
        "device": "cpu",
        "processor": "A processor",
        "cores": 2,
    }
    key = [
        s.data.dataset,
        s.network,
        method,
        s.preset,
        getattr(s.method, "ratio", None),
        s.request.remain_limit,
        s.tuning.fine_tune_epochs,
        s.request.kind,
        s.flat["mislabel_ratio"],
        seed,
    ]
    data = {
        "name": s.data.dataset,
        "digest": "x",
        "source": "by hand",
        "train": train,
        "test": test,
        "size": 32,
        "remarks": {},
    }
    return {
        "key": "-".join(map(str, key)),
        "settings": settings,
        "data": data,
        "provenance": made,
        "training": "t",
        "request": request,
        "changed": [],
        "note": "null",
        "masked_rows": [0, 1],
        "history": history or rows(pairs),
        "seconds": {"method": 0.1 + 0.2},
    }


def changed(original, **settings):
    """A copy of a record with other settings, some of them of the training (`train`) or its
    schedule (`schedule`)."""
    result = copy.deepcopy(original)
    schedule, train = settings.pop("schedule", {}), settings.pop("train", {})
    result["settings"].update(settings)
    result["settings"]["train"].update(train)
    result["settings"]["train"]["schedule"].update(schedule)
    return result


def training(original):
    "The record of a training, as far as it differs from that of a run."
    kept = {
        name: part for name, part in original.items() if name in ("settings", "data", "provenance")
    }
    return kept | {"key": "train", "history": [{"epoch": 1, "test_acc": 9.0}]}


def pick(table, **where):
    "The only row of a table that has these values."
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1, len(table)
    return table.iloc[0]


def test_the_papers_numbers_are_those_of_the_file():
    with (ROOT / "paper_numbers.csv").open(encoding="utf-8") as file:
        printed = list(csv.DictReader(file))
    assert len(printed) == len(paper_numbers()) == 232
    for t, count in {1: 138, 2: 18, 3: 30, 4: 13, 5: 33}.items():
        ours = paper_numbers(t)
        assert len(ours) == count and ours["mean"].tolist() == [
            float(row["mean"]) for row in printed if row["table"] == str(t)
        ]
    with pytest.raises(ValueError, match="unknown table '6'"):
        paper_numbers(6)


def test_the_file_is_the_one_that_was_checked_against_the_paper():
    assert (
        hashlib.sha256((ROOT / "paper_numbers.csv").read_bytes()).hexdigest()
        == "72ede44b21026ca1a4d34f2297c9325746b5cf23d8d1426b2ca611d1dbc4be16"
    )


@pytest.mark.parametrize(
    "settings, label",
    [
        (dict(method="finetune", preset="authors_code"), "Finetune"),
        (dict(method="retrain"), "Retrain"),
        (dict(method="mask_classifier"), "MaskClassifier"),
        (dict(method="random_mask"), "RandomMask (paper)"),
        (dict(method="tfidf", preset="authors_code"), "TF-IDF (authors_code)"),
        (dict(method="fisher_noise"), "FisherNoise (paper)"),
        (dict(method="activation_mask"), "ActivationMask (paper)"),
        (dict(method="influence"), "Influence (paper)"),
        (dict(method="fisher_mask", ratio=0.3), "FisherMask (paper)"),
        (dict(remain_weight=2.0, hard=True), "FisherMask (paper, remain_weight=2.0, hard=True)"),
        (dict(preset="authors_code", unit="kernel"), "FisherMask (authors_code)"),
        (dict(method="random_mask", tfidf_batches=5), "RandomMask (paper)"),
    ],
)
def test_row_labels(settings, label):
    assert row_label(RunSettings.of(**settings)) == label


@pytest.mark.parametrize(
    "parameters, name",
    [
        ({}, "ResNet20/CIFAR10"),
        (dict(dataset="mnist", network="densenet"), "DenseNet/MNIST"),
        (dict(dataset="mnist", ratio=0.02), "ResNet20/MNIST, R = 0.02"),
        (dict(method="finetune", ratio=0.3), "ResNet20/CIFAR10"),
        (dict(method="finetune", request="poison"), "ResNet20/CIFAR10, poison"),
        (dict(request="poison"), "ResNet20/CIFAR10, poison, R = 0.02"),
        (dict(request="poison", ratio=0.2), "ResNet20/CIFAR10, poison, R = 0.2"),
        (dict(request="mislabel", mislabel_ratio=0.3), "ResNet20/CIFAR10, 30% label noise"),
        (dict(remain_limit=0, fine_tune_epochs=0), "ResNet20/CIFAR10, no remain data"),
        (dict(remain_limit=50), "ResNet20/CIFAR10, 50 remain images"),
        (dict(request="random"), "ResNet20/CIFAR10, 200 random samples"),
        (dict(request="samples", samples=[1]), "ResNet20/CIFAR10, 200 given samples"),
        (dict(fine_tune_lr=0.01), "ResNet20/CIFAR10, rate 0.01"),
        (dict(fine_tune_length=30), "ResNet20/CIFAR10, 30 epochs of fine-tuning"),
        (dict(profile="quick"), "ResNet20/Digits"),
        (dict(network="googlenet", dataset="tinyimagenet"), "GoogLeNet/TinyImageNet"),
    ],
)
def test_setting_names(parameters, name):
    assert setting_name(record(**parameters)) == name


def test_other_classes_have_another_setting():
    other = record()
    other["request"]["classes"] = [3, 5]
    assert setting_name(other) == "ResNet20/CIFAR10, classes 3 5"


def test_the_cells_are_the_papers_sixteen():
    names = {
        f"{n}/{d}"
        for d, small in [
            ("MNIST", "ResNet20"),
            ("CIFAR10", "ResNet20"),
            ("CIFAR100", "ResNet50"),
            ("TinyImageNet", "ResNet50"),
        ]
        for n in (small, "VGG16", "GoogLeNet", "DenseNet")
    }
    assert len(CELLS) == 16 and set(CELLS) == names


def test_histories_hold_every_epoch_of_every_run():
    two = [
        record(seed=666),
        record(
            seed=777,
            pairs=[(1.0, 2.0), (3.0, 4.0)],
            history=rows([(1.0, 2.0), (3.0, 4.0)], {"trigger_acc": 7.0}),
        ),
    ]
    table = histories(two)
    assert (
        table.epoch.tolist() == [*range(6), 0, 1] and table.seed.tolist() == [666] * 6 + [777] * 2
    )
    assert table.remain_acc.tolist() == [r for r, _ in HISTORY] + [1.0, 3.0]
    assert table.trigger_acc.tolist()[-2:] == [7.0, 7.0] and table.trigger_acc[:6].isna().all()
    assert table.lr.isna().tolist() == [True, *[False] * 5, True, False] and table.lr.dtype == float
    first = table.iloc[0]
    assert [
        first.dataset,
        first.network,
        first.method,
        first.preset,
        first.ratio,
        first.epochs,
        first.fine_tune_epochs,
        first.label,
    ] == ["cifar10", "resnet20", "fisher_mask", "paper", 0.02, 160, 5, "FisherMask (paper)"]
    assert (
        table.cell.nunique() == 1
        and histories([two[0], record(dataset="mnist")]).cell.nunique() == 2
    )


@pytest.mark.parametrize(
    "use", [histories, outcomes, lacking, conditions], ids=lambda f: f.__name__
)
def test_lists_with_gaps_or_doubles_are_refused(use):
    with pytest.raises(ValueError, match="2 of 3 records are None"):
        use([None, record(), None])
    with pytest.raises(ValueError, match="there are no records"):
        use([])
    with pytest.raises(ValueError, match="1 of 1 records are None"):
        use([None])
    with pytest.raises(ValueError, match="is there twice"):
        use([record(), record()])


@pytest.mark.parametrize("use", [histories, outcomes, lacking], ids=lambda f: f.__name__)
def test_trainings_are_no_runs(use):
    with pytest.raises(ValueError, match="the record train is that of a training"):
        use([record(), training(record())])


def score(pair):
    return pair[0] / (1 + pair[1] / 100)


@pytest.mark.parametrize(
    "window, admitted", [("fine_tuning", range(1, 6)), ("authors_code", range(0, 5)), ("last", [5])]
)
@pytest.mark.parametrize(
    "pairs",
    [HISTORY, [(99.0, 0.0), *HISTORY[1:]], [*HISTORY[:5], (90.0, 0.0)]],
    ids=["middle", "first", "last"],
)
def test_windows_of_fine_tuning(window, admitted, pairs):
    best = max(admitted, key=lambda e: (score(pairs[e]), -e))
    run = outcomes([record(pairs=pairs)], window).iloc[0]
    assert [run.remain_acc_before, run.forget_acc_before, run.unlearn_score_before] == [
        *pairs[0],
        score(pairs[0]),
    ]
    assert [
        run.remain_acc_best,
        run.forget_acc_best,
        run.unlearn_score_best,
        run.epochs_to_best,
    ] == [*pairs[best], score(pairs[best]), best]
    assert [run.remain_acc_last, run.forget_acc_last, run.unlearn_score_last] == [
        *pairs[5],
        score(pairs[5]),
    ]
    steps = range(1, 5 if window == "authors_code" else 6)
    assert run.delta_forget_acc == pytest.approx(
        sum(abs(pairs[t][1] - pairs[t - 1][1]) for t in steps) / 4
    )
    assert run.delta_remain_acc == pytest.approx(
        sum(abs(pairs[t][0] - pairs[t - 1][0]) for t in steps) / 4
    )
    assert run.delta_unlearn_score == pytest.approx(
        sum(abs(score(pairs[t]) - score(pairs[t - 1])) for t in steps) / 4
    )


ODD = [
    (99.0, 0.0),
    (50.0, 0.0),
    (60.0, 90.0),
    (55.0, 0.0),
]  # the accuracy is best in epoch 2, the unlearn score in epoch 3, and both before


@pytest.mark.parametrize("window, epoch", [("fine_tuning", 2), ("authors_code", 2), ("last", 3)])
def test_retraining_is_judged_by_accuracy_and_counted_from_zero(window, epoch):
    run = outcomes([record("retrain", pairs=ODD), record("finetune", pairs=ODD)], window).iloc[0]
    assert [run.remain_acc_best, run.forget_acc_best, run.epochs_to_best] == [
        *ODD[epoch],
        epoch - 1,
    ]
    assert (
        run[
            [
                "remain_acc_before",
                "forget_acc_before",
                "unlearn_score_before",
                "accuracy_before",
                "delta_remain_acc",
            ]
        ]
        .isna()
        .all()
    )
    assert run.remain_acc_last == 55


def test_mislabelled_samples_are_judged_by_accuracy_others_by_score():
    noisy, usual = outcomes(
        [record("finetune", pairs=ODD, request="mislabel"), record("finetune", pairs=ODD)]
    ).itertuples()
    assert (noisy.epochs_to_best, noisy.accuracy_best) == (
        2,
        (9 * 60 + 90) / 10,
    ) and usual.epochs_to_best == 3


def test_without_fine_tuning_there_is_only_before():
    run = outcomes([record(pairs=HISTORY[:1], remain_limit=0, fine_tune_epochs=0), record()]).iloc[
        0
    ]
    assert (
        run.remain_acc_before == 80
        and run[["remain_acc_best", "remain_acc_last", "epochs_to_best", "delta_remain_acc"]]
        .isna()
        .all()
    )
    alone = summary(outcomes([record(pairs=HISTORY[:1], remain_limit=0, fine_tune_epochs=0)]))
    assert set(alone.phase) == {"before_ft"} and set(alone.metric) == {
        "remain_acc",
        "forget_acc",
        "unlearn_score",
        "accuracy",
    }


def test_one_epoch_has_no_fluctuation():
    assert "delta_remain_acc" not in outcomes([record(pairs=HISTORY[:2])])


def test_means_are_over_seeds_with_the_population_deviation():
    seeds = {666: 0, 777: 1, 888: 5}
    runs = [
        record("finetune", seed, [(r - d, f) for r, f in HISTORY]) for seed, d in seeds.items()
    ] + [record(seed=666)]
    table = summary(outcomes(runs))
    for phase, metric, values, name in [
        ("before_ft", "remain_acc", [80.0, 79.0, 75.0], "w*"),
        ("after_ft", "remain_acc", [82.0, 81.0, 77.0], "Finetune"),
        ("last_epoch", "remain_acc", [81.0, 80.0, 76.0], "Finetune"),
        ("after_ft", "epochs_to_best", [2, 2, 2], "Finetune"),
    ]:
        row = pick(table, method=name, phase=phase, metric=metric)
        assert [row["mean"], row.deviation, row.n] == pytest.approx(
            [statistics.fmean(values), statistics.pstdev(values), 3]
        )
    assert pick(table, method="FisherMask (paper)", phase="before_ft", metric="forget_acc").n == 1
    assert (
        not ((table.method == "Finetune") & (table.phase == "before_ft")).any()
        and not table.duplicated(["setting", "method", "phase", "metric"]).any()
    )


def test_retrained_models_have_their_own_phase():
    table = summary(outcomes([record("retrain", pairs=ODD)]))
    assert (
        set(table.phase) == {"retrained", "last_epoch"}
        and pick(table, phase="retrained", metric="epochs_to_best")["mean"] == 1
    )


@pytest.mark.parametrize(
    "other, named",
    [
        (dict(fine_tune_epochs=3), "fine_tune_epochs"),
        (dict(subset=100), "subset"),
        (dict(schedule={"epochs": 200}), "epochs"),
        (dict(device="cuda"), "device"),
        (dict(threads=1), "threads"),
        (dict(train={"weight_decay": 0.5}), "settings that have no column"),
    ],
)
def test_only_seeds_may_differ_within_a_mean(other, named):
    mixed = [record(), changed(record(seed=777), **other)]
    with pytest.raises(
        ValueError,
        match=rf"FisherMask \(paper\) in ResNet20/CIFAR10 differ in {named}.*make one table "
        r"for each",
    ):
        summary(outcomes(mixed))


def test_a_seed_counts_once_whatever_its_key():
    with pytest.raises(ValueError, match="differ in"):
        summary(outcomes([record(), record() | {"key": "of an older version"}]))


def cells_of(seeds=(1, 2, 3), leave_out=(), method="TF-IDF (paper)"):
    "A summary written by hand: cell k has mean k and deviation k/4."
    made = [
        (cell, method, "after_ft", "remain_acc", float(k), k / 4, len(seeds))
        for k, cell in enumerate(CELLS)
        if cell not in leave_out
    ]
    return pd.DataFrame(
        made, columns=["setting", "method", "phase", "metric", "mean", "deviation", "n"]
    )


def test_an_average_needs_all_sixteen_cells_with_three_seeds():
    whole, two_seeds, holed = cells_of(), cells_of((1, 2)), cells_of(leave_out=CELLS[3:5])
    assert (
        missing_cells(whole) == {"TF-IDF (paper)": []}
        and len(missing_cells(two_seeds)["TF-IDF (paper)"]) == 16
    )
    assert missing_cells(holed) == {
        "TF-IDF (paper)": [f"{CELLS[3]} (n = 0)", f"{CELLS[4]} (n = 0)"]
    }
    assert len(with_average(two_seeds)) == 16 and len(with_average(holed)) == 14
    one_short = whole.assign(n=[2, *[3] * 15])
    assert len(with_average(one_short)) == 16 and missing_cells(one_short) == {
        "TF-IDF (paper)": [f"{CELLS[0]} (n = 2)"]
    }
    assert len(with_average(whole.assign(mean=[None, *whole["mean"][1:]]))) == 16
    average = with_average(pd.concat([whole, holed.assign(method="Finetune")]))
    row = pick(average, setting=AVERAGE)
    assert [row.method, row["mean"], row.deviation, row.n] == [
        "TF-IDF (paper)",
        statistics.fmean(range(16)),
        statistics.fmean(k / 4 for k in range(16)),
        48,
    ]


def test_the_average_stands_beside_the_papers_only_if_it_is_whole():
    joined = beside(with_average(cells_of()), 1)
    row = pick(joined, setting=AVERAGE, method="TF-IDF (paper)")
    assert (row.n, row.paper_mean, row.paper_deviation) == (
        48,
        75.6,
        0.5,
    ) and row.difference == pytest.approx(7.5 - 75.6)
    short = beside(with_average(cells_of(leave_out=CELLS[:1])), 1)
    assert short[(short.setting == AVERAGE) & (short.n > 0)].empty
    assert (
        pick(short, setting=AVERAGE, method="TF-IDF", phase="after_ft", metric="remain_acc").n == 0
    )


# numbers of the paper that runs of ours must meet: table -> (run, phase, metric, mean, deviation)
PRINTED = {
    1: [
        (dict(method="retrain"), "retrained", "remain_acc", 85.5, 0.4),
        (dict(method="retrain"), "retrained", "epochs_to_best", 133.7, 16.1),
        (dict(method="finetune"), "before_ft", "forget_acc", 87.6, 0.4),
        (dict(method="finetune"), "after_ft", "forget_acc", 63.5, 0.6),
        (dict(preset="authors_code"), "before_ft", "unlearn_score", 86.1, 0.3),
        (dict(method="tfidf"), "after_ft", "epochs_to_best", 2.7, 1.9),
        (
            dict(dataset="cifar100", network="googlenet", method="random_mask"),
            "before_ft",
            "forget_acc",
            90.7,
            5.4,
        ),
    ],
    3: [
        (
            dict(method="finetune", request="poison", ratio=0.15),
            "after_ft",
            "forget_acc",
            88.2,
            16.7,
        ),
        (
            dict(method="random_mask", request="poison", ratio=0.2),
            "after_ft",
            "remain_acc",
            77.0,
            1.6,
        ),
        (dict(request="poison", ratio=0.25), "after_ft", "unlearn_score", 79.5, 0.9),
        (dict(request="poison", ratio=0.15), "after_ft", "forget_acc", 11.0, 15.6),
    ],
    4: [
        (
            dict(method="finetune", request="mislabel", mislabel_ratio=0.1),
            "after_ft",
            "accuracy",
            83.04,
            0.36,
        ),
        (dict(request="mislabel", mislabel_ratio=0.3), "after_ft", "accuracy", 80.36, 0.71),
        (dict(request="mislabel", mislabel_ratio=0.5), "after_ft", "accuracy", 77.45, 0.40),
        (
            dict(method="retrain", request="mislabel", mislabel_ratio=0.1),
            "retrained",
            "accuracy",
            84.43,
            0.20,
        ),
    ],
    5: [
        (
            dict(method="finetune", remain_limit=0, fine_tune_epochs=0),
            "before_ft",
            "remain_acc",
            85.0,
            0.5,
        ),
        (
            dict(method="tfidf", remain_limit=0, fine_tune_epochs=0),
            "before_ft",
            "forget_acc",
            55.5,
            38.1,
        ),
        (dict(remain_limit=0, fine_tune_epochs=0), "before_ft", "unlearn_score", 45.2, 8.8),
        (dict(remain_limit=50), "after_ft", "remain_acc", 86.1, 0.4),
        (dict(method="fisher_noise", remain_limit=50), "after_ft", "forget_acc", 0.1, 0.0),
    ],
}


@pytest.mark.parametrize(
    "table, case", [(t, case) for t, cases in PRINTED.items() for case in cases], ids=str
)
def test_runs_meet_the_papers_numbers(table, case):
    parameters, phase, metric, mean, deviation = case
    found = record(
        **parameters, pairs=HISTORY[:1] if parameters.get("remain_limit") == 0 else HISTORY
    )
    joined = beside(summary(outcomes([found])), table)
    row = pick(joined[joined.n > 0], phase=phase, metric=metric)
    assert (row.paper_mean, row.paper_deviation) == (
        mean,
        deviation,
    ) and row.difference == pytest.approx(row["mean"] - mean)


@pytest.mark.parametrize(
    "delta, printed",
    [("delta_remain_acc", 2.6), ("delta_forget_acc", 0.4), ("delta_unlearn_score", 2.8)],
)
def test_fluctuations_meet_table_2(delta, printed):
    ours = summary(outcomes([record()])).assign(setting=AVERAGE)
    assert pick(beside(ours, 2), metric=delta, method="FisherMask (paper)").paper_mean == printed


@pytest.mark.parametrize("table", [1, 2, 3, 4, 5])
def test_every_number_of_the_paper_has_a_name_of_ours_and_appears_once(table):
    printed = paper_numbers(table)
    assert set(printed.setting) <= set(PAPER_SETTINGS)
    elsewhere = cells_of()[:1].assign(setting="elsewhere", method="Finetune", n=1)
    joined = beside(elsewhere, table)
    assert (
        len(joined) == len(printed) + 1
        and joined.n.tolist() == [1, *[0] * len(printed)]
        and not joined.setting.isna().any()
    )
    assert (
        joined.paper_mean[1:].tolist() == printed["mean"].tolist()
        and joined.difference.isna().all()
    )
    assert not joined.duplicated(["setting", "method", "phase", "metric"]).any()


def test_numbers_of_other_settings_do_not_meet_the_papers():
    for strange in (
        record(profile="quick"),
        record(ratio=0.1),
        record(fine_tune_length=30),
        record(fine_tune_lr=0.1),
        record(remain_limit=49),
    ):
        joined = beside(summary(outcomes([strange])), 1)
        assert joined[joined.n > 0].paper_mean.isna().all()


def test_the_printed_table_has_one_number_a_cell_and_rows_that_were_run():
    runs = [
        record(seed=666),
        record(seed=777, pairs=[(r - 2, f) for r, f in HISTORY]),
        record("retrain", pairs=ODD),
        record("mask_classifier"),
    ]
    wide = printable(beside(summary(outcomes(runs)), 1))
    names = ("remain acc", "forget acc", "unlearn score", "epochs to best")
    columns = [f"{name}{part}" for name in names for part in ("", " ±", ", paper")]
    assert wide.columns.tolist() == ["setting", "method", "when", "n", *columns]
    rows = wide.set_index(["method", "when"])
    assert rows.index.tolist() == [
        ("FisherMask (paper)", "before"),
        ("FisherMask (paper)", "after"),
        ("Retrain", "after"),
        ("MaskClassifier", "before"),
        ("MaskClassifier", "after"),
    ]
    assert {*wide.setting} == {"ResNet20/CIFAR10"} and wide.n.tolist() == [2, 2, 1, 1, 1]
    fisher, fresh = rows.loc[("FisherMask (paper)", "before")], rows.loc[("Retrain", "after")]
    assert fisher[columns[:6]].tolist() == ["79.0", "1.0", "86.2", "90.0", "0.0", "0.0"]
    assert fisher["epochs to best"] == "–"
    assert fresh[columns[-3:]].tolist() == ["1.0", "–", "133.7"]
    control = rows.loc[("MaskClassifier", "before")]
    assert control[columns[:3]].tolist() == ["80.0", "–", "–"]
    more = printable(beside(summary(outcomes(runs)), 1), digits=2).set_index(["method", "when"])
    assert more["remain acc"]["MaskClassifier", "before"] == "80.00"


FAITHFUL = [
    dict(),
    dict(method="retrain"),
    dict(preset="authors_code"),
    dict(dataset="mnist"),
    dict(dataset="cifar100"),
    dict(dataset="tinyimagenet"),
    dict(dataset="tinyimagenet", network="vgg16"),
    dict(request="poison", ratio=0.2),
    dict(request="mislabel", mislabel_ratio=0.5),
    dict(request="mislabel", mislabel_how="permuted"),
    dict(remain_limit=50),
    dict(remain_limit=0, fine_tune_epochs=0),
    dict(ratio=0.08),
    dict(fine_tune_lr=0.01),
    dict(fine_tune_length=30),
    dict(method="influence", fine_tune_epochs=0),
    dict(unit="weight"),
    dict(seed=1),
    dict(threads=8),
]


@pytest.mark.parametrize("parameters", FAITHFUL, ids=str)
def test_a_record_of_the_protocol_has_no_departures(parameters):
    assert departures(record(**parameters)) == []


def test_the_training_of_a_run_departs_by_its_training_only():
    "Its record carries the settings of the run that was first to need it."
    run = record(hard=True, fine_tune_epochs=2)
    assert len(departures(run)) == 2 and departures(training(run)) == []
    assert departures(changed(training(run), schedule={"lr": 0.01})) == [
        "`lr` is 0.01 (paper: 0.1)"
    ]


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(schedule={"lr": 0.01}), "`lr` is 0.01 (paper: 0.1)"),
        (dict(schedule={"epochs": 161}), "`epochs` is 161 (paper: 160)"),
        (dict(schedule={"drops": [80]}), "`drops` is (80,) (paper: (80, 120))"),
        (dict(schedule={"factor": 0.2}), "`factor` is 0.2 (paper: 0.1)"),
        (dict(schedule={"warmup": 20}), "`warmup` is 20 (paper: 0)"),
        (dict(train={"batch_size": 64}), "`batch_size` is 64 (paper: 128)"),
        (dict(train={"momentum": 0.0}), "`momentum` is 0.0 (paper: 0.9)"),
        (dict(train={"weight_decay": 0.0}), "`weight_decay` is 0.0 (paper: 0.0001)"),
        (dict(train={"select": "last"}), "`select` is last (paper: best)"),
        (dict(train={"optimizer": "adamw"}), "`optimizer` is adamw (paper: sgd)"),
        (
            dict(train={"loss": "binary_cross_entropy"}),
            "`loss` is binary_cross_entropy (paper: cross_entropy)",
        ),
        (dict(train={"clip": 0.01}), "`clip` is 0.01 (paper: None)"),
        (dict(train={"epochs": 10}), "`length` is 10 (paper: None)"),
        (dict(subset=5000), "`subset` is 5000 (paper: None)"),
        (dict(fine_tune_epochs=4), "`fine_tune_epochs` is 4 (paper: 5)"),
        (
            dict(network="resnet50"),
            "`network` is resnet50 (paper: resnet20 or vgg16 or googlenet or densenet)",
        ),
        (dict(dataset="digits"), "digits is not among the paper's data sets"),
        (dict(remain_limit=51), "`remain_limit` is 51 (paper: None or 0 or 50)"),
        (dict(remain_weight=2.0), "`remain_weight` is 2.0 (preset paper: sums)"),
        (dict(train={"precision": "bfloat16"}), "`precision` is bfloat16 (paper: float32)"),
        (dict(hard=True), "`hard` is True (preset paper: False)"),
        (dict(request="random"), "the paper has no request 'random'"),
        (dict(request="poison", count=40), "`count` is 40 (paper: 200)"),
        (dict(request="poison", patch_value=255), "`patch_value` is 255 (paper: 0)"),
        (
            dict(request="mislabel", mislabel_ratio=0.2),
            "`mislabel_ratio` is 0.2 (paper: 0.1 or 0.3 or 0.5)",
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_each_departure_is_named(change, named):
    assert departures(changed(record(), **change)) == [named]


def test_an_options_departure_names_the_preset_that_it_is_compared_with():
    "The paper says nothing of our options, and two presets of a method may be each other's change."
    said = [
        departures(record(preset=preset, classifier_in_pool=value))
        for preset, value in (("authors_code", False), ("paper", True))
    ]
    assert said == [
        ["`classifier_in_pool` is False (preset authors_code: True)"],
        ["`classifier_in_pool` is True (preset paper: False)"],
    ]


@pytest.mark.parametrize(
    "name, option, named",
    [
        ("kick", {"kick_scale": 0.25}, "`kick_scale` is 0.25 (preset paper: 1.0)"),
        ("ssd", {"ssd_alpha": 5.0}, "`ssd_alpha` is 5.0 (preset paper: "),
        ("scrub", {"scrub_gamma": 0.5}, "`scrub_gamma` is 0.5 (default: "),
    ],
)
def test_of_a_method_that_is_none_of_the_papers_nothing_is_said_to_be_the_papers(
    name, option, named
):
    assert METHODS[name].title not in {*paper_numbers().method}
    said = departures(record(name, **option))
    assert said[-1].startswith(named) and not any("(paper:" in text for text in said)


def test_departures_in_data_and_request_are_named():
    fewer, lossy, other, target = (record() for _ in range(4))
    fewer["data"]["train"] = 25_000
    lossy["data"]["remarks"] = {"lossy_tr": "117 images", "wnids": "50 images"}
    other["request"]["classes"] = [3]
    target = record(request="poison")
    target["request"]["details"]["target"] = 4
    assert departures(fewer) == ["25,000 training images of cifar10 (paper: 50,000)"]
    assert departures(lossy) == ["cifar10 has inexact images (`lossy_tr`: 117 images)"]
    assert departures(other) == ["`classes` is (3,) (paper: (0,))"] and departures(target) == [
        "`target` is 4 (paper: 0)"
    ]
    named = changed(record(), classes=["airplane"])  # the class 0 by its name
    assert departures(named) == []
    assert (
        departures(changed(record("retrain"), fine_tune_epochs=1)) == []
    )  # retraining is not fine-tuned
    assert departures(record("influence")) == ["`fine_tune_epochs` is 5 (paper: 0)"]


def test_committed_records_depart_as_they_say():
    found = {
        path.parent.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT.parent / "figures").glob("*/records/*.json"))
    }
    assert any("digits is not among" in text for text in departures(found["quick"]))
    assert {"`epochs` is 3 (paper: 30)"} <= set(departures(found["cpu"]))


def test_conditions_name_all_that_numbers_depend_on():
    other = changed(record("finetune", seed=777), schedule={"epochs": 200})
    other["provenance"] |= {"clean": False, "device": "A card", "instructions": "AVX2"}
    other["data"]["remarks"] = {"lossy_te": "34 images"}
    said = conditions([record(), other, training(record())])
    for part in (
        "3 records",
        "cifar10 (50,000 training and 10,000 test images)",
        "resnet20",
        "seeds 666 / 777",
        "160 epochs at rate 0.1, times 0.1 after epochs 80 and 120",
        "200 epochs",
        "batches of 128",
        "replayed in 5 epochs",
        "cpu (A processor, 2 threads)",
        "A card (A processor with AVX2, 2 threads)",
        "torch 2.9.9",
        "0123456789 (clean tree)",
        "0123456789 (changed tree)",
        "`epochs` is 200 (paper: 160)",
        "cifar10 has inexact images (`lossy_te`: 34 images)",
    ):
        assert part in said, part
    assert "no departures" in conditions([record()]) and "\n" not in said
    read_out = record() | {
        "readouts": {
            "agreement": {"provenance": record()["provenance"] | {"commit": "fedcba9876543210"}}
        }
    }
    assert "commit 0123456789 (clean tree) / fedcba9876 (clean tree)" in conditions(
        [read_out]
    ) and conditions([read_out]).startswith("1 records")
    assert "rate 0.01 for 5 epochs" in conditions(
        [record(fine_tune_lr=0.01)]
    ) and "fine-tuning" not in conditions([record("retrain")])


def enough(seeds=(666, 777, 888), **parameters):
    return [
        record(method, seed, **parameters)
        for seed in seeds
        for method in ("finetune", "fisher_mask")
    ]


def test_three_seeds_of_every_cell_without_departures_are_enough():
    assert lacking(enough()) == [] and lacking(enough((1, 2)), seeds=2) == []
    assert lacking(enough((1, 2))) == ["every cell has fewer than 3 seeds, the least 2"]
    assert lacking(enough()[:-1]) == ["1 of 2 cells have fewer than 3 seeds, the least 2"]
    assert lacking([record("finetune", 1), record("finetune", 2), record("fisher_mask", 3)]) == [
        "every cell has fewer than 3 seeds, the least 1"
    ]
    assert lacking(enough(profile="quick")) == ["1 departure from the paper's protocol"]
    assert lacking(enough(fine_tune_epochs=4, epochs=80)) == [
        "3 departures from the paper's protocol"
    ]
    assert lacking(enough(), settings=["ResNet20/CIFAR10"]) == []
    assert lacking(enough(), settings=CELLS) == [
        "30 of 32 cells have fewer than 3 seeds, the least 0"
    ]


def test_the_profile_quick_is_never_enough():
    for name in ("digits", "mnist", "cifar10"):
        assert lacking(
            [record("finetune", seed, profile="quick", dataset=name) for seed in range(9)]
        )


@pytest.mark.parametrize(
    "holds, lacks, outcome, words",
    [
        (True, [], "holds", ""),
        (False, [], "does not hold", ""),
        (
            True,
            ["why"],
            "not enough runs to say",
            " The numbers at hand point towards the claim (why).",
        ),
        (
            False,
            ["why", "and"],
            "not enough runs to say",
            " The numbers at hand point away from the claim (why; and).",
        ),
        (None, ["why"], "not enough runs to say", " Numbers that it needs are missing (why)."),
        (None, [], "not enough runs to say", " Numbers that it needs are missing."),
    ],
)
def test_verdicts(holds, lacks, outcome, words):
    found = verdict("A is above B (paper: 3 and 4)", holds, "1.0 and 2.0.", lacks)
    points = None if outcome != "not enough runs to say" else POINTS[holds]
    more = () if points is None else tuple(lacks)
    assert found == Verdict("A is above B", outcome, "1.0 and 2.0.", "3 and 4", points, more)
    assert str(found) == f"* A is above B (paper: 3 and 4): **{outcome}**. 1.0 and 2.0.{words}"
    assert bullets([found, found]) == f"{found}\n{found}"


POINTS = {True: "towards", False: "away", None: "numbers missing"}


def test_a_table_of_verdicts_says_once_what_all_lack():
    rows = [
        verdict("A | a", True, "1.", ["few", "short"]),
        verdict("B (paper: 2)", False, "2.", ["few", "short", "odd"]),
        verdict("C", None, "", ["few", "short"]),
        verdict("D", True, "4.", []),
    ]
    text = verdict_table(rows)
    assert [(r["claim"], r["here"], r["paper"], r["says"], r["marks"]) for r in verdicts(text)] == [
        ("A \\| a", "1.", "–", "towards", ""),
        ("B", "2.", "2", "away", "a"),
        ("C", "–", "–", "numbers missing", ""),
        ("D", "4.", "–", "holds", ""),
    ]
    assert lacking_line(text) == (
        "**Not enough runs to say**, in 3 of 4 rows: few; short; in rows marked a, odd."
    )
    assert not lacking_line(verdict_table(rows[3:]))
    assert answer(rows) == (
        "Of the paper's claims here (4), 1 hold and 0 do not. Runs are not enough for 3: the "
        "numbers at hand point towards 1 and away from 1, and for 1 they are missing. Against the "
        "paper: B."
    )
    assert answer(rows[:1]).startswith("Of the paper's claims here (1), none can be judged.")


@pytest.fixture
def figure():
    return matplotlib.figure.Figure(figsize=(2, 1))


def test_what_is_kept_comes_back_bit_for_bit(tmp_path, figure):
    made = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT.parent / "figures" / "quick" / "records").glob("*.json"))
    ]
    odd, *others = [r for r in made if "request" in r]
    odd["history"][-1] |= {"remain_acc": 100 / 3, "forget_acc": 5e-324}
    odd |= {"memory": {"host": 1.5}, "seconds": {"method": 0.1 + 0.2}, "note": "ä | b"}
    odd["digest"] = record_digest(odd)
    records = [odd, next(r for r in made if "request" not in r), *others]
    table = beside(summary(outcomes([record()])), 1)
    names = keep("table1", tmp_path / "new" / "folder", table, figure, "words ±", records)
    folder = tmp_path / "new" / "folder"
    assert (
        sorted(names)
        == listed(folder)
        == ["table1.csv", "table1.md", "table1.parquet", "table1.png"]
    )
    assert read_kept(folder / "table1.parquet") == records and [
        list(r) for r in read_kept(folder / "table1.parquet")
    ][2] == list(records[2])
    assert (folder / "table1.md").read_text(encoding="utf-8") == "words ±\n" and (
        folder / "table1.png"
    ).read_bytes()[:4] == b"\x89PNG"
    back = pd.read_csv(folder / "table1.csv")
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert not any(str(tmp_path).encode() in p.read_bytes() for p in folder.iterdir())


def test_what_is_kept_replaces_what_was_there_only_when_it_is_whole(tmp_path, figure):
    table = pd.DataFrame({"a": [1]})
    keep("t", tmp_path, table, figure, "old", [record()])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    class Broken(matplotlib.figure.Figure):
        def savefig(self, path, **options):
            Path(path).write_bytes(b"half")
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        keep("t", tmp_path, table, Broken(), "old", [record()])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="are None"):
        keep("t", tmp_path, table, figure, "new", [None])
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == "old\n"


def test_a_folder_that_cant_be_written_is_named(tmp_path, figure):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write in the folder"):
        keep("t", tmp_path / "file", pd.DataFrame({"a": [1]}), figure, "x", [record()])
