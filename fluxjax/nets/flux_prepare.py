"""What depends on no image and is shared by the networks that are made of FLUX's blocks.

The conditioning vector of time, pooled text and guidance; the modulation of all blocks, computed
before their loop; and the rotation of the tokens.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.nets.activations import silu
from fluxjax.nets.flux_blocks import DoubleBlock, DoubleModulation, Mlp, SingleBlock
from fluxjax.nets.flux_config import BlockConfig, TransformerConfig
from fluxjax.nets.flux_state import Times, TxtLength
from fluxjax.nets.layers import Linear, Rotation, rope, sinusoid
from fluxjax.nets.scan import map_blocks
from fluxjax.nets.stack import map_part
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, ScalarLike

ConditioningVectors = Float[Array, "times width"]
"""One vector for each time, of the time, the pooled text and the guidance scale."""


class Embedders(NamedTuple):
    """The layers whose outputs add up to the vector that modulates every block.

    `guidance`: None for a network that takes no distilled guidance scale.
    """

    time: Mlp
    vector: Mlp
    guidance: Mlp | None

    def __call__(
        self,
        times: Times,
        vec: Float[Array, " pooled"],
        guidance: ScalarLike | None,
        time_width: int,
    ) -> ConditioningVectors:
        """Return the vectors of times, pooled text and guidance, after the SiLU of all blocks.

        **Arguments:** `time_width`: features of the sinusoid of times.
        """

        def embed(mlp: Mlp, value: Array | ScalarLike) -> Array:
            # The sinusoid is cast after it is computed: 1000 t has no exact bfloat16.
            wave = sinusoid(1000 * in_wide_dtype(value), time_width)
            return mlp(wave.astype(vec.dtype), silu)

        # The text's vector is the same at all times.
        total = embed(self.time, times) + self.vector(vec, silu)
        if self.guidance is not None and guidance is not None:
            total = total + embed(self.guidance, guidance)
        return silu(total)


def joint_rotation(
    config: BlockConfig,
    txt_ids: Float[Array, "txt_tokens axes"],
    img_ids: Float[Array, "img_tokens axes"],
    dtype: DTypeLike,
) -> Rotation:
    """Return the rotation of the text's tokens, which come first in the attention, and the image's.

    **Arguments:** `dtype`: of the activations.
    """
    ids = jnp.concatenate([txt_ids, img_ids]).astype(wide_dtype(jnp.dtype(dtype)))
    return rope(ids, config.rope_axes, config.rope_theta)


def block_modulation(
    double: PyTree,
    single: PyTree,
    conditioning: ConditioningVectors,
    remat: bool,
) -> tuple[DoubleModulation, Float[Array, "single_depth times three_width"]]:
    """Return the modulation of all double and of all single blocks.

    **Arguments:** `double`, `single`: stacked or unrolled. `conditioning`: from `Embedders`.
    """

    def double_modulation(layers: tuple[Linear, Linear]) -> DoubleModulation:
        return DoubleModulation(*(layer(conditioning) for layer in layers))

    def single_modulation(layer: Linear) -> Float[Array, "times three_width"]:
        return layer(conditioning)

    return (
        map_blocks(map_part(double, _double_layers), double_modulation, remat=remat),
        map_blocks(map_part(single, _single_layer), single_modulation, remat=remat),
    )


def without_modulation(double: PyTree, single: PyTree) -> tuple[PyTree, PyTree]:
    """Return blocks without the layers of `block_modulation`, so that no loop fetches them."""

    def double_part(block: DoubleBlock) -> DoubleBlock:
        if block.img.modulation is None:
            return block
        return eqx.tree_at(_double_layers, block, (None, None))

    def single_part(block: SingleBlock) -> SingleBlock:
        if block.modulation is None:
            return block
        return eqx.tree_at(_single_layer, block, None)

    return map_part(double, double_part), map_part(single, single_part)


def in_wide_dtype(value: Array | ScalarLike) -> Float[Array, "*shape"]:
    """Return times, or a guidance scale, in float32, or in float64 if that is their dtype."""
    array = jnp.asarray(value)
    return array.astype(wide_dtype(array.dtype))


def check_widths(call: str, config: BlockConfig, **inputs: Array) -> None:
    """Check that the last axis of each input fits the config.

    **Arguments:** `call`: the network that got them, for the message. `inputs`: by the name of the
    argument.
    **Raises:** `ValueError` that names all inputs that do not.
    """
    widths = {
        "x": config.in_channels,
        "txt": config.context,
        "img_ids": len(config.rope_axes),
    }
    if isinstance(config, TransformerConfig):
        widths["vec"] = config.pooled
    problems = []
    for name, value in inputs.items():
        if value.shape[-1] != widths[name]:
            problems.append(f"{name} has {value.shape[-1]} features, not {widths[name]}")
    if problems:
        raise ValueError(
            f"`{call}` got inputs that do not fit its config: {'; '.join(problems)}. Load the "
            "config that belongs to them, or make them with this model's encoders and VAE."
        )


def check_distilled_scale(call: str, guidance: ScalarLike | None, *, taken: bool) -> None:
    """Check that a network gets a distilled guidance scale if and only if it takes one.

    **Raises:** `ValueError` if it does not.
    """
    if taken and guidance is None:
        raise ValueError(
            f"This `{call}` is guidance-distilled and needs `guidance=`. Pass guidance=3.5, the "
            "default of FLUX.1-dev."
        )
    if not taken and guidance is not None:
        raise ValueError(
            f"This `{call}` has no guidance embedder, as schnell has none. Pass guidance=None."
        )


def checked_length(call: str, length: TxtLength | int | None, txt_tokens: int) -> TxtLength | None:
    """Return how many text tokens are attended to, as an array; None for all of them.

    **Arguments:** `call`: the network that got it, for the message. `txt_tokens`: of the text.
    **Raises:** `ValueError` for a Python number outside of 0 to `txt_tokens`.
    """
    if length is None:
        return None
    if isinstance(length, int) and not 0 <= length <= txt_tokens:
        raise ValueError(
            f"`{call}(txt_length)` is 0 to {txt_tokens}, the number of text tokens, got {length}."
        )
    return jnp.asarray(length, jnp.int32)


def _double_layers(block: DoubleBlock) -> tuple[Linear | None, Linear | None]:
    return block.img.modulation, block.txt.modulation


def _single_layer(block: SingleBlock) -> Linear | None:
    return block.modulation
