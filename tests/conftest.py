"""Small real data and a small trained network, made once for all tests."""

import pytest
import torch
from hypothesis import settings as hypothesis_settings

from fisher_unlearn.images.data import load_images
from fisher_unlearn.images.forget import forget_class
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, train_model

# machines that run tests are shared and noisy, and a commit is to be tested by the same examples
hypothesis_settings.register_profile("steady", deadline=None, derandomize=True, database=None)
hypothesis_settings.load_profile("steady")


# Two workers take a file at a time: the longest first, so that no one is left alone with one.
LONGEST = (
    "grid",
    "experiments_tables",
    "unlearn",
    "experiments_masks",
    "cluster",
    "records",
    "stopping",
    "foreign",
    "notebooks",
    "partial",
    "experiments_tasks",
    "fisher",
    "readouts",
    "step",
    "train",
    "squares",
    "experiments_figures",
    "kept",
)


def pytest_collection_modifyitems(items):
    "Files in the order of their length; the order within a file stays."
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def digits():
    return load_images("digits")


@pytest.fixture(scope="session")
def settings():
    return TrainSettings(Schedule(epochs=4, drops=(2,)), select="last")


@pytest.fixture(scope="session")
def original(digits, settings):
    model = build_model("resnet20", 10, 1, seed=0)
    train_model(model, digits.train, settings, progress="none")
    return model


@pytest.fixture(scope="session")
def request_zero(digits):
    return forget_class(digits, 0)


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from the same state of torch's generator, and leaves the number of
    threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads
