"""The reference: a page for each module, made of its docments, in the markdown that MyST reads."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from docments import Definition, Module, Parameter

PACKAGE = "fisher_unlearn"
SHORT = 72  # characters of a value that is worth showing
CODE_OR_MATH = re.compile(r"(`+[^`]*`+|\$[^$]+\$)")


def write_api(root: Path, folder: Path) -> None:
    "A page for each module of the package, and one that lists them."
    folder.mkdir()
    modules = read_modules(root / PACKAGE)
    classes = {
        one.name: one
        for module in modules.values()
        for one in module.definitions()
        if one.kind == "class"
    }
    seen: set[Definition] = set()
    for name, module in modules.items():
        public = [one for one in module.definitions() if not one.name.startswith("_")]
        new = [with_inherited(one, classes) for one in public if one not in seen]
        seen |= {one for one in public if one.kind == "data"}
        (folder / f"{name}.md").write_text(page(name, module, new), encoding="utf-8")
    (folder / "index.md").write_text(index(modules), encoding="utf-8")


def read_modules(package: Path) -> dict[str, Module]:  # by their names within the package
    "The modules that are exported from chapters, in the order of these."
    modules = {}
    for path in package.rglob("*.py"):
        module = Module(path)
        if module.chapter():
            modules[".".join(path.relative_to(package).with_suffix("").parts)] = module
    return dict(sorted(modules.items(), key=lambda one: one[1].chapter()))


def index(modules: dict[str, Module]) -> str:
    "The page of all pages: each module with its question."
    lines = ["# The package", "", "Each module comes from a chapter, and asks what that asks.", ""]
    lines += [f"* [{name}]({name}.md): {prose(module.doc)}" for name, module in modules.items()]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *modules, "```", ""])


def page(name: str, module: Module, entries: list[Definition]) -> str:
    "What a module has: but names of annotations that an earlier module has, too."
    head = [
        f"# {name}",
        f"> {prose(module.doc)}",
        f"Its story is the chapter `{module.chapter()}`.",
        f"```{{py:module}} {PACKAGE}.{name}\n```",
    ]
    return "\n\n".join([*head, *map(entry, entries)]) + "\n"


def with_inherited(one: Definition, classes: dict[str, Definition]) -> Definition:
    "A class with the fields of its bases as well, those that are not shown among them."
    if one.kind != "class":
        return one
    above = [with_inherited(classes[base], classes) for base in one.bases if base in classes]
    fields = {
        field.name: field
        for base in above
        for field in base.parameters
        if isinstance(field, Parameter) and not field.name.startswith("*")
    }
    own = {getattr(field, "name", field): field for field in one.parameters}
    return replace(one, parameters=tuple((fields | own).values()))


def entry(one: Definition, colons: int = 6) -> str:
    "A definition with all that is said of it, and its methods within."
    bases = [code(base) for base in one.bases if not base.startswith("_")]
    parts = [
        *options(one),
        *map(prose, one.text.split("\n\n")),
        f"*Derived from* {', '.join(bases)}." if bases else "",
        table(one),
        *(entry(method, colons - 1) for method in one.methods),
    ]
    fence = ":" * colons
    body = "\n\n".join(part for part in parts if part)
    return f"{fence}{{py:{one.kind}}} {signature(one)}\n{body}\n{fence}"


def options(one: Definition) -> Iterator[str]:
    "What a value is, if that is short; and the type of a property."
    lines = [f":type: {one.returns}"] if one.returns and one.kind in ("data", "property") else []
    if one.value and len(one.value) <= SHORT:
        lines.append(f":value: {one.value}")
    if lines:
        yield "\n".join(lines)


def signature(one: Definition) -> str:
    "How it is called."
    if one.kind in ("data", "property"):
        return one.name
    star = ["*"] if by_name_only(one) else []
    given = ", ".join(map(written, [*star, *one.parameters]))
    called = one.kind != "class" or one.parameters
    returns = f" -> {one.returns}" if one.returns else ""
    return one.name + f"({given}){returns}" * bool(called)


def by_name_only(one: Definition) -> bool:
    "Do fields with a default come before others, so that names must say which are meant?"
    fields = [field.default is not None for field in one.parameters if isinstance(field, Parameter)]
    return one.kind == "class" and fields != sorted(fields)


def written(parameter: Parameter | str) -> str:
    "A parameter as it is written in a signature."
    if isinstance(parameter, str):
        return parameter
    note = f": {parameter.annotation}" if parameter.annotation else ""
    default = "" if parameter.default is None else f" = {parameter.default}"
    return parameter.name + note + default


def table(one: Definition) -> str:
    """The parameters, and what comes back: name, annotation, default, meaning. Where no meaning is
    given, the signature has said it all."""
    rows = [
        (f"**{prose(p.name)}**", code(p.annotation), code(p.default), prose(p.comment))
        for p in one.parameters
        if isinstance(p, Parameter)
    ]
    if one.returned:
        rows.append(("*returns*", code(one.returns), "", prose(one.returned)))
    if not any(meaning for *_, meaning in rows):
        return ""
    head = ("name", "annotation", "default", "meaning")
    return "\n".join(
        ["```{list-table}", ":header-rows: 1", ":class: docments", "", *map(row, [head, *rows])]
        + ["```"]
    )


def row(cells: Iterable[str]) -> str:
    "A line of a table, as a list in a list."
    first, *others = cells
    return "\n".join([f"* - {first}", *(f"  - {cell}" for cell in others)])


def code(text: str | None) -> str:
    "Code in a line of markdown; nothing where there is none."
    return f"`` {text} ``" if text else ""


def prose(text: str) -> str:
    "A docstring or comment in markdown: what looks like markup and is none is escaped."
    parts = CODE_OR_MATH.split(" ".join(text.split()))
    return "".join(
        part if place % 2 else re.sub(r"([\\*_<\[])", r"\\\1", part)
        for place, part in enumerate(parts)
    )
