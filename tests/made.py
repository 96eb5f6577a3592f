"Whole records of settings, made up from a committed one."

import json
from pathlib import Path

import fisher_unlearn
from fisher_unlearn.lab.settings import run_key, training_key, training_settings

ROOT = Path(fisher_unlearn.__file__).parent.parent
COMMITTED = json.loads(
    (ROOT / "data" / "checkpoints" / "0ad10a69e608804b.json").read_text(encoding="utf-8")
)
ROW = {"lr": 0.1, "train_loss": 1.0, "seconds": 1.0, "remain_acc": 80.0, "forget_acc": 10.0}


def listed(folder):
    "The names of the files of a folder, without its lock."
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def run_record(settings, **more):
    "A record as a run of these settings leaves it."
    fresh = settings.retrains
    epochs = settings.train.epochs if fresh else settings.tuning.epochs
    made = {name: part for name, part in COMMITTED.items() if name not in ("digest", "weights")}
    made |= {
        "key": run_key(settings),
        "settings": settings.flat,
        "training": None if fresh else training_key(settings),
        "history": [ROW | {"epoch": epoch} for epoch in range(epochs + 1)],
    }
    return json.loads(json.dumps(made | more))


def training_record(settings, **more):
    "A record as the training of w* leaves it."
    rows = [
        {"epoch": epoch + 1, "lr": 0.1, "train_loss": 1.0, "seconds": 1.0}
        for epoch in range(settings.train.epochs)
    ]
    parts = {name: COMMITTED[name] for name in ("data", "provenance")}
    made = {
        "key": training_key(settings),
        "settings": training_settings(settings),
        "history": rows,
        **parts,
    }
    return json.loads(json.dumps(made | more))
