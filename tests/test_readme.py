"""The README's Python runs as pasted, one snippet after the other, from the root of a clone."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_snippets(tmp_path, monkeypatch, unchecked):
    import jax

    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(snippets) >= 4
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for snippet in snippets:
            exec(compile(snippet, "README.md", "exec"), names)
    assert names["out"].weight_versions.shape == (2, 8) and names["gradients"]
