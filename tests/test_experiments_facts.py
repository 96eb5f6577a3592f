"""The experiments that need no training (Proposition 1, Tables 6 and 7), executed, against
calculations that share no code with them."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from safetensors.torch import save_file

import fisher_unlearn
from fisher_unlearn.images.data import load_images
from made import listed

pytestmark = pytest.mark.slow
NOTEBOOKS = Path(fisher_unlearn.__file__).parent.parent / "nbs" / "experiments"


def executed(name, base, **parameters):
    "Run an experiment on the profile quick; the folder of its results, and its executed notebook."
    papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb",
        base / f"{name}.ipynb",
        {"figures": str(base), **parameters},
        progress_bar=False,
    )
    folder = base / "quick"
    assert (folder / f"{name}.csv").stat().st_size and (folder / f"{name}.md").stat().st_size
    assert all(Path(name).suffix in (".csv", ".md", ".png") for name in listed(folder))
    assert all(path.stat().st_size < 60_000 for path in folder.glob("*.png"))
    return folder, nbformat.read(base / f"{name}.ipynb", 4)


def says(folder, name):
    "The sentences at the end of an experiment's Markdown file."
    return [
        line
        for line in (folder / f"{name}.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("* ")
    ]


# --- Proposition 1


@pytest.fixture(scope="module")
def proposition(tmp_path_factory):
    folder, _ = executed("proposition1", tmp_path_factory.mktemp("proposition1"))
    return folder, pd.read_csv(folder / "proposition1.csv")


def again(seed):
    "A problem drawn again from its seed, in the order in which the notebook says it draws."
    rng = np.random.default_rng(seed)
    design = rng.choice(["one feature a sample", "ρ = 0", "ρ = 0.5", "ρ = 0.9", "ρ = 0.99"])
    rule = rng.choice(["difference", "ratio", "random"])
    balanced = rng.integers(2) == 1
    d, share, top = (
        rng.choice([1, 2, 5, 20, 50]),
        rng.choice([0.02, 0.1, 0.3, 1.0]),
        rng.choice([0.02, 0.1, 0.5]),
    )
    n_r = int(d) * int(rng.choice([2, 10])) + 5
    n_f = max(round(float(share) * n_r), 1)
    scales = np.exp(rng.normal(0, 1, (2, d)))
    shared, own = rng.normal(size=n_f + n_r), rng.normal(size=(n_f + n_r, d))
    w, apart, noise = rng.normal(size=d), rng.normal(size=d), rng.normal(size=n_f + n_r)
    order = rng.permutation(d)
    X, y = np.zeros((n_f + n_r, d)), np.zeros(n_f + n_r)
    if balanced:
        w = (w - w.mean()) / scales[1]
    for i in range(n_f + n_r):
        for j in range(d):
            if design == "one feature a sample":
                value = own[i, j] if i % d == j else 0
            else:
                value = (
                    float(design.split()[-1]) ** 0.5 * shared[i]
                    + (1 - float(design.split()[-1])) ** 0.5 * own[i, j]
                )
            X[i, j] = value * scales[0 if i < n_f else 1, j]
        y[i] = X[i] @ (w + apart if i < n_f else w) + noise[i]
    return str(design), str(rule), bool(balanced), n_f, max(1, int(top * d)), X, y, order


def by_hand(n_f, masked, rule, X, y, order):
    """Bound, distance with diagonal matrices, and distance of the fitted regressions, entry by
    entry."""
    n, d = X.shape
    F, F_f, F_r = (
        [sum(X[i, j] ** 2 for i in part) for j in range(d)]
        for part in (range(n), range(n_f), range(n_f, n))
    )
    b, b_f, b_r = (
        [sum(y[i] * X[i, j] for i in part) for j in range(d)]
        for part in (range(n), range(n_f), range(n_f, n))
    )
    score = {
        "difference": [F_f[j] - F_r[j] for j in range(d)],
        "ratio": [F_f[j] / (F[j] * F_r[j]) for j in range(d)],
        "random": list(order),
    }[rule]
    M = set(sorted(range(d), key=lambda j: -score[j])[:masked])
    c1, c2 = max(v * v for v in b_r), max(v * v for v in b_f)
    c = max(c1, 2 * c2) * sum(1 / v**2 for v in F_r)
    lam = np.linalg.svd(X, compute_uv=False)[0] ** 2
    right = (
        lam
        / (2 * n)
        * (c + 2 * c1 * sum((F_f[j] / (F[j] * F_r[j])) ** 2 for j in range(d) if j not in M))
    )
    diagonal = sum(
        F[j] * (b_r[j] / F_r[j] - (0 if j in M else b[j] / F[j])) ** 2 for j in range(d)
    ) / (2 * n)
    whole, rest = np.linalg.pinv(X) @ y, np.linalg.pinv(X[n_f:]) @ y[n_f:]
    hat = np.array([0 if j in M else whole[j] for j in range(d)])
    return right, diagonal, sum((X[i] @ rest - X[i] @ hat) ** 2 / 2 for i in range(n)) / n


def test_problems_of_proposition_1_come_out_the_same_when_done_by_hand(proposition):
    _, rows = proposition
    small = rows[rows.d <= 5]
    picked = pd.concat(
        [
            small.groupby(["design", "rule"]).head(1),
            small[small.solved > small.bound].head(3),
            rows[rows.d == 50].head(1),
        ]
    )
    assert len(picked) >= 16 and set(picked.rule) == {"difference", "ratio", "random"}
    for _, row in picked.iterrows():
        design, rule, balanced, n_f, masked, X, y, order = again(row.seed)
        assert (design, rule, balanced, n_f, len(X) - n_f, masked, X.shape[1]) == (
            row.design,
            row.rule,
            row.balanced,
            row.n_f,
            row.n_r,
            row.masked,
            row.d,
        )
        assert by_hand(n_f, masked, rule, X, y, order) == pytest.approx(
            (row.bound, row.diagonal, row.solved), rel=1e-5
        )


def test_the_bound_of_proposition_1_holds_for_diagonal_matrices_only(proposition):
    folder, rows = proposition
    assert len(rows) == 2000 and rows.seed.is_unique
    assert (rows.diagonal <= rows.bound * (1 + 1e-5)).all()
    exact = rows.design == "one feature a sample"
    assert np.allclose(rows.diagonal[exact], rows.solved[exact], rtol=1e-4, atol=1e-9)
    broken = rows.solved > rows.bound * (1 + 1e-5)
    held = pd.read_csv(folder / "proposition1_held.csv", index_col="group").loc["all"]
    assert (
        0 < broken.sum() == held["solved: broken"]
        and held["diagonal: broken"] == 0
        and not broken[exact].any()
    )
    assert held["solved: worst"] == pytest.approx((rows.solved / rows.bound).max(), rel=1e-4)
    verdict, assumption = says(folder, "proposition1")[:2]
    assert (
        "**holds**" in verdict
        and "0 of 2,000" in verdict
        and f"broken in {broken.sum()} of {(~exact).sum():,} problems" in assumption
    )


def test_with_one_masked_entry_the_bound_of_proposition_1_can_be_reached(proposition):
    _, rows = proposition
    ratio = (rows.diagonal / rows.bound)[rows.d == 1]
    assert (
        ratio.median() == pytest.approx(1, abs=1e-4)
        and (rows.diagonal / rows.bound)[rows.d == 50].max() < 1e-2
    )


def test_rankings_agree_as_far_as_their_limits_say(proposition):
    """Chance is 0.1; entries that are alike, and a small forget set, bring the ratio close to
    the difference of sums."""
    folder, _ = proposition
    table = pd.read_csv(folder / "proposition1_overlap.csv").set_index(
        ["spread", "difference", "share"]
    )["mean"]
    assert (
        table.between(0.05, 1).all()
        and table.loc[0.5, "sums"].iloc[:3].min() > 0.5
        and table.loc[1.5, "sums"].iloc[-1] < 0.2
    )
    assert np.allclose(
        table.xs(1.0, level="share").unstack("difference").diff(axis=1).iloc[:, 1], 0
    )  # as many to forget as to keep: sums are means


# --- Table 6


@pytest.fixture(scope="module")
def table6(tmp_path_factory):
    "Digits, a CIFAR-10 of 40 and 20 images, MNIST in raw files, and nothing else."
    root = tmp_path_factory.mktemp("data")
    images = lambda n: torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    labels = lambda n: torch.arange(n) % 8 // 2
    save_file(
        {
            "train_images": images(40),
            "train_labels": labels(40),
            "test_images": images(20),
            "test_labels": labels(20),
        },
        root / "cifar10.safetensors",
        metadata={"classes": json.dumps([f"class {k}" for k in range(10)]), "inexact": "[1, 2, 3]"},
    )
    (root / "MNIST" / "raw").mkdir(parents=True)
    folder, nb = executed("table6", tmp_path_factory.mktemp("table6"), root=str(root))
    return folder, root, nb, pd.read_csv(folder / "table6.csv", index_col=["data set", "fact"])


def test_table_6_counts_the_digits(table6):
    here, digits = table6[3].here, load_images("digits")
    zeros = [
        sum(int(label) == 0 for label in part.labels.tolist())
        for part in (digits.train, digits.test)
    ]
    wanted = {
        "training images": 1297,
        "test images": 500,
        "classes": 10,
        "image size": 8,
        "size for networks": 8,
        "channels": 1,
        "forget, training": 128,
        "remain, training": 1169,
        "forget, test": 50,
        "remain, test": 450,
    }
    assert (
        zeros == [128, 50]
        and {fact: int(value) for fact, value in here["digits"].items() if fact in wanted} == wanted
    )
    assert set(table6[3].paper["digits"]) == {"–"}


def test_table_6_names_the_differences_and_what_is_missing(table6):
    folder, root, nb, table = table6
    assert (
        table.loc[("cifar10", "training images")].tolist() == ["50000", "40", "-49960"]
        and table.loc[("cifar10", "image size"), "difference"] == "0"
    )
    assert table.here["cifar10"][
        ["forget, training", "remain, training", "forget, test", "remain, test"]
    ].tolist() == ["10", "30", "6", "14"]
    lines = {line[2:].split(":")[0]: line for line in says(folder, "table6")}
    assert (
        list(lines) == ["digits", "mnist", "cifar10", "cifar100", "tinyimagenet"]
        and "not one of the paper's data sets" in lines["digits"]
    )
    assert (
        "**differs** in training images (40; the paper: 50,000), test images (20; the "
        "paper: 10,000)" in lines["cifar10"]
    )
    assert "inexact: a list of 3" in lines["cifar10"]
    assert (
        all("**not at hand**" in lines[name] for name in ("mnist", "cifar100", "tinyimagenet"))
        and "not prepared on the profile quick" in lines["mnist"]
    )
    assert "cifar100 is missing: looked for ROOT/cifar100.safetensors" in lines["cifar100"] and set(
        table.here["tinyimagenet"]
    ) == {"–"}
    outputs = [json.dumps(cell.get("outputs", [])) for cell in nb.cells]
    assert str(root) not in "".join(
        path.read_text(encoding="utf-8") for path in folder.iterdir()
    ) + "".join(outputs)
    assert listed(root) == ["MNIST", "cifar10.safetensors"]


# --- Table 7


@pytest.fixture(scope="module")
def table7(tmp_path_factory):
    folder, _ = executed("table7", tmp_path_factory.mktemp("table7"))
    return folder, pd.read_csv(folder / "table7.csv", index_col=["data set", "setting"])


def test_table_7_has_the_printed_settings(table7):
    paper = table7[1].paper
    for data, epochs, batch, drops, warm, R in [
        ("cifar10", 160, 128, "[80, 120]", 0, 0.02),
        ("cifar100", 160, 128, "[80, 120]", 0, 0.02),
        ("mnist", 30, 128, "[]", 0, 0.04),
        ("tinyimagenet", 160, 32, "[80, 120]", 20, 0.02),
    ]:
        one = paper[data]
        names = [
            "epochs",
            "batch size",
            "warm-up epochs",
            "R",
            "rate",
            "momentum",
            "weight decay",
            "S",
        ]
        assert [float(one[name]) for name in names] == [epochs, batch, warm, R, 0.1, 0.9, 1e-4, 5]
        assert one["drops after"] == drops and one.get("cut by") == (
            None if data == "mnist" else "10"
        )
    assert (
        set(table7[1].cpu["cifar100"]) == {"–"}
        and table7[1].quick["cifar10", "training images"] == "5000"
    )


def test_table_7_names_what_differs(table7):
    folder, table = table7
    odd = table[table["profile paper"].str.startswith("differs")]
    assert odd.index.tolist() == [("mnist", "rate")] and odd[["Table 7", "text", "paper"]].iloc[
        0
    ].tolist() == ["0.1", "0.01", "0.1"]
    assert set(
        table[table["profile paper"] == "not printed"].index.get_level_values("setting")
    ) == {"network", "weight decay"}
    printed = int((table["profile paper"] != "not printed").sum())
    assert (
        f"of {printed} settings that the paper prints, the profile `paper` agrees with "
        f"{printed - 1}: mnist, rate: 0.1" in says(folder, "table7")[0]
    )


def test_the_replay_drops_where_the_protocol_says(table7):
    folder, _ = table7
    rows = pd.read_csv(folder / "table7_replay.csv")
    columns = [
        "data set",
        "remain images",
        "B",
        "warm-up steps",
        "first drop",
        "second drop",
        "steps in all",
    ]
    assert rows[columns].to_numpy().tolist() == [
        ["cifar10", 45_000, 352, 0, 880, 1320, 1760],
        ["cifar100", 49_500, 387, 0, 967, 1451, 1935],
        ["tinyimagenet", 99_500, 3110, 1943, 7775, 11662, 15550],
        ["cifar10", 50, 1, 0, 2, 3, 5],
    ]
    assert rows["first rate"].tolist() == pytest.approx([0.1, 0.1, 0.1 / 1943, 0.1]) and rows[
        "last rate"
    ].tolist() == pytest.approx([0.001] * 4)
    assert set(rows["drops after epochs"]) == {"2.5 and 3.75"}
