"Runs on a Ray cluster: what they ask for, and that a node that dies loses nothing."

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from test_grid import RUNNER, same, wanted

from fisher_unlearn.lab.cluster import _room, gpu_share, on_ray, training_parameters
from fisher_unlearn.lab.executors import complete
from fisher_unlearn.lab.experiments import NEEDS, needed
from fisher_unlearn.lab.notebook import declared
from fisher_unlearn.lab.plans import label
from fisher_unlearn.lab.settings import profiles, resolve, training_key
from fisher_unlearn.lab.store import write_record
from made import run_record


@pytest.fixture
def on_gpu():
    return resolve("quick", device="cpu").but(device="cuda")


@pytest.mark.parametrize("profile", profiles())
def test_the_notebook_train_gives_the_w_star_of_every_run(profile):
    "Of one seed; each w* once."
    wanted = [s for name in NEEDS for s in needed(name, profile, seeds=[666], device="cpu")]
    for s in {training_key(s): s for s in wanted}.values():
        assert training_key(resolve(**training_parameters(s))) == training_key(s), label(s)


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "adamw"},
        {"loss": "binary_cross_entropy"},
        {"clip": 1.0},
        {"subset": 400, "data_seed": 5},
        {"request": "poison", "count": 9, "data_seed": 5},
    ],
    ids=str,
)
def test_the_notebook_train_gives_the_w_star_of_unusual_runs_too(given):
    s = resolve("smoke", device="cpu", **given)
    assert training_key(s) != training_key(resolve("smoke", device="cpu"))
    assert training_key(resolve(**training_parameters(s))) == training_key(s)


def test_what_the_notebook_train_does_not_take_is_said(monkeypatch):
    known = [name for name in declared("train") if name != "clip"]
    monkeypatch.setattr("fisher_unlearn.lab.cluster.declared", lambda name: known)
    assert training_parameters(resolve("smoke", device="cpu"))
    with pytest.raises(ValueError, match="say all of the w"):
        training_parameters(resolve("smoke", device="cpu", clip=1.0))


def test_a_share_of_a_gpu_is_given_or_measured_or_one(on_gpu, tmp_path, monkeypatch):
    assert (
        gpu_share(on_gpu, tmp_path, total=80_000) == 1
        and gpu_share(resolve("quick", device="cpu"), tmp_path) == 0
    )
    for k, peak in enumerate((900.0, 2_000.0)):
        record = run_record(on_gpu.but(seed=k), memory={"device": peak})
        (tmp_path / record["key"]).mkdir()
        write_record(tmp_path / record["key"] / "record.json", record)
    assert (
        gpu_share(on_gpu, tmp_path, total=8_000) == 1 / 2
        and gpu_share(on_gpu, tmp_path, total=80_000) == 1 / 22
    )  # 80 000 / (1.25 * 2000 + 1000)
    assert gpu_share(on_gpu.but(network="vgg16"), tmp_path, total=80_000) == 1
    monkeypatch.setenv("FISHER_UNLEARN_GPU_SHARE", ".25")
    assert gpu_share(on_gpu, tmp_path, total=80_000) == 0.25
    monkeypatch.setenv("FISHER_UNLEARN_GPU_SHARE", "4")
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        gpu_share(on_gpu, tmp_path)


def cluster(*nodes):
    return SimpleNamespace(
        nodes=lambda: [{"Alive": alive, "Resources": resources} for alive, resources in nodes]
    )


def test_a_run_asks_for_no_more_than_a_node_has(on_gpu, tmp_path):
    cpu = resolve("quick", device="cpu", threads=8)
    assert _room(
        cluster((True, {"CPU": 4.0}), (False, {"CPU": 16.0}), (True, {"CPU": 2.0})), cpu, tmp_path
    ) == {"num_cpus": 4, "num_gpus": 0}
    assert _room(cluster((True, {"CPU": 16.0, "GPU": 2.0})), on_gpu, tmp_path)["num_gpus"] == 1
    with pytest.raises(ValueError, match="no node of the Ray cluster has one"):
        _room(cluster((True, {"CPU": 4.0}), (False, {"GPU": 1.0})), on_gpu, tmp_path)


def test_ray_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert on_ray([], tmp_path) is None
    with pytest.raises(ImportError, match="pip install"):
        on_ray([resolve("quick", device="cpu")], tmp_path)


def at_work(node):
    "The processes of a node, if a notebook runs on it."
    family = psutil.Process(node.all_processes["raylet"][0].process.pid)
    family = [family, *family.children(recursive=True)]
    return (
        family
        if any(
            "ipykernel_launcher" in " ".join(p.cmdline())
            for p in family
            if p.is_running() and p.status() != "zombie"
        )
        else []
    )


def kill_one(nodes):
    "SIGKILL of a node that is at work, with all of its processes, as when a machine loses power."
    while not (found := [(n, family) for n in nodes if (family := at_work(n))]):
        time.sleep(0.2)
    node, family = found[0]
    for process in reversed(family):
        process.kill()
    return node


@pytest.mark.slow
def test_a_node_that_dies_twice_loses_nothing(tmp_path):
    """Two nodes; one is killed in the training of w*, and one among the runs, each replaced: the
    records and weights of a grid that nothing befell."""
    from ray.cluster_utils import Cluster

    complete(wanted(), tmp_path / "whole")
    ray, folder = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), tmp_path / "killed"
    try:
        nodes = [ray.add_node(num_cpus=2) for _ in range(2)]
        runner = subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(folder), "ray"],
            env={**os.environ, "RAY_ADDRESS": ray.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        for moment in (
            "train-*/progress.safetensors",
            "[!t]*/record.json",
        ):  # an epoch of w*, and the first run
            while not list(folder.glob(moment)):
                time.sleep(0.1)
                assert runner.poll() is None, runner.stdout.read()
            nodes.remove(dead := kill_one(nodes))
            ray.remove_node(dead, allow_graceful=False)
            nodes.append(ray.add_node(num_cpus=2))
        out, _ = runner.communicate(timeout=600)
    finally:
        ray.shutdown()
    assert (
        runner.returncode == 0 and out.count("done: ") == len(wanted()) and "failed: " not in out
    ), out
    same(tmp_path / "whole", folder)
