"""A method, a network, a data set and a metric from outside the package, added as CONTRIBUTING
shows it, come out in a table by their titles."""

import re
from pathlib import Path

import pytest

from fisher_unlearn.images.data import DATASETS
from fisher_unlearn.lab.experiments import sweep
from fisher_unlearn.lab.executors import complete
from fisher_unlearn.lab.report import conditions
from fisher_unlearn.lab.results import beside, outcomes, printable, summary
from fisher_unlearn.methods.conformance import check_method
from fisher_unlearn.methods.unlearn import METHODS
from fisher_unlearn.networks.metrics import METRICS
from fisher_unlearn.networks.models import NETWORKS

SHOWN = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def added():
    "What CONTRIBUTING's examples add, taken away afterwards."
    tables = (METHODS, NETWORKS, DATASETS, METRICS)
    before = [dict(table) for table in tables]
    for block in re.findall(r"```python\n(.*?)```", SHOWN.read_text(encoding="utf-8"), re.S):
        exec(block, {})
    yield [[name for name in table if name not in old] for table, old in zip(tables, before)]
    for table, old in zip(tables, before):
        table.clear()
        table.update(old)


def test_what_is_added_from_outside_comes_out_in_a_table(added, tmp_path):
    [method], [network], [dataset], [metric] = added
    check_method(METHODS[method])
    short = dict(epochs=2, drops=[1], fine_tune_epochs=1, threads=1, device="cpu")
    axes = [{"seed": 1}, {"seed": 2}], [{"method": method}, {"method": "fisher_mask"}]
    settings = sweep("explicit", *axes, dataset=dataset, network=network, **short)
    records = complete(settings, tmp_path / "runs")
    runs = outcomes(records)
    assert (runs[f"{metric}_best"] == runs.remain_acc_best - runs.forget_acc_best).all()
    table = summary(runs)
    assert set(table.setting) == {f"{NETWORKS[network].title}/{DATASETS[dataset].title}"}
    assert {METHODS[method].title, "FisherMask (paper)"} <= {*table.method}
    assert (table[table.method == METHODS[method].title].n == 2).all()
    shown = printable(beside(table, 1))
    assert METRICS[metric].title in shown and len(shown) > 2
    assert f"{dataset} is not among the paper's data sets" in conditions(records)


def test_options_of_one_from_outside_are_in_the_key_and_on_the_command_line(added):
    from fisher_unlearn.lab.settings import parameter_names, resolve, run_key

    [method], *_ = added
    assert "share" in parameter_names()
    one, two = (
        run_key(resolve("quick", method=method, share=share, device="cpu")) for share in (0.1, 0.2)
    )
    assert one != two


def test_a_kind_of_request_is_one_entry_too(monkeypatch):
    "Its parameters have flat names, a place in keys and a comment, and it draws what is forgotten."
    from fisher_unlearn.images.arguments import Count
    from fisher_unlearn.images.forget import forget_samples
    from fisher_unlearn.lab import settings
    from fisher_unlearn.lab.run import images_of, request_of

    class Every(settings.Request):
        "Forget every so many-th sample."

        kind = "every"
        step: Count = settings._value(7, "distance between two samples")

        def drawn(self, images, seed):
            return forget_samples(images, range(0, len(images.train), self.step))

        def unmet(self, data):
            return None if self.step < data.images else "`step` is larger than the training set."

    plain = settings.run_key(settings.resolve("smoke", device="cpu"))
    monkeypatch.setitem(settings.REQUESTS, "every", Every)
    chosen = settings.resolve("smoke", device="cpu", request="every", step=9)
    assert settings.RunSettings.of(**chosen.flat) == chosen
    keys = {settings.run_key(chosen.but(step=k)) for k in (8, 9)} | {plain}
    assert len(keys) == 3 and settings.run_key(settings.resolve("smoke", device="cpu")) == plain
    assert settings.parameter_types()["step"][1] == "every: distance between two samples"
    found = request_of(chosen, images_of(chosen))
    assert found.forget_indices.tolist() == list(range(0, 128, 9))
    with pytest.raises(ValueError, match="`step` has no meaning for the request 'class'"):
        settings.resolve("smoke", device="cpu", step=9)
    with pytest.raises(ValueError, match="larger than the training set"):
        settings.resolve("smoke", device="cpu", request="every", step=500)
