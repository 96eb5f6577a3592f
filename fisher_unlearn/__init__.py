"""Make an image classifier forget, and see what was forgotten."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOMS = {  # the public names, by the room that has them: it is imported when one is asked for
    "images.arguments": ("option",),
    "images.data": ("load_images",),
    "images.folders": ("read_folder",),
    "images.forget": (
        "forget_class",
        "forget_classes",
        "forget_samples",
        "mislabel",
        "poison",
        "random_subset",
    ),
    "images.sources": ("asked_for", "source_of"),
    "networks.models": ("build_model", "find_classifier"),
    "networks.foreign": ("load_checkpoint", "network_named"),
    "networks.schedule": ("Schedule", "schedule_of"),
    "networks.metrics": ("evaluate", "unlearn_score"),
    "networks.train": ("TrainSettings", "train_model"),
    "scores.fisher": ("diag_fisher",),
    "methods.base": ("Method", "Task"),
    "methods.masking": ("candidates", "compare_masks", "select_top", "zero_"),
    "methods.masks": (
        "TFIDF",
        "ActivationMask",
        "FisherMask",
        "GivenMask",
        "MaskClassifier",
        "RandomMask",
    ),
    "methods.noise": ("FisherNoise",),
    "methods.influence": ("Influence",),
    "methods.retraining": ("Finetune", "Retrain"),
    "methods.dampening": ("LFSSD", "SSD"),
    "methods.labels": ("UNSIR", "L1Sparse", "NegGradPlus", "RandomLabels"),
    "methods.saliency": ("CT", "MSG", "SalUn", "SFRon"),
    "methods.teachers": ("DELETE", "SCRUB", "BadTeacher", "RewoundSCRUB"),
    "methods.layers": ("CFk", "EUk"),
    "methods.kick": ("Kick",),
    "methods.result": ("read_mask",),
    "methods.unlearn": ("METHODS", "unlearn"),
    "methods.conformance": ("check_method",),
    "audit.readouts": ("agreement", "relearn_time"),
    "lab.deletion": ("delete",),
    "lab.deletion_report": ("save_deletion",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
