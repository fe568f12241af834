"""An adapter in memory: which weights of which networks it changes, and how.

Files of all formats become the same `Lora`, so that merging, attaching and writing do not depend
on where an adapter comes from.
"""

import equinox as eqx

from fluxjax.lora.terms import Term


class Change(eqx.Module):
    """A term and the rows of the weight that it changes.

    - `term`: what is added to these rows.
    - `part`: the part of a fused weight ("q", "k", "v", "qkv" or "mlp"); None for the whole
      weight.
    - `swap`: whether the term has the two halves of these rows in the other order, as diffusers
      has those of the last modulation.
    """

    term: Term
    part: str | None = eqx.field(static=True)
    swap: bool = eqx.field(static=True)


class Lora(eqx.Module):
    """An adapter of any kind (LoRA, LoKr, LoHa, DoRA, …), as a pytree of arrays.

    - `changes`: by network ("flux", "clip", "t5"), then by the name of the weight or bias that is
      changed, as in "double.0.img.qkv.weight". A weight may have several changes, of its parts.
    - `format`: the format of the file's key names, as in "kohya"; or where the adapter comes from.
    - `notes`: one line for each thing in the file that has no effect on FLUX and was left out, to
      be shown to the user.
    """

    changes: dict[str, dict[str, tuple[Change, ...]]]
    format: str = eqx.field(static=True)
    notes: tuple[str, ...] = eqx.field(static=True, default=())
