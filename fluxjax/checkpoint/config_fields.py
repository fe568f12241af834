"""Which values a config may hold: ten to a thousand times what any network of FLUX.1 has.

A larger value is that of a damaged file, and could take all of the memory.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.settings import Field, check_settings

JsonObject = dict[str, Any]
"""A JSON object: names, and values of JSON's types."""

SIZE = Field(kind="integer", least=1, most=1_000_000)
DEPTH = Field(kind="integer", least=0, most=1000)
VOCABULARY = Field(kind="integer", least=1, most=10_000_000)
LEVELS = Field(kind="integers", least=1, most=100_000)
RESNETS = Field(kind="integer", least=0, most=100)
NUMBER = Field(kind="number", least=-1e6, most=1e6)
EPS = Field(kind="number", least=0, most=1)
FLAG = Field(kind="boolean")
TEXT = Field(kind="text")
TOKEN = Field(kind="integer", least=0, most=10_000_000, optional=True)
_MOST_LEVELS = 16


def needed(field: Field) -> Field:
    """Return a field that the file must have."""
    return replace(field, required=True)


def nullable(field: Field) -> Field:
    """Return a field that may be null."""
    return replace(field, optional=True)


FLUX_FIELDS: Mapping[str, Field] = {
    "num_attention_heads": needed(Field(kind="integer", least=1, most=1000)),
    "attention_head_dim": needed(Field(kind="integer", least=1, most=10_000)),
    "in_channels": needed(SIZE),
    "out_channels": nullable(SIZE),
    "num_layers": needed(DEPTH),
    "num_single_layers": needed(DEPTH),
    "joint_attention_dim": needed(SIZE),
    "pooled_projection_dim": needed(SIZE),
    "axes_dims_rope": LEVELS,
    "guidance_embeds": FLAG,
}
CHROMA_FIELDS: Mapping[str, Field] = {
    "num_attention_heads": FLUX_FIELDS["num_attention_heads"],
    "attention_head_dim": FLUX_FIELDS["attention_head_dim"],
    "in_channels": needed(SIZE),
    "out_channels": nullable(SIZE),
    "num_layers": needed(DEPTH),
    "num_single_layers": needed(DEPTH),
    "joint_attention_dim": needed(SIZE),
    "axes_dims_rope": LEVELS,
    "approximator_num_channels": SIZE,
    "approximator_hidden_dim": SIZE,
    "approximator_layers": DEPTH,
}
VAE_FIELDS: Mapping[str, Field] = {
    "use_quant_conv": FLAG,
    "use_post_quant_conv": FLAG,
    "block_out_channels": needed(LEVELS),
    "layers_per_block": needed(RESNETS),
    "norm_num_groups": needed(SIZE),
    "latent_channels": needed(SIZE),
    "scaling_factor": needed(NUMBER),
    "shift_factor": nullable(NUMBER),
}
CLIP_FIELDS: Mapping[str, Field] = {
    "vocab_size": needed(VOCABULARY),
    "max_position_embeddings": SIZE,
    "hidden_size": needed(SIZE),
    "num_attention_heads": needed(SIZE),
    "num_hidden_layers": needed(DEPTH),
    "intermediate_size": needed(SIZE),
    "eos_token_id": TOKEN,
    "hidden_act": TEXT,
    "layer_norm_eps": EPS,
}
T5_FIELDS: Mapping[str, Field] = {
    "feed_forward_proj": TEXT,
    "vocab_size": needed(VOCABULARY),
    "d_model": needed(SIZE),
    "num_heads": needed(SIZE),
    "d_kv": needed(SIZE),
    "num_layers": needed(DEPTH),
    "d_ff": needed(SIZE),
    "relative_attention_num_buckets": SIZE,
    "relative_attention_max_distance": SIZE,
    "layer_norm_epsilon": EPS,
}


def read_fields(
    config: object,
    fields: Mapping[str, Field],
    *,
    place: str = "its settings",
    closed: bool = False,
) -> JsonObject:
    """Return the fields of a config, each checked; those that are lists have a bounded length.

    **Arguments:** `config`: what the JSON holds. `place`: what the error calls it. `closed`:
    whether other fields are an error; else they are left out.
    **Raises:** `WeightsError` that names the field.
    """
    values = check_settings(place, config, fields, closed=closed)
    for name, value in values.items():
        if isinstance(value, tuple) and not 1 <= len(value) <= _MOST_LEVELS:
            raise WeightsError(
                f"its settings: {name!r} should have 1 to {_MOST_LEVELS} entries, got {len(value)}."
            )
    return values
