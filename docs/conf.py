"How Sphinx makes the book of what `build.py` has prepared."

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "fisher_unlearn"
author = "The fisher_unlearn authors"
html_title = project
extensions = ["myst_nb", "links"]
exclude_patterns = ["figures"]
smartquotes = False  # what stands in quotes is often a value

nb_execution_mode = "off"  # a notebook's outputs are those that it was stored with
nb_render_markdown_format = "myst"  # an output's tables are tables, as those in prose are
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]

# MathJax comes with the book: pages ask nobody else.
html_static_path = [
    "static",
    str(Path(find_spec("sphinx-mathjax-offline").origin).parent / "static"),
]
mathjax_path = "mathjax/tex-chtml.js"

html_theme = "sphinx_book_theme"
html_css_files = ["book.css"]
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
html_show_sphinx = html_show_copyright = html_copy_source = False

add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
