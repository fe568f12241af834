"""The widths of the transformer that an adapter was made for, from the shapes of its changes.

An adapter file does not say which transformer it is for. To fuse the parts of a weight, or to cut
a fused weight into its parts, their numbers of rows are needed: the width for each of q, k and v,
and the width of the MLP. Most layers show one of them or both.
"""

from collections.abc import Iterator, Mapping, Sequence

from fluxjax.checkpoint.fused import FusedRows, fused_rows
from fluxjax.lora.adapter import Change
from fluxjax.nets.flux_config import FluxConfig

# Layers of a block by the name of their weight: those that take the width, and those that give it.
_WIDTH_IN = ("qkv.weight", "linear1.weight", "mlp.up.weight", "modulation.weight")
_WIDTH_OUT = ("out", "mlp.down", "linear2")


def adapter_parts(changes: Mapping[str, Sequence[Change]], config: FluxConfig | None) -> FusedRows:
    """Return the rows of the parts of the fused weights that an adapter of the transformer changes.

    **Arguments:**

    - `changes`: of the transformer, by the name of the weight.
    - `config`: of the transformer; None to take the widths from the shapes of the changes. Where
      no shape shows a width, it is in the proportions of FLUX.1.
    """
    if config is not None:
        return fused_rows(config.width, config.mlp_width)
    flux1 = FluxConfig()
    width = next(_widths(changes), flux1.width)
    flux1_mlp_width = flux1.mlp_width * width // flux1.width
    return fused_rows(width, next(_mlp_widths(changes, width), flux1_mlp_width))


def _widths(changes: Mapping[str, Sequence[Change]]) -> Iterator[int]:
    """Yield the transformer's width from every change that shows it.

    **Arguments:**

    - `changes`: by the name of the weight.
    """
    for name, change in _block_changes(changes):
        rows = change.term.rows
        columns = change.term.columns
        # Without ".weight" or ".bias", as both have the same rows.
        layer = name.rpartition(".")[0]
        if name.endswith(_WIDTH_IN) and columns is not None:
            yield columns
        elif rows is not None and (layer.endswith(_WIDTH_OUT) or change.part in ("q", "k", "v")):
            yield rows
        elif rows is not None and (change.part == "qkv" or layer.endswith(".qkv")):
            yield rows // 3


def _mlp_widths(changes: Mapping[str, Sequence[Change]], width: int) -> Iterator[int]:
    """Yield the rows of the MLP in the fused `linear1` from every change that shows them.

    The double blocks' MLPs are as wide as those of the single blocks.

    **Arguments:**

    - `changes`: by the name of the weight.
    - `width`: of the transformer.
    """
    for name, change in _block_changes(changes):
        rows = change.term.rows
        columns = change.term.columns
        layer = name.rpartition(".")[0]
        if rows is not None and (layer.endswith(".mlp.up") or change.part == "mlp"):
            yield rows
        # The fused weights of a single block: linear1 gives q, k, v and the MLP's hidden features,
        # and linear2 takes the attention's output and these features.
        elif rows is not None and layer.endswith(".linear1") and change.part is None:
            yield rows - 3 * width
        elif columns is not None and layer.endswith(".mlp.down"):
            yield columns
        elif columns is not None and layer.endswith(".linear2"):
            yield columns - width


def _block_changes(changes: Mapping[str, Sequence[Change]]) -> Iterator[tuple[str, Change]]:
    """Yield every change of a block, with the name of its weight."""
    for name, of_weight in changes.items():
        if name.startswith(("double.", "single.")):
            for change in of_weight:
                yield name, change
