"""A small extension of Sphinx: names in backticks lead to what they name. A chapter, such as
`4_methods/13_unlearn`, leads to its page; a public name of the package to its definition."""

import re
from functools import cache

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

CHAPTER = re.compile(r"(?:nbs/)?(\d_\w+(?:/\d\d_\w+)?|experiments/\w+|\w+(?=\.ipynb))(?:\.ipynb)?")
NAME = re.compile(r"([A-Za-z]\w*(?:\.[A-Za-z]\w*)?)(?:\(.*\))?", re.DOTALL)
WITHIN = (nodes.reference, nodes.title, nodes.raw)
logger = logging.getLogger(__name__)


@cache
def definitions(env: BuildEnvironment) -> dict[str, tuple[str, str]]:  # name: (page, anchor)
    """Where each public name, alone or after its class, is defined. Of two modules that have it
    the lower one is meant; a command's name is a word like others, and is left alone."""
    pages = env.toctree_includes["api/index"]
    entries = [one for one in env.domains["py"].objects.items() if one[1].objtype != "module"]
    entries.sort(key=lambda one: pages.index(one[1].docname), reverse=True)
    return {
        re.sub(r"^([a-z]\w*\.)+", "", full): (entry.docname, entry.node_id)
        for full, entry in entries
        if entry.docname != "api/cli"
    }


def target_of(text: str, env: BuildEnvironment) -> tuple[str, str] | None:
    "The page and anchor that a text in backticks means, if it means one."
    if chapter := CHAPTER.fullmatch(text):
        return (chapter[1], "") if chapter[1] in env.found_docs else None
    name = NAME.fullmatch(text)
    return definitions(env).get(name[1]) if name else None


def link_names(app: Sphinx, doctree: nodes.document, page: str) -> None:
    "Make links of the names on a page; chapters that are not there are warned of."
    for literal in list(doctree.findall(nodes.literal)):
        if any(isinstance(above, WITHIN) for above in ancestors(literal)):
            continue
        text = literal.astext()
        target = target_of(text, app.env)
        if target is None and re.fullmatch(r"(\d_\w+/\d\d|experiments/)\w+", text):
            logger.warning("there is no chapter %r", text, location=literal)
        if target and target != (page, ""):
            link = make_refnode(app.builder, page, *target, [literal.deepcopy()])
            literal.replace_self(link)


def ancestors(node: nodes.Node):
    "What a node lies in, from within."
    while node.parent is not None:
        node = node.parent
        yield node


def setup(app: Sphinx) -> dict:
    app.connect("doctree-resolved", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
