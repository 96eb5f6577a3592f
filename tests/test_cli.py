"What the command takes, refuses and returns, in this process."

from pathlib import Path

import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

import fisher_unlearn
import fisher_unlearn.cli as cli
from fisher_unlearn.lab.deletion_order import _tuning, order_of
from fisher_unlearn.lab.settings import parameter_types, resolve, run_key
from fisher_unlearn.lab.report import restore
from fisher_unlearn.methods.unlearn import METHODS
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.train import save_weights

FIGURES = Path(fisher_unlearn.__file__).parent.parent / "figures"


def command(*words):
    return CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, words)


def test_a_runs_command_has_an_option_for_every_parameter():
    "As its type says: the name, numbers as numbers, what it means, and the names to choose from."
    said = command("unlearn", "--help").output
    unbroken = "".join(said.split())
    for name, (_, comment) in parameter_types().items():
        assert f"--{name.replace('_', '-')} " in said, name
        assert "".join(comment[1:].split()) in unbroken, name


@pytest.mark.parametrize("name", ["table1", "unlearn", "quickstart", "plan", "status"])
def test_help_names_the_variables_and_defaults_of_places(name):
    said = " ".join(command(name, "--help").output.split())
    for place in ("runs", "root", "figures"):
        if f"--{place} " in said:
            variable = {"root": "DATA"}.get(place, place.upper())
            assert f"[default: $FISHER_UNLEARN_{variable}, else" in said
    assert "--runs " in said


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--remain-weight", "sums", "--preset", "authors_code"], {"remain_weight": "sums"}),
        (["--remain-weight", "2"], {"remain_weight": 2.0}),
        (["--method", "tfidf", "--no-tfidf-gate"], {"tfidf_gate": False}),
        (["--noise-alpha", "1e-5", "--method", "fisher_noise"], {"noise_alpha": 1e-5}),
    ],
)
def test_what_is_typed_is_what_is_meant(words, wanted, monkeypatch, tmp_path):
    found = []

    def stop(settings, *_):
        found.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(cli, "run", stop)
    command("unlearn", *words, "--device", "cpu", "--runs", str(tmp_path))
    (settings,) = found
    assert {name: getattr(settings.method, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["unlearn", "--epochs", "6", "--set", "epochs=5"],
            "`epochs` is given twice, as 6 and as 5",
        ),
        (
            ["unlearn", "--set", "epochs=6", "--set", "epochs=5"],
            "`epochs` is given twice, as 6 and as 5",
        ),
        (["unlearn", "--ratio", "0.1", "--set", "ratio=.2"], "`ratio` is given twice"),
        (
            ["unlearn", "--classes", "0", "--samples", "3"],
            "`classes` has no meaning for the request 'samples'",
        ),
        (
            ["unlearn", "--classes", "0", "--request", "random"],
            "`classes` has no meaning for the request 'random'",
        ),
        (["unlearn", "--count", "5"], "`count` has no meaning for the request 'class'"),
        (
            ["unlearn", "--mislabel-ratio", "0.1"],
            "`mislabel_ratio` has no meaning for the request 'class'",
        ),
        (
            ["unlearn", "--request", "samples", "--samples", "3", "--set", "classes=[0]"],
            "`classes` has no meaning for the request 'samples'",
        ),
        (["unlearn", "--set", "profile=cpu"], "give --profile cpu in place of --set profile=cpu"),
        (["unlearn", "--set", "runs=x"], "give --runs x"),
        (["unlearn", "--set", "epochs=true"], "`epochs` is True"),
        (["unlearn", "--set", "lr=yes"], "`lr` is True"),
        (["unlearn", "--set", "samples=[true]", "--request", "samples"], "`samples` is [True]"),
        (["table5", "--profile", "cpu", "--set", "profile=quick"], "give --profile quick"),
        (["table5", "--set", "on=none"], "give --on none"),
        (["table5", "--set", "figures=x"], "give --figures x"),
        (["table5", "--set", "seeds=[1]", "--set", "seeds=[2]"], "`seeds` is given twice"),
        (["table5", "--address", "auto"], "`--address` is for runs on a Ray cluster"),
        (["table5", "--gpu-share", ".5"], "`--gpu-share` is for runs on a Ray cluster"),
        (["table6", "--on", "none"], "`--on none` has no meaning for table6"),
        (["train", "--on", "papermill"], "`--on papermill` has no meaning for train"),
        (["plan", "floor", "--set", "seed=5"], "`seed` is what floor itself chooses: give `seeds`"),
        (["plan", "floor", "--set", "method=ssd"], "`method` is what floor itself chooses"),
        (["plan", "figure4", "--set", "ratio=.5"], "`ratio` is what figure4 itself chooses"),
        (["plan", "floor", "--set", "epochs=" + "[" * 5000], "the value can't be read"),
        (["plan", "table1", "--set", "seeds=666"], "`seeds` is 666"),
        (["plan", "table1", "--set", "seeds=[]"], "`seeds` is empty"),
        (["plan", "table1", "--set", "seeds=[x]"], "`seeds"),
        (["plan", "table1", "--set", "profile=cpu"], "give --profile cpu"),
        (["plan", "table1", "--set", "experiment=x"], "unknown parameter 'experiment'"),
        (
            ["status", "table1", "--set", "seeds=[1]", "--set", "seeds=[2]"],
            "`seeds` is given twice",
        ),
    ],
)
def test_contradictions_and_nonsense_are_refused_in_one_line(words, message, tmp_path):
    refused = command(*words, "--runs", str(tmp_path / "runs"))
    assert (
        refused.exit_code == 2
        and message in refused.output
        and refused.output.count("\n") == 1
        and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--classes", "[a"], "`classes=[a`: the value can't be read"),
        (["--mean", "{"], "`mean={`: the value can't be read"),
        (["--options", "ratio=["], "`ratio=[`: the value can't be read"),
        (["--device", "mps"], "`device` is 'mps', on which torch can't compute here"),
        (["--device", "meta"], "`device` is 'meta', on which torch can't compute here"),
        (["--size", "64"], "`size` is 64, and digits is no folder of images"),
        (["--channels", "1"], "`channels` is 1, and digits is no folder of images"),
        (["--mean", ".5"], "`mean` is (0.5,), and digits is no folder of images"),
        (["--std", ".5"], "`std` is (0.5,), and digits is no folder of images"),
        (["--test", "nofolder"], "`test` is 'nofolder', and digits is no folder of images"),
        (["--method", "retrain"], "`retrain` needs `build`, which an order can't give"),
        (["--method", "tfidf"], "`tfidf` needs `reference`, which an order can't give"),
    ],
)
def test_an_order_that_can_not_be_is_refused_in_one_line(words, message, network, tmp_path):
    "Before any image is scored, and before it is said what that would take."
    given = {"--classes": "4"} | dict([words])
    typed = [word for pair in given.items() for word in pair]
    out = tmp_path / "out"
    refused = command("forget", "--checkpoint", str(network), *typed, "--out", str(out))
    assert refused.exit_code == 2 and message in refused.output, refused.output
    assert refused.output.count("\n") == 1 and not out.exists()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    "The file of an untrained network of the digits."
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(build_model("resnet20", 10, 1), path)
    return path


def test_images_for_which_there_is_no_memory_are_refused_in_one_line(monkeypatch):
    def full(_):
        raise MemoryError("Unable to allocate 894. GiB for an array")

    monkeypatch.setattr(cli, "carry_out", lambda *_: full(_))
    refused = command("forget", "--size", "100000")
    assert refused.exit_code == 2 and refused.output.count("\n") == 1
    assert "Unable to allocate 894. GiB for an array: ask for less" in refused.output


def test_help_leaves_symbols_and_literals_as_they_are():
    "Only a word begins with a capital; λ, module:function and the names of requests stay."
    unlearning, forgetting = (
        " ".join(command(part, "--help").output.split()) for part in ("unlearn", "forget")
    )
    for text in ("λ in F_f/n_f", "γ: weight", "α: weight", "R: share", "S, epochs", "poison: side"):
        assert text in unlearning
    assert not set("ΛΓΑ") & set(unlearning + forgetting)
    assert "module:function, torchvision:NAME" in forgetting and "Module:" not in forgetting
    assert "Way to forget (retrain" in unlearning and "A CSV that lists" in forgetting
    assert "Folder of test images; if left out: that in the data." in forgetting


def test_help_of_forget_lists_the_methods_that_it_can_carry_out():
    said = " ".join(command("forget", "--help").output.split())
    found = said.partition("[default: fisher_mask], one of ")[2].partition(".")[0].split(", ")
    able = {"remain", "classes", "one_class", "everything"}
    assert found == [name for name, kind in METHODS.items() if {*kind.needs} <= able]
    assert "fisher_mask" in found and "retrain" not in found


@pytest.mark.parametrize("name", ["Adam", "adam", "AdamW"])
def test_an_optimizer_is_found_in_any_case(name):
    assert _tuning(order_of(optimizer=name)).optimizer == name.lower()


@pytest.mark.parametrize(
    "seconds, said",
    [
        ([float("nan")] * 2, "Nobody knows yet how long these take: nothing like them was done."),
        ([60.0, 120.0], "About 3 minutes are left."),
        ([60.0, float("nan")], "About 1 minutes are left, not counting 1 run of which nothing"),
    ],
)
def test_the_time_that_is_left_is_no_zero_where_nobody_knows_it(seconds, said, capsys):
    cli._summary(pd.DataFrame({"state": ["missing"] * len(seconds), "seconds": seconds}))
    counts, time = capsys.readouterr().out.splitlines()
    assert counts == f"{len(seconds)} missing" and time.startswith(said)


def test_a_fresh_clone_is_told_that_nobody_knows(tmp_path):
    for part in ("plan", "status"):
        said = command(part, "figure1", "--runs", str(tmp_path / "none"), "--root", str(tmp_path))
        assert "Nobody knows yet how long" in said.output and "About 0" not in said.output


def test_the_same_value_twice_is_no_contradiction():
    assert cli._further(["epochs=6", "epochs=6"], {"epochs": 6}, ["epochs"], "parameter") == {
        "epochs": 6
    }


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "table1", "--runs", ""],
        ["status", "table1", "--root", " "],
        ["unlearn", "--runs", ""],
        ["quickstart", "--figures", ""],
        ["table1", "--runs", ""],
        ["restore", ""],
        ["data", "--root", ""],
    ],
)
def test_an_empty_path_is_not_the_working_folder(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = command(*words)
    assert (
        refused.exit_code == 2
        and "a path is empty" in refused.output
        and refused.output.count("\n") == 1
        and not list(tmp_path.iterdir())
    )


def test_an_index_as_text_is_the_index():
    keys = {
        run_key(resolve("quick", request="poison", target=target, device="cpu"))
        for target in (3, "3")
    }
    assert len(keys) == 1


def notebook_that_says(*lines):
    "In place of `execute`: it leaves a notebook that printed some lines."

    def execute(notebook, output, parameters, budget=None):
        cell = nbformat.v4.new_code_cell(
            "", outputs=[nbformat.v4.new_output("stream", text="\n".join(lines) + "\n")]
        )
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), output)

    return execute


def test_a_table_some_of_whose_runs_failed_ends_with_1(tmp_path, monkeypatch):
    places = ["--runs", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]
    monkeypatch.setattr(
        cli,
        "execute",
        notebook_that_says(
            "--- one",
            "failed: digits resnet20 666: finetune: training diverged",
            "12 of 13 runs are done.",
        ),
    )
    failed = command("table1", *places)
    assert (
        failed.exit_code == 1
        and "1 run failed" in failed.output
        and "the same command tries again" in failed.output
    )
    monkeypatch.setattr(
        cli, "execute", notebook_that_says("13 of 13 runs are done.", "none failed: good")
    )
    assert command("table1", *places).exit_code == 0


def test_a_notebook_that_fails_for_what_was_left_goes_on_later(tmp_path, monkeypatch):
    """Whatever it then says: it is for want of time, unless a run failed, or nobody spoke of
    time."""
    places = ["--runs", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]

    def failing(*lines):
        says = notebook_that_says(*lines)

        def execute(notebook, output, parameters, budget=None):
            says(notebook, output.with_suffix(".partial.ipynb"), parameters)
            raise cli.NotebookFailed("no re-learn time was read.", "ValueError")

        return execute

    left, failed = "left: relearn_all_3 of a run", "failed: a run: it diverged"
    for lines, budget, code in (
        ([left], ["--budget", "1h"], cli.LATER),
        ([left], [], 2),
        ([left, failed], ["--budget", "1h"], 2),
        (["nothing"], ["--budget", "1h"], 2),
    ):
        monkeypatch.setattr(cli, "execute", failing(*lines))
        said = command("figure2", *budget, *places)
        assert said.exit_code == code and said.output.count("\n") == 1, said.output


@pytest.mark.slow
def test_who_only_looks_writes_nothing_among_the_runs(tmp_path):
    "Finished runs may lie where nothing can be written: not even a test of that is made there."
    restore(FIGURES / "cpu" / "figure4.parquet", tmp_path / "runs", tmp_path / "data")
    stamps = {
        path: path.stat().st_mtime_ns
        for path in [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]
    }
    done = command(
        "figure4",
        "--profile",
        "cpu",
        "--set",
        "seeds=[666]",
        "--on",
        "none",
        "--runs",
        str(tmp_path / "runs"),
        "--figures",
        str(tmp_path / "figures"),
    )
    assert done.exit_code == 0, done.output
    assert stamps == {
        path: path.stat().st_mtime_ns
        for path in [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]
    }
