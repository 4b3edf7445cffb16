"""Every family against transformers, on the folders that tests/make_models.py makes; configs that are refused; registration."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import loading
from nvfp4jax import models
from nvfp4jax.models import family
from nvfp4jax.models.rope import Rope
from nvfp4jax.rollout import generate

FOLDERS = {"llama2-tiny": False, "llama3-tiny": True, "mistral-tiny": True, "qwen2-tiny": False}  # scanned or not


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_greedy_tokens_of_transformers(name):
    model = loading.load(name, scan_layers=FOLDERS[name])
    ids, valid, logits = loading.right_padded(name)
    found = np.asarray(loading.run(model, ids, valid).logits)
    assert np.abs(found - logits)[valid].max() < 2e-5 * np.abs(logits).max()
    ref = loading.reference(name)
    out = generate(model, ref["input_ids"], ref["attention_mask"], max_new_tokens=16)
    np.testing.assert_array_equal(out.tokens, ref["greedy_16"])


def test_rotary_scaling_counts():
    """Without their scaling the two scaled folders compute something else: the oracle sees it."""
    for name in ("llama3-tiny", "qwen2-tiny"):
        model = nnx.clone(loading.load(name, scan_layers=FOLDERS[name]))
        ids, valid, logits = loading.right_padded(name)
        model.config = dataclasses.replace(model.config, rope=Rope(theta=model.config.rope.theta))
        assert np.abs(np.asarray(loading.run(model, ids, valid).logits) - logits)[valid].max() > 1e-2


REFUSED = [
    ("llama3-tiny", dict(pretraining_tp=2), "pretraining_tp='2'"),
    ("llama3-tiny", dict(rope_interleaved=True), "rope_interleaved='True'"),
    ("llama3-tiny", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("llama3-tiny", dict(model_type="gemma"), "model_type='gemma'"),
    ("llama3-tiny", dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "'llama3' needs 'high_freq_factor'"),
    ("llama3-tiny", dict(rope_parameters={"rope_type": "linear", "factor": -1}), "factor=-1 must be a positive number"),
    ("llama3-tiny", dict(attn_logit_softcapping=50.0), "'attn_logit_softcapping'=50.0 is not known for Llama"),
    ("mistral-tiny", dict(sliding_window=4096), "sliding_window=4096 is not supported"),
    ("mistral-tiny", dict(attention_bias=True), "'attention_bias'=True is not known for Mistral"),
    ("qwen2-tiny", dict(use_sliding_window=True), "use_sliding_window"),
    ("qwen2-tiny", dict(use_mrope=True), "use_mrope"),
    ("qwen2-tiny", dict(num_hidden_layers=9), "layer_types names 3 layers"),
]


@pytest.mark.parametrize("name, change, words", REFUSED)
def test_configs_that_are_not_computed(name, change, words):
    models.build(loading.config(name))
    with pytest.raises(ValueError, match=words) as error:
        models.build(loading.config(name) | change)
    assert "\n" not in str(error.value)


def test_a_window_that_is_absent_is_no_null():
    config = loading.config("mistral-tiny")
    del config["sliding_window"]
    with pytest.raises(ValueError, match="sliding_window=4096 .where the key is absent."):
        models.build(config)


def test_a_family_of_ones_own():
    with pytest.raises(ValueError, match="MineForCausalLM.*known: .*LlamaForCausalLM"):
        models.build({"architectures": ["MineForCausalLM"]})
    llama = models.family_of({"architectures": ["LlamaForCausalLM"]})
    mine = dataclasses.replace(llama, architectures=("MineForCausalLM",), prefix="backbone.", bare=("lm_head", "norm"))
    models.register(mine)
    try:
        config = loading.config("llama3-tiny") | {"architectures": ["MineForCausalLM"]}
        assert models.build(json.loads(json.dumps(config)), jnp.float32).config == loading.load("llama3-tiny", scan_layers=True).config
        assert mine.tensor_name(("layers", 0, "mlp", "up_proj", "kernel")) == "backbone.layers.0.mlp.up_proj.weight"
        assert mine.tensor_name(("norm", "scale")) == "norm.weight" and mine.module_name(("lm_head",)) == "lm_head"
        with pytest.raises(ValueError, match="registered already"):
            models.register(dataclasses.replace(mine, prefix=""))
    finally:
        del family._families["MineForCausalLM"]
