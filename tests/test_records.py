"""Settings, keys and records; one run from settings; the command line."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fisher_unlearn
from fisher_unlearn.cli import app
from fisher_unlearn.images.data import DATASETS, load_images
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.lab.settings import REQUESTS, DataSettings, RunSettings, option_hints
from fisher_unlearn.lab.settings import parameter_names, profiles, resolve, run_key, training_key
from fisher_unlearn.lab.settings import training_settings
from fisher_unlearn.networks.machine import provenance
from fisher_unlearn.lab.store import record_digest, read_record, write_record
from fisher_unlearn.lab.experiments import sweep
from fisher_unlearn.networks.metrics import accuracy
from fisher_unlearn.images.forget import random_subset
from fisher_unlearn.lab.report import read_kept
from fisher_unlearn.audit.readouts import agreement
from fisher_unlearn.lab.run import READOUTS, images_of, model_of, readout, request_of, run
from fisher_unlearn.lab.store import keep_run
from fisher_unlearn.lab.results import seconds_taken, weights_moved
from fisher_unlearn.lab.store import KeptScores
from fisher_unlearn.networks.machine import repeatable
from fisher_unlearn.networks.train import load_weights, read_tensors, tensors_digest, train_model
from made import listed

WHOLE = {"epochs": 2, "fine_tune_epochs": 1}
SHORT = {"subset": 150, "threads": 1, **WHOLE}


def quick(**parameters):
    "Settings of the profile `quick`, on the CPU wherever the tests run."
    return resolve("quick", **{"device": "cpu"} | parameters)


@pytest.mark.parametrize("profile", ["quick", "cpu", "paper"])
def test_every_profile_resolves_for_every_data_set_it_names(profile):
    for dataset in profiles()[profile]["datasets"]:
        for preset in ("paper", "authors_code"):
            resolve(profile, dataset=dataset, preset=preset, device="cpu")


def test_the_paper_profile_is_the_protocol():
    schedule = {
        name: resolve("paper", dataset=name).train.schedule
        for name in profiles()["paper"]["datasets"]
    }
    assert {name: (s.lr, s.epochs, s.drops, s.warmup) for name, s in schedule.items()} == {
        "mnist": (0.1, 30, (), 0),
        "cifar10": (0.1, 160, (80, 120), 0),
        "cifar100": (0.1, 160, (80, 120), 0),
        "tinyimagenet": (0.1, 160, (80, 120), 20),
    }
    assert {
        name: (
            r.method.ratio,
            r.network,
            r.train.batch_size,
            r.tuning.fine_tune_epochs,
            r.train.momentum,
            r.train.weight_decay,
        )
        for name in schedule
        for r in [resolve("paper", dataset=name)]
    } == {
        "mnist": (0.04, "resnet20", 128, 5, 0.9, 1e-4),
        "cifar10": (0.02, "resnet20", 128, 5, 0.9, 1e-4),
        "cifar100": (0.02, "resnet50", 128, 5, 0.9, 1e-4),
        "tinyimagenet": (0.02, "resnet50", 32, 5, 0.9, 1e-4),
    }


def test_none_means_the_profiles_value_and_drops_scale_with_epochs():
    assert quick(dataset=None, seed=None) == quick()
    assert resolve("paper", dataset="cifar10", epochs=16).train.schedule.drops == (8, 12)
    assert resolve("paper", dataset="tinyimagenet", epochs=16).train.schedule.warmup == 2
    assert resolve("paper", dataset="cifar10", epochs=1).train.schedule.drops == ()
    assert resolve("paper", dataset="cifar10", epochs=16, drops=[3]).train.schedule.drops == (3,)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"profile": "paperr"}, "unknown profile 'paperr': did you mean 'paper'"),
        ({"epoch": 3}, "unknown parameter 'epoch': did you mean 'epochs'"),
        ({"dataset": "cifra10"}, "did you mean 'cifar10'"),
        ({"dataset": "tinyimagenet"}, "has no settings for tinyimagenet"),
        ({"network": "resnet"}, "did you mean 'resnet"),
        ({"method": "fisher"}, "did you mean 'fisher_mask'"),
        ({"preset": "papers"}, "did you mean 'paper'"),
        ({"ratio": 1}, r"`ratio` is 1: .* in \[0, 1\)"),
        ({"ratio": "x"}, "`ratio` is 'x'"),
        ({"epochs": "ten"}, "`epochs` is 'ten'"),
        ({"epochs": 0}, "`epochs`"),
        ({"seed": -1}, "`seed`"),
        ({"seed": 1.5}, "`seed` is 1.5"),
        ({"unit": "layer"}, "`unit` is 'layer'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"threads": 0}, "`threads` is 0"),
        ({"samples": [1]}, "`samples` has no meaning for the request 'class'"),
        ({"request": "samples"}, "`samples` must be given if"),
        (
            {"request": "samples", "samples": [1], "method": "mask_classifier"},
            "has no meaning for the request 'samples'",
        ),
        ({"request": "poison", "method": "tfidf"}, "`tfidf` forgets classes"),
        ({"request": "mislabel", "method": "fisher_noise"}, "`fisher_noise` forgets classes"),
        ({"request": "all"}, "unknown request 'all'"),
        ({"patch_size": 3}, "`patch_size` has no meaning for the request 'class'"),
        ({"request": "poison", "mislabel_ratio": 0.3}, "`mislabel_ratio` has no meaning"),
        ({"request": "poison", "patch_corner": "top"}, "unknown corner"),
        ({"request": "mislabel", "mislabel_how": "uniformly"}, "did you mean 'uniform'"),
        ({"request": "random", "count": 0}, "`count` is 0"),
        ({"remain_limit": -1}, "`remain_limit` is -1"),
        ({"remain_limit": 0}, "let `fine_tune_epochs` be 0"),
        (
            {"remain_limit": 0, "method": "fisher_noise", "fine_tune_epochs": 0},
            "without remain data",
        ),
        ({"remain_limit": 5, "method": "retrain"}, "is the yardstick"),
        ({"remain_limit": 5, "method": "influence"}, "needs the Hessian"),
        ({"method": "finetune", "hard": True}, "`hard` is no option of `finetune`: it has none"),
        (
            {"method": "activation_mask", "unit": "kernel"},
            "`unit` is 'kernel': it must be 'channel'",
        ),
        ({"method": "tfidf", "tfidf_direction": "up"}, "`tfidf_direction` is 'up'"),
        ({"tfidf_gate": True}, "`tfidf_gate` is no option of `fisher_mask`: it has ratio"),
        ({"method": "fisher_noise", "noise_alpha": "x"}, "`noise_alpha` is 'x'"),
        ({"drops": [50]}, "`drops` of the schedule"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"select": "first"}, "`select` is 'first'"),
    ],
)
def test_bad_parameters_are_one_sentence(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve(**bad)
    assert "\n" not in str(error.value) and error.type is ValueError


@given(
    st.text(min_size=1).filter(lambda s: s not in parameter_names() and s != "profile"),
    st.integers(),
)
@settings(max_examples=50)
def test_no_unknown_name_is_ever_accepted(name, value):
    with pytest.raises(ValueError, match="unknown parameter"):
        quick(**{name: value})


# What a person might type, right and wrong, for each parameter: made up from the help texts and
# from slips of the hand, not from the validators.
RIGHT = {
    "dataset": ["digits", "mnist", "cifar10"],
    "network": ["resnet20", "vgg16", "densenet"],
    "seed": [0, 1, 12345],
    "epochs": [1, 7, 40],
    "fine_tune_epochs": [1, 3, 9],
    "method": ["finetune", "fisher_mask", "random_mask"],
    "preset": ["paper", "authors_code"],
    "ratio": [0, 0.02, 0.5],
    "device": ["cpu", "auto"],
    "threads": [1, 4],
    "classes": [[0], [1, 2], ["3"]],
    "subset": [100, None],
    "lr": [0.1, 0.01],
    "batch_size": [32, 128],
    "momentum": [0, 0.9],
    "weight_decay": [0, 1e-4],
    "layout": ["channels_last", "contiguous"],
    "select": ["best", "last"],
    "remain_limit": [1, 50],
    "fine_tune_lr": [0.01],
    "fine_tune_length": [4],
    "lissa_epochs": [3],
    "noise_alpha": [1e-5],
    "tfidf_batches": [0, 2],
}
WRONG = {
    "dataset": ["imagenet", "MNIST", 10, ""],
    "network": ["resnet18", "VGG", 20],
    "seed": [-1, 1.5, "six", [1]],
    "epochs": [0, -3, "ten", 2.5, [3]],
    "fine_tune_epochs": [-1, "5x", 0.5],
    "method": ["fisher", "Finetune", "prune", 3],
    "preset": ["Paper", "authors", 1],
    "ratio": [1, 1.5, -0.1, "two", "nan", [0.1]],
    "device": ["gpu", "cuda:9", 0],
    "threads": [0, -1, "all", 1.5],
    "classes": [[-0.5], [[1]], {"a": 1}],
    "subset": [0, -5, "half"],
    "lr": [0, -0.1, "fast"],
    "batch_size": [0, -8, 1.5, "big"],
    "momentum": [1, -0.1, "m"],
    "weight_decay": [-1, "w"],
    "layout": ["nhwc", 1],
    "select": ["first", 0],
    "remain_limit": [-1, 2.5, "few"],
    "fine_tune_lr": [0, -1, "slow"],
    "fine_tune_length": [0, -2, "long"],
    "lissa_epochs": ["e", 1.5],
    "noise_alpha": ["a", [1]],
    "tfidf_batches": ["all", 0.5],
    "unit": ["layer", 3],
    "reach": ["all"],
    "fisher_labels": ["false", 1],
    "fisher_per": ["epoch"],
    "request": ["forget", 1],
    "hard": ["maybe", 7],
    "epoch": [3],
    "Seed": [1],
    "learning_rate": [0.1],
    "runs_folder": ["r"],
    "--ratio": [0.1],
    "ratio ": [0.1],
}
APART = [
    {"request": "poison", "method": "tfidf"},
    {"request": "mislabel", "method": "fisher_noise"},
    {"request": "random", "method": "mask_classifier"},
    {"remain_limit": 0},
    {"remain_limit": 0, "method": "retrain", "fine_tune_epochs": 0},
    {"method": "finetune", "hard": True},
    {"method": "tfidf", "unit": "weight"},
    {"patch_size": 3},
    {"request": "samples"},
    {"samples": [1]},
    {"method": "retrain", "fine_tune_lr": 0.1},
    {"profile": "paper", "dataset": "digits"},
    {"drops": [90]},
]


def test_500_wrong_sets_of_parameters_are_refused_among_100_right_ones():
    """Each wrong set is a right one with a slip, or two values that don't go together; each is
    refused in one sentence, and each right one passes."""
    rng, slips = (
        random.Random(0),
        [(name, value) for name, values in WRONG.items() for value in values],
    )

    def draw():
        names = rng.sample(sorted(RIGHT), rng.randint(1, 5))
        drawn = {name: rng.choice(RIGHT[name]) for name in names}
        own = option_hints(drawn.get("method", "fisher_mask"))
        return {n: v for n, v in drawn.items() if n in own or n not in option_hints()}

    for _ in range(100):
        right = draw()
        assert isinstance(quick(**right), RunSettings), right
    for k in range(500):
        wrong = {**draw(), **dict([rng.choice(slips)])} if k % 4 else rng.choice(APART)
        with pytest.raises(ValueError) as error:
            resolve(**{"device": "cpu"} | wrong)
        assert (
            "\n" not in str(error.value) and len(str(error.value)) > 15 and error.type is ValueError
        ), wrong


def test_unknown_names_are_refused_at_every_depth():
    for bad in ({"sed": 1}, {"train": {"epoch": 1}}, {"train": {"schedule": {"rate": 1}}}):
        with pytest.raises(ValueError):
            RunSettings.of(**bad)


def test_keys_change_with_what_can_change_a_result_and_with_nothing_else():
    base = quick()
    different = [
        {"seed": 1},
        {"epochs": 3},
        {"classes": [1]},
        {"ratio": 0.1},
        {"preset": "authors_code"},
        {"unit": "kernel"},
        {"fine_tune_epochs": 2},
        {"threads": 1},
        {"layout": "contiguous"},
        {"network": "densenet"},
        {"method": "finetune"},
        {"subset": 100},
        {"held_out": 100},
        {"held_out": 50},
        {"remain_weight": 2.0},
        {"weight_decay": 0.0},
        {"select": "last"},
        {"hard": True},
        {"remain_limit": 50},
        {"remain_limit": 0, "fine_tune_epochs": 0},
        {"fine_tune_epochs": 0},
        {"request": "random"},
        {"request": "random", "count": 5},
        {"unit": "channel"},
        {"unit": "channel", "reach": "norm"},
        *(
            {"request": "poison"} | more
            for more in (
                {},
                {"count": 5},
                {"target": 1},
                {"patch_size": 2},
                {"patch_value": 9},
                {"patch_corner": "upper left"},
                {"patch_replace": True},
            )
        ),
        *(
            {"request": "mislabel"} | more
            for more in ({}, {"mislabel_ratio": 0.3}, {"mislabel_how": "permuted"})
        ),
        *(
            {"method": "tfidf"} | more
            for more in ({}, {"preset": "authors_code"}, {"tfidf_batches": 0}, {"reach": "norm"})
        ),
        *(
            {"method": "fisher_noise"} | more
            for more in (
                {},
                {"noise_alpha": 1e-5},
                {"noise_exponent": 0.5},
                {"noise_clamp": 1.0},
                {"noise_averaged": True},
                {"noise_row": True},
                {"fisher_per": "batch"},
            )
        ),
        *(
            {"method": "influence"} | more
            for more in (
                {},
                {"lissa_epochs": 3},
                {"lissa_damping": 0.1},
                {"lissa_scale": 9.0},
                {"lissa_divide": False},
            )
        ),
    ]
    keys = [run_key(base), *(run_key(quick(**d)) for d in different)]
    assert len(set(keys)) == len(keys)
    for d in ({"unit": "weight"}, {"fisher_per": "sample"}, {"classes": ["0"]}, {"device": "cpu"}):
        assert run_key(quick(**d)) == keys[0]
    assert run_key(quick(request="samples", samples=[2, 1])) == run_key(
        quick(request="samples", samples=[1, 2])
    )
    for d in ({"method": "influence"}, {"method": "fisher_noise"}):
        for others in ({"ratio": 0.3}, {"tfidf_batches": 3}):  # which a sweep gives to all
            assert [run_key(quick(**d))] == [
                run_key(s) for s in sweep("quick", [d | others], device="cpu")
            ]
    assert run_key(quick(method="retrain", fine_tune_epochs=1)) == run_key(
        quick(method="retrain", preset="authors_code")
    )
    shared = {
        training_key(quick(**d))
        for d in (
            {},
            {"classes": [1]},
            {"ratio": 0.1},
            {"method": "finetune"},
            {"fine_tune_epochs": 2},
            {"preset": "authors_code"},
            {"request": "random"},
            {"remain_limit": 5},
            {"hard": True},
        )
    }
    assert (
        len(shared) == 1
        and not {training_key(quick(**d)) for d in ({"seed": 1}, {"held_out": 9})} & shared
    )
    spoilt = [
        training_key(quick(**d))
        for d in (
            {"request": "poison"},
            {"request": "poison", "target": 1},
            {"request": "mislabel"},
            {"request": "mislabel", "mislabel_how": "permuted"},
        )
    ]
    assert len({*spoilt, *shared}) == 5


def test_the_device_of_w_star_is_told_from_that_of_the_method():
    "Only a method that runs elsewhere than w* has a key of its own; retraining is w*'s kin."
    here, there, mixed = quick(), quick(device="cuda"), quick(trained_on="cuda")
    assert training_key(mixed) == training_key(there) != training_key(here) and training_settings(
        mixed
    ) == training_settings(there)
    assert len({run_key(s) for s in (here, there, mixed)}) == 3
    assert run_key(quick(trained_on="cpu")) == run_key(here) and run_key(
        quick(device="cuda", trained_on="cuda")
    ) == run_key(there)
    assert run_key(quick(method="retrain", trained_on="cuda")) == run_key(
        quick(method="retrain", device="cuda")
    )


def test_settings_survive_json():
    for dataset in ("digits", "mnist"):
        base = resolve("cpu", dataset=dataset, classes=["1", 2])
        assert RunSettings.of(**json.loads(json.dumps(base.flat))) == base


def test_provenance_says_what_is_needed_and_names_no_place():
    found = provenance()
    assert (
        found["torch"] == torch.__version__
        and found["device"] == "cpu"
        and found["cores"] == os.cpu_count()
        and found["instructions"] == torch.backends.cpu.get_cpu_capability()
    )
    assert not any(
        os.sep in str(v) or str(v) == os.uname().nodename
        for k, v in found.items()
        if k != "processor"
    )


def test_a_tree_is_clean_whatever_its_figures(monkeypatch, tmp_path):
    def git(*args):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    package, table = tmp_path / "fisher_unlearn" / "__init__.py", tmp_path / "figures" / "table.csv"
    index = tmp_path / "nbs" / "index.ipynb"
    for path in (package, table, index, other := tmp_path / "Makefile"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("old", encoding="utf-8")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(fisher_unlearn, "__file__", str(package))
    assert provenance()["clean"]
    table.write_text("new", encoding="utf-8")
    assert provenance()["clean"] and provenance()["commit"]
    other.write_text("new", encoding="utf-8")
    assert provenance()["clean"] is False


def repository(folder, *files):
    "A repository with one commit of these files."
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("", encoding="utf-8")
    for words in (["init"], ["add", "."], ["commit", "-m", "all"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True)
    return head.stdout.decode().strip()


def test_another_repository_that_the_environment_names_is_not_ours(monkeypatch, tmp_path):
    ours = repository(tmp_path / "ours", "fisher_unlearn/__init__.py", "nbs/index.ipynb")
    theirs = repository(
        tmp_path / "theirs", "fisher_unlearn/__init__.py", "nbs/index.ipynb", "more"
    )
    package = tmp_path / "ours" / "fisher_unlearn" / "__init__.py"
    monkeypatch.setattr(fisher_unlearn, "__file__", str(package))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "theirs" / ".git"))
    assert ours != theirs and provenance()["commit"] == ours
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "theirs"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "theirs" / ".git" / "index"))
    assert provenance()["commit"] == ours and provenance()["clean"]


@pytest.mark.parametrize(
    "place", [".venv/lib/fisher_unlearn", "fisher_unlearn", "vendor/fisher_unlearn"]
)
def test_a_package_that_lies_in_another_repository_claims_no_commit_of_it(
    place, monkeypatch, tmp_path
):
    "Tracked there or not."
    repository(tmp_path, f"{place}/__init__.py", "README.md")
    monkeypatch.setattr(fisher_unlearn, "__file__", str(tmp_path / place / "__init__.py"))
    assert provenance()["commit"] is None and provenance()["clean"] is None


def test_a_machine_without_git_is_no_obstacle(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] is None


def test_committed_records_are_those_of_their_settings_and_their_weights_are_small():
    root = Path(fisher_unlearn.__file__).parent.parent
    kept = list((root / "data" / "checkpoints").glob("*.json"))
    assert sum(p.stat().st_size for p in (root / "data" / "checkpoints").iterdir()) <= 40e6
    records = [
        json.loads(p.read_text(encoding="utf-8"))
        for p in [*(root / "figures").glob("*/records/*.json"), *kept]
    ]
    assert kept and all(p.with_suffix(".safetensors").exists() for p in kept)
    assert records
    for record in records:
        chosen = RunSettings.of(**record["settings"])
        assert record["key"] == (
            run_key(chosen) if "request" in record else training_key(chosen)
        ), record["key"]


ROOT = Path(fisher_unlearn.__file__).parent.parent
COMMITTED = sorted(
    [*(ROOT / "figures").glob("**/records/*.json"), *(ROOT / "data" / "checkpoints").glob("*.json")]
)


def test_record_files_are_whole_or_refused(tmp_path):
    path = tmp_path / "record.json"
    assert read_record(path) is None
    whole = json.loads(COMMITTED[0].read_text(encoding="utf-8"))
    assert write_record(path, whole) == read_record(path)
    for junk in (
        "{",
        "[]",
        "{}",
        '"x"',
        "\x00",
        "",
        "\xff\xfe",
        "[" * 100_000,
        '{"key":' * 50_000,
        '{"key": NaN}',
        "9" * 10_000,
    ):
        path.write_text(junk, encoding="utf-8")
        with pytest.raises(ValueError, match="is not a record") as error:
            read_record(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="is not a record"):
        read_record(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is not a record"):
        read_record(path)


def test_every_committed_record_fits_the_schema_and_is_that_of_its_settings():
    assert len(COMMITTED) >= 25
    for path in COMMITTED:
        assert read_record(path)
    for path in (ROOT / "data" / "checkpoints").glob("*.json"):
        record = read_record(path)
        assert record["weights"] == tensors_digest(*read_tensors(path.with_suffix(".safetensors")))
        assert record["digest"]


def changed(record, place, value):
    "A copy of a record with a part changed, or left out if the value is `...`; signed anew."
    copy = json.loads(json.dumps(record))
    *parents, last = place
    part = copy
    for name in parents:
        part = part[name]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    copy["digest"] = record_digest(copy)
    return copy


RUN = next(
    record
    for path in COMMITTED
    if "request" in (record := json.loads(path.read_text(encoding="utf-8")))
    and record["settings"]["method"] == "fisher_mask"
)
WRONG_PARTS = [
    (place, value)
    for places, values in [
        (
            [("history", 0, "remain_acc"), ("history", 0, "unlearn_score")],
            (float("nan"), float("inf"), -1, 100.5, "50", [50.0], True),
        ),
        ([("key",)], ("0" * 16, "../outside", "", 5, None)),
        ([("settings", "seed")], (5, "x", -1, 1.5, 2**70)),
        ([("settings", "sed")], (5,)),
        ([("training",)], ("0" * 16, None)),
        ([("data", "digest")], ("x", 5, "0" * 63)),
        ([("history", 0, "epoch")], (1, -1, "0")),
        ([("history",)], ([], {}, "x")),
        ([("note",)], (5, None, ["x"])),
        ([("more",)], (5,)),
        ([("masked_rows", 0)], (-1, 1.5)),
        ([("seconds", "method")], (-1.0, "x")),
        ([("request", "kind")], ("all",)),
        ([("readouts",)], ({"../x": {}}, {"agreement": {}}, [])),
        (
            [
                (name,)
                for name in (
                    "settings",
                    "data",
                    "provenance",
                    "training",
                    "request",
                    "changed",
                    "note",
                    "masked_rows",
                    "history",
                    "seconds",
                )
            ]
            + [("data", "digest"), ("request", "forget"), ("provenance", "torch")],
            (...,),
        ),
    ]
    for place in places
    for value in values
]


@pytest.mark.parametrize("place, value", WRONG_PARTS, ids=lambda x: str(x)[:40])
def test_a_record_with_a_part_that_makes_no_sense_is_refused_in_one_sentence(
    place, value, tmp_path
):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(changed(RUN, place, value)), encoding="utf-8")
    with pytest.raises(ValueError, match="is not a record") as error:
        read_record(path)
    assert (
        "\n" not in str(error.value)
        and str(path) in str(error.value)
        and "delete it" in str(error.value)
    )


def test_a_changed_accuracy_is_seen(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, RUN)
    path.write_text(
        path.read_text(encoding="utf-8").replace(str(RUN["history"][0]["remain_acc"]), "12.5"),
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="its digest is not that of its content"):
        read_record(path)


def test_a_record_in_anothers_place_is_refused(tmp_path):
    "Under another key, or of another kind."
    training = next(
        r
        for path in COMMITTED
        if "request" not in (r := json.loads(path.read_text(encoding="utf-8")))
    )
    failure = {"key": RUN["key"], "settings": RUN["settings"], "error": "E", "reason": "r"}
    readout_ = {
        "key": RUN["key"],
        "readout": "agreement",
        "provenance": RUN["provenance"],
        **{n: {"images": 5, "same_top1": 50.0, "divergence": 0.1} for n in ("forget", "remain")},
    }
    for place, record in {
        f"{'0' * 16}/record.json": RUN,
        f"{RUN['key']}/record.json": training,
        f"train-{RUN['key']}/record.json": RUN,
        f"{'0' * 16}.json": RUN,
        f"{RUN['key']}/failure.json": RUN,
        f"{RUN['key']}/agreement.json": RUN,
        "a/record.json": failure,
        "b/record.json": readout_,
        f"{RUN['key']}/relearn_all_5.json": readout_,
        f"{'1' * 16}/agreement.json": readout_,
    }.items():
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(ValueError, match="is not a record"):
            read_record(path)
        with pytest.raises(ValueError):
            write_record(path, record)
    for place, record in {
        f"{RUN['key']}/record.json": RUN,
        f"{RUN['key']}/failure.json": failure,
        f"{RUN['key']}/agreement.json": readout_,
        f"train-{training['key']}.json": training,
    }.items():
        write_record(tmp_path / place, record)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_a_run_leaves_a_whole_record_and_is_not_done_twice(runs):
    chosen = quick(method="fisher_mask", preset="authors_code", **SHORT)
    record = run(chosen, runs, progress="none")
    zeros = int((images_of(chosen).train.labels == 0).sum())
    assert {
        "key",
        "settings",
        "data",
        "provenance",
        "training",
        "request",
        "changed",
        "note",
        "masked_rows",
        "history",
        "steps",
        "seconds",
        "spared",
        "memory",
        "weights",
        "digest",
    } == set(record)
    assert [row["epoch"] for row in record["history"]] == [0, 1]
    assert record["request"]["forget"] == zeros > 0
    assert sum(record["masked_rows"]) + sum(
        r["masked"] for r in record["changed"] if "classifier" not in r["name"]
    ) == sum(r["masked"] for r in record["changed"])
    stamp = (runs / record["key"] / "record.json").stat().st_mtime_ns
    assert (
        run(chosen, runs) == record
        and (runs / record["key"] / "record.json").stat().st_mtime_ns == stamp
    )
    load_weights(build_model("resnet20", 10, 1), runs / record["key"] / "weights.safetensors")


def test_methods_share_one_original_and_a_record_repeats_exactly(runs, tmp_path):
    records = [
        run(quick(method=m, **SHORT), runs, progress="none")
        for m in ("finetune", "mask_classifier")
    ]
    (training,) = {r["training"] for r in records}
    assert (runs / f"train-{training}" / "record.json").exists()
    again = run(quick(method="mask_classifier", **SHORT), tmp_path, progress="none")
    timeless = lambda r: {
        k: v if k != "history" else [{c: x for c, x in row.items() if c != "seconds"} for row in v]
        for k, v in r.items()
        if k not in ("seconds", "spared", "memory", "digest")
    }
    assert timeless(again) == timeless(records[1])
    weights = [
        (folder / again["key"] / "weights.safetensors").read_bytes() for folder in (runs, tmp_path)
    ]
    assert weights[0] == weights[1]


def test_samples_can_be_forgotten_from_settings(runs):
    record = run(quick(request="samples", samples=[1, 5, 9], **SHORT), runs, progress="none")
    assert record["request"]["kind"] == "samples" and record["request"]["forget"] == 3


def test_a_random_subset_is_drawn_by_the_seed_and_judged_by_the_retrained_model(runs):
    chosen = quick(request="random", count=60, method="finetune", seed=5, **WHOLE)
    record, images = run(chosen, runs, progress="none"), images_of(chosen)
    request = random_subset(images, 60, 5)
    assert record["request"] == {
        "kind": "random",
        "classes": [],
        "forget": 60,
        "remain": 1237,
        "digest": request.digest,
        "details": request.details,
    }
    found = readout(chosen, "agreement", runs, progress="none")
    fresh = build_model("resnet20", 10, 1, seed=5)
    with repeatable(2):
        train_model(
            fresh, request.remain, replace(chosen.train, seed=5, select="last"), progress="none"
        )
    tuned = build_model("resnet20", 10, 1)
    load_weights(tuned, runs / record["key"] / "weights.safetensors")
    for name, part in (("forget", request.test_forget), ("remain", request.test_remain)):
        assert found[name] == pytest.approx(
            asdict(agreement(tuned, fresh, part.batches(500))), rel=1e-5
        )


def test_a_held_out_part_of_the_training_set_judges_instead_of_the_test_set(tmp_path):
    chosen = quick(method="mask_classifier", held_out=200, **WHOLE | {"fine_tune_epochs": 0})
    record, images = (
        run(chosen, tmp_path, progress="none"),
        load_images("digits").held_out(200, 666),
    )
    assert record["data"]["digest"] == images.digest and (
        record["data"]["train"],
        record["data"]["test"],
    ) == (1097, 200)
    model = build_model("resnet20", 10, 1)
    load_weights(model, tmp_path / record["key"] / "weights.safetensors")
    assert record["history"][0]["accuracy"] == pytest.approx(
        accuracy(model, images.test.batches(500))
    )


def test_fisher_information_is_computed_once(tmp_path, monkeypatch):
    """For one w*, one request and one estimator; other options read it, with the masks that
    fresh scores give."""
    computed, real = [], fisher_unlearn.methods.base.diag_fisher

    def counting(model, batches, labels, per, reduction, *rest):
        computed.append((labels, per, reduction))
        return real(model, batches, labels, per, reduction, *rest)

    monkeypatch.setattr("fisher_unlearn.methods.base.diag_fisher", counting)

    def news(**given):
        computed.clear()
        record = run(quick(**SHORT, **given), tmp_path, progress="none")
        return record, list(computed)

    first, made = news(ratio=0.02)
    assert made == [("true", "sample", "sum")] * 2 and first["spared"] == 0
    again, made = news(ratio=0.01, unit="kernel")
    assert made == [] and 0 < again["spared"] <= first["seconds"]["method"]
    assert news(method="fisher_noise")[1] == [("true", "sample", "mean")]
    assert news(remain_weight=1.0)[1] == [
        ("true", "sample", "mean")
    ]  # of the forget set: that of the remain set is there
    assert (
        len(news(classes=[1])[1]) == 2
        and len(news(seed=5)[1]) == 2
        and len(news(remain_limit=50)[1]) == 2
    )
    shutil.rmtree(tmp_path / again["key"])
    for path in tmp_path.glob("train-*/fisher/*/*"):
        path.write_bytes(path.read_bytes()[:1000])  # damaged
    fresh, made = news(ratio=0.01, unit="kernel")
    assert (
        len(made) == 2
        and fresh["changed"] == again["changed"]
        and fresh["history"][0] == again["history"][0]
    )


def test_scores_that_another_process_computes_are_waited_for(tmp_path):
    "Two at once compute once."
    calls = []

    def slow():
        calls.append(time.sleep(0.5))
        return {"w": torch.ones(2)}

    stores = [KeptScores(tmp_path, "cpu") for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda store: store("name", slow), stores))
    assert len(calls) == 1 and all(torch.equal(f["w"], torch.ones(2)) for f in found)
    assert sorted(store.spared > 0.4 for store in stores) == [False, True]


def test_poisoned_and_mislabelled_images_are_learned_and_then_forgotten(runs):
    """w* learns the spoilt training set and the retrained network the clean rest; what else
    tells is in the history; the accuracy is that of the test set."""
    for given_, name in (
        ({"request": "poison", "count": 40, "patch_size": 2, "patch_value": 255}, "trigger_acc"),
        ({"request": "mislabel", "mislabel_ratio": 0.2}, "truth_acc"),
    ):
        chosen = quick(method="finetune", **given_, **SHORT)
        record, images = run(chosen, runs, progress="none"), images_of(chosen)
        request = request_of(chosen, images)
        assert record["request"] == {
            "kind": request.kind,
            "classes": [],
            "forget": len(request.forget),
            "remain": len(request.remain),
            "digest": request.digest,
            "details": request.details,
        }
        assert set(record["history"][0]) > {
            name,
            "remain_acc",
            "forget_acc",
            "unlearn_score",
        } and all(row["accuracy"] == row["remain_acc"] for row in record["history"])
        model = build_model("resnet20", 10, 1, seed=666)
        with repeatable(chosen.machine.threads):
            train_model(
                model,
                request.train,
                replace(chosen.train, seed=666),
                {"test": images.test.batches(500)},
                progress="none",
            )
        trained = build_model("resnet20", 10, 1)
        load_weights(trained, runs / f"train-{record['training']}" / "weights.safetensors")
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), trained.state_dict().values())
        )
        assert record["history"][0]["forget_acc"] == pytest.approx(
            accuracy(trained, request.forget.batches(500))
        )


def test_limited_remain_data_are_all_that_a_method_sees(runs, monkeypatch):
    """50 images, or none, for scores and fine-tuning; TF-IDF compares what is at hand, in the
    order of the training set."""
    import fisher_unlearn.lab.run as module

    seen, whole = {}, module.unlearn

    def spy(model, forget, remain, *, method, reference, **more):
        seen[method.name] = (remain, reference)
        return whole(model, forget, remain, method=method, reference=reference, **more)

    monkeypatch.setattr(module, "unlearn", spy)
    for method, limit in (("fisher_mask", 50), ("tfidf", 50), ("activation_mask", 0)):
        record = run(
            quick(
                method=method,
                remain_limit=limit,
                **WHOLE | ({} if limit else {"fine_tune_epochs": 0}),
            ),
            runs,
            progress="none",
        )
        request = request_of(
            chosen := quick(remain_limit=limit, **WHOLE | {"fine_tune_epochs": 0}),
            images_of(chosen),
        )
        assert (
            record["request"]["remain"] == limit == len(request.remain)
            and record["request"]["digest"] == request.digest
            and len(record["history"]) == (2 if limit else 1)
        )
        remain, reference = seen[method]
        at_hand = sorted([*request.forget_indices.tolist(), *request.remain_indices.tolist()])
        assert (
            (remain is None) == (limit == 0)
            and torch.equal(reference.labels, request.train.labels[at_hand])
            and len(at_hand) == 128 + limit
        )
        if remain is not None:
            assert torch.equal(remain.labels, request.remain.labels)


def test_a_small_image_is_padded_for_a_network_that_needs_it_and_it_is_said(runs, capsys):
    record = run(
        quick(network="vgg16", method="mask_classifier", subset=40, epochs=1, fine_tune_epochs=0),
        runs,
        progress="none",
    )
    assert record["data"]["size"] == 32 and "padded with zeros" in capsys.readouterr().out


def test_a_record_of_other_images_is_refused(tmp_path):
    chosen = quick(method="finetune", **WHOLE)
    run(chosen, tmp_path, progress="none")
    for folder, again in (
        (f"train-{training_key(chosen)}", quick(method="finetune", epochs=2, fine_tune_epochs=0)),
        (run_key(chosen), chosen),
    ):
        path = tmp_path / folder / "record.json"
        whole = path.read_text(encoding="utf-8")
        write_record(
            path, json.loads(whole) | {"data": json.loads(whole)["data"] | {"digest": "0" * 64}}
        )
        with pytest.raises(ValueError, match="made from other digits images"):
            run(again, tmp_path, progress="none")
        path.write_text(whole, encoding="utf-8")


def test_a_diverging_run_leaves_no_record(tmp_path):
    chosen = quick(method="finetune", lr=1e30, **SHORT)
    with pytest.raises(FloatingPointError, match="training diverged"):
        run(chosen, tmp_path, progress="none")
    assert not list(tmp_path.rglob("record.json"))


def command(*words):
    return CliRunner(
        env={"COLUMNS": "200", "NO_COLOR": "1", "FORCE_COLOR": None, "TERM": "dumb"}
    ).invoke(app, words)


@pytest.mark.parametrize(
    "words, message",
    [
        (["unlearn", "--dataset", "mnits"], "did you mean 'mnist'"),
        (["unlearn", "--ratio", "1.5"], "in [0, 1)"),
        (["unlearn", "--classes", "12", "--epochs", "1"], "class 12 does not exist"),
        (["unlearn", "--profile", "fast"], "unknown profile"),
        (["quickstart", "--network", "resnet18"], "did you mean 'resnet"),
        (["quickstart", "--dataset", "cifar10", "--root", "/proc/none"], "cannot write"),
        (["unlearn", "--runs", "/proc/none"], "cannot write in the folder"),
        (["quickstart", "--figures", "/proc/none"], "cannot write in the folder"),
    ],
)
def test_the_command_refuses_in_one_line(words, message, tmp_path):
    extra = [] if "--runs" in words else ["--runs", str(tmp_path / "r")]
    extra += (
        ["--figures", str(tmp_path / "f")]
        if words[0] == "quickstart" and "--figures" not in words
        else []
    )
    done = command(*words, *extra)
    assert (
        done.exit_code == 2
        and message in done.output
        and done.output.startswith("fisher-unlearn: ")
        and done.output.count("\n") == 1
    )
    assert not list(tmp_path.rglob("record.json"))


def test_help_names_every_option():
    for words in ([], ["unlearn"], ["quickstart"], ["data"]):
        assert command(*words, "--help").exit_code == 0
    text = command("unlearn", "--help").output
    assert all(
        name in text for name in ("authors_code", "fisher_mask", "--remain-weight", "digits, mnist")
    )
    assert command("data", "--root", "none").output.count("missing") == len(DATASETS) - 1


def test_unlearn_prints_the_history_and_where_the_record_is(tmp_path):
    done = command(
        "unlearn",
        "--method",
        "mask_classifier",
        "--epochs",
        "1",
        "--fine-tune-epochs",
        "1",
        "--classes",
        "3,4",
        "--runs",
        str(tmp_path),
    )
    assert done.exit_code == 0 and "masked 130," in done.output and "unlearn_score" in done.output
    assert any(
        str(path.parent) in done.output.replace("\n", "") for path in tmp_path.rglob("record.json")
    )


def test_any_parameter_can_be_set_on_the_command_line(tmp_path):
    done = command(
        "unlearn",
        "--request",
        "poison",
        "--count",
        "30",
        "--set",
        "patch_value=255",
        "--set",
        "patch_size=2",
        "--method",
        "random_mask",
        "--hard",
        "--epochs",
        "1",
        "--fine-tune-epochs",
        "1",
        "--runs",
        str(tmp_path),
    )
    record = next(r for r in map(read_record, tmp_path.rglob("record.json")) if "request" in r)
    assert (
        done.exit_code == 0
        and "trigger_acc" in done.output
        and record["settings"]["options"]["hard"] is True
    )
    assert {"n": 30, "value": 255, "size": 2}.items() <= record["request"]["details"].items()
    for word, message in (
        ("patch_valu=1", "did you mean 'patch_value'"),
        ("5", "takes NAME=VALUE"),
        ("seed=[", "can't be read"),
    ):
        failed = command("unlearn", "--set", word, "--runs", str(tmp_path))
        assert failed.exit_code == 2 and message in failed.output and failed.output.count("\n") == 1


def test_a_copy_with_other_options_is_another_run():
    "Nothing of the first is taken along, also if its key was asked for before."
    first = quick()
    first_key = run_key(first)
    for change in ({"ratio": 0.3}, {"unit": "channel"}, {"preset": "authors_code"}):
        copied = first.but(**change)
        assert run_key(copied) == run_key(quick(**change)) != first_key
        assert copied == quick(**change)
    assert first.but(method="finetune") == quick(method="finetune")
    with pytest.raises(ValueError, match="`ratio` is 3"):
        first.but(ratio=3)


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_like_one_never_killed(tmp_path):
    """SIGKILL at most half a second after each line that it prints, so in training, scoring and
    fine-tuning, until it is done."""
    start = [
        sys.executable,
        "-c",
        "from fisher_unlearn.cli import app; app()",
        "unlearn",
        "--profile",
        "smoke",
        "--epochs",
        "6",
        "--fine-tune-epochs",
        "3",
        "--runs",
    ]
    assert subprocess.run([*start, str(tmp_path / "whole")], capture_output=True).returncode == 0
    kills, wait = 0, random.Random(0)
    for _ in range(30):
        process = subprocess.Popen(
            [*start, str(tmp_path / "killed")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            encoding="utf-8",
        )
        assert process.stdout.readline().startswith("--- ")
        if not re.match(
            r"epoch \d+/", process.stdout.readline()
        ):  # it is done: a pipe that is closed before it has said so would fail it
            process.communicate()
            break
        time.sleep(wait.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        kills += process.wait() == -signal.SIGKILL
        for path in (tmp_path / "killed").rglob("record.json"):
            assert read_record(path)
    assert process.returncode == 0 and kills >= 2
    files = [
        sorted(
            str(p.relative_to(tmp_path / run))
            for p in (tmp_path / run).rglob("*")
            if p.is_file() and p.name != ".lock"
        )
        for run in ("whole", "killed")
    ]
    assert files[0] == files[1] and not any(f.endswith(".part") for f in files[0])
    for name in (f for f in files[0] if f.endswith(".safetensors")):
        whole, killed = (tmp_path / run / name for run in ("whole", "killed"))
        if "/fisher/" not in name:
            assert whole.read_bytes() == killed.read_bytes()
        else:  # scores, whose file says how long they took
            (a, _), (b, _) = map(read_tensors, (whole, killed))
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpus_runs_can_be_named_and_read_without_one_but_not_done(without_gpu, tmp_path):
    "Before anything is read or downloaded."
    settings = resolve("paper", device="cuda")
    with pytest.raises(ValueError, match="`device` is cuda, but torch finds no GPU"):
        run(settings, tmp_path / "runs", tmp_path / "no data")
    with pytest.raises(ValueError, match="no GPU"):
        model_of(quick(device="cuda"), load_images("digits"))


def test_w_star_from_another_device_is_a_start_and_is_never_trained_here(without_gpu, tmp_path):
    """As if a GPU had trained the same network: what is done to it here is what is done to one
    that was trained here."""
    here, mixed = (
        quick(method="mask_classifier", **SHORT),
        quick(method="mask_classifier", trained_on="cuda", **SHORT),
    )
    with pytest.raises(ValueError, match="are to be trained on cuda, and are not among the runs"):
        run(mixed, tmp_path, progress="none")
    with pytest.raises(ValueError, match="are to be trained on cuda"):
        run(quick(method="retrain", trained_on="cuda", **SHORT), tmp_path, progress="none")
    done = run(here, tmp_path, progress="none")
    ours, theirs = (tmp_path / f"train-{training_key(s)}" for s in (here, mixed))
    shutil.copy(ours / "weights.safetensors", theirs / "weights.safetensors")
    write_record(
        theirs / "record.json",
        read_record(ours / "record.json")
        | {"key": training_key(mixed), "settings": training_settings(mixed)},
    )
    found = run(mixed, tmp_path, progress="none")
    bare = lambda record: [
        {k: v for k, v in row.items() if k != "seconds"} for row in record["history"]
    ]
    assert (
        bare(found) == bare(done)
        and found["training"] == training_key(mixed)
        and found["settings"]["device"] == "cpu"
    )


@pytest.mark.parametrize("trained_on", [None, "cuda"])
def test_what_a_gpu_did_is_read_out_on_the_cpu_where_there_is_none(
    without_gpu, tmp_path, trained_on
):
    "As if a GPU had done the same runs: what is read out is the same."

    def done(device, method):
        return quick(method=method, device=device, **SHORT)

    pairs = [
        (tmp_path / run_key(done("cpu", method)), tmp_path / run_key(done("cuda", method)))
        for method in ("finetune", "retrain")
    ]
    pairs.append(
        tuple(
            tmp_path / f"train-{training_key(done(device, 'finetune'))}"
            for device in ("cpu", "cuda")
        )
    )
    found = {
        kind: readout(done("cpu", "finetune"), kind, tmp_path, progress="none", cap=2)
        for kind in READOUTS
    }
    for here, there in pairs:
        shutil.copytree(
            here,
            there,
            ignore=lambda *_: [
                f"{name}.json" for name in ("agreement", "relearn_all_2", "relearn_classifier_2")
            ],
        )
        record = json.loads((there / "record.json").read_text(encoding="utf-8"))
        key, made = there.name.removeprefix("train-"), record["settings"] | {"device": "cuda"}
        trained = (
            {"training": pairs[2][1].name.removeprefix("train-") if record["training"] else None}
            if "training" in record
            else {}
        )
        write_record(there / "record.json", record | {"key": key, "settings": made} | trained)
    theirs = quick(method="finetune", device="cuda", trained_on=trained_on, **SHORT)
    for kind in READOUTS:
        read = readout(theirs, kind, tmp_path, progress="none", cap=2)
        assert read["key"] == run_key(theirs) and read["provenance"]["device"] == "cpu"
        said, expected = (
            {k: v for k, v in one.items() if k not in ("key", "provenance", "digest", "seconds")}
            for one in (read, found[kind])
        )
        assert said == expected


def test_a_kept_run_is_not_done_again(tmp_path, monkeypatch):
    "Nor is the training of a kept w*, by another method; half a copy is none."
    done = run(
        quick(method="mask_classifier", epochs=2, fine_tune_epochs=1),
        tmp_path / "mine",
        progress="none",
    )
    for key in (done["key"], f"train-{done['training']}"):
        keep_run(key, tmp_path / "mine", tmp_path / "data")
    assert {*listed(tmp_path / "data" / "checkpoints")} == {
        f"{key}.{end}"
        for key in (done["key"], f"train-{done['training']}")
        for end in ("safetensors", "json")
    }
    monkeypatch.setattr("fisher_unlearn.lab.run._trained", None)  # training would raise
    other = run(
        quick(method="finetune", epochs=2, fine_tune_epochs=0),
        tmp_path / "other",
        tmp_path / "data",
        progress="none",
    )
    assert other["training"] == done["training"]
    monkeypatch.setattr("fisher_unlearn.lab.run._done", None)
    assert (
        run(
            quick(method="mask_classifier", epochs=2, fine_tune_epochs=1),
            tmp_path / "other",
            tmp_path / "data",
        )
        == done
    )
    kept = tmp_path / "data" / "checkpoints" / f"{done['key']}.json"
    write_record(kept, done | {"data": done["data"] | {"digest": "0" * 64}})
    with pytest.raises(TypeError):
        run(
            quick(method="mask_classifier", epochs=2, fine_tune_epochs=1),
            tmp_path / "elsewhere",
            tmp_path / "data",
        )  # it would be done
    kept.unlink()
    with pytest.raises(TypeError):
        run(
            quick(method="mask_classifier", epochs=2, fine_tune_epochs=1),
            tmp_path / "third",
            tmp_path / "data",
        )
    with pytest.raises(ValueError, match="holds no finished run"):
        keep_run("0" * 16, tmp_path / "mine", tmp_path / "data")


# ---- every value has its range, which is checked before anything is trained or downloaded

NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = [
    *({"remain_weight": v} for v in (NAN, INF, -1, -1e-9, 1e300, True, "x")),
    *({"noise_alpha": v} for v in (NAN, INF, -1, 0, 1e300, True)),
    *({"noise_exponent": v} for v in (NAN, INF, -1, 0)),
    *({"noise_clamp": v} for v in (0, -1, NAN, INF)),
    *({"lissa_epochs": v} for v in (0, -1, 1.5, True, 2**70)),
    *({"lissa_scale": v} for v in (0, -1, NAN, INF)),
    *({"lissa_damping": v} for v in (1, -0.1, NAN)),
    *({"tfidf_batches": v} for v in (-1, 0.5, True)),
    *({"ratio": v} for v in (NAN, INF, -0.1, 1, True, "x", [0.1])),
    *({"held_out": v} for v in (1, 0, -1, 1297, 2000, True)),
    *({"subset": v} for v in (0, -1, 1298, 2**70, True, 2.5)),
    {"subset": 100, "held_out": 100},
    *({"fine_tune_lr": v} for v in (INF, NAN, 0, -1, 1e300, True)),
    *({"fine_tune_length": v} for v in (0, -1, True, 2**70)),
    *({"fine_tune_epochs": v} for v in (-1, 2.5, True, INF, 2**70)),
    *({"seed": v} for v in (-1, 2**70, 2**63, True, 1.5, NAN)),
    *({"threads": v} for v in (0, True, 2**40, "x")),
    *({"remain_limit": v} for v in (-1, True, 2.5)),
    *({"classes": v} for v in ([True], [10], [-1], [1.5], [], [2**70], [[1]], "11", [None])),
    *(
        {"request": "samples", "samples": v}
        for v in ([-1], [1297], [1, 1], [True], [1.5], ["a.png"], [2**70])
    ),
    *({"request": "random", "count": v} for v in (0, True, 1297, 2**70)),
    *(
        {"request": "poison", **v}
        for v in (
            {"target": 10},
            {"target": True},
            {"target": -1},
            {"patch_value": 256},
            {"patch_value": -1},
            {"patch_size": 0},
            {"count": 1297},
        )
    ),
    *({"request": "mislabel", "mislabel_ratio": v} for v in (0, 1, NAN, INF, True, -1)),
    *({"lr": v} for v in (INF, NAN, 0, -1, 1e300, True, "x")),
    *({"epochs": v} for v in (0, True, INF, 2**70, 1.5)),
    *({"drops": v} for v in ([15, 10], [80.5], [True], "10", [NAN])),
    *({"warmup": v} for v in (-1, True, 20, 0.5)),
    *({"batch_size": v} for v in (0, True, 2**70, NAN)),
    *({"momentum": v} for v in (1, -0.1, NAN, True)),
    *({"weight_decay": v} for v in (-1, NAN, INF, 1e300, True)),
    *({"holdout": v} for v in (0, 1, NAN, True)),
    *({"hard": v} for v in (3, "maybe", NAN)),
    *({"compile": v} for v in ("x", 3)),
]


@pytest.mark.parametrize("bad", OUT_OF_RANGE, ids=str)
def test_values_out_of_range_are_refused_before_anything_is_done(bad):
    method = {"noise": "fisher_noise", "lissa": "influence", "tfidf": "tfidf"}.get(
        next(iter(bad)).partition("_")[0], "fisher_mask"
    )
    with pytest.raises(ValueError) as error:
        quick(**{"method": method} | bad)
    name = [n for n in bad if n != "request"][-1]
    words = {"classes": "class", "samples": "sample", "target": "class"}
    assert name in str(error.value) or words.get(name, name) in str(error.value)
    assert (
        "\n" not in str(error.value)
        and "Input should" not in str(error.value)
        and len(str(error.value)) < 300
    )


@pytest.mark.parametrize(
    "make", [RunSettings.of, RunSettings, DataSettings, REQUESTS["poison"]], ids=str
)
@pytest.mark.parametrize(
    "bad",
    [
        {"sed": 3},
        {"ratio": True, "request": 3},
        {"train": 3},
        {"train": {"schedule": {"lr": True}}},
        {"train": {"epoch": 3}},
        {"train": {"schedule": {"rate": 0.1}}},
    ],
)
def test_settings_themselves_refuse_in_one_sentence(make, bad):
    with pytest.raises(ValueError) as error:
        make(**bad)
    assert "\n" not in str(error.value) and "validation error" not in str(error.value)


def test_a_target_has_one_key_however_it_is_written():
    assert run_key(quick(request="poison", target="3")) == run_key(
        quick(request="poison", target=3)
    )
    assert quick(request="poison", target="03").request.target == 3
    assert quick(classes=["3", 3]).request.classes == (3,)
    assert training_key(quick(request="poison", target="3")) == training_key(
        quick(request="poison", target=3)
    )
    assert quick(epochs="6") == quick(epochs=6)


def test_scalars_are_the_numbers_that_they_are():
    numpy = {
        "seed": np.int64(3),
        "ratio": np.float32(0.5),
        "lr": torch.tensor(0.25),
        "epochs": np.int8(4),
        "classes": [np.int64(2)],
    }
    assert run_key(quick(**numpy)) == run_key(
        quick(seed=3, ratio=0.5, lr=0.25, epochs=4, classes=[2])
    )
    assert json.dumps(quick(**numpy).flat)


def test_keys_of_kept_results_are_those_of_their_settings():
    "The records in the Parquet files of figures/, too: no check of settings may move a key."
    root = Path(fisher_unlearn.__file__).parent.parent
    files = sorted((root / "figures").rglob("*.parquet"))
    assert files
    for file in files:
        for record in read_kept(file):
            chosen = RunSettings.of(**record["settings"])
            assert record["key"] == (
                run_key(chosen) if "request" in record else training_key(chosen)
            ), (file, record["key"])


def test_networks_of_several_seeds_can_be_shown_the_same_images(tmp_path):
    "`data_seed` decides what is drawn, and is in a key only where it makes a difference."
    one = quick(subset=200, seed=1, data_seed=7)
    other = quick(subset=200, seed=2, data_seed=7)
    assert images_of(one).digest == images_of(other).digest
    assert images_of(one).digest == images_of(quick(subset=200, seed=7)).digest
    assert images_of(quick(subset=200, seed=1)).digest != images_of(one).digest
    assert len({training_key(s) for s in (one, other, quick(subset=200, seed=1))}) == 3
    assert training_key(quick(subset=200, seed=7, data_seed=7)) == training_key(
        quick(subset=200, seed=7)
    )
    whole = quick(seed=1, data_seed=7)
    assert run_key(whole) == run_key(quick(seed=1))  # where nothing is drawn
    drawn = [
        request_of(s, images_of(s)).digest
        for s in (
            quick(request="random", count=9, seed=1, data_seed=7),
            quick(request="random", count=9, seed=2, data_seed=7),
            quick(request="random", count=9, seed=1),
        )
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    random = quick(request="random", count=9, seed=1, data_seed=7)
    assert training_key(random) == training_key(quick(seed=1))  # whose images are all of them
    assert run_key(random) != run_key(quick(request="random", count=9, seed=1))
    with pytest.raises(ValueError, match="`data_seed` is -1"):
        quick(data_seed=-1)


def test_a_record_says_how_far_the_weights_went(tmp_path):
    "The length is that of the result, which had the network at hand; counters are no part of it."
    few = {"dataset": "digits", "subset": 128, "epochs": 1, "fine_tune_epochs": 1}
    record = run(resolve("smoke", method="ct", **few), tmp_path, progress="none")
    assert f"moved the model by {weights_moved(record):.3g}." in record["note"]
    whole = sum(row["distance"] ** 2 for row in record["changed"]) ** 0.5
    assert weights_moved(record) < whole


def test_seconds_are_those_of_method_scores_and_all_epochs():
    "One of three epochs was interrupted for a thousand seconds."
    record = {"seconds": {"method": 2.0, "fine_tune": 0.5, "measure": 9.0}, "spared": 50.0}
    epochs = [{"epoch": e, "seconds": s} for e, s in enumerate((None, 1.5, 1001.5, 1.25))]
    assert seconds_taken(record | {"history": epochs}) == 2 + 50 + 4.5
    assert seconds_taken(record | {"history": epochs[:1], "spared": 0.0}) == 2
