"""The key tables of Chroma: its authors' names, which are BFL's for FLUX's blocks, and diffusers'."""

from fluxjax.checkpoint.dialect import Dialect, Row
from fluxjax.checkpoint.names import FLUX_BFL, FLUX_DIFFUSERS

APPROXIMATOR = "distilled_guidance_layer"
_EMBEDDERS = ("time_in.", "vector_in.", "guidance_in.")


def _block_rows(dialect: Dialect) -> tuple[Row, ...]:
    """Return the rows of what Chroma has of the FLUX transformer: no embedders, no modulation."""
    rows = []
    for row in dialect.rows:
        if not row.name.startswith(_EMBEDDERS) and "modulation" not in row.name:
            rows.append(row)
    return tuple(rows)


def _approximator_rows(first: str, second: str, scale: str) -> tuple[Row, ...]:
    """Return the rows of the approximator.

    **Arguments:** `first`, `second`: the layers of an MLP. `scale`: of a norm.
    """
    return (
        Row(f"{APPROXIMATOR}.in_proj.{{p}}", "approximator_in.{p}"),
        Row(f"{APPROXIMATOR}.layers.{{i}}.{first}.{{p}}", "approximator.{i}.mlp.up.{p}"),
        Row(f"{APPROXIMATOR}.layers.{{i}}.{second}.{{p}}", "approximator.{i}.mlp.down.{p}"),
        Row(f"{APPROXIMATOR}.norms.{{i}}.{scale}", "approximator.{i}.norm.scale"),
        Row(f"{APPROXIMATOR}.out_proj.{{p}}", "approximator_out.{p}"),
    )


APPROXIMATOR_BFL = _approximator_rows("in_layer", "out_layer", "scale")
APPROXIMATOR_DIFFUSERS = _approximator_rows("linear_1", "linear_2", "weight")

CHROMA_BFL = Dialect(
    "bfl",
    f"{APPROXIMATOR}.layers.0.in_layer.weight",
    (*_block_rows(FLUX_BFL), *APPROXIMATOR_BFL),
)
CHROMA_DIFFUSERS = Dialect(
    "diffusers",
    f"{APPROXIMATOR}.layers.0.linear_1.weight",
    (*_block_rows(FLUX_DIFFUSERS), *APPROXIMATOR_DIFFUSERS),
)
