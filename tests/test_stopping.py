"""How commands end that are stopped, killed, not read, or shown on a terminal that knows few
letters."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fisher_unlearn.images.atomic import locked
from fisher_unlearn.lab import notebook

COMMAND = [sys.executable, "-c", "from fisher_unlearn.cli import app; app()"]
LONG = ["--set", "epochs=4000", "--set", "subset=50", "--set", "seeds=[666]"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def _stoppable():
    """Ctrl-C reaches the command also where whoever runs the tests ignores it, as a shell does
    for what runs in its background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(words, folder, **more):
    """A command at work: its process, once an epoch of it is kept, and all processes that it has
    started."""
    runs, figures = folder / "runs", folder / "figures"
    places = ["--runs", str(runs)] + ([] if words[0] == "unlearn" else ["--figures", str(figures)])
    process = subprocess.Popen(
        [*COMMAND, *words, *places],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=QUIET,
        preexec_fn=_stoppable,
        **more,
    )
    limit = time.monotonic() + 240
    while not list(runs.rglob("progress.safetensors")):
        assert process.poll() is None, process.communicate()
        if time.monotonic() > limit:
            process.kill()
            pytest.fail("no epoch within 240 s")
        time.sleep(0.1)
    return process, psutil.Process(process.pid).children(recursive=True)


def left_over(folder):
    "What a command should have put away."
    return [
        path
        for path in folder.rglob("*")
        if path.name.endswith((".draft", ".part", ".partial.ipynb"))
    ]


PATHS = {
    "unlearn": ["unlearn", "--epochs", "4000", "--subset", "50"],
    "notebook": ["figure4", *LONG],
    "papermill": ["figure4", *LONG, "--on", "papermill"],
}


@pytest.mark.parametrize(
    "path", ["unlearn", "notebook", pytest.param("papermill", marks=pytest.mark.slow)]
)
def test_ctrl_c_ends_in_one_line_and_leaves_no_kernel(path, tmp_path):
    process, family = start(PATHS[path], tmp_path)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and error.count("\n") == 1, error
    assert (
        error.startswith("fisher-unlearn: stopped in digits resnet20 666: ")
        and f"this goes on from there: fisher-unlearn {PATHS[path][0]}" in error
    )
    assert not psutil.wait_procs(family, timeout=20)[1] and not left_over(tmp_path)
    assert len(family) == {"unlearn": 0, "notebook": 1, "papermill": 2}[path] and list(
        tmp_path.rglob("progress.safetensors")
    )


@pytest.mark.slow
def test_a_kernel_that_is_killed_is_said_in_one_line(tmp_path):
    process, family = start(PATHS["notebook"], tmp_path)
    family[0].kill()
    _, error = process.communicate(timeout=120)
    assert (
        process.returncode == 2
        and error.count("\n") == 1
        and "was killed by signal 9, most likely because the memory ran out" in error
    ), error
    assert "goes on from there" in error


DEAF = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_kernel_that_listens_to_nothing_is_killed_where_there_are_no_signals(monkeypatch):
    "By the process itself: Windows has no SIGKILL to send."
    words = [sys.executable, "-c", DEAF]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    monkeypatch.setattr(notebook, "signal", SimpleNamespace(SIGINT=signal.SIGINT))
    watch = notebook._Watch({})
    provisioner = SimpleNamespace(process=process, pid=process.pid)
    watch.kernels.append(SimpleNamespace(provisioner=provisioner))
    watch.stop()
    time.sleep(0.5)
    assert process.poll() is None
    watch.stop()
    assert process.wait(20) == -signal.SIGKILL
    watch.over.set()
    assert "memory ran out" in str(notebook._death(Path("some.ipynb"), watch))


@pytest.mark.slow
def test_what_a_killed_command_left_is_removed_by_the_next_start(tmp_path):
    process, family = start(PATHS["notebook"], tmp_path)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and not psutil.wait_procs(family, timeout=20)[1]
    assert [path.suffix for path in left_over(tmp_path / "figures")] == [".draft"]
    again = [
        *COMMAND,
        "figure4",
        *LONG,
        "--on",
        "none",
        "--runs",
        str(tmp_path / "runs"),
        "--figures",
        str(tmp_path / "figures"),
    ]
    subprocess.run(again, capture_output=True, env=QUIET, timeout=120)
    assert [path.name for path in left_over(tmp_path / "figures")] == ["figure4.partial.ipynb"]
    [trained] = tmp_path.rglob("progress.safetensors")
    with locked(trained.parent, wait=False):  # as the training's next start does
        assert not left_over(tmp_path / "runs")


@pytest.mark.slow
def test_what_nobody_reads_is_no_error(tmp_path):
    "As with `| head -1`: the work is done all the same, and nothing is complained of."
    words = [
        "unlearn",
        "--epochs",
        "1",
        "--fine-tune-epochs",
        "1",
        "--subset",
        "50",
        "--runs",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        [*COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=QUIET,
        encoding="utf-8",
    )
    assert process.stdout.readline().startswith("--- digits")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(120) == 0
    process.stderr.close()
    assert len(list(tmp_path.glob("*/record.json"))) == 2


POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_a_command_works_where_text_is_ascii(tmp_path):
    words = ["table7", "--runs", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]
    done = subprocess.run([*COMMAND, *words], capture_output=True, env=QUIET | POSIX, timeout=240)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert "–" in (tmp_path / "figures/quick/table7.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("language", [POSIX, {"PYTHONIOENCODING": "ascii"}])
def test_letters_that_a_terminal_does_not_know_are_replaced(language):
    program = "from fisher_unlearn.terminal import screens\nwith screens(): print('a \\u2013 b')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=QUIET | language, timeout=240
    )
    assert done.returncode == 0 and done.stdout == b"a ? b\n" and done.stderr == b"", done.stderr
