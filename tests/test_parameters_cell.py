"""What the experiment notebooks are given: each refuses, in its first line, names that it
doesn't declare and values that make no sense."""

import nbformat
import papermill
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from fisher_unlearn.lab.notebook import check_parameters, notebooks
from fisher_unlearn.lab.settings import parameter_names, parameter_types
from fisher_unlearn.lab.paper import plain

NAMES = sorted(notebooks())
PROFILED = [name for name in NAMES if name != "forget_your_own"]  # which has no runs of the paper
LINE = "from fisher_unlearn.lab.notebook import check_parameters\n\ncheck_parameters(globals())"


def begun(name, **given):
    """The namespace of a notebook whose first cells were executed as IPython does, with
    parameters put in as papermill does."""
    nb = load_notebook_node(str(notebooks()[name]))
    nb = parameterize_notebook(nb, given) if given else nb
    sources = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    space = {"In": [""]}
    for source in sources[: sources.index(LINE) + 1]:
        space["In"].append(source)
        exec(source, space)
    return space


@pytest.mark.parametrize("name", NAMES)
def test_the_line_stands_behind_the_parameters(name):
    cells = [cell for cell in nbformat.read(notebooks()[name], 4).cells if cell.cell_type == "code"]
    assert "parameters" in cells[0].metadata.tags and cells[1].source == LINE


def test_the_notebook_of_one_run_has_every_parameter_as_its_type_says():
    "Names, their order, and what they mean; a list of choices may be left out where it is long."
    known = papermill.inspect_notebook(str(notebooks()["unlearn"]))
    assert [n for n in known if n not in ("profile", "runs", "root")] == [*parameter_names()]
    for name, (_, comment) in parameter_types().items():
        assert comment and known[name]["help"] in (comment, comment.rpartition(" (")[0]), name


def test_the_notebook_of_ones_own_takes_its_names_and_refuses_others():
    begun("forget_your_own", classes="cat", recommend=True)
    with pytest.raises(ValueError, match="unknown parameter 'clases'"):
        begun("forget_your_own", clases="cat")


@pytest.mark.parametrize("name", PROFILED)
def test_every_notebook_takes_its_own_names_and_refuses_others(name):
    known = papermill.inspect_notebook(str(notebooks()[name]))
    begun(name)
    begun(name, profile="cpu", **{n: "here" for n in ("runs", "root", "figures") if n in known})
    for unknown in ("sedes", "profil", "parameters", "lissa_epoch"):
        with pytest.raises(ValueError, match=f"^unknown parameter '{unknown}'.*Known: profile"):
            begun(name, **{unknown: 3})
    with pytest.raises(ValueError, match="unknown profile 'fast'"):
        begun(name, profile="fast")
    with pytest.raises(TypeError, match="`profile` is 3"):
        begun(name, profile=3)
    foreign = next(n for n in ("seed", "seeds", "ratio", "lissa_damping") if n not in known)
    with pytest.raises(ValueError, match=f"unknown parameter '{foreign}'"):
        begun(name, **{foreign: 1})


@pytest.mark.parametrize(
    "given, message",
    [
        ({"seeds": 666}, "`seeds` is 666"),
        ({"seeds": [1.5]}, "`seeds"),
        ({"seeds": ["x"]}, "`seeds"),
        ({"seeds": [-1]}, "`seeds"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"seeds": [True]}, "`seeds"),
        ({"runs": ""}, "`runs` is empty"),
        ({"figures": 3}, "`figures` is 3"),
        ({"on": 3}, "`on` is 3"),
        ({"on": ""}, "`on` is empty"),
    ],
)
def test_values_that_only_notebooks_have(given, message):
    with pytest.raises((TypeError, ValueError)) as refused:
        begun("table1", **given)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_notebook_in_jupyter_has_no_injected_cell():
    check_parameters(
        {"profile": "quick", "seeds": [1, 2], "In": ["", "profile = 'quick'"], "mine": 3}
    )


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "a|b",
        "**bold**",
        "_it_",
        "[x](http://y)",
        "`code`",
        "two\nlines\r# title",
        "\\",
        "~~gone~~",
    ],
)
def test_text_of_records_is_no_markdown(text):
    from markdown_it import MarkdownIt

    html = (
        MarkdownIt("commonmark")
        .enable(["table", "strikethrough"])
        .render(f"| a |\n|---|\n| {plain(text)} |\n")
    )
    inside = html.split("<td>")[1].split("</td>")[0]
    assert "<" not in inside and html.count("<td>") == 1 and html.count("<tr>") == 2


def test_names_with_underscores_stay_as_they_are():
    assert (
        plain("fisher_mask, 2.14.1+cpu (AMD EPYC, AVX512)")
        == "fisher_mask, 2.14.1+cpu (AMD EPYC, AVX512)"
    )
