"""Builds the book: `python docs/build.py _docs` leaves `_docs/html/index.html`. No notebook is
executed, no other machine is asked, and only that folder is written to."""

import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import build_main

from api import write_api
from chapters import write_chapters

ROOT = Path(__file__).parent.parent


def build(
    folder: Path,  # for `source`, what Sphinx reads, and `html`, what it makes
) -> int:  # 0, or that of an error or a warning
    "The book of this checkout."
    source, html = folder / "source", folder / "html"
    for old in (source, html):
        shutil.rmtree(old, ignore_errors=True)
    write_chapters(ROOT, source)
    write_api(ROOT, source / "api")
    strict = ["-q", "--fail-on-warning", "--keep-going", "--jobs", "2"]
    places = ["--conf-dir", str(ROOT / "docs"), "--doctree-dir", str(folder / "doctrees")]
    return build_main([*strict, "--fresh-env", *places, str(source), str(html)])


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]).resolve()))
