"""What the package stands on: it is declared, has a lower bound, and the lowest versions are
those that are tried."""

import ast
import importlib
import json
import pkgutil
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from lowest import declared, lowest
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import fisher_unlearn
from fisher_unlearn.cli import app

ROOT = Path(fisher_unlearn.__file__).parent.parent
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(fisher_unlearn.__path__, "fisher_unlearn.")
)
OURS = {"fisher_unlearn", *sys.stdlib_module_names}
BY_OTHERS = {
    "ray": "an extra, imported where it is asked for",
    "IPython": "ipykernel brings it",
    "pydantic_core": "pydantic brings the only version that it works with",
}


def cells():
    "The code of the experiment notebooks, which a wheel carries too."
    for path in sorted((ROOT / "nbs" / "experiments").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield "".join(cell["source"])


def imported(source):
    "The top-level packages that code imports, inside functions too."
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module)
    return {name.split(".")[0] for name in names}


def stray(sources, known):
    "Packages that code imports and nobody declares."
    distributions = packages_distributions()
    names = set().union(*map(imported, sources)) - OURS - set(BY_OTHERS)
    made_by = {
        name: {canonicalize_name(d) for d in distributions.get(name, [name])} for name in names
    }
    return sorted(name for name, packages in made_by.items() if not packages & set(known))


def test_whatever_is_imported_is_declared():
    modules = [path.read_text(encoding="utf-8") for path in (ROOT / "fisher_unlearn").rglob("*.py")]
    assert len(modules) > 20 and not stray([*modules, *cells()], declared())
    assert stray(["def f():\n    import sklearn.utils, jinja2"], declared()) == ["jinja2"]


def test_every_requirement_has_a_lower_bound():
    assert len(declared()) > 15
    assert not [str(one) for one in declared().values() if lowest(one) is None]


def test_what_is_installed_is_within_the_bounds():
    for name, requirement in declared().items():
        assert requirement.specifier.contains(version(name), prereleases=True), requirement


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_imported(name):
    importlib.import_module(name)


def commands():
    names = {path.stem for path in (ROOT / "nbs" / "experiments").glob("*.ipynb")} - {"train"}
    return sorted(name.removesuffix("_your_own") for name in names)


@pytest.mark.parametrize(
    "words", [(), *((name,) for name in [*commands(), "data", "plan", "status"])]
)
def test_every_command_has_its_help(words):
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0 and "Usage" in done.output
