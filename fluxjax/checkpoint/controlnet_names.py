"""The key tables of ControlNets: XLabs' own names, and diffusers' for all of them."""

from fluxjax.checkpoint.dialect import Dialect, Row
from fluxjax.checkpoint.names import FLUX_BFL, FLUX_DIFFUSERS

_HINT_CONVS = 8


def _transformer_rows(dialect: Dialect) -> tuple[Row, ...]:
    """Return the rows of the layers that a ControlNet shares with the transformer."""
    return tuple(row for row in dialect.rows if not row.name.startswith("final."))


def _hint_rows(keys: list[str]) -> tuple[Row, ...]:
    """Return the rows of the convolutions that reduce an image, in their order."""
    rows = []
    for number, key in enumerate(keys):
        rows.append(Row(f"input_hint_block.{key}.{{p}}", f"hint.convs.{number}.{{p}}"))
    return tuple(rows)


CONTROLNET_XLABS = Dialect(
    "xlabs",
    "input_hint_block.0.weight",
    (
        *_transformer_rows(FLUX_BFL),
        Row("controlnet_blocks.{i}.{p}", "double_residual.{i}.{p}"),
        Row("pos_embed_input.{p}", "condition_in.{p}"),
        # The activations between the convolutions have the odd numbers.
        *_hint_rows([str(2 * number) for number in range(_HINT_CONVS)]),
    ),
)

CONTROLNET_DIFFUSERS = Dialect(
    "diffusers",
    "controlnet_x_embedder.weight",
    (
        *_transformer_rows(FLUX_DIFFUSERS),
        Row("controlnet_blocks.{i}.{p}", "double_residual.{i}.{p}"),
        Row("controlnet_single_blocks.{i}.{p}", "single_residual.{i}.{p}"),
        Row("controlnet_mode_embedder.weight", "mode_in.weight"),
        Row("controlnet_x_embedder.{p}", "condition_in.{p}"),
        *_hint_rows(
            ["conv_in", *(f"blocks.{number}" for number in range(_HINT_CONVS - 2)), "conv_out"]
        ),
    ),
)
