"""Wrong calls of every public function and settings class: each is refused in one sentence,
before anything is done.

The calls are drawn from the signatures: a valid call with one thing wrong, of another kind, out
of range, misspelt, missing or
too many. What a value must not be is written here from what its annotation means to a reader,
not with the package's own checks.
"""

import copy
import importlib
import inspect
import math
import pkgutil
import random
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from pydantic import BaseModel
from torch import Tensor, nn

import fisher_unlearn
from fisher_unlearn.images.arguments import annotations_of
from fisher_unlearn.audit import answers
from fisher_unlearn.images.budget import Budget
from fisher_unlearn.lab import paper, report
from fisher_unlearn.lab import settings as lab_settings
from fisher_unlearn.methods import base, masking, masks, noise
from fisher_unlearn.methods.result import Unlearned
from fisher_unlearn.methods.unlearn import unlearn
from fisher_unlearn.networks import objective, step
from fisher_unlearn.scores import graph
from fisher_unlearn.images import sources
from fisher_unlearn.images.data import ImageData, Samples, digest
from fisher_unlearn.images.folders import FolderImages
from fisher_unlearn.lab.deletion import Deletion, delete
from fisher_unlearn.lab.deletion_order import Order
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings

ELSEWHERE = {
    "arguments": "the check itself, which has tests of its own",
    "cli": "typer checks its arguments, and their values are those of `resolve`",
    "terminal": "what the command line prints",
    "start": "the command itself",
    "passes": "steps of the engine, on what `diag_fisher` has checked",
    "leaves": "steps of the engine, too",
}
INNER = {  # parts of networks and loops, called for each batch by their owners
    "Inception",
    "DenseLayer",
    "squared_products",
    "squares_by_channel",
    "summed_products",
    "plan_tiles",
    "Plan",
    "Windows",
    "Tile",
    "GradientSquares",
    "train_epoch",
    "take_step",
    "from_here",
    "epoch_batches",
    "hessian_product",
    "KeptScores",
    "read_pair",
    "read_logits",
    "close",
    "check_labels",
    "place_of",
    "memory_of",
    "joined",
    "as_one",
    "Joined",
    "laid_out",
    "cross_entropy",
    "check_fresh",
    "Step",
    "Stretch",
    "Pool",
    "Reader",
    "Unlearned",
    "Overlap",
    "Part",
    "Asked",
    "Earlier",
    "Cost",
    "Judgement",
    "Deletion",
    "Answers",
    "Membership",
    "Floor",
    "Comeback",
    "Card",
    "Snapshot",
    "TrainingRecord",
    "RunRecord",
    "ReadoutRecord",
    "FailureRecord",
    "Budget",
    "Entry",
}  # and what functions return, or `check_record` reads


# ---------------------------------------------------------------- what a valid call is made of


def net() -> nn.Module:
    "A network that every method takes."
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def batches() -> list[tuple[Tensor, Tensor]]:
    "Two batches for it."
    numbers = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 1, 6, 6, generator=numbers), torch.tensor([0, 1, 2, 0])) for _ in range(2)
    ]


def others() -> list[tuple[Tensor, Tensor]]:
    "Three batches of other samples."
    numbers = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 1, 6, 6, generator=numbers), torch.tensor([0, 1, 2, 0])) for _ in range(3)
    ]


def result() -> Unlearned:
    "What came out of doing nothing."
    return unlearn(net(), batches(), None, method="finetune")


def samples() -> Samples:
    "Twelve images of three classes."
    images = torch.randint(
        0, 256, (12, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return Samples(images, torch.arange(12) % 3, (0.5,), (0.2,), 6)


def images() -> ImageData:
    "A data set of them."
    part = samples()
    return ImageData(
        "tiny", part, part, ("a", "b", "c"), "made here", digest(part.images, part.labels)
    )


def source() -> sources.Source:
    "Those images, as somebody's."
    return sources.source_of(images())


def folder_images() -> Any:
    "The images of a folder that is not there any more."
    return FolderImages(images(), ("a/1.png",), Path("photos"))


def asked() -> sources.Asked:
    "A request for one of their classes."
    return sources.asked_for(source(), classes=[1])


def deletion() -> Deletion:
    "A request that was carried out on a network of nobody."
    return delete(net(), source(), asked(), method="finetune", fine_tune=None, progress="none")


def scores() -> dict[str, Tensor]:
    "A score for each of the network's weights."
    return {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(0))
        for name, p in net().named_parameters()
    }


def settings() -> lab_settings.RunSettings:
    """A run that no machine of these tests can do, so that a call that passes its checks ends at
    once."""
    return lab_settings.RunSettings.of(
        device="cuda", train={"schedule": {"epochs": 1, "drops": []}}
    )


def record() -> dict[str, Any]:
    "One of the committed records."
    folder = Path(fisher_unlearn.__file__).parent.parent / "figures"
    return report.read_kept(sorted(folder.rglob("*.parquet"))[0])[0]


def history() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "epoch": range(4),
            "unlearn_score": [1.0, 2.0, 3.0, 2.0],
            "remain_acc": [1.0, 2.0, 3.0, 2.0],
        }
    )


BY_NAME: dict[str, Callable[[], Any]] = {
    "model": net,
    "other": net,
    "original": net,
    "module": net,
    "batches": batches,
    "forget": batches,
    "remain": batches,
    "reference": batches,
    "train": batches,
    "samples": samples,
    "images": images,
    "labels": lambda: torch.arange(12) % 3,
    "inputs": lambda: batches()[0][0],
    "scores": scores,
    "fisher": scores,
    "gradient": scores,
    "vector": scores,
    "tensors": scores,
    "mask": lambda: {"0.weight": torch.zeros(4, 1, 3, 3, dtype=torch.bool)},
    "pool": lambda: masking.candidates(net()),
    "settings": settings,
    "record": record,
    "history": history,
    "runs": lambda: Path("runs"),
    "root": lambda: Path("data"),
    "path": lambda: Path("a") / "b",
    "folder": lambda: Path("folder"),
    "output": lambda: Path("out.ipynb"),
    "ratio": lambda: 0.1,
    "seed": lambda: 1,
    "size": lambda: 4,
    "name": lambda: "name",
    "sets": lambda: {"forget": batches()},
    "source": source,
    "asked": asked,
    "done": deletion,
    "order": lambda: Order(classes=("1",)),
    "part": lambda: source().train,
    "positions": lambda: torch.arange(2),
    "hashes": lambda: ["0" * 32],
    "files": lambda: ["a.png"],
    "optimizer": lambda: torch.optim.SGD(net().parameters(), 0.1),
    "classes": lambda: (1,),
    "which": lambda: 1,
    "indices": lambda: [1, 2],
    "n": lambda: 2,
    "k": lambda: 2,
    "method": lambda: "fisher_mask",
    "profile": lambda: "quick",
    "experiment": lambda: "table1",
    "logits": lambda: torch.zeros(4, 3),
    "others": lambda: torch.zeros(4, 3),
    "rule": noise.FisherNoise,
    "schedule": Schedule,
    "epochs": lambda: 1,
    "text": lambda: "0.5",
    "claim": lambda: "more",
    "evidence": lambda: "1 of 1",
    "key": lambda: "0" * 16,
    "kind": lambda: "agreement",
    "classifier": lambda: "5",
    "rows": lambda: (1,),
    "epoch": lambda: 0,
    "steps": lambda: 2,
    "what": lambda: "thing",
    "table": lambda: ["name", "other"],
    "device": lambda: "cpu",
    "column": lambda: "unlearn_score",
    "window": lambda: "fine_tuning",
    "columns": lambda: 3,
    "num_classes": lambda: 3,
    "remain_acc": lambda: 50.0,
    "forget_acc": lambda: 20.0,
    "images_": lambda: 4,
    "todo": lambda: [settings()],
    "way": step.Way,
    "do": lambda: lambda: None,
    "notebook": lambda: Path("no.ipynb"),
    "parameters": dict,
    "lacks": list,
    "holds": lambda: True,
    "verdicts": list,
    "records": lambda: [record()],
    "figure": Figure,
    "stem": lambda: "table1",
    "generator": torch.Generator,
    "where": lambda: torch.ones(2, 2, dtype=torch.bool),
    "dims": lambda: 1,
    "start": lambda: 0,
    "threads": lambda: 1,
    "weights": lambda: torch.ones(2),
    "readers": dict,
    "images_count": lambda: 4,
    "broken": lambda: torch.tensor(0),
    "ours": history,
    "task": lambda: base.Task(batches()),
    "budget": lambda: Budget(0.0, 1.0),
    "numbers": lambda: paper.paper_numbers(1),
}


def said() -> answers.Answers:
    "What a model says about forty images."
    labels = torch.arange(40) % 2
    return answers.Answers(torch.randn(40, 3).double().log_softmax(1), labels)


OWN: dict[str, dict[str, Callable[[], Any]]] = {  # where a name means something else
    "data.check_images": {"images": lambda: samples().images},
    "data.pad_or_resize": {"images": lambda: samples().images},
    "data.Samples": {
        "images": lambda: samples().images,
        "mean": lambda: (0.5,),
        "std": lambda: (0.2,),
    },
    "data.ImageData": {
        "train": samples,
        "test": samples,
        "classes": lambda: ("a", "b", "c"),
        "source": lambda: "here",
        "digest": lambda: "0",
    },
    "data.load_images": {"name": lambda: "digits"},
    "data.DataSet": {
        "title": lambda: "Tiny",
        "mean": lambda: (0.5,),
        "std": lambda: (0.2,),
        "read": lambda: lambda root, download: None,
    },
    "data.titles": {"table": dict},
    "answers.balanced": {"sets": lambda: [said(), said()]},
    "membership.membership": {"seen": said, "unseen": said},
    "membership.area": {"members": lambda: torch.ones(3), "others": lambda: torch.zeros(3)},
    "membership.rate_at": {"members": lambda: torch.ones(3), "others": lambda: torch.zeros(3)},
    "membership.rmia": {
        "target": lambda: torch.rand(3),
        "references": lambda: torch.rand(2, 3),
        "population": lambda: torch.rand(4),
        "beside": lambda: torch.rand(2, 4),
    },
    "membership.ulira": {
        "unlearned": lambda: torch.randn(4, 3),
        "retrained": lambda: torch.randn(4, 3),
    },
    "membership.klom": {
        "unlearned": lambda: torch.randn(64, 3),
        "retrained": lambda: torch.randn(64, 3),
    },
    "features.linear_probe": {
        "train": lambda: (torch.randn(12, 3), torch.arange(12) % 3),
        "test": lambda: (torch.randn(12, 3), torch.arange(12) % 3),
        "classes": lambda: (1,),
    },
    "floor.largest_difference": {"values": lambda: [1.0, 2.0]},
    "floor.equivalence": {"differences": lambda: [[0.1], [0.2], [0.3]], "margin": lambda: 1.0},
    "floor.holm": {"chances": lambda: {"a": 0.1}},
    "floor.bootstrap": {"values": lambda: [[1.0, 2.0]]},
    "report_card.tow": {
        "accs": lambda: {"forget": 1.0},
        "reference": lambda: {"forget": 1.0},
    },
    "objective.Objective": {"steps": lambda: lambda epoch: [], "total": lambda: 3},
    "objective.check_teacher": {
        "teacher": lambda: objective.Teacher(net()),
        "student": net,
    },
    "objective.divergence": {
        "teacher": lambda: torch.zeros(4, 3),
        "student": lambda: torch.zeros(4, 3),
    },
    "objective.minimise": {"objective": lambda: objective.Objective(lambda epoch: [], 1, 0.1)},
    "dampening.dampen_": {"ratios": scores},
    "labels.endless": {"of": lambda: "remain"},
    "labels.repelling_noise": {"label": lambda: 1},
    "teachers.without_class": {"logits": lambda: torch.randn(12, 3)},
    "layers.last_modules": {"k": lambda: 1},
    "kick.length_of": {"step": scores},
    "base.check_fresh": {"fresh": net},
    "optimizers.check_loss": {"choice": lambda: nn.functional.cross_entropy},
    "models.Network": {"title": lambda: "Tiny", "build": lambda: net},
    "data.digest": {"tensors": lambda: torch.ones(2)},
    "forget.class_index": {"names": lambda: ("a", "b"), "whose": lambda: "tiny"},
    "folders.positions_of": {"found": folder_images},
    "folders.FolderImages": {"files": lambda: ("a/1.png",)},
    "sources.imported": {"name": lambda: "math:sqrt"},
    "sources.source_named": {"data": lambda: "digits", "how": lambda: None},
    "sources.Source": {
        "train": lambda: source().train,
        "test": lambda: None,
        "classes": lambda: ("a", "b", "c"),
    },
    "foreign.network_named": {"name": lambda: "resnet20"},
    "optimizers.function_named": {"choice": lambda: "sgd", "table": dict},
    "optimizers.name_of": {"choice": lambda: "sgd"},
    "optimizers.make_optimizer": {"choice": lambda: "sgd", "lr": lambda: 0.1, "usual": lambda: 0.1},
    "optimizers.optimizer_state": {"parameters": lambda: dict(net().named_parameters())},
    "optimizers.put_optimizer_state_": {
        "parameters": lambda: dict(net().named_parameters()),
        "state": dict,
    },
    "optimizers.set_rate": {"rate": lambda: 0.1},
    "schedule.schedule_of": {
        "scheduler": lambda: "ConstantLR",
        "lr": lambda: 0.1,
        "options": lambda: 1,
    },
    "masking.compare_masks": {
        name: lambda: {"a": torch.ones(2, dtype=torch.bool)} for name in ("one", "other")
    },
    "masks.GivenMask": {},
    "deletion.delete": {},
    "deletion.expected_cost": {
        "images": lambda: (8, 8),
        "method": masks.FisherMask,
        "fine_tune": lambda: None,
    },
    "deletion.without_earlier": {"earlier": list},
    "deletion.chain_digest": {"chain": list},
    "deletion_report.read_requests": {"weights": lambda: Path("w.safetensors")},
    "deletion_report.free_folder": {},
    "deletion_report.save_deletion": {"folder": lambda: "new"},
    "deletion_order.order_of": {"given": lambda: None},
    "forget.ForgetRequest": {
        "train": samples,
        "forget": samples,
        "remain": samples,
        "test_forget": samples,
        "test_remain": samples,
        "kind": lambda: "class",
        "forget_indices": lambda: torch.arange(2),
        "remain_indices": lambda: torch.arange(2),
        "digest": lambda: "0",
    },
    "models.min_size": {"name": lambda: "resnet20"},
    "models.build_model": {"name": lambda: "resnet20"},
    "models.check_batch": {"labels": lambda: batches()[0][1]},
    "step.choose_way": {"labels": lambda: batches()[0][1], "ways": lambda: [step.Way()]},
    "metrics.mean_and_deviation": {"runs": lambda: pd.DataFrame({"a": [1.0, 2.0]})},
    "metrics.refuse_broken": {"images": lambda: 4},
    "influence.forget_gradient": {"images": lambda: 8},
    "influence.lissa": {"epochs": lambda: 1, "scale": lambda: 20.0},
    "noise.noise_moments": {"fisher": lambda: torch.ones(2), "rows": lambda: ()},
    "noise.add_noise_": {
        "fisher": lambda: {n: p.detach() ** 2 for n, p in net().named_parameters()}
    },
    "readouts.Agreement": {
        "divergence": lambda: 0.1,
        "same_top1": lambda: 50.0,
        "images": lambda: 4,
    },
    "readouts.Relearned": {"cap": lambda: 3, "threshold": lambda: 0.1, "losses": history},
    "readouts.relearn_time": {
        "settings": lambda: TrainSettings(Schedule(epochs=1, drops=()), select="last"),
        "cap": lambda: 1,
    },
    "train.train_model": {
        "samples": batches,
        "settings": lambda: TrainSettings(Schedule(epochs=1, drops=()), select="last"),
    },
    "unlearn.unlearn": {"remain": others},
    "result.save_result": {"result": result, "folder": lambda: "new"},
    "metrics.Metric": {"of": lambda: lambda column: column, "needs": lambda: ("remain_acc",)},
    "base.check_needs": {"method": masks.FisherMask},
    "conformance.check_method": {"kind": lambda: masks.FisherMask},
    "result.Unlearned": {
        "mask": dict,
        "changed": history,
        "steps": history,
        "seconds": dict,
        "history": history,
    },
    "fisher.rebatch": {"size": lambda: 3},
    "comeback.Mixed": {"first": batches, "others": batches},
    "tfidf.tfidf_scores": {"classes": lambda: (1,)},
    "activation.read_channels": {"readers": lambda: graph.find_readers(net())},
    "activation.mean_activations": {"readers": lambda: graph.find_readers(net())},
    "masking.Stretch": {"name": lambda: "0.bias"},
    "masking.Pool": {
        "unit": lambda: "weight",
        "shapes": lambda: {"0.weight": torch.Size((4, 1, 3, 3))},
        "followers": dict,
    },
    "masking.masked_rows": {
        "mask": lambda: {"5.weight": torch.zeros(3, 4, dtype=torch.bool)},
        "name": lambda: "5",
        "rows": lambda: 3,
    },
    "experiments.sweep": {"axes": lambda: [{"seed": 1}]},
    "experiments.cast": {"methods": lambda: "finetune"},
    "notebook.find_notebook": {"name": lambda: "table1"},
    "plans.label": {},
    "plans.plan": {"settings": lambda: [settings()]},
    "cards.cards_of": {"settings": lambda: [settings()], "floor": lambda: [settings()]},
    "experiment.retrained_apart": {"own": lambda: settings(), "others": lambda: [settings()]},
    "experiment.with_weights": {"settings": lambda: [settings()]},
    "store.card_name": {"beside": lambda: ["0" * 16]},
    "plans.as_done": {"settings": lambda: [settings()]},
    "executors.complete": {"settings": lambda: [settings()]},
    "report.keep": {"table": history, "text": lambda: "text", "stem": lambda: "x"},
    "report.beside": {"table": lambda: 1},
    "report.printable": {"table": history},
    "report.summary": {"runs": history},
    "report.Verdict": {"outcome": lambda: "holds"},
    "schedule.replay": {"epochs": lambda: 2},
    "squares.scoring": {},
    "train.save_tensors": {"metadata": lambda: "text"},
    "store.write_record": {"record": dict},
    "train.shows_bar": {"progress": lambda: "none"},
    "step.allowed_ways": {"compile": lambda: False, "precision": lambda: "float32"},
    "train.load_weights": {},
    "run.write_failure": {"error": lambda: ValueError("x")},
    "run.with_readouts": {},
    "notebook.in_notebook": {"wait": lambda: False},
    "parameters.by_first_name": {"marks": lambda: {"0.bias": torch.zeros(4, dtype=torch.bool)}},
    "batches.read_pair": {"batch": lambda: batches()[0]},
    "parameters.place_of": {"tensor": lambda: torch.ones(2)},
    "parameters.check_apart": {"run": lambda: lambda: None},
    "settings.strangers": {"request": lambda: "class"},
    "notebook.check_parameters": {"namespace": dict},
    "draws.seeded_draws": {"generators": torch.Generator},
    "train.tensors_digest": {"metadata": dict},
    "train.keep_freed_memory": {},
    "atomic.write_whole": {"write": lambda: lambda path: None},
    "notebook.failures": {"executed": lambda: Path("no.ipynb")},
    "notebook.parameters": {},
    "cluster.on_ray": {"todo": list},
    "report.histories": {},
    "plans.attempt": {},
    "budget.duration": {"text": lambda: "12m"},
    "run.timings": {"records": list},
    "run.alike": {"known": pd.DataFrame},
    "run.taken": {"found": pd.DataFrame},
    "run.pace_key": {"chosen": lambda: settings().flat},
    "executors.work_in": {"table": lambda: pd.DataFrame({"key": [], "state": [], "seconds": []})},
    "value.by_value": {"experiments": dict},
    "queue.queue_plan": {"entries": list},
    "queue.work_off": {"entries": list},
}


@cache
def public() -> dict[str, Any]:
    "All public functions and classes that are called with settings, by module and name."
    found = {}
    for info in pkgutil.walk_packages(fisher_unlearn.__path__, "fisher_unlearn."):
        name = info.name.rpartition(".")[2]
        if name.startswith("_") or name in ELSEWHERE or info.ispkg:
            continue
        module = importlib.import_module(info.name)
        for each in module.__all__:
            thing = getattr(module, each)
            plain = (
                inspect.isfunction(thing)
                or inspect.isclass(thing)
                and not issubclass(thing, (BaseException, Mapping))
            )
            if plain and thing.__module__ == module.__name__ and each not in INNER:
                found[f"{name}.{each}"] = thing
    return found


def parameters(where: str) -> dict[str, inspect.Parameter]:
    "The parameters of a function or class; pydantic's models take values by name only."
    thing = public()[where]
    model = inspect.isclass(thing) and issubclass(thing, BaseModel)
    return {
        n: p
        for n, p in inspect.signature(thing).parameters.items()
        if not (model and p.kind is p.VAR_POSITIONAL)
    }


def hints(where: str) -> dict[str, Any]:
    "The annotation of each parameter."
    thing = public()[where]
    known = (
        annotations_of(thing)
        if not inspect.isclass(thing) or is_dataclass(thing) or issubclass(thing, BaseModel)
        else annotations_of(thing.__init__)
    )
    return {name: known.get(name, Any) for name in parameters(where)}


def valid(where: str, name: str) -> Any:
    """A valid value of a parameter that has no default, or whose default is not what the call is
    to be made with."""
    make = OWN.get(where, {}).get(name) or BY_NAME.get(name) or _plain(hints(where)[name])
    assert make, f"tests/test_calls.py needs a valid value for `{name}` of {where}"
    return make()


def _plain(annotation: Any) -> Callable[[], Any] | None:
    "What makes a value of a simple annotation."
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return _plain(get_args(annotation)[0])
    kinds = {
        Tensor: lambda: torch.ones(2),
        int: lambda: 1,
        float: lambda: 0.5,
        str: lambda: "x",
        bool: lambda: False,
        Path: lambda: Path("x"),
        nn.Module: net,
        dict: dict,
        Mapping: dict,
        list: list,
        tuple: tuple,
        Any: lambda: 0,
    }
    return kinds.get(get_origin(annotation) or annotation)


def call_of(where: str) -> tuple[list[Any], dict[str, Any]]:
    "The arguments of a valid call."
    args, kwargs = [], {}
    for name, parameter in parameters(where).items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            args = [kwargs.pop(n) for n in list(kwargs)] + [valid(where, name)]
        elif parameter.kind is not parameter.VAR_KEYWORD and (
            parameter.default is parameter.empty or name in OWN.get(where, {})
        ):
            kwargs[name] = valid(where, name)
    return args, kwargs


# ---------------------------------------------------------------- what a wrong one is


class Thing:
    "An object that is nothing that any function takes."

    def __repr__(self) -> str:
        return "<a thing>"


NUMBERS = ["3", True, None, math.nan, math.inf, -math.inf, [1], 1j, 2**70, 10**400, Thing()]
ODD = [3.5, "no such thing", Thing(), b"bytes", {"a": "b"}, None]
LOADERS = [
    3,
    "abc",
    None,
    Thing(),
    [3],
    [("a", "b")],
    [(torch.zeros(2, 1, 6, 6),)],
    [(torch.zeros(2, 1, 6, 6), torch.zeros(3, dtype=torch.long))],
    [],
    [(torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.long))],
    [(torch.zeros(2, 1, 6, 6), torch.tensor([0, 77]))],
    [(torch.zeros(2, 1, 6, 6), torch.tensor([0, -1]))],
]


WRONG = {
    bool: [3, "yes", None, [True], Thing()],
    int: [*NUMBERS, 2.5],
    float: [n for n in NUMBERS if n not in (2**70,)],
    str: [3, None, True, b"x", ["x"], Thing()],
    Path: [3, None, [], 1.5, Thing()],
    Literal: ["no such thing", 3, [], None, Thing()],
    Callable: [3, "abc", None],
    **dict.fromkeys((tuple, list, Sequence), [3, "abc", None, Thing(), [Thing()], [None]]),
    Any: [],
}


def wrong_for(annotation: Any) -> list[Any]:
    "Values that can't be meant by an annotation."
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return wrong_for(inner[0])
    if origin in (Union, types.UnionType):
        return _wrong_for_all(inner)
    if origin in (dict, Mapping):
        values = [] if inner[1] is Any else [{"a": Thing()}]
        return [3, "abc", None, Thing(), {1: Thing()}, *values]
    if origin is Iterable:
        pairs = get_args(inner[0]) and get_origin(inner[0]) is tuple
        return LOADERS if pairs else [3, "abc", None, Thing(), [Thing()]]
    kind = origin or annotation
    return WRONG.get(kind, ODD if isinstance(annotation, type) else [])


def _wrong_for_all(kinds: Sequence[Any]) -> list[Any]:
    "Values that none of several annotations can mean."
    lists = [wrong_for(kind) for kind in kinds if kind is not type(None)]
    known = [{_say(value) for value in values} for values in lists]
    rest = (
        [value for value in lists[0] if all(_say(value) in names for names in known)]
        if lists
        else []
    )
    if Path in kinds:
        rest = [3, 1.5, [], Thing()]
    if {int, str} <= set(kinds):
        rest = [math.nan, 2.5, True, [1], Thing(), None, 2**70]
    return [value for value in rest if value is not None] if type(None) in kinds else rest


def _say(value: Any) -> str:
    "A value in a few letters."
    try:
        return " ".join(repr(value).split())[:60]
    except ValueError:
        return "a huge number"


def slips(where: str) -> list[tuple[str, Any, str]]:
    "All that is tried with a function: (parameter, value, what is wrong)."
    found: list[tuple[str, Any, str]] = []
    for name, parameter in parameters(where).items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            found += [(name, value, "value") for value in wrong_for(hints(where)[name])]
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            found.append((f"{name}_", None, "unknown name"))
            if parameter.default is parameter.empty:
                found.append((name, None, "missing"))
    if not any(p.kind is p.VAR_POSITIONAL for p in parameters(where).values()):
        found.append(("", None, "too many"))
    return found


def attempt(where: str, name: str, value: Any, what: str) -> Exception | None:
    "Call with one thing wrong: the error, or None if it was accepted."
    args, kwargs = call_of(where)
    if what == "missing":
        kwargs.pop(name, None)
        if args:
            args.pop(0)
    elif what == "too many":
        args, kwargs = [*kwargs.values(), *([Thing()] * 40)], {}
    elif (
        name in parameters(where)
        and parameters(where)[name].kind is inspect.Parameter.VAR_POSITIONAL
    ):
        args[-1] = value
    elif args and name in list(parameters(where))[: len(args) - 1]:
        args[list(parameters(where)).index(name)] = value
    else:
        kwargs[name] = copy.copy(value)
    try:
        result = public()[where](*args, **kwargs)
        if inspect.isgenerator(result):
            next(result, None)
        elif hasattr(result, "__enter__") and hasattr(result, "gen"):
            with result:
                pass
    except Exception as error:  # noqa: BLE001  # whatever it is: that is what is looked at
        return error
    return None


# ---------------------------------------------------------------- what is asked of the answer

JARGON = re.compile(
    "not supported between|too many values|not enough values|object is "
    "not|NoneType|has no attribute|unexpected keyword|positional argument.* but|not "
    "subscriptable|not callable|"
    "unhashable|could not convert|can't convert|cannot convert|must be real "
    "number|invalid literal|expected str|not iterable|__init__|validation "
    "error|pydantic|"
    "__class__|object at 0x|out of range for|indices must be|unsupported operand|can't "
    "multiply|__len__|argument '|should be a",
    re.IGNORECASE,
)
KINDS = (TypeError, ValueError, OSError, FloatingPointError)


def fault(where: str, name: str, value: Any, what: str) -> str | None:
    "What is wrong with the answer to a wrong call, or None."
    error = attempt(where, name, value, what)
    if error is None or "torch finds no GPU" in str(error):
        return None if accepted(where, name, value, what) else "accepted"
    text = str(error)
    if not isinstance(error, KINDS) or isinstance(error, (UnicodeError,)):
        return f"{type(error).__name__}: {text[:200]}"
    if "\n" in text or not 15 < len(text) < 1200 or JARGON.search(text):
        return f"{type(error).__name__}: {text[:200]!r}"
    return None


# What is taken on purpose, though it is of the odd kind: (function, parameter, value), each a
# pattern.
ACCEPTED: list[tuple[str, str, str]] = [
    (r"settings\.\w+(Settings|Request)", ".*", r"'3'|'yes'|b'x'"),  # as a command line gives them
    (
        r"influence\.count_images|activation\.mean_activations",
        "batches",
        r"\[",
    ),  # labels aren't read, none is a number
    (
        r"(train\.(trainable|count)_batches|draws\.samples_digest)",
        "batches",
        r"\[",
    ),  # they are checked before, by `check_batches`
    (r"base\.Task", "forget|remain|reference|held_out", r"\["),  # `unlearn` has checked them
    # `comeback` checks what it yields; where one set is left out, the next is the first
    (r"comeback\.Mixed", "first|others", r"\[|None"),
    (
        r"fisher\.(rebatch|rank_batches)",
        "batches",
        r"\[",
    ),  # streams: they are read later, by whoever checks them
    (
        r"experiments\.needed|experiments\.sweep",
        ".*_",
        "None",
    ),  # None means that a parameter was not given
]


def accepted(where: str, name: str, value: Any, what: str) -> bool:
    return any(
        re.fullmatch(f, where) and re.fullmatch(p, name) and re.match(v, _say(value))
        for f, p, v in ACCEPTED
    )


def all_slips() -> list[tuple[str, str, Any, str]]:
    return [(where, *slip) for where in public() for slip in slips(where)]


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    "Calls work in an empty folder, without a GPU and without the internet."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "ray", None)  # which would start a cluster
    for name in ("FISHER_UNLEARN_DATA", "FISHER_UNLEARN_RUNS"):
        monkeypatch.delenv(name, raising=False)


def test_500_wrong_calls_are_one_sentence_each(capsys):
    drawn = random.Random(0).sample(all_slips(), 500)
    faults = [
        f"{where}({name}={_say(value)}; {what}): {found}"
        for where, name, value, what in drawn
        if (found := fault(where, name, value, what))
    ]
    assert not faults, "\n".join([f"{len(faults)} of {len(drawn)}", *faults])


@pytest.mark.slow
def test_all_wrong_calls_are_one_sentence_each(capsys):
    faults = [
        f"{where}({name}={_say(value)}; {what}): {found}"
        for where, name, value, what in all_slips()
        if (found := fault(where, name, value, what))
    ]
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])
