"""Reading a config.json: each key is taken by the architecture, or known to change nothing, or refused."""

from collections.abc import Collection, Mapping
from typing import Any

from nvfp4jax.models.rope import Rope

# Keys that change nothing that a decoder computes in inference: training, tokens, serialization, what else is returned.
INERT = frozenset(
    """architectures model_type dtype torch_dtype transformers_version _name_or_path name_or_path _attn_implementation
    attn_implementation auto_map tokenizer_class use_cache initializer_range attention_dropout hidden_dropout
    embd_pdrop resid_pdrop attn_pdrop bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    unk_token_id output_attentions output_hidden_states output_router_logits return_dict return_dict_in_generate
    router_aux_loss_coef aux_loss_alpha seq_aux id2label label2id problem_type num_labels finetuning_task task_specific_params
    chunk_size_feed_forward use_bfloat16 torchscript gradient_checkpointing unsloth_version unsloth_fixed
    transformers.js_config is_llama_config quantization_config max_position_embeddings use_mamba_kernels
    temperature top_k top_p typical_p do_sample max_length min_length num_beams num_beam_groups num_return_sequences
    repetition_penalty length_penalty no_repeat_ngram_size early_stopping diversity_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
    remove_invalid_values output_scores encoder_no_repeat_ngram_size bad_words_ids prefix tf_legacy_loss
    ep_size base_model_ep_plan base_model_tp_plan base_model_pp_plan""".split()
)


def _text(value: Any) -> str:
    """The beginning of a value, on one printable line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value)[:80])


class Keys:
    """A config.json while an architecture reads it. Null counts as absent. Errors are one line that names the key."""

    def __init__(self, config: Mapping[str, Any]):
        self.given = config
        self._values = {key: value for key, value in config.items() if value is not None}
        self._taken: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._taken.add(key)
        return self._values.get(key, default)

    def count(self, *names: str, default: int | None = None) -> int:
        """An integer of at least 1, under the first of `names` that is there."""
        self._taken.update(names)
        key = next((name for name in names if name in self._values), None)
        if key is None and default is None:
            raise ValueError(f"config.json: key {' or '.join(map(repr, names))} is missing")
        value = default if key is None else self._values[key]
        if type(value) is not int or value < 1:
            raise ValueError(f"config.json: {key or names[0]}={_text(value)} must be an integer of at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"config.json: {key}={_text(value)} must be a number of at least 0")
        return float(value)

    def switch(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {key}={_text(value)} must be true or false")
        return value

    def only(self, key: str, *values: Any) -> None:
        """Refuses a key that is there with another value than `values`, which is all that is computed here."""
        value = self.get(key, values[0])
        if value not in values:
            known = " or ".join(repr(v) for v in values)
            raise ValueError(f"config.json: {key}={_text(value)!r} is not supported, only {known}")

    def full_attention(self, layers: int) -> None:
        """Refuses sliding windows and other layer types, in the spelling of Qwen's configs; their sizes change nothing then."""
        self.only("use_sliding_window", False)
        types = self.get("layer_types", ["full_attention"] * layers)
        if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
            raise ValueError(f"config.json: layer_types={_text(types)} is not supported, only 'full_attention'")
        if len(types) < layers:
            raise ValueError(f"config.json: layer_types names {len(types)} layers, num_hidden_layers={layers}")
        self._taken.update(("sliding_window", "max_window_layers"))

    def ignore(self, *names: str) -> None:
        """Keys that change nothing for this architecture."""
        self._taken.update(names)

    def heads(self) -> tuple[int, int]:
        """(query heads, key and value heads)"""
        heads = self.count("num_attention_heads")
        kv_heads = self.count("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            )
        return heads, kv_heads

    def head_dim(self, default: int) -> int:
        size = self.count("head_dim", default=default)
        if size % 2:
            raise ValueError(f"config.json: head_dim={size} must be even: rotary embeddings turn pairs")
        return size

    def rope(self, kinds: Collection[str] = ("default", "linear", "llama3", "yarn")) -> Rope:
        """`rope_parameters` (transformers 5), `rope_scaling` (4) or `rope_theta` alone.

        Of both objects transformers takes rope_scaling, and then no rope_theta from the other one: refused unless it
        has its own, or the two say the same.
        """
        tables = {}
        for key in ("rope_parameters", "rope_scaling"):
            table = self.get(key) or {}
            if not isinstance(table, Mapping):
                raise ValueError(f"config.json: {key}={_text(table)} must be an object")
            tables[key] = {name: value for name, value in table.items() if value is not None}
        theta = self.number("rope_theta", 0.0) if "rope_theta" in self._values else None
        self.only("partial_rotary_factor", 1.0)
        parameters, scaling = tables["rope_parameters"], tables["rope_scaling"]
        key = "rope_scaling" if scaling else "rope_parameters"
        if scaling and parameters and theta is None and "rope_theta" not in scaling:
            raise ValueError(
                "config.json: rope_scaling beside rope_parameters takes its place whole, and has no rope_theta; "
                "put all of it into rope_parameters"
            )
        return _rope(key, tables[key], theta, kinds, self.get("max_position_embeddings"))

    def decoder(self, head_dim: int | None = None) -> dict[str, Any]:
        """What the configs of Llama and of what is built like it have in common, by the field's name.

        head_dim: transformers' value where the key is absent; None: hidden size / heads.
        """
        hidden, (heads, kv_heads) = self.count("hidden_size"), self.heads()
        return dict(
            vocab_size=self.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.count("intermediate_size"),
            num_layers=self.count("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=self.head_dim(max(hidden // heads, 1) if head_dim is None else head_dim),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            rope=self.rope(),
            tie_word_embeddings=self.switch("tie_word_embeddings"),
        )

    def done(self, architecture: str) -> None:
        """Refuses keys that nobody has taken."""
        unknown = sorted(set(self._values) - self._taken - INERT)
        if unknown:
            value = _text(self._values[unknown[0]])
            more = f" (and {len(unknown) - 1} more: {', '.join(unknown[1:4])})" if len(unknown) > 1 else ""
            raise ValueError(
                f"config.json: key {unknown[0]!r}={value}{more} is not known for {architecture}: it may change what the "
                "model computes; remove it if it does not"
            )


_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "attention_factor", "truncate"),
}  # fmt: skip


def _rope(key: str, table: dict[str, Any], theta: float | None, kinds: Collection[str], trained: int | None) -> Rope:
    kind = table.pop("rope_type", table.get("type", "default"))
    table.pop("type", None)
    if table.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: {key}: partial_rotary_factor is not supported, only 1.0")
    known = _ROPE_FIELDS.get(kind) if isinstance(kind, str) and kind in kinds else None
    if known is None:
        raise ValueError(f"config.json: {key}: rope_type {_text(kind)!r} is not supported; known: {', '.join(kinds)}")
    theta = table.pop("rope_theta", 10000.0 if theta is None else theta)
    if unknown := sorted(set(table) - set(known)):
        raise ValueError(f"config.json: {key}={_text(table)}: {unknown[0]!r} means nothing to rope_type {kind!r}")
    fields = {name: table[name] for name in known if name in table}
    needed = {"factor"} if kind in ("linear", "yarn") else set()
    needed = {"factor", "low_freq_factor", "high_freq_factor"} if kind == "llama3" else needed
    if missing := sorted(needed - set(fields)):
        raise ValueError(f"config.json: {key}: rope_type {kind!r} needs {missing[0]!r}")
    if "original_max_position_embeddings" in known:
        fields.setdefault("original_max_position_embeddings", trained or 0)
    for name, value in [("rope_theta", theta), *fields.items()]:
        positive = name in ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "truncate" and isinstance(value, bool):
            continue
        if not numeric or not (value > 0 if positive else value >= 0):
            raise ValueError(f"config.json: {key}: {name}={_text(value)} must be a {'positive ' * positive}number")
    if kind == "yarn" and not theta > 1:
        raise ValueError(f"config.json: {key}: rope_theta={theta} must be above 1")
    if kind == "llama3" and not fields["low_freq_factor"] < fields["high_freq_factor"]:
        raise ValueError(f"config.json: {key}: low_freq_factor must be below high_freq_factor")
    kinds_of = {"original_max_position_embeddings": int, "truncate": bool}
    return Rope(theta=float(theta), kind=kind, **{name: kinds_of.get(name, float)(v) for name, v in fields.items()})
