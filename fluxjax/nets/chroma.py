"""Chroma: FLUX's blocks, whose modulation a small network computes from time and vector number."""

import math
from typing import Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.nets.activations import silu
from fluxjax.nets.chroma_config import DOUBLE_VECTORS, SINGLE_VECTORS, ChromaConfig
from fluxjax.nets.flux_blocks import DoubleBlock, DoubleModulation, FinalLayer, Mlp, SingleBlock
from fluxjax.nets.flux_prepare import check_widths, in_wide_dtype, joint_rotation
from fluxjax.nets.flux_state import Modulation, Prepared, Times, TxtLength
from fluxjax.nets.layers import Linear, RmsNorm, sinusoid
from fluxjax.nets.scan import scan_blocks
from fluxjax.nets.stack import stack
from fluxjax.nets.summary import describe_network
from fluxjax.nets.transformer import (
    AbstractTransformer,
    FluxOptions,
    ImgIds,
    ImgTokens,
    ImgVelocity,
    Pooled,
    TxtIds,
    TxtStates,
)
from fluxjax.shapes import Array, Float, PRNGKeyArray, ScalarLike


class ApproximatorLayer(eqx.Module):
    """x + mlp(norm(x)), of one vector's hidden features."""

    norm: RmsNorm
    mlp: Mlp

    def __init__(self, width: int, *, key: PRNGKeyArray):
        self.norm = RmsNorm(width)
        self.mlp = Mlp(width, width, width, key=key)

    def __call__(self, x: Float[Array, "rows features"]) -> Float[Array, "rows features"]:
        return x + self.mlp(self.norm(x), silu)


class Chroma(AbstractTransformer):
    """The transformer of Chroma, blocks stacked.

    It takes one example. `eqx.filter_jit(eqx.filter_vmap(chroma))` takes a batch. It reads neither
    a pooled text nor a distilled guidance scale.

    `img_in`, `txt_in`: from the features of a token to the width of the blocks. `approximator_in`,
    `approximator`, `approximator_out`: the network that gives every vector which modulates the
    blocks and the final layer, of the time and the number of the vector; its layers are stacked.
    `double`, `single`: the blocks, stacked, without layers of their own for the modulation.
    `final`: to the prediction.
    **Source:** lodestone-rock 2025, Chroma.
    """

    config: ChromaConfig = eqx.field(static=True)
    img_in: Linear
    txt_in: Linear
    approximator_in: Linear
    approximator: ApproximatorLayer
    approximator_out: Linear
    double: DoubleBlock
    single: SingleBlock
    final: FinalLayer

    def __init__(self, config: ChromaConfig, *, key: PRNGKeyArray):
        img, txt, first, layers, last, double, single, final = jax.random.split(key, 8)
        width, hidden = config.width, config.approximator_width
        self.config = config
        self.img_in = Linear(config.in_channels, width, key=img)
        self.txt_in = Linear(config.context, width, key=txt)
        self.approximator_in = Linear(config.approximator_features, hidden, key=first)
        self.approximator = stack(
            lambda key: ApproximatorLayer(hidden, key=key), config.approximator_depth, key=layers
        )
        # Zeros, as the modulation of a new `Flux`: each of its blocks is the identity.
        self.approximator_out = Linear(hidden, width, scale=0, key=last)
        self.double = stack(
            lambda key: DoubleBlock(config, modulated=False, key=key),
            config.double_depth,
            key=double,
        )
        self.single = stack(
            lambda key: SingleBlock(config, modulated=False, key=key),
            config.single_depth,
            key=single,
        )
        self.final = FinalLayer(width, config.out_channels, modulated=False, key=final)

    def __repr__(self) -> str:
        # Equinox's own has a line for each array.
        return describe_network(self)

    @convert_arguments
    def __call__(
        self,
        x: ImgTokens,
        t: ScalarLike,
        *,
        txt: TxtStates,
        img_ids: ImgIds,
        txt_ids: TxtIds | None = None,
        txt_length: TxtLength | int | None = None,
        **options: Unpack[FluxOptions],
    ) -> ImgVelocity:
        """Return the velocity dx/dt of the image tokens at time t.

        **Arguments:** `x`: packed noisy latent. `t`: in [0, 1], where 1 is noise. `txt`: hidden
        states of T5, which is to leave out padding too. `img_ids`, `txt_ids`: positions; those of
        the text are zeros by default. `txt_length`: how many of the text's tokens are attended to:
        those of the prompt, the end token and one of padding; None for all of them. `options`:
        those of `FluxOptions`.
        **Returns:** dx/dt in the dtype of `x`.
        **Raises:** `ValueError` if a width is not that of the config.
        """
        # All inputs at once, for one message about all of them.
        check_widths("Chroma", self.config, x=x, txt=txt, img_ids=img_ids)
        prepared = self.prepare(
            in_wide_dtype(t)[None],
            txt=txt,
            img_ids=img_ids,
            txt_ids=txt_ids,
            dtype=options.get("dtype"),
            remat=options.get("remat", False),
        )
        prepared = self.with_txt_length(prepared, txt_length)
        return self.velocity(
            x,
            t,
            self.with_image_prompts(prepared, options.get("image_prompts", ())),
            attention=options.get("attention"),
            degraded=options.get("degraded"),
            control=options.get("control", ()),
            remat=options.get("remat", False),
        )

    @convert_arguments
    def prepare(
        self,
        times: Times,
        *,
        txt: TxtStates,
        vec: Pooled | None = None,
        img_ids: ImgIds,
        txt_ids: TxtIds | None = None,
        guidance: ScalarLike | None = None,
        dtype: DTypeLike | None = None,
        remat: bool = False,
    ) -> Prepared:
        """Compute what `velocity` needs at any of several times, once for all of them.

        The approximator's vectors take 2 MB for each time, in bfloat16.

        **Arguments:** `times`: those at which `velocity` will be called. `vec`, `guidance`: None.
        The others are as for a call of the network.
        **Raises:** `ValueError` as for a call of the network, and for a pooled text or a guidance
        scale.
        """
        for name, value in {"vec": vec, "guidance": guidance}.items():
            if value is not None:
                raise ValueError(
                    f"`Chroma` reads no pooled text and takes no distilled guidance scale, got "
                    f"{name}=. Pass {name}=None."
                )
        check_widths("Chroma", self.config, txt=txt, img_ids=img_ids)
        if txt_ids is None:
            txt_ids = jnp.zeros((len(txt), img_ids.shape[-1]), img_ids.dtype)
        dtype = txt.dtype if dtype is None else dtype
        rotation = joint_rotation(self.config, txt_ids, img_ids, dtype)
        times = in_wide_dtype(times)
        modulation = self._modulation(times, dtype, remat)
        tokens = self.txt_in(txt.astype(dtype))
        return Prepared(times, tokens, rotation, modulation)

    def _modulation(self, times: Times, dtype: DTypeLike, remat: bool) -> Modulation:
        """Return the modulation of the whole network at all times, by the approximator."""
        config = self.config
        inputs = self._approximator_inputs(times).astype(dtype)
        hidden = self.approximator_in(rearrange(inputs, "times vectors f -> (times vectors) f"))
        hidden = scan_blocks(self.approximator, hidden, lambda layer, x: layer(x), remat=remat)
        vectors = rearrange(
            self.approximator_out(hidden), "(times vectors) w -> times vectors w", times=len(times)
        )
        of_single = SINGLE_VECTORS * config.single_depth
        of_stream = DOUBLE_VECTORS // 2 * config.double_depth
        ends = np.cumsum([of_single, of_stream, of_stream])
        single, img, txt, final = jnp.split(vectors, ends, axis=1)
        return Modulation(
            DoubleModulation(
                _by_block(img, config.double_depth), _by_block(txt, config.double_depth)
            ),
            _by_block(single, config.single_depth),
            rearrange(final, "times two w -> times (two w)"),
        )

    def _approximator_inputs(self, times: Times) -> Float[Array, "times vectors features"]:
        """Return the sinusoids of time, of a guidance scale of 0, and of each vector's number."""
        features, count = self.config.approximator_features, self.config.vectors
        wave = sinusoid(1000 * times, features // 4)
        of_zero = jnp.broadcast_to(sinusoid(jnp.zeros_like(times), features // 4), wave.shape)
        both = jnp.concatenate([wave, of_zero], axis=-1)
        numbers = jnp.asarray(vector_waves(count, features // 2), wave.dtype)
        return jnp.concatenate(
            [
                jnp.broadcast_to(both[:, None], (len(times), count, both.shape[-1])),
                jnp.broadcast_to(numbers, (len(times), *numbers.shape)),
            ],
            axis=-1,
        )


def _by_block(
    vectors: Float[Array, "times vectors width"], depth: int
) -> Float[Array, "depth times vectors_width"]:
    """Return the vectors of each block, one after the other."""
    # The number of a block's vectors is read off, except where there is no block.
    count = vectors.shape[1] // max(depth, 1)
    pattern = "times (depth vectors) w -> depth times (vectors w)"
    return rearrange(vectors, pattern, depth=depth, vectors=count)


def vector_waves(count: int, width: int, *, base: float = 10_000.0) -> Float[np.ndarray, "_ _"]:
    """Return the sinusoids of 1000 times the numbers of vectors, as `sinusoid` does.

    They are constants. Their angles go up to 343,000, where the last digit of a frequency in
    float32 makes 0.02 of an angle: the exponents are rounded to float32 and the exponentials of
    these again, as in Chroma's training, and do not depend on a device's exponential.

    **Arguments:** `count`: of the vectors. `width`: features; half of them are cosines. `base`: as
    for `sinusoid`.
    """
    half = width // 2
    exponents = np.float32(-math.log(base)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (1000 * np.arange(count, dtype=np.float32))[:, None] * frequencies
    wide = angles.astype(np.float64)
    return np.concatenate([np.cos(wide), np.sin(wide)], axis=-1).astype(np.float32)
