"""What each scaling costs a real trained model: perplexity and KL against bfloat16 on real text.

    python benchmarks/smollm2.py ~/smollm2; python benchmarks/bench_accuracy.py ~/smollm2 --tokens 16384

Text in windows that the model sees alone; all linear layers are swapped, a tied head stays bfloat16. Every mode sees each window before
the next is taken, so a run can be stopped at any window: the table so far is in the JSON (`--out`), and goes on with `--resume`.
Text: the Python language reference that every Python ships (pydoc_data.topics), or --text FILE. Static scales come from --calibration
tokens of the end of the text, which is not scored.
"""

import argparse
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

import nvfp4jax
from nvfp4jax import Rule, Token
from nvfp4jax.demo import one_level
from nvfp4jax.layers import InputAmax
from nvfp4jax.models import stack_layers

# Name -> (scaling, four-over-six of the weights, first and last layers that stay bfloat16).
MODES = {
    "weights only": (None, None, 0),
    "weights only, four-over-six": (None, "mse", 0),
    "token": ("token", None, 0),
    "token, four-over-six on both sides": (Token(four_over_six="mse"), "mse", 0),
    "token, first and last two layers kept": ("token", None, 2),
    "tensor": ("tensor", None, 0),
    "tensor_pow2": ("tensor_pow2", None, 0),
    "static": ("static", None, 0),
    "delayed": ("delayed", None, 0),
    "one level": ("token", None, 0),
}


def quantized(name: str, model: nnx.Module, calibration: np.ndarray) -> nnx.Module:
    """A mode's model, equal layers stacked, which compiles once for all of them."""
    scaling, four_over_six, kept = MODES[name]
    depth = len(model.layers)
    skip = [Rule(rf"layers/{i}/.*", skip=True) for i in range(depth) if i < kept or i >= depth - kept]
    rules = [*skip, Rule(r"layers/.*", scaling=scaling, weight_four_over_six=four_over_six)]
    qmodel = nvfp4jax.quantize_model(model, rules)
    if name == "static":
        qmodel = nvfp4jax.calibrate(qmodel, [calibration], float_model=model)
    if name == "one level":
        qmodel = one_level(qmodel, model)
    return stack_layers(qmodel)


@jax.jit
def forward(graphdef, params, ids):
    """(logits [B, T, V], what delayed layers have seen)"""
    model = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    logits = model(ids, positions).logits
    return logits, nnx.state(model, InputAmax)


@jax.jit
def score(reference, logits, ids):
    """Of each window: (negative log likelihood, KL of the reference to it, tokens whose likeliest is the reference's), sums."""
    reference, logits = (jax.nn.log_softmax(x[:, :-1].astype(jnp.float32), axis=-1) for x in (reference, logits))
    nll = -jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    kl = (jnp.exp(reference) * (reference - logits)).sum(-1)
    same = reference.argmax(-1) == logits.argmax(-1)
    return nll.sum(-1), kl.sum(-1), same.sum(-1)


def table(sums: dict[str, list[list[float]]], count: int) -> list[dict]:
    """A row a mode; the interval of the ratio of perplexities: windows are drawn again 2,000 times."""
    rows, base = [], np.asarray(sums["bf16"])[:, 0]
    draws = np.random.default_rng(0).integers(0, len(base), (2000, len(base)))
    for name, values in sums.items():
        values = np.asarray(values)
        ratio = (values[:, 0] - base) / count
        low, high = np.exp(np.percentile(ratio[draws].mean(1), [2.5, 97.5]))
        rows.append({
            "mode": name, "tokens": len(values) * count, "perplexity": math.exp(values[:, 0].mean() / count),
            "over_bf16": math.exp(ratio.mean()), "interval": [low, high], "kl": values[:, 1].mean() / count, "same_top1": values[:, 2].mean() / count,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--out", type=Path, default=Path("accuracy.json"))
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    if arguments.text is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        text = arguments.text.read_text()
    ids = np.asarray(Tokenizer.from_file(str(arguments.folder / "tokenizer.json")).encode(text).ids, np.int32)
    size = arguments.window
    if len(ids) < arguments.tokens + arguments.calibration:
        parser.error(f"the text has {len(ids)} tokens")
    calibration = ids[-(arguments.calibration // size) * size :].reshape(-1, size)
    windows = ids[: len(ids) - arguments.calibration]
    windows = windows[: len(windows) // size * size].reshape(-1, size)
    chosen = np.random.default_rng(0).permutation(len(windows))[: -(-arguments.tokens // size)]

    model = nvfp4jax.load_model(arguments.folder)
    models = {"bf16": nnx.split(stack_layers(model))}
    models |= {name: nnx.split(quantized(name, model, calibration)) for name in arguments.modes}
    sums: dict[str, list[list[float]]] = {name: [] for name in models}
    if arguments.resume:
        sums |= json.loads(arguments.out.read_text())["sums"]
    for number, index in enumerate(chosen):
        if number < len(sums["bf16"]):
            continue
        window, reference = jnp.asarray(windows[index][None]), None
        for name, (graphdef, params) in models.items():
            logits, seen = forward(graphdef, params, window)
            reference = logits if reference is None else reference
            sums[name].append([float(v[0]) for v in score(reference, logits, window)])
            if name == "delayed":
                models[name] = graphdef, nnx.merge_state(params, seen)
        rows = table(sums, size - 1)
        arguments.out.write_text(json.dumps({"rows": rows, "sums": sums}))
        print(f"window {number + 1} of {len(chosen)}: " + ", ".join(f"{r['mode']} {r['perplexity']:.2f}" for r in rows), flush=True)
    print("| mode | perplexity | over bf16 (95 %) | KL | same top-1 |\n|---|---|---|---|---|")
    for r in table(sums, size - 1):
        low, high = r["interval"]
        print(f"| {r['mode']} | {r['perplexity']:.2f} | {r['over_bf16']:.3f} ({low:.3f} to {high:.3f}) | {r['kl']:.3f} | {r['same_top1']:.3f} |")


if __name__ == "__main__":
    main()
