"""Every name that a module reads exists: F821 is off for jaxtyping's strings, and a file that was split may forget an import."""

import builtins
import symtable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("nvfp4jax", "kernels", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


def scopes(table: symtable.SymbolTable) -> list[symtable.SymbolTable]:
    return [table] + [each for child in table.get_children() for each in scopes(child)]


def undefined(text: str) -> set[str]:
    """The global names that are read and never made; annotations in strings are none."""
    top = symtable.symtable(text, "", "exec")
    made = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    made |= {s.get_name() for table in scopes(top) for s in table.get_symbols() if s.is_declared_global() and s.is_assigned()}
    read = {s.get_name() for table in scopes(top) for s in table.get_symbols() if s.is_referenced() and s.is_global()}
    return read - made - set(dir(builtins)) - {"__file__", "__name__", "__path__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_that_is_read_exists(path):
    assert not undefined(path.read_text())


def test_a_name_without_its_import_is_found():
    assert undefined("from a import b\ndef f(x: 'Float[A, \"n\"]'):\n    return isinstance(b(x), Sequence)") == {"Sequence"}
