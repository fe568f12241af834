"""What a FLUX transformer computes before its blocks, and what goes through them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fluxjax.nets.flux_blocks import DoubleModulation
from fluxjax.nets.image_prompt import BlockPrompt, ImagePrompt
from fluxjax.nets.layers import Rotation
from fluxjax.numeric import index_axis
from fluxjax.shapes import Array, Float, Int, ScalarLike

ImgStates = Float[Array, "img_tokens width"]
"""Hidden states of the image's tokens."""
Times = Float[Array, " times"]
TxtLength = Int[Array, "*prompts"]
"""How many of a text's tokens are attended to; the others, which come last, are padding."""


class Modulation(NamedTuple):
    """The modulation of the whole network, at one time or at several.

    `final` is None in networks without a final layer.
    """

    double: DoubleModulation  # of arrays [double_depth, *times, six_width]
    single: Float[Array, "single_depth *times three_width"]
    final: Float[Array, "*times two_width"] | None


class Prepared(NamedTuple):
    """Everything in a network's evaluations that does not depend on the image.

    `times`: those that were prepared. `txt`: the embedded text tokens. `rotation`: of the text's
    and the image's tokens. `modulation`: at each of the times. `image_prompts`: keys and values
    that the blocks attend to as well. `txt_length`: how many text tokens are attended to; None for
    all of them. Where the text is of two prompts, as for `Nag`, it is two numbers.
    """

    times: Times
    txt: Float[Array, "txt_tokens width"]
    rotation: Rotation
    modulation: Modulation
    image_prompts: tuple[ImagePrompt, ...] = ()
    txt_length: TxtLength | None = None

    def at(self, t: ScalarLike) -> Modulation:
        """Return the modulation at t; NaN if t is none of the times, within 1e-6."""
        distance = jnp.abs(self.times - jnp.asarray(t, self.times.dtype))
        index = jnp.argmin(distance)
        is_prepared = jnp.min(distance) <= 1e-6

        def row(x: Array) -> Array:
            # No error can be raised for a traced t, and another time's modulation would go
            # unnoticed.
            return jnp.where(is_prepared, index_axis(x, index, axis=x.ndim - 2), jnp.nan)

        return jax.tree.map(row, self.modulation)


class HiddenState(NamedTuple):
    """The tokens of one example between the blocks, and what the blocks take besides."""

    img: ImgStates
    txt: Float[Array, "txt_tokens width"]
    modulation: Modulation
    rotation: Rotation
    image_prompts: tuple[ImagePrompt, ...] = ()
    txt_length: TxtLength | None = None

    def prompts_in_blocks(self) -> tuple[tuple[BlockPrompt, ...], tuple[BlockPrompt, ...]]:
        """Return the image prompts in the double and in the single blocks, for loops over them."""
        double: list[BlockPrompt] = []
        single: list[BlockPrompt] = []
        for prompt in self.image_prompts:
            double.append(prompt.in_double())
            single += prompt.in_single(len(self.txt))
        return tuple(double), tuple(single)
