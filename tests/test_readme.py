"""The README's Python runs as pasted, one snippet after the other, from the root of a clone.

XLA optimizes nothing here: that the snippets run is what is asked, and most of the time is spent in compiling them.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_snippets(tmp_path, monkeypatch, unchecked, request):
    import jax

    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(snippets) >= 4
    names: dict = {}
    jax.config.update("jax_disable_most_optimizations", True)
    request.addfinalizer(lambda: jax.config.update("jax_disable_most_optimizations", False))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for snippet in snippets:
            exec(compile(snippet, "README.md", "exec"), names)
    assert names["out"].weight_versions.shape == (2, 8) and names["gradients"]


def test_the_api_page_has_every_public_name():
    import nvfp4jax

    page = (ROOT / "docs" / "api.md").read_text()
    assert not [name for name in nvfp4jax.__all__ if not re.search(rf"\b{name}\b", page)]
