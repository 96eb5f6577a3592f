"""The words about results, in README and on the page of results, are fixed, and their numbers are
read from the kept records: the words must be true of them."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

import fisher_unlearn
from fisher_unlearn.lab.results import outcomes
from fisher_unlearn.lab.paper import paper_numbers
from fisher_unlearn.lab.report import conditions, read_kept
from verdicts import lacking_line, verdicts

FIGURES = Path(fisher_unlearn.__file__).parent.parent / "figures"
README_TEXT = FIGURES.parent / "README.md"
RESULTS = FIGURES.parent / "nbs" / "results.ipynb"
BOTH = ("paper", "authors_code")


def results():
    "What the page of results says: its prose, and what its cells put out."
    cells = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]
    prose = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    said = [
        "".join(output["data"]["text/markdown"])
        for cell in cells
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    return "\n".join([*prose, *said])


def table(name, **chosen):
    "Remain and forget accuracy by method and phase, ours (mean) and the paper's (paper_mean)."
    rows = pd.read_csv(FIGURES / f"{name}.csv")
    for column, value in chosen.items():
        rows = rows[rows[column] == value]
    return rows[rows.metric.isin(["remain_acc", "forget_acc"])].pivot_table(
        index=["method", "phase"], columns="metric", values=["mean", "paper_mean"], sort=False
    )


@pytest.fixture(scope="module")
def table_1():
    return table("paper_bfloat16/table1", setting="ResNet20/CIFAR10", window="fine_tuning")


@pytest.fixture(scope="module")
def short():
    return table("cpu/table1", setting="ResNet20/CIFAR10", window="fine_tuning")


@pytest.mark.parametrize(
    "method, phase",
    [
        ("w*", "before_ft"),
        ("Retrain", "retrained"),
        ("Finetune", "after_ft"),
        ("RandomMask (paper)", "after_ft"),
        ("FisherMask (authors_code)", "before_ft"),
        *(
            (f"{method} ({reading})", "after_ft")
            for method in ("FisherNoise", "ActivationMask")
            for reading in BOTH
        ),
    ],
)
def test_what_is_as_in_the_paper_is_within_3_points(table_1, method, phase):
    ours, paper = table_1.loc[method, phase]["mean"], table_1.loc[method, phase]["paper_mean"]
    assert (ours - paper).abs().max() <= 3


def test_what_is_not_as_in_the_paper_is_far_from_it(table_1):
    forget = table_1.xs("forget_acc", axis=1, level="metric")
    off = (forget["mean"] - forget.paper_mean).abs()
    assert off["FisherMask (paper)"].min() > 25 and all(
        off[f"TF-IDF ({reading})", "after_ft"] > 20 for reading in BOTH
    )


def test_the_control_has_the_signature_of_the_authors_code(table_1):
    code, control, w_star = (
        table_1["mean"].loc[method, "before_ft"]
        for method in ("FisherMask (authors_code)", "MaskClassifier", "w*")
    )
    assert (code - control).abs().max() < 0.5 and min(
        code.remain_acc, control.remain_acc
    ) > w_star.remain_acc + 1


def test_fine_tuning_alone_forgets_least_and_the_texts_fisher_mask_next(table_1):
    left = table_1["mean"].xs("after_ft", level="phase").forget_acc.sort_values(ascending=False)
    assert list(left.index[:2]) == ["Finetune", "FisherMask (paper)"] and left["Finetune"] > 50
    before = table_1["mean"].forget_acc
    assert (
        5
        < before["FisherMask (paper)", "before_ft"]
        < left["FisherMask (paper)"]
        < before["w*", "before_ft"]
    )


def test_a_short_training_hides_this(table_1, short):
    forget, whole = short["mean"].forget_acc, table_1["mean"].forget_acc
    assert (
        forget.xs("after_ft", level="phase").max() < 1
        and abs(
            forget["FisherMask (paper)", "before_ft"] - whole["FisherMask (paper)", "before_ft"]
        )
        > 25
    )


def test_without_remain_data_fisher_mask_destroys_the_rest():
    remain = table("paper_bfloat16/table5", setting="ResNet20/CIFAR10, no remain data")[
        "mean"
    ].remain_acc
    assert all(remain[f"FisherMask ({reading})", "before_ft"] < 60 for reading in BOTH)


def test_on_the_short_schedule_the_rate_matters_and_the_ratio_does_not():
    ratios, rates = (pd.read_csv(FIGURES / f"cpu/figure{n}.csv") for n in (4, 3))
    assert (
        ratios.forget_acc_best.max() < 1
        and ratios.remain_acc_best.max() - ratios.remain_acc_best.min() < 2
    )
    last = rates[rates.epoch == rates.epoch.max()].set_index(["label", "rate"]).forget_acc
    for label in ("Finetune", "FisherMask (paper)"):
        assert (
            last[label, "replay"] < 1
            and last[label, "0.1"] < 1 < last[label, "0.01"] < last[label, "0.001"]
        )


def test_on_the_short_schedule_fine_tuning_forgets_at_once_and_the_influence_function_little():
    forget = pd.read_csv(FIGURES / "cpu/figure1.csv").pivot(
        index="epoch", columns="method", values="forget_acc"
    )
    assert (
        forget["Finetune"][0] > 50
        and forget["Finetune"][1:].max() < 1
        and all(forget[f"FisherMask ({reading})"][10] < 1 for reading in BOTH)
    )
    text, code = (forget[f"Influence ({reading})"].dropna() for reading in BOTH)
    assert (text - text[0]).abs().max() < 0.05 and 0 < code[0] - code[3] < 10 and len(code) == 4
    used = [record["settings"] for record in read_kept(FIGURES / "cpu/figure1.parquet")]
    assert {(s["lissa_epochs"], s["lissa_scale"]) for s in used if s["method"] == "influence"} == {
        (3, 80)
    } and {s["subset"] for s in used} == {10_000}


def test_on_a_hundred_classes_only_the_mask_of_the_code_takes_the_class():
    forget = pd.read_csv(FIGURES / "interpolating/figure1.csv").pivot(
        index="epoch", columns="method", values="forget_acc"
    )
    assert len(forget) == 31 and (forget["FisherMask (authors_code)"] == 0).all()
    others = forget.drop(columns="FisherMask (authors_code)")
    assert (others.min() > 50).all()
    for reading in BOTH:
        passes = forget[f"Influence ({reading})"].dropna()
        assert len(passes) == 4 and (passes == passes[0]).all()
    used = [record["settings"] for record in read_kept(FIGURES / "interpolating/figure1.parquet")]
    assert {(s["dataset"], s["network"], s["seed"]) for s in used} == {
        ("cifar100", "resnet20", 666)
    }
    lines = [line for line in results().splitlines() if "end at 0.0036" in line]
    assert len(lines) == 1


def test_on_the_whole_schedule_fisher_mask_of_the_text_forgets_more_with_a_higher_ratio():
    forget = (
        pd.read_csv(FIGURES / "paper_bfloat16/figure4.csv")
        .set_index("label")
        .sort_values("ratio")
        .forget_acc_best
    )
    text = forget["FisherMask (paper)"].tolist()
    assert len(text) == 4 and text == sorted(text, reverse=True) and text[-1] > 5
    assert forget["FisherMask (authors_code)"].iloc[1:].max() < 1


def test_only_re_learning_by_all_parameters_tells_retraining_from_the_rest():
    epochs = pd.read_csv(FIGURES / "cpu/figure2.csv").set_index(["scope", "method"])
    every = epochs.loc["all", "at least"]
    assert (
        every.drop("Retrain").max() < every["Retrain"]
        and epochs.loc["classifier"].epochs.isna().all()
    )


def test_poisoned_images_are_forgotten_best_by_activation_mask_and_not_by_fisher_mask():
    ends = outcomes(read_kept(FIGURES / "cpu/table3.parquet"))
    trigger = (
        ends[(ends.ratio == 0.2) | ends.method.isin(["retrain", "finetune"])]
        .set_index("label")
        .trigger_acc_last
    )
    assert (
        trigger.drop("Retrain").idxmin().startswith("ActivationMask") and trigger["Finetune"] > 50
    )
    assert (
        abs(trigger["FisherMask (paper)"] - trigger["Finetune"]) < 10
        and trigger["FisherMask (authors_code)"] > trigger["RandomMask (authors_code)"]
    )


def test_who_forgets_wrong_labels_ends_between_w_star_and_retraining():
    table = outcomes(read_kept(FIGURES / "cpu/table4.parquet"))
    for _, ends in table.groupby("setting"):
        ends = ends.set_index("label")
        for measure in ("accuracy", "truth_acc", "forget_acc"):
            w_star, retrained = (
                ends.loc["Finetune", f"{measure}_before"],
                ends.loc["Retrain", f"{measure}_best"],
            )
            assert (
                ends.drop("Retrain")[f"{measure}_best"].between(*sorted((w_star, retrained))).all()
            )
    before, best = (
        table.pivot(index="setting", columns="label", values=f"accuracy_{when}")
        for when in ("before", "best")
    )
    harm = before["Finetune"] - before["FisherMask (paper)"]
    assert (
        harm.is_monotonic_increasing
        and harm.index[-1].endswith("50% label noise")
        and best.iloc[-1].idxmin() == "FisherMask (paper)"
    )
    printed = (
        paper_numbers(4)
        .query("phase == 'after_ft'")
        .pivot(index="setting", columns="method", values="mean")
    )
    assert (printed.idxmax(axis=1) == "FisherMask").all() and (
        printed.idxmin(axis=1) == "Finetune"
    ).all()


def test_without_the_classifier_the_authors_recipe_does_nothing_and_no_mask_does_both():
    full, brief = (
        pd.read_csv(FIGURES / profile / "what_the_mask_removes.csv")
        for profile in ("paper_bfloat16", "cpu")
    )
    inside, outside = (full[full.classifier == pool] for pool in ("in the pool", "not in the pool"))
    code, short = (
        rows[
            (rows.estimator == "expected labels, per batch")
            & (rows.unit == "kernel")
            & (rows["λ"] == 1)
            & (rows.R == 0.02)
        ].set_index("classifier")
        for rows in (full, brief)
    )
    assert (
        code["does nothing"]["not in the pool"]
        and code["is the control"]["in the pool"]
        and code.norm["not in the pool"] < 0.5
    )
    ends = outcomes(read_kept(FIGURES / "paper_bfloat16/what_the_mask_removes.parquet")).query(
        "fine_tune_epochs > 0"
    )
    alone, footnote = (
        ends[ends.method == "finetune"].iloc[0],
        ends[
            (ends.preset == "authors_code") & (ends.options == '{"classifier_in_pool": false}')
        ].iloc[0],
    )
    assert all(
        abs(alone[end] - footnote[end]) < 2 for end in ("remain_acc_last", "forget_acc_last")
    )
    assert (
        inside.printed.any()
        and outside.forgets.any()
        and not (outside.printed | outside.forgets & outside.keeps).any()
    )
    assert (
        short.forget["in the pool"] < 1 < short.forget["not in the pool"] < 50
        and short["is the control"]["in the pool"]
    )


def test_other_instructions_end_otherwise_on_the_digits():
    here, there = (
        pd.read_csv(FIGURES / place / "quick/quickstart_digits_resnet20.csv", index_col="method")[
            ["remain best", "forget best"]
        ].round(1)
        for place in ("", "avx512")
    )
    assert (
        (here != there)
        .any(axis=1)[["Retrain", "FisherMask (paper)", "FisherMask (authors_code)"]]
        .all()
    )


def test_what_was_not_run_has_no_result():
    runs = pd.DataFrame(
        [
            {
                "result": path.stem,
                **record["settings"],
                **record["settings"]["train"],
                "epochs": record["settings"]["train"]["schedule"]["epochs"],
                "seed": record["settings"]["seed"],
            }
            for path in FIGURES.glob("*/*.parquet")
            for record in read_kept(path)
        ]
    )
    runs = runs[runs.dataset != "digits"]  # which are none of the paper's
    few = runs[runs.dataset == "cifar100"]  # Figure 1's, on a stand-in
    assert set(few.result) == {"figure1"} and set(few.subset) == {10_000}
    runs = runs.drop(few.index)
    small = runs[runs.dataset == "mnist"]
    assert set(small.epochs) == {30} and set(small.seed) == {666, 777, 888}
    assert {*small.result} == {"table1", "table2"} and set(runs.network) == {"resnet20"}
    runs = runs.drop(small.index)
    whole = runs[runs.epochs == 160]
    assert set(runs.dataset) == {"cifar10"} and 888 not in set(whole.seed)
    assert set(whole.precision) == {"bfloat16"} and not set(whole.result) & {
        "table3",
        "table4",
        "figure1",
        "figure2",
        "figure3",
    }


def test_claims_are_no_stronger_than_their_records():
    "What a reader can count in the records: who leaves as much, and who is near to the paper."
    text = results()
    ends = outcomes(read_kept(FIGURES / "paper_bfloat16/table1.parquet"))
    ends = ends[ends.dataset == "cifar10"]
    mask = ends[ends.label == "FisherMask (paper)"].set_index("seed").forget_acc_best
    others = ends[~ends.label.isin(["FisherMask (paper)", "Finetune"])]
    for row in others.itertuples():
        if row.forget_acc_best >= mask[row.seed]:
            assert f"{row.label} ({row.forget_acc_best:.1f} under seed {row.seed})" in text
    assert (others.forget_acc_best >= others.seed.map(mask)).any()  # TF-IDF under one seed
    one = pd.read_csv(FIGURES / "paper_bfloat16/table1.csv").query(
        "window == 'fine_tuning' and setting == 'ResNet20/CIFAR10'"
    )
    rows = [line for line in text.splitlines() if "within a point" in line or line.startswith("| ")]
    head = [cell.strip() for cell in rows[0].split("|")]
    near = {
        (cells[1].strip(), when): cells[head.index(f"{when}: within a point")].strip()
        for cells in (line.split("|") for line in rows[1 : 1 + one.method.nunique()])
        for when in ("masked", "tuned")
    }
    for phase, when in (("before_ft", "masked"), ("after_ft", "tuned"), ("retrained", "tuned")):
        rows = one[(one.phase == phase) & one.metric.isin(["remain_acc", "forget_acc"])]
        for method, group in rows.groupby("method"):
            both = group.dropna(subset=["mean", "paper_mean"])
            if len(both) == 2:
                gap = (both["mean"].round(1) - both.paper_mean.round(1)).abs().max()
                assert near[method, when] == ("yes" if gap <= 1 + 1e-9 else "no"), (method, phase)


def test_what_a_class_of_mnist_says_of_the_masks():
    digits = table("paper_bfloat16/table1", setting="ResNet20/MNIST", window="fine_tuning")["mean"]
    before = digits.xs("before_ft", level="phase")
    code, control = (before.loc[name] for name in ("FisherMask (authors_code)", "MaskClassifier"))
    assert (code - control).abs().max() < 5 and code.forget_acc < 1 < before.forget_acc["w*"]
    assert before.forget_acc["FisherMask (paper)"] > 5
    last = table("paper_bfloat16/table1", setting="ResNet20/MNIST", window="last")["mean"]
    last = last.xs("after_ft", level="phase").forget_acc
    assert last["Finetune"] < 50
    runs = outcomes(
        [
            r
            for r in read_kept(FIGURES / "paper_bfloat16/table1.parquet")
            if r["settings"]["dataset"] == "mnist"
        ]
    )
    masked = runs.pivot(index="label", columns="seed", values="forget_acc_before")
    assert len(runs) == 39 and (masked.loc["FisherMask (authors_code)"] < 0.1).all()
    assert masked.loc["MaskClassifier"].max() < 10
    assert (masked.loc["FisherMask (paper)"] > masked.loc["MaskClassifier"] - 1).all()
    losses = {"mnist": [], "cifar10": []}
    for record in read_kept(FIGURES / "paper_bfloat16/table1.parquet"):
        if record["training"]:
            place = FIGURES.parent / f"data/checkpoints/train-{record['training']}.json"
            rows = json.loads(place.read_text(encoding="utf-8"))["history"]
            (loss,) = (row["train_loss"] for row in rows if row["selected"])
            losses[record["settings"]["dataset"]].append(loss)
            assert f"{loss:.4f}" in results()
    assert min(losses["mnist"]) > 5 * max(losses["cifar10"])


def test_times_of_re_learning_are_not_said_to_tell_what_they_do_not():
    text = results()
    again = pd.read_csv(FIGURES / "cpu/figure2.csv")
    assert again[again.scope == "classifier"].epochs.isna().all()  # an aim that nobody reaches
    judged = pd.read_csv(FIGURES / "cpu/recommended.csv").query("data == 'all'")
    all_of = lambda name: judged[judged["name"] == name]["re-learned, all"].tolist()
    assert {*all_of("Retrain")} & {*all_of("FisherMask (paper)")}  # so it tells nothing
    for name in ("Retrain", "FisherMask (paper)"):
        assert ", ".join(f"{v:.0f}" for v in all_of(name)) in text
    assert "tells retraining from all the rest" not in text and "it tells nothing" not in text


def test_counts_of_masks_count_distinct_outcomes():
    masks = pd.read_csv(FIGURES / "paper_bfloat16/what_the_mask_removes.csv")
    spared = masks[masks.classifier == "not in the pool"]
    idle = (spared[["remain − w*", "forget − w*"]].abs() < 1e-9).all(axis=1).sum()
    printed = masks[(masks.classifier == "in the pool") & masks.printed]
    kinds = {(round(m.remain, 6), round(m.forget, 6)) for m in printed.itertuples()}
    assert 0 < idle and len(kinds) < len(printed)
    text = " ".join(results().split())
    assert f"{idle} of the {len(spared)} masks leave both accuracies exactly as they were" in text
    assert f"which are {len(kinds)} distinct outcomes" in text


def test_the_finding_in_readme_is_that_of_the_records():
    "The five models and the printed numbers, from the records and from no other place."
    lines = README_TEXT.read_text(encoding="utf-8").splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:6] for line in lines if line[:1] == "|"}
    said = {name: [cell.strip() for cell in cells] for name, cells in rows.items()}
    ends = outcomes(read_kept(FIGURES / "paper_bfloat16/what_the_mask_removes.parquet"))
    tuned = ends[ends.fine_tune_epochs > 0]
    spared = tuned.options == json.dumps({"classifier_in_pool": False})
    wanted = {
        "w*, unmasked": tuned.method == "finetune",
        "the class's row zeroed (control)": tuned.method == "mask_classifier",
        "FisherMask as in the code": (tuned.preset == "authors_code") & (tuned.options == "{}"),
        "the same, the classifier spared": (tuned.preset == "authors_code") & spared,
        "FisherMask as in the text": (tuned.method == "fisher_mask")
        & (tuned.preset == "paper")
        & (tuned.options == "{}"),
    }
    for name, where in wanted.items():
        (row,) = tuned[where].itertuples()
        numbers = (row.remain_acc_before, row.forget_acc_before)
        numbers += (row.remain_acc_last, row.forget_acc_last)
        assert said[name] == [f"{value:.1f}" for value in numbers], name
    code, control = said["FisherMask as in the code"], said["the class's row zeroed (control)"]
    assert all(abs(float(a) - float(b)) <= 1 for a, b in zip(code, control))
    assert said["the same, the classifier spared"][:2] == said["w*, unmasked"][:2]
    assert [float(x) for x in said["FisherMask, as printed"]] == pytest.approx([86.2, 0, 86.1, 0])


WORDS = {
    "holds": "hold",
    "does not hold": "do not hold",
    "towards": "towards",
    "away": "away",
    "numbers missing": "without numbers",
}


def counted(folder, name):
    "What the table of verdicts on the page of an exhibit comes to."
    text = (FIGURES / folder / f"{name}.md").read_text(encoding="utf-8")
    says = [row["says"] for row in verdicts(text)]
    assert says and {*says} <= {*WORDS}
    parts = [f"{says.count(what)} {word}" for what, word in WORDS.items() if what in says]
    short = "; not enough runs" if lacking_line(text) else ""
    return f"of {len(says)} claims {', '.join(parts)}{short}"


def exhibits():
    "Of each exhibit in README: the folder and the name of its notebook, and what came out."
    text = README_TEXT.read_text(encoding="utf-8")
    row = r"\| \[([^]]+)\]\(figures/(\w+)/(\w+)\.ipynb\) \| ([^|]+) \|"
    return {title: (folder, name, out) for title, folder, name, out in re.findall(row, text)}


@pytest.mark.parametrize(
    "title", [*(f"Table {n}" for n in range(1, 6)), *(f"Figure {n}" for n in range(1, 5))]
)
def test_what_readme_says_of_an_exhibit_is_counted_on_its_page(title):
    "No outcome says more than the table of verdicts beside it."
    folder, name, out = exhibits()[title]
    assert out == counted(folder, name)


def test_what_readme_says_of_masks_is_counted_in_their_tables():
    said = exhibits()
    masks = pd.read_csv(FIGURES / "paper_bfloat16/what_the_mask_removes.csv")
    by_pool = masks.groupby("classifier").printed.agg(["sum", "count"])
    (inside, of), (outside, among) = by_pool.loc[["in the pool", "not in the pool"]].values
    assert said["What the mask removes"][2] == (
        f"as printed in {inside} of {of} masks with the classifier, in {outside} of {among} without"
    )
    judged = pd.read_csv(FIGURES / "cpu/recommended.csv")
    reaches = judged[judged["name"] == "FisherMask (chosen)"].reaches
    assert said["A mask to recommend"][2] == (
        f"the chosen one reaches its aim in {sum(reaches)} of {len(reaches)} cases"
    )


def test_what_the_page_of_results_says_of_both_readings_is_true_of_their_records(table_1):
    "As printed by the code's reading, and far from it by the text's."
    gap = lambda table, method, phase: (
        (table.loc[method, phase]["mean"] - table.loc[method, phase]["paper_mean"]).abs().max()
    )
    assert max(gap(table_1, "FisherMask (authors_code)", p) for p in ("before_ft", "after_ft")) < 1
    assert min(gap(table_1, "FisherMask (paper)", p) for p in ("before_ft", "after_ft")) > 25
    few = table("paper_bfloat16/table5", setting="ResNet20/CIFAR10, 50 remain images")
    assert gap(few, "FisherMask (authors_code)", "after_ft") < 1
    assert gap(few, "FisherMask (paper)", "after_ft") > 25
    none = table("paper_bfloat16/table5", setting="ResNet20/CIFAR10, no remain data")
    assert gap(none, "FisherMask (paper)", "before_ft") > 25


def test_every_section_with_results_has_its_conditions():
    "Of each kept result that the page of results reads, it says how its runs came about."
    source = "\n".join(
        "".join(cell["source"])
        for cell in json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    )
    shown = re.findall(r'"((?:cpu|quick|interpolating|paper_bfloat16)/\w+)\.csv"', source)
    shown += [f"cpu/figure{n}" for n in (1, 2, 3, 4)]
    text = results()
    beside = {"quick/quickstart_digits_resnet20", "interpolating/rivals_masks"}  # no records
    for name in {*shown} - beside:
        kept = read_kept(FIGURES / f"{name}.parquet")
        if name == "paper_bfloat16/what_the_mask_removes":
            kept = [
                r
                for r in kept
                if r["settings"]["fine_tune_epochs"] and not r["settings"]["remain_weight"]
            ]
        if name == "interpolating/rivals":  # of the others, there are few yet
            kept = [
                r for r in kept if (r["request"]["kind"], r["request"]["classes"]) == ("class", [0])
            ]
        for dataset in {r["settings"]["dataset"] for r in kept}:  # each has its section
            own = [r for r in kept if r["settings"]["dataset"] == dataset]
            assert conditions(own) in text or conditions(kept) in text, (name, dataset)


def test_no_departure_on_the_page_contradicts_another():
    text = results()
    assert "`classifier_in_pool` is True (paper" not in text
    assert "(preset authors_code: True)" in text and "(preset paper: 1.0)" in text
    assert not re.search(r"`kick_\w+` is [^;]* \(paper: ", text)


def test_what_is_said_of_re_learning_by_the_classifier_alone_is_no_claim_without_a_number():
    text = results()
    assert "not even w*" not in text and "Every number on this page" not in text


def test_what_an_auditor_finds_where_accuracy_finds_nothing():
    cards = pd.read_csv(FIGURES / "interpolating/audit.csv")
    runs = read_kept(FIGURES / "interpolating/audit.parquet")
    floor = [r for r in runs if r["settings"]["method"] == "retrain"]
    models = cards.pivot(index="method", columns="readout", values="model")
    ends = cards.groupby("readout")[["w_star", "low", "high"]].first()
    gone = models[models["accuracy, test_forget"] <= 1]
    w_star, high = ends.loc["membership by others, area", ["w_star", "high"]]
    others = gone["membership by others, area"]
    assert (others > high).all() and others.drop("FisherNoise (paper)").min() > w_star - 0.03
    before = outcomes(runs).set_index("label").remain_acc_before["FisherNoise (paper)"]
    assert abs(before - 100 / 9) < 0.1 and others.idxmin() == "FisherNoise (paper)"
    back = gone["comes back, all parameters (epochs)"].drop("FisherNoise (paper)")
    for readout in ("classifier alone", "all parameters", "by the remain set"):
        assert ends.low[f"comes back, {readout} (epochs)"] == 3  # not within two
    assert back.max() < 0.5 and f"{len(back)} of these {len(gone)} have it back" in results()
    line = next(
        x for x in README_TEXT.read_text(encoding="utf-8").splitlines() if "[The audit]" in x
    )
    assert f"{len(gone)} of {len(gone)} that answer 1 %" in line and "1 w*, no test" in line
    assert f"{len(floor)} retrained models make the interval" in results()


def test_what_the_fields_methods_leave_on_the_bench():
    runs = [
        record
        for record in read_kept(FIGURES / "interpolating/rivals.parquet")
        if (record["settings"]["request"], record["settings"]["classes"]) == ("class", [0])
    ]
    epochs = {(r["settings"]["method"], r["settings"]["preset"]): r["history"] for r in runs}
    whats = ("remain_acc", "forget_acc")
    fresh, alone, row = (
        next(epochs[name] for name in epochs if name[0] == method)
        for method in ("retrain", "finetune", "mask_classifier")
    )
    aim = [fresh[-1][what] for what in whats]
    epochs = {n: rows for n, rows in epochs.items() if n[0] not in ("retrain", "finetune")}

    def count(epoch):
        off = ([abs(r[epoch][w] - a) for w, a in zip(whats, aim)] for r in epochs.values())
        return sum(max(both) <= 5 for both in off)

    assert f"{count(0)} of {len(epochs)} stand within five points" in results()
    assert f"and {count(-1)} after it" in results()
    assert max(abs(row[-1][w] - a) for w, a in zip(whats, aim)) <= 5
    lost = {name[0] for name, rows in epochs.items() if aim[0] - rows[-1]["remain_acc"] > 5}
    assert lost == {"neggrad_plus", "sfron"}
    assert all(rows[1]["train_loss"] > 100 for name, rows in epochs.items() if name[0] in lost)
    mask, kick = ([epochs[m, p][-1]["forget_acc"] for p in BOTH] for m in ("fisher_mask", "kick"))
    assert min(mask) < 1 and all(k > m + 5 for m, k in zip(mask, kick))
    assert abs(min(kick) - alone[-1]["forget_acc"]) < 5
    idle = {r["settings"]["method"] for r in runs if not any(c["changed"] for c in r["changed"])}
    assert idle == {"ssd", "finetune"} or idle == {"ssd", "finetune", "retrain"}
    line = next(
        x for x in README_TEXT.read_text(encoding="utf-8").splitlines() if "[The bench]" in x
    )
    assert f"{count(-1)} of {len(epochs)} end" in line


def test_readme_is_one_page_and_its_links_lead_somewhere():
    text = README_TEXT.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    assert len([word for word in prose.split() if re.search(r"\w", word)]) < 850
    for place in re.findall(r"\]\(([^)]+)\)", text):
        assert place.startswith("https://arxiv.org/") or (FIGURES.parent / place).exists(), place
    exhibits = [f"Table {n}" for n in range(1, 8)] + [f"Figure {n}" for n in range(1, 5)]
    for title in [*exhibits, "Proposition 1", "The bench", "The audit"]:
        assert f"[{title}](" in text


def test_the_lines_for_a_model_of_ones_own_run_as_they_stand_in_readme():
    (block,) = re.findall(
        r"```python\n(.*?)```", README_TEXT.read_text(encoding="utf-8"), flags=re.S
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Linear(8, 3))
    parts = [(torch.rand(6, 3, 2, 2), torch.arange(6) % 3) for _ in range(2)]
    names = {"model": model, "forget": parts[:1], "remain": parts[1:]}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exec(block, names)
    assert names["result"].model is not model
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
