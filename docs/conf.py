"""Sphinx, with MyST-NB as JAX and Flax have it: `sphinx-build -W docs docs/_build` after `pip install -e '.[docs]'`."""

import ast
import importlib.metadata
import inspect
import os
import re
import shutil
import sys
import textwrap
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
autodoc_preserve_defaults = True

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


def _is_python(text: str) -> bool:
    try:
        ast.parse(textwrap.dedent(text))
    except SyntaxError:
        return False
    return True


def _parameters(obj) -> list[str]:
    try:
        return [*inspect.signature(obj).parameters]
    except (TypeError, ValueError):
        return []


def plain_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Our docstrings are plain text: paragraphs, `name: what it is` with hanging lines, and indented code."""
    known = "|".join(_parameters(obj)) or "(?!)"
    out: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = paragraph.split("\n")
        if all(row.startswith("    ") for row in rows):
            out += [f".. code-block:: {'python' if _is_python(paragraph) else 'text'}", "", *rows, ""]
            continue
        items: list[tuple[str, str]] = []  # (name or nothing, text)
        for row in rows:
            named = re.match(r"[A-Za-z_]\w*(, \w+)*: ", row)
            # A sentence goes on in the next line, whatever that begins with.
            goes_on = bool(items) and not items[-1][1].endswith((".", ":", ";", ")"))
            if items and (goes_on or row.startswith("    ") or not (named or items[-1][0])):
                items[-1] = items[-1][0], f"{items[-1][1]} {row.strip()}"
            else:
                items.append((named[0][:-2], row[named.end() :]) if named else ("", row.strip()))
        for title, text in items:
            # What is said of a second parameter in the same line is an item, too.
            first, *others = re.split(rf"(?<=[.;]) (?=(?:{known})(?:, (?:{known}))*: )", text)
            for head, said in [(title, first), *(other.split(": ", 1) for other in others)]:
                said = _escaped(said.removesuffix(";"))
                out += [f"* **{_escaped(head)}**: {said}"] if head else ["", said, ""]
        out.append("")
    lines[:] = out


def setup(app) -> None:
    app.connect("autodoc-process-docstring", plain_docstring)
