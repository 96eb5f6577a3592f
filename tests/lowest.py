"""The lowest versions that pyproject.toml allows, one requirement a line.

`make test-lowest` installs them over the newest and runs the quick tests, so that a bound says
what was tried. torch and torchvision keep
their newest, for their size: gigabytes that would be downloaded once more."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
TOO_LARGE = ("torch", "torchvision")


def declared():
    "The requirements of the package, and of its loops, by their names as registries have them."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = [*project["dependencies"], *project["optional-dependencies"]["fused"]]
    found = map(Requirement, every)
    return {canonicalize_name(one.name): one for one in found}


def lowest(requirement):
    "The lowest version that a requirement allows, or None if it has no lower bound."
    bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==", "~=")]
    return bounds[0] if bounds else None


def name_of(requirement):
    "What pip installs, with its extras."
    return re.split(r"[<>=!~;\s]", str(requirement))[0]


if __name__ == "__main__":
    for name, requirement in declared().items():
        if name not in TOO_LARGE:
            print(f"{name_of(requirement)}=={lowest(requirement)}")
