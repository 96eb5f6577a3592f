"""The chapters as Sphinx reads them: notebooks without nbdev's directives, experiments with the
results that are kept of them, and the table of contents."""

import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

PROFILES = ("paper", "paper_bfloat16", "interpolating", "cpu", "quick")  # the richest first
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
FILES = ("CITATION.cff",)  # which pages lead to
COPY = re.compile(r"\]\((?:\.\./)*figures/(\w+/\w+)\.ipynb\)")  # a link to an executed copy
DIRECTIVE = re.compile(r"^#\| *(.*)\n?", re.MULTILINE)


def write_chapters(root: Path, source: Path) -> None:
    "All that is read of a checkout, in a folder that mirrors `nbs/`."
    source.mkdir(parents=True)
    (source / "figures").symlink_to(root / "figures", target_is_directory=True)
    for name in (*PAGES, *FILES):
        (source / name).write_text((root / name).read_text(encoding="utf-8"), encoding="utf-8")
    write_copies(root, source)
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        place = path.relative_to(root / "nbs")
        notebook = readable(nbformat.read(with_results(path, root), 4), depth=len(place.parts) - 1)
        lead_to_pages(notebook, root)
        if path.parent.name == "experiments":
            notebook.cells.insert(1, provenance(path, root))
        if place.stem == "index":
            notebook.cells += map(new_markdown_cell, contents(root))
        (source / place).parent.mkdir(exist_ok=True)
        nbformat.write(notebook, source / place)


def write_copies(root: Path, source: Path) -> None:
    "Executed copies of experiments that are shown under a richer profile, each as a page as well."
    for path in further_copies(root):
        place = source / page_of(path, root).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        notebook = readable(nbformat.read(path, 4), depth=1)
        notebook.cells.insert(1, provenance(experiment_of(path, root), root, path))
        nbformat.write(notebook, place)


def further_copies(root: Path) -> list[Path]:
    "All kept copies but those that stand for their experiments."
    copies = [p for profile in PROFILES for p in (root / "figures" / profile).glob("*.ipynb")]
    return sorted(p for p in copies if kept_copy(experiment_of(p, root), root) != p)


def experiment_of(copy: Path, root: Path) -> Path:
    "The notebook that a copy was executed from; a quickstart's also names its data and network."
    stem = "quickstart" if copy.stem.startswith("quickstart_") else copy.stem
    return root / "nbs" / "experiments" / f"{stem}.ipynb"


def page_of(copy: Path, root: Path) -> str:
    "Where an executed copy is read, from the top of the book."
    experiment = experiment_of(copy, root)
    shown = kept_copy(experiment, root) == copy
    return f"/experiments/{experiment.name if shown else f'{copy.parent.name}/{copy.name}'}"


def lead_to_pages(notebook: NotebookNode, root: Path) -> None:
    "Links to executed copies, in prose and in what cells put out, lead to their pages."
    page = lambda link: f"]({page_of(root / 'figures' / f'{link[1]}.ipynb', root)})"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = COPY.sub(page, cell.source)
        for output in cell.get("outputs", []):
            if text := output.get("data", {}).get("text/markdown"):
                output.data["text/markdown"] = COPY.sub(page, text)


def readable(notebook: NotebookNode, depth: int) -> NotebookNode:
    "A notebook without what is meant for nbdev, and with links from where it will lie."
    notebook.cells = [cell for cell in map(plain, notebook.cells) if cell.source.strip()]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            # `nbs/` is left out of the book's places, so that a way out of it is one step shorter
            cell.source = cell.source.replace("](" + "../" * (depth + 1), "](" + "../" * depth)
    notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook


def plain(cell: NotebookNode) -> NotebookNode:
    "A cell without directives; an empty one if it is to be hidden."
    if cell.cell_type == "code":
        hidden = "hide" in DIRECTIVE.findall(cell.source)
        cell.source = "" if hidden else DIRECTIVE.sub("", cell.source).lstrip("\n")
        tags = cell.metadata.get("tags", [])
        cell.metadata["tags"] = [tag.replace("hide_input", "hide-input") for tag in tags]
    return cell


def kept_copy(path: Path, root: Path) -> Path | None:
    "The executed copy of an experiment under the richest profile that has one."
    for profile in PROFILES:
        folder = root / "figures" / profile
        found = [*folder.glob(path.name), *sorted(folder.glob(f"{path.stem}_*.ipynb"))]
        if found:
            return found[0]
    return None


def with_results(path: Path, root: Path) -> Path:
    "The notebook to read: of an experiment its executed copy, where there is one."
    return path.parent.name == "experiments" and kept_copy(path, root) or path


def provenance(path: Path, root: Path, copy: Path | None = None) -> NotebookNode:
    "What a reader of an experiment looks at: the fullest copy, or another one."
    copy, where = copy or kept_copy(path, root), path.relative_to(root).as_posix()
    if copy is None:
        return new_markdown_cell(f"*The notebook `{where}`, of which no executed copy is kept.*")
    profile, kept = copy.parent.name, copy.relative_to(root).as_posix()
    return new_markdown_cell(
        f"*The notebook `{where}`, as it was executed under the profile `{profile}`; "
        f"this copy is `{kept}`.*"
    )


def contents(root: Path) -> list[str]:
    "The table of contents: the parts in their order, then what is made with them."
    nbs = root / "nbs"
    parts = sorted(folder for folder in nbs.glob("[0-9]_*") if folder.is_dir())
    on_top, loose = sorted(nbs.glob("[0-9]_*.ipynb")), {*nbs.glob("[a-z]*.ipynb")}
    sections = {
        "": sorted(loose - {nbs / "index.ipynb"}),
        **{titled(part): sorted(part.glob("*.ipynb")) for part in parts},
        "On top": on_top,
        "Experiments": sorted((nbs / "experiments").glob("*.ipynb"), key=experiment_order),
    }
    listed = {
        caption: [path.relative_to(nbs).with_suffix("").as_posix() for path in paths]
        for caption, paths in sections.items()
    }
    further = [page_of(copy, root).lstrip("/") for copy in further_copies(root)]
    listed["Other runs"] = [page.removesuffix(".ipynb") for page in further]
    listed["Reference"] = ["api/index", *(Path(name).stem for name in PAGES)]
    return [toctree(caption, names) for caption, names in listed.items() if names]


def titled(part: Path) -> str:
    "The name of a part: that of its folder."
    number, _, name = part.name.partition("_")
    return f"{number}. {name.capitalize()}"


def experiment_order(path: Path) -> tuple[int, str]:
    "The quickstart, then the paper's tables and figures, then our own questions."
    kinds = ("quickstart", "table", "figure", "proposition")
    place = [path.stem.startswith(kind) for kind in (*kinds, "")].index(True)
    return place, path.stem


def toctree(caption: str, names: list[str]) -> str:
    "A part of the table of contents, which shows beside each page."
    head = f":caption: {caption}\n" if caption else ""
    return "```{toctree}\n:hidden:\n" + head + "\n" + "\n".join(names) + "\n```"
