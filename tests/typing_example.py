"""Checked by mypy, run by nobody: right uses of the public API pass; each `type: ignore` stands for a wrong one that is flagged.

An ignore that is not needed is an error (warn_unused_ignores), so a wrong use that passes is found.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nvfp4jax
from nvfp4jax import Rule, Static, Tensor, Token
from nvfp4jax.checkpoint.convert import Selection
from nvfp4jax.checkpoint.reload import Reader, publish


class Mine(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def right(model: Mine, x: jax.Array) -> None:
    rules = [
        Rule("head", skip=True),
        Rule(".*", scaling="token", weight_four_over_six="mse", implementation=("hopper", "xla")),
        Rule(".*", scaling=Tensor(pow2=True, axes=("data",), four_over_six="mae")),
        Rule(".*", scaling=None, implementation="xla"),
    ]
    qmodel: Mine = nvfp4jax.quantize_model(model, rules)  # the class stays: the call and attributes are checked
    y: jax.Array = qmodel(x)
    y = nvfp4jax.straight_through(qmodel, nnx.state(model))(x)
    calibrated: Mine = nvfp4jax.calibrate(qmodel, [np.ones((2, 4)), (y, None)], headroom=1.5, float_model=model)
    nnx.update(calibrated, nvfp4jax.quantize_params(model, qmodel, merge_lora=0.5))
    nvfp4jax.save_model("folder", calibrated)
    loaded: Mine = nvfp4jax.load_model("folder", like=qmodel)
    other: nnx.Module = nvfp4jax.load_model("folder", jnp.float32, scaling="static", scan_layers=True, rules=rules)
    publish("steps", 1, other)
    with Reader("steps", loaded, float_model=model) as reader:
        out = nvfp4jax.generate(loaded, np.array([[1, 2]]), max_new_tokens=2, weights=reader, key=jax.random.key(0), top_p=0.9)
    tokens: jax.Array = out.tokens
    packed = nvfp4jax.quantize(x, scaling=Static(jnp.float32(1)))
    z: jax.Array = nvfp4jax.matmul(tokens, packed, scaling=Token(), out_dtype=jnp.float32)
    nbytes: int = nvfp4jax.describe(qmodel).packed_bytes
    Selection(keep_first_n=1, exclude=("x",), four_over_six="mse", scaling="tensor_pow2")
    del z, nbytes


def wrong(model: Mine, x: jax.Array) -> None:
    Rule(".*", scaling="tokens")  # type: ignore[arg-type]
    Rule(".*", scaling=1.0)  # type: ignore[arg-type]
    Rule(".*", implementation="hoper")  # type: ignore[arg-type]
    Rule(".*", weight_four_over_six="mze")  # type: ignore[arg-type]
    Rule(".*", activation="token")  # type: ignore[call-arg]
    Token(four_over_six="mean")  # type: ignore[arg-type]
    Token(pow2=True)  # type: ignore[call-arg]
    Tensor(axes="data")  # type: ignore[arg-type]
    Selection(four_over_six="mes")  # type: ignore[arg-type]
    nvfp4jax.quantize_model(model, ".*")  # type: ignore[arg-type]
    nvfp4jax.quantize_model({"kernel": x}, Rule(".*"))  # type: ignore[type-var]
    _ = nvfp4jax.quantize_model(model, Rule(".*")).missing  # type: ignore[attr-defined]
    nvfp4jax.quantize(x, scaling="per_token")  # type: ignore[arg-type]
    nvfp4jax.matmul(x, x, implementation=("xla", "cuda"))  # type: ignore[arg-type]
    nvfp4jax.generate(model, np.array([[1]]))  # type: ignore[call-arg]
    nvfp4jax.generate(model, np.array([[1]]), max_new_tokens="4")  # type: ignore[arg-type]
    nvfp4jax.calibrate(model, x, headroom="2")  # type: ignore[arg-type]
    nvfp4jax.load_model("folder", like=model, scaling="token")  # type: ignore[call-overload]
    nvfp4jax.load_model("folder", scaling="tokens")  # type: ignore[call-overload]
    publish("steps", "1", model)  # type: ignore[arg-type]
    Reader("steps", x)  # type: ignore[arg-type]
