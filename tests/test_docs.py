"""The book that `make docs` builds: whole, out of docments, without a warning, and without asking
anybody."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import nbformat
import pytest
from bs4 import BeautifulSoup
from fastcore.docments import docments

import fisher_unlearn
from api import entry, with_inherited
from chapters import FILES, PAGES, PROFILES, kept_copy, page_of, readable
from docments import Module

ROOT = Path(fisher_unlearn.__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
ALONE = "import socket\ndef refuse(*given):\n    raise OSError('no network')\n" + "".join(
    f"socket.socket.{way} = refuse\n" for way in ("connect", "connect_ex")
)
NOWHERE = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}


def built(root, folder):
    "The build of a checkout, by a Python that reaches no other machine."
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ALONE, encoding="utf-8")
    words = [sys.executable, root / "docs" / "build.py", folder]
    environment = os.environ | NOWHERE | {"PYTHONPATH": str(folder)}
    return subprocess.run(words, env=environment, capture_output=True, encoding="utf-8")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "book"
    done = built(ROOT, folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder / "html"


def soup(page):
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


class Addresses(HTMLParser):
    "What a page leads to, shows and runs, and where it can be led to."

    def __init__(self, page):
        super().__init__()
        self.asked, self.anchors = [], {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.add(given.get("id"))
        self.asked += [(tag, given[name]) for name in ("href", "src") if given.get(name)]


read_page = cache(Addresses)


def pages_of(folder):
    "The pages of a book; the theme's own templates, which it carries along, are none."
    return sorted(page for page in folder.rglob("*.html") if page.parent.name != "_static")


def has(target, fragment):
    "Is there such a place in a file?"
    return target.suffix != ".html" or fragment in read_page(target).anchors


def broken(folder):
    "Links to pages, anchors and pictures of a book that are not there."
    for page in pages_of(folder):
        for _, address in read_page(page).asked:
            to = urlparse(address)
            if to.scheme or to.netloc:
                continue
            target = (page.parent / unquote(to.path)).resolve() if to.path else page.resolve()
            if not target.is_file() or not has(target, unquote(to.fragment)):
                yield f"{page.relative_to(folder)}: {address}"


def elsewhere(path):
    "What a style asks of another host."
    text = path.read_text(encoding="utf-8")
    return re.findall(r"(?:url\(|@import )\s*['\"]?(?:https?:)?//[^)\s]+", text)


def foreign(folder):
    "What pages and their styles fetch from another host; links that a reader may follow are none."
    for page in pages_of(folder):
        fetched = [to for tag, to in read_page(page).asked if tag != "a" and urlparse(to).netloc]
        yield from [*fetched, *elsewhere(page)]
    for style in sorted(folder.rglob("*.css")):
        yield from elsewhere(style)


@pytest.mark.slow
def test_no_link_is_broken_and_no_picture_is_missing(book):
    assert len(pages_of(book)) > len(NOTEBOOKS) + 50 and not list(broken(book))


@pytest.mark.slow
def test_no_page_asks_another_host(book):
    assert not list(foreign(book))
    formulas = book / "experiments" / "proposition1.html"
    assert [tag for tag, to in read_page(formulas).asked if "mathjax" in to] == ["script"]


def test_what_is_wrong_with_a_book_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here">1</a><a href="b.html#there">2</a><a href="c.html">3</a>'
        '<img src="none.png"><a href="https://example.org">4</a>'
        '<script src="//cdn.example.org/x.js"></script>',
        encoding="utf-8",
    )
    (tmp_path / "b.html").write_text('<a href="a.html#here">1</a>', encoding="utf-8")
    (tmp_path / "a.css").write_text("@import 'https://fonts.example.org';", encoding="utf-8")
    found = ["a.html: b.html#there", "a.html: c.html", "a.html: none.png"]
    assert list(broken(tmp_path)) == found and len(list(foreign(tmp_path))) == 2


@pytest.mark.slow
def test_every_notebook_is_in_the_table_of_contents(book):
    found = soup(book / "index.html").select("nav.bd-links a[href]")
    listed = [a["href"].split("#")[0] for a in found]
    places = [path.relative_to(ROOT / "nbs").with_suffix("") for path in NOTEBOOKS]
    assert {f"{place.as_posix()}.html" for place in places} <= {*listed, "index.html"}
    rooms = [one for one in listed if re.match(r"\d_", one)]
    assert rooms == sorted(rooms) and len(rooms) > 40


@pytest.mark.slow
def test_the_search_knows_every_page(book):
    words = (book / "searchindex.js").read_text(encoding="utf-8")
    known = json.loads(re.search(r'"?docnames"?:(\[[^]]*\])', words)[1])
    places = [path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in NOTEBOOKS]
    assert {*places, "api/methods.unlearn", "CONTRIBUTING"} <= set(known)


@pytest.mark.slow
def test_chapters_and_names_in_prose_are_links(book):
    pages = [soup(book / f"{name}.html") for name in ("results", "CONTRIBUTING")]
    found = [a for page in pages for a in page.select("article a[href]") if a.find("code")]
    links = {a.text: a["href"] for a in found}
    assert links["5_audit/05_comeback"] == "5_audit/05_comeback.html"
    assert links["4_methods/13_unlearn"] == "4_methods/13_unlearn.html"
    defined = "api/methods.unlearn.html#fisher_unlearn.methods.unlearn.unlearn"
    assert links["unlearn"] == defined
    assert links["check_method"].endswith("#fisher_unlearn.methods.conformance.check_method")


@pytest.mark.slow
def test_directives_are_hidden_and_code_is_not(book):
    pages = [book / path.relative_to(ROOT / "nbs").with_suffix(".html") for path in NOTEBOOKS]
    assert not [page for page in pages if "#| " in page.read_text(encoding="utf-8")]
    assert "def _check_apart" in soup(book / "4_methods" / "13_unlearn.html").text


@pytest.mark.slow
def test_tables_that_cells_put_out_are_tables(book):
    found = soup(book / "results.html").select("article table")
    assert len(found) >= 9 and "|:--" not in soup(book / "results.html").text
    assert soup(book / "index.html").select("article table a[href^='experiments/']")


@pytest.mark.slow
def test_every_executed_copy_is_a_page_and_links_to_it_lead_there(book):
    copies = [p for p in (ROOT / "figures").glob("*/*.ipynb") if p.parent.name in PROFILES]
    shown = [page_of(copy, ROOT).lstrip("/").removesuffix(".ipynb") for copy in copies]
    assert len({*shown}) == len(copies) and all((book / f"{page}.html").exists() for page in shown)
    links = {a["href"] for a in soup(book / "results.html").select("article a[href]")}
    assert {"experiments/table1.html", "experiments/cpu/table1.html"} <= links
    assert not [link for link in links if link.endswith(".ipynb")]


@pytest.mark.slow
def test_an_experiment_is_shown_as_it_was_executed(book):
    for path in (path for path in NOTEBOOKS if path.parent.name == "experiments"):
        copy, page = kept_copy(path, ROOT), soup(book / "experiments" / f"{path.stem}.html")
        if copy:
            outputs = [o for c in nbformat.read(copy, 4).cells for o in c.get("outputs", [])]
            pictures = [o for o in outputs if "image/png" in o.get("data", {})]
            assert len(page.select("article .cell_output img")) == len(pictures)
            assert copy.relative_to(ROOT).as_posix() in page.text


def test_the_richest_profile_is_chosen():
    where = lambda name: kept_copy(ROOT / "nbs" / "experiments" / f"{name}.ipynb", ROOT)
    assert where("table1") == ROOT / "figures" / "paper_bfloat16" / "table1.ipynb"
    assert where("quickstart").name == "quickstart_mnist_resnet20.ipynb"
    assert where("nothing") is None


def functions():
    found = {name: getattr(fisher_unlearn, name) for name in fisher_unlearn.__all__}
    return {name: one for name, one in found.items() if hasattr(one, "__code__")}


@pytest.mark.slow
@pytest.mark.parametrize("name", functions())
def test_the_reference_says_what_docments_say(book, name):
    "By fastcore's reading of them, which shares no code with ours."
    function = functions()[name]
    page = book / "api" / f"{function.__module__.removeprefix('fisher_unlearn.')}.html"
    entry = soup(page).find(id=f"{function.__module__}.{name}").parent
    rows = {
        row.td.text.strip(" \n*"): " ".join(row.text.split()) for row in entry.select("tbody tr")
    }
    for parameter, comment in docments(function, returns=False).items():
        if comment:
            # in a signature of one line, fastcore takes what comes back for the parameter's
            said = rows[parameter] + rows.get("returns", "")
            assert " ".join(comment.replace("`", "").split()) in said


SOURCE = '''"""What?"""
# File to edit: ../nbs/1_part/00_room.ipynb.
from typing import TypeVar

T = TypeVar("T")
LIMIT = 3  # of all


def one(a: int, b: int) -> int:  # what comes back
    "Do | it."


def two(
    a: int,  # (n, c) scores
    # said above,
    # in two lines
    b: str = "*",
    *,
    c: float | None = None,
    **more: int,  # the rest
) -> dict[str, int]:  # {name: count}
    "Do *both*."


@dataclass(frozen=True)
class Kind(Base):
    "A kind."

    share: Share = option(0.1, "of all")
    size: int = 2  # in pixels

    @property
    def area(self) -> int:
        "In pixels."

    def _own(self):
        "Nobody's business."


class _Own(BaseModel):
    kind: ClassVar[str]
    first: Seed = _value(None, "in (0, 1)")

    def __init__(self, **values): ...


class Settings(_Own):
    "Some."

    second: int  # of all
'''


@pytest.fixture
def read(tmp_path):
    (tmp_path / "room.py").write_text(SOURCE, encoding="utf-8")
    module = Module(tmp_path / "room.py")
    assert module.chapter() == "1_part/00_room" and module.doc == "What?"
    return {one.name: one for one in module.definitions()}


def comments(definition):
    return {p.name: p.comment for p in definition.parameters if p != "*"}


def test_a_comment_belongs_to_its_parameter(read):
    assert [*read] == ["LIMIT", "one", "two", "Kind", "_Own", "Settings"] and read[
        "LIMIT"
    ].text == "of all"
    assert comments(read["one"]) == {"a": "", "b": ""}
    assert read["one"].returned == "what comes back"
    assert comments(read["two"]) == {
        "a": "(n, c) scores",
        "b": "said above, in two lines",
        "c": "",
        "**more": "the rest",
    }
    assert read["two"].parameters[2] == "*" and read["two"].returned == "{name: count}"
    assert comments(read["Kind"]) == {"share": "of all", "size": "in pixels"}
    assert [(one.kind, one.name) for one in read["Kind"].methods] == [("property", "area")]


def test_a_class_has_the_fields_of_its_bases(read):
    whole = with_inherited(read["Settings"], read)
    assert comments(whole) == {"second": "of all"}
    open_base = replace(read["_Own"], parameters=read["Kind"].parameters)
    whole = with_inherited(read["Settings"], read | {"_Own": open_base})
    assert [*comments(whole)] == ["share", "size", "second"] and "_Own" not in entry(whole)
    called = "Settings(*, share: Share = 0.1, size: int = 2, second: int)"
    assert f"{{py:class}} {called}\n" in entry(whole)


def test_an_entry_is_a_signature_and_a_table(read):
    text = entry(read["two"])
    called = "two(a: int, b: str = '*', *, c: float | None = None, **more: int) -> dict[str, int]"
    assert text.startswith(f"::::::{{py:function}} {called}\n")
    assert "* - **a**\n  - `` int ``\n  - \n  - (n, c) scores" in text
    assert r"Do \*both\*." in text and r"**\*\*more**" in text
    assert "list-table" not in entry(read["Kind"].methods[0])


def test_a_notebook_is_read_without_directives_and_from_another_place():
    cells = ["#| hide\nexport()", "#| export\n\ndef f(): ...", "#| default_exp part.room", "1 + 1"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    notebook.cells.append(nbformat.v4.new_markdown_cell("[c](../C.md) [d](d.md) ../C.md"))
    shown = [cell.source for cell in readable(notebook, depth=0).cells]
    assert shown == ["def f(): ...", "1 + 1", "[c](C.md) [d](d.md) ../C.md"]


@pytest.mark.slow
def test_a_book_with_faults_fails(tmp_path):
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "docs", root / "docs")
    for folder in ("nbs", "figures", "fisher_unlearn"):
        (root / folder).mkdir()
    (root / "fisher_unlearn" / "room.py").write_text(SOURCE, encoding="utf-8")
    for name in (*PAGES, *FILES):
        (root / name).write_text(f"# {name}\n", encoding="utf-8")
    text = "# A book\n\nSee `4_methods/99_nothing`, [this](none.md) and ![that](figures/none.png)."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    nbformat.write(notebook, root / "nbs" / "index.ipynb")
    done = built(root, tmp_path / "book")
    assert done.returncode != 0
    assert all(one in done.stderr for one in ("99_nothing", "none.md", "none.png")), done.stderr
