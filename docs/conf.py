"""Sphinx, with MyST-NB as JAX and Flax have it: `sphinx-build -W docs docs/_build` after `pip install -e '.[docs]'`."""

import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

project = "nvfp4jax"
author = "the nvfp4jax authors"
version = release = importlib.metadata.version("nvfp4jax")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "sphinx_book_theme"
html_title = "nvfp4jax"
# The sidebar has the search; a bar above it would hold nothing else.
html_theme_options = {"show_navbar_depth": 2, "home_page_in_toc": True, "navbar_persistent": []}

html_static_path = ["_static"]
html_css_files = ["narrow.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"

# The notebooks lie beside the docs and are shown from a copy; NVFP4JAX_DOCS_EXECUTE=auto runs them for their pictures.
nb_execution_mode = os.environ.get("NVFP4JAX_DOCS_EXECUTE", "off")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
_here = Path(__file__).parent
_copies = _here / "notebooks"
_copies.mkdir(exist_ok=True)
for _notebook in sorted((_here.parent / "notebooks").glob("*.ipynb")):
    shutil.copyfile(_notebook, _copies / _notebook.name)

sys.path.insert(0, str(_here))
import make_plots  # noqa: E402

make_plots.main()


def _escaped(text: str) -> str:
    """Plain text as reStructuredText; what stands in single backquotes is code."""
    parts = text.split("`")
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{part}``" + ("\\ " if parts[i + 1 :] and parts[i + 1][:1].isalnum() else "")
        else:
            parts[i] = re.sub(r"([\\*|_])", r"\\\1", part)
    return "".join(parts)


def plain_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Our docstrings are plain text: paragraphs, `name: what it is` with hanging lines, and indented code."""
    out: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = paragraph.split("\n")
        if all(row.startswith("    ") for row in rows):
            out += ["::", "", *rows, ""]
            continue
        items: list[tuple[str, str]] = []  # (name or nothing, text)
        for row in rows:
            named = re.match(r"[A-Za-z_]\w*(, \w+)*: ", row)
            if items and (row.startswith("    ") or not (named or items[-1][0])):
                items[-1] = items[-1][0], f"{items[-1][1]} {row.strip()}"
            else:
                items.append((named[0][:-2], row[named.end() :]) if named else ("", row.strip()))
        for title, text in items:
            out += [f"* **{_escaped(title)}**: {_escaped(text)}"] if title else ["", _escaped(text), ""]
        out.append("")
    lines[:] = out


def setup(app) -> None:
    app.connect("autodoc-process-docstring", plain_docstring)
