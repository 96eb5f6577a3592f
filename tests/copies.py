"""Are the executed notebooks in figures/ copies of today's? Their source must be that of the
notebook in nbs/experiments, but for the parameters that a run was given. A copy is drawn again from
the records that are kept with it."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST = 300_000  # bytes of a copy
GIVEN = "injected-parameters"  # the tag of a cell that papermill adds


def source(path: Path) -> list[tuple[str, str]]:
    "The kind and the source of each cell that a notebook was written with."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        (cell["cell_type"], "".join(cell["source"]))
        for cell in cells
        if GIVEN not in cell["metadata"].get("tags", [])
    ]


def original(copy: Path, notebooks: Path) -> Path:
    "The notebook that an executed one is a copy of: its name may go on with what it was run on."
    return max(
        (path for path in notebooks.glob("*.ipynb") if f"{copy.stem}_".startswith(f"{path.stem}_")),
        key=lambda path: len(path.stem),
    )


def stale(figures: Path, notebooks: Path) -> list[str]:
    "A line for each copy that is out of step, or too large to be kept."
    lines = []
    for copy in sorted(figures.glob("**/*.ipynb")):
        name = copy.relative_to(figures)
        if source(copy) != source(original(copy, notebooks)):
            lines.append(f"{name}: its source is not that of today's notebook.")
        if copy.stat().st_size > MOST:
            lines.append(f"{name}: it has {copy.stat().st_size:,} bytes, more than {MOST:,}.")
    return lines


if __name__ == "__main__":
    found = stale(ROOT / "figures", ROOT / "nbs" / "experiments")
    if found:
        print("Executed copies are out of step with their notebooks:", *found, sep="\n  ")
        print("Draw them again from their records: fisher-unlearn restore, then --on none.")
        sys.exit(1)
    count = len(list((ROOT / "figures").glob("**/*.ipynb")))
    print(f"{count} executed copies have the source of their notebooks.")
