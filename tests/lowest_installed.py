"What `make test-lowest` tries are the lowest versions; the other suites don't collect this file."

from importlib.metadata import version

from lowest import TOO_LARGE, declared, lowest
from packaging.version import Version


def test_the_lowest_versions_are_those_that_are_tried():
    for name, requirement in declared().items():
        assert name in TOO_LARGE or Version(version(name)) == Version(lowest(requirement)), name
