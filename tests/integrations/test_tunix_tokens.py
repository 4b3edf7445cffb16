"""Which ids the rollout engine takes for tokens; without google-tunix, so that it runs everywhere."""

import numpy as np
import pytest

from integrations import tunix_stand_in

PAD, EOS, OTHER = 9, 1, 2


@pytest.mark.parametrize("pad, ends, prompt, answer, expected", [
    (PAD, [EOS], [PAD, 5, 6], [7, EOS, PAD, PAD], "011 1100"),
    (PAD, [EOS], [PAD, 5, 6], [7, 8, PAD, PAD], "011 1100"),  # cut off, no stop token
    (PAD, [EOS], [PAD, 5, PAD], [7, PAD, 8, EOS], "011 1111"),  # a pad that is a token
    (EOS, [EOS], [EOS, 5, 6], [7, 8, EOS, EOS], "011 1110"),  # a tokenizer without a pad
    (EOS, [EOS], [5, EOS, 6], [7, 8, 7, 8], "111 1111"),
    (EOS, [EOS], [5, 6, 6], [EOS, EOS, EOS, EOS], "111 1000"),
    (EOS, [OTHER], [5, 6, 6], [7, OTHER, EOS, EOS], "111 1100"),
    (EOS, [EOS, OTHER], [5, 6, 6], [7, OTHER, EOS, EOS], "111 1100"),
])  # fmt: skip
def test_tokens_and_padding(pad, ends, prompt, answer, expected):
    found = tunix_stand_in.rollout_module()._tokens_in(np.array([prompt]), np.array([answer]), pad, ends)
    assert "".join(map(str, found[0].astype(int))) == expected.replace(" ", "")
