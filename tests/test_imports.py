"The public names, and what importing them costs."

import json
import os
import statistics
import subprocess
import sys
from importlib import import_module

import pytest

import fisher_unlearn

HEAVY = ["torchvision", "matplotlib", "seaborn", "papermill", "nbformat", "sklearn", "pandas"]


@pytest.mark.parametrize("name", fisher_unlearn.__all__)
def test_a_public_name_is_that_of_its_room(name):
    thing = getattr(fisher_unlearn, name)
    room = import_module(f"fisher_unlearn.{fisher_unlearn._HOME[name]}")
    assert thing is getattr(room, name) and name in room.__all__ and name in dir(fisher_unlearn)


def test_unknown_names_are_refused_as_ever():
    with pytest.raises(AttributeError, match="has no attribute 'unlern'"):
        fisher_unlearn.unlern  # noqa: B018


def after(code):
    "The heavy libraries that are there after some code, and the seconds of CPU that it took."
    program = (
        f"import json, sys, time\n{code}\n"
        f"print(json.dumps([[m for m in {HEAVY} if m in sys.modules], time.process_time()]))"
    )
    compiled = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=compiled
    )
    return json.loads(done.stdout.splitlines()[-1])


HELP = """
sys.argv = ["fisher-unlearn", "--help"]
from fisher_unlearn.start import main
try:
    main()
except SystemExit as end:
    assert not end.code"""


@pytest.mark.parametrize("code", ["from fisher_unlearn import *", HELP], ids=["names", "help"])
def test_importing_or_asking_for_help_imports_nothing_heavy(code):
    assert after(code)[0] == []


@pytest.mark.slow
def test_the_import_and_help_take_little_more_than_torch():
    """At most 1.3 times its seconds of CPU: the median of seven rounds, each of which has all
    three, after one in which modules are compiled."""
    codes = "import torch", "import fisher_unlearn", HELP
    for code in codes:
        after(code)
    rounds = [[after(code)[1] for code in codes] for _ in range(7)]
    ratios = [max(ours) / torch_alone for torch_alone, *ours in rounds]
    assert statistics.median(ratios) <= 1.3, rounds
