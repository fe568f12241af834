"""The key tables of Chroma: its authors' names, BFL's for FLUX's blocks, and diffusers'."""

from fluxjax.checkpoint.dialect import Dialect, Row
from fluxjax.checkpoint.names import FLUX_BFL, FLUX_DIFFUSERS

_APPROXIMATOR = "distilled_guidance_layer"
EMBEDDERS = ("time_in.", "vector_in.", "guidance_in.")
"""Prefixes of FLUX layers that Chroma does not have; it has no modulation layers either."""


def _block_rows(dialect: Dialect) -> tuple[Row, ...]:
    """Return the rows of what Chroma has of the FLUX transformer: no embedders, no modulation."""
    rows = []
    for row in dialect.rows:
        if not row.name.startswith(EMBEDDERS) and "modulation" not in row.name:
            rows.append(row)
    return tuple(rows)


def _approximator_rows(first: str, second: str, scale: str) -> tuple[Row, ...]:
    """Return the rows of the approximator.

    **Arguments:** `first`, `second`: the layers of an MLP. `scale`: of a norm.
    """
    return (
        Row(f"{_APPROXIMATOR}.in_proj.{{p}}", "approximator_in.{p}"),
        Row(f"{_APPROXIMATOR}.layers.{{i}}.{first}.{{p}}", "approximator.{i}.mlp.up.{p}"),
        Row(f"{_APPROXIMATOR}.layers.{{i}}.{second}.{{p}}", "approximator.{i}.mlp.down.{p}"),
        Row(f"{_APPROXIMATOR}.norms.{{i}}.{scale}", "approximator.{i}.norm.scale"),
        Row(f"{_APPROXIMATOR}.out_proj.{{p}}", "approximator_out.{p}"),
    )


_APPROXIMATOR_BFL = _approximator_rows("in_layer", "out_layer", "scale")
_APPROXIMATOR_DIFFUSERS = _approximator_rows("linear_1", "linear_2", "weight")

# For adapters, which name the modules of both transformers alike.
TRANSFORMER_BFL = Dialect("bfl", FLUX_BFL.marker, (*FLUX_BFL.rows, *_APPROXIMATOR_BFL))
TRANSFORMER_DIFFUSERS = Dialect(
    "diffusers", FLUX_DIFFUSERS.marker, (*FLUX_DIFFUSERS.rows, *_APPROXIMATOR_DIFFUSERS)
)

CHROMA_BFL = Dialect(
    "bfl",
    f"{_APPROXIMATOR}.layers.0.in_layer.weight",
    (*_block_rows(FLUX_BFL), *_APPROXIMATOR_BFL),
)
CHROMA_DIFFUSERS = Dialect(
    "diffusers",
    f"{_APPROXIMATOR}.layers.0.linear_1.weight",
    (*_block_rows(FLUX_DIFFUSERS), *_APPROXIMATOR_DIFFUSERS),
)
