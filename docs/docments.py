"""Reads docments, the comments beside parameters, out of the package's source; nothing is
imported for it."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLIND = ("TypeVar", "ParamSpec")  # names for the type checker alone


@dataclass(frozen=True)
class Parameter:
    "A parameter of a function, or a field of a dataclass."

    name: str  # with its stars
    annotation: str  # as in the source; empty: there is none
    default: str | None  # as in the source
    comment: str  # its docment: meaning, unit and shape


@dataclass(frozen=True)
class Definition:
    "A function, class, method, property or value."

    kind: str  # "function", "class", "method", "property" or "data"
    name: str
    text: str  # the docstring, or the comment beside a value
    parameters: tuple[Parameter | str, ...] = ()  # "*" and "/" as they stand
    returns: str = ""  # the annotation
    returned: str = ""  # its docment
    bases: tuple[str, ...] = ()  # of a class
    methods: tuple["Definition", ...] = ()  # of a class: those that say what they do
    value: str = ""  # of a value


class Module:
    "What a module defines, read from its source."

    def __init__(self, path: Path):
        source = path.read_text(encoding="utf-8")
        self.tree = ast.parse(source)
        self.doc = ast.get_docstring(self.tree) or ""
        self.lines = source.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokens
            if token.type == tokenize.COMMENT
        }

    def chapter(self) -> str:
        "The chapter that the module is exported from, as `4_methods/13_unlearn`."
        found = re.search(r"File to edit: (?:\.\./)*nbs/(\S+)\.ipynb", "\n".join(self.lines))
        return found[1] if found else ""

    def definitions(self) -> Iterator[Definition]:
        "What is defined, in the order of the source."
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef):
                yield self.function(node, "function")
            if isinstance(node, ast.ClassDef):
                yield self.of_class(node)
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                yield from self.values(node)

    def function(self, node: ast.FunctionDef, kind: str) -> Definition:
        "A function, or a method without its `self`."
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        if kind == "method" and decorators & {"property", "cached_property"}:
            kind = "property"
        bound = kind != "function" and "staticmethod" not in decorators
        returned = self.comments.get(node.returns.end_lineno, "") if node.returns else ""
        return Definition(
            kind,
            node.name,
            ast.get_docstring(node) or "",
            tuple(self.parameters(node))[bound:],
            ast.unparse(node.returns) if node.returns else "",
            returned,
        )

    def parameters(self, node: ast.FunctionDef) -> Iterator[Parameter | str]:
        "Those of a function, each with its docment; `/` and `*` where they stand."
        given, closing = node.args, node.returns.end_lineno if node.returns else None
        positional = [*given.posonlyargs, *given.args]
        defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
        for place, (arg, default) in enumerate(zip(positional, defaults), 1):
            yield self.parameter(arg, default, closing)
            if place == len(given.posonlyargs):
                yield "/"
        if given.vararg:
            yield self.parameter(given.vararg, None, closing, "*")
        elif given.kwonlyargs:
            yield "*"
        for arg, default in zip(given.kwonlyargs, given.kw_defaults):
            yield self.parameter(arg, default, closing)
        if given.kwarg:
            yield self.parameter(given.kwarg, None, closing, "**")

    def parameter(
        self, arg: ast.arg, default: ast.expr | None, closing: int | None, stars: str = ""
    ) -> Parameter:
        "One of a function; the comment of the line that closes the signature is not its own."
        last = default or arg
        comment = "" if last.end_lineno == closing else self.beside(arg, last)
        return Parameter(
            stars + arg.arg,
            ast.unparse(arg.annotation) if arg.annotation else "",
            ast.unparse(default) if default else None,
            comment,
        )

    def beside(self, first: ast.AST, last: ast.AST) -> str:
        "The comment at the end of what is written from one node to another, or above it."
        for line in (last.end_lineno, first.lineno):
            if line in self.comments:
                return self.comments[line]
        above, line = [], first.lineno - 1
        while line in self.comments and self.lines[line - 1].lstrip().startswith("#"):
            above.insert(0, self.comments[line])
            line -= 1
        return " ".join(above)

    def of_class(self, node: ast.ClassDef) -> Definition:
        "A class: its fields, or what makes one; and the methods that say what they do."
        functions = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
        made = functions.get("__init__")
        methods = [
            self.function(part, "method")
            for name, part in functions.items()
            if ast.get_docstring(part) and (name == "__call__" or not name.startswith("_"))
        ]
        return Definition(
            "class",
            node.name,
            ast.get_docstring(node) or "",
            self.function(made, "method").parameters if made else tuple(self.fields(node)),
            bases=tuple(ast.unparse(base) for base in node.bases),
            methods=tuple(methods),
        )

    def fields(self, node: ast.ClassDef) -> Iterator[Parameter]:
        "Its own fields; an option has its default and its comment as arguments of a call."
        for part in node.body:
            if not isinstance(part, ast.AnnAssign) or "ClassVar" in ast.unparse(part.annotation):
                continue
            default, comment = part.value, self.beside(part, part)
            match default:
                case ast.Call(args=[first, ast.Constant(value=str(told))]):
                    default, comment = first, told
            shown = ast.unparse(default) if default else None
            yield Parameter(part.target.id, ast.unparse(part.annotation), shown, comment)

    def values(self, node: ast.Assign | ast.AnnAssign) -> Iterator[Definition]:
        "Values, such as `METHODS`, and the names of annotations, such as `Share`."
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        made_by = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
        for target in targets:
            if isinstance(target, ast.Name) and made_by not in BLIND:
                note = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
                text, value = self.beside(node, node), ast.unparse(node.value)
                yield Definition("data", target.id, text, returns=note, value=value)
