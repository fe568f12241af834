"""ControlNets for FLUX.1: residuals for a transformer's blocks, from an image that is followed."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.arguments import convert_arguments
from fluxjax.nets.activations import silu
from fluxjax.nets.controlnet_config import HINT_PATCH, ControlNetConfig
from fluxjax.nets.conv import Conv
from fluxjax.nets.flux_attention import AttentionChoice, block_runner
from fluxjax.nets.flux_blocks import DoubleBlock, ImageAndText, Mlp, SingleBlock, TokenStates
from fluxjax.nets.flux_control import ControlResiduals
from fluxjax.nets.flux_prepare import (
    Embedders,
    block_modulation,
    check_distilled_scale,
    check_widths,
    in_wide_dtype,
    joint_rotation,
    without_modulation,
)
from fluxjax.nets.flux_state import HiddenState, ImgStates, Modulation, Prepared, Times
from fluxjax.nets.layers import Embedding, Linear
from fluxjax.nets.scan import scan_blocks_with_results
from fluxjax.nets.stack import stack, zip_blocks
from fluxjax.nets.summary import describe_network
from fluxjax.shapes import Array, Float, Image, Int, PRNGKeyArray, ScalarLike

Condition = Float[Array, "img_tokens in_channels"] | Float[Array, "pixel_rows pixel_columns 3"]
"""A packed latent, or for a network of `hint_image` an image in [-1, 1]."""
Mode = int | Int[Array, ""]
BlockAndResidual = tuple[PyTree, Linear]
"""A block, and the layer that makes a residual of the image's states after it."""

_HINT_CHANNELS = 16
"""Channels inside of the block that reduces an image."""
_HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)
"""Strides of its convolutions; an image is reduced as much as the VAE does."""


class PreparedControlNet(NamedTuple):
    """Everything in a ControlNet's evaluations that does not depend on the noisy image.

    `prepared`: as of `Flux.prepare`. `condition`: what is added to the embedded image tokens.
    """

    prepared: Prepared
    condition: Float[Array, "img_tokens width"]


class HintBlock(eqx.Module):
    """Convolutions that reduce an image to the size of the latent, then packed into tokens.

    `convs`: of 3x3 cells, with a SiLU between them.
    **Source:** XLabs 2024, x-flux.
    """

    convs: tuple[Conv, ...]

    def __init__(self, out: int, *, key: PRNGKeyArray):
        """Make the convolutions. `out`: channels of the last one."""
        inputs = [3] + [_HINT_CHANNELS] * (len(_HINT_STRIDES) - 1)
        outputs = [_HINT_CHANNELS] * (len(_HINT_STRIDES) - 1) + [out]
        keys = jax.random.split(key, len(_HINT_STRIDES))
        convs = []
        for channels, outs, subkey in zip(inputs, outputs, keys, strict=True):
            convs.append(Conv(channels, outs, key=subkey))
        self.convs = tuple(convs)

    def __call__(self, image: Image) -> Float[Array, "img_tokens features"]:
        """Return the packed features of an image, in its dtype."""
        x = self.convs[0](image)
        for conv, stride in zip(self.convs[1:], _HINT_STRIDES[1:], strict=True):
            # As PyTorch pads, on both sides: XLA's "same" would pad less before.
            x = conv(silu(x), stride=stride, padding=((1, 1), (1, 1)))
        packed = "(rows dy) (columns dx) c -> (rows columns) (c dy dx)"
        return rearrange(x, packed, dy=HINT_PATCH, dx=HINT_PATCH)


class ControlNet(eqx.Module):
    """A small transformer of FLUX's blocks whose states become residuals of a `Flux`.

    It takes one example, as `Flux` does.

    `img_in`, `txt_in`, `time_in`, `vector_in`, `guidance_in`: as of `Flux`. `condition_in`: from
    the features of the condition's tokens to the width; its result is added to `img_in`'s. `hint`:
    makes these features of an image, where the condition is one. `mode_in`: an embedding for each
    kind of condition, which becomes a token before the text's. `double`, `single`: the blocks,
    stacked. `double_residual`, `single_residual`: from the image's states after each block to its
    residual, stacked.
    **Source:** Zhang et al. 2023; InstantX 2024, FLUX.1-dev-Controlnet-Union.
    """

    config: ControlNetConfig = eqx.field(static=True)
    img_in: Linear
    condition_in: Linear
    hint: HintBlock | None
    mode_in: Embedding | None
    txt_in: Linear
    time_in: Mlp
    vector_in: Mlp
    guidance_in: Mlp | None
    double: DoubleBlock
    single: SingleBlock
    double_residual: Linear
    single_residual: Linear

    def __init__(self, config: ControlNetConfig, *, key: PRNGKeyArray):
        """Make a network whose residuals are zeros, so that at first it changes nothing."""
        img, condition, hint, mode, txt, time, vector, guidance, blocks = jax.random.split(key, 9)
        width, double_depth, single_depth = config.width, config.double_depth, config.single_depth
        self.config = config
        self.img_in = Linear(config.in_channels, width, key=img)
        self.condition_in = Linear(config.in_channels, width, scale=0, key=condition)
        self.hint = None
        if config.hint_image:
            self.hint = HintBlock(config.in_channels // HINT_PATCH**2, key=hint)
        self.mode_in = None
        if config.modes is not None:
            self.mode_in = Embedding(config.modes, width, key=mode)
        self.txt_in = Linear(config.context, width, key=txt)
        self.time_in = Mlp(config.time_width, width, width, key=time)
        self.vector_in = Mlp(config.pooled, width, width, key=vector)
        self.guidance_in = None
        if config.guidance_embed:
            self.guidance_in = Mlp(config.time_width, width, width, key=guidance)
        double, single, of_double, of_single = jax.random.split(blocks, 4)

        def residual(key: PRNGKeyArray) -> Linear:
            return Linear(width, width, scale=0, key=key)

        self.double = stack(lambda key: DoubleBlock(config, key=key), double_depth, key=double)
        self.single = stack(lambda key: SingleBlock(config, key=key), single_depth, key=single)
        self.double_residual = stack(residual, double_depth, key=of_double)
        self.single_residual = stack(residual, single_depth, key=of_single)

    def __repr__(self) -> str:
        return describe_network(self)

    @convert_arguments
    def __call__(
        self,
        x: Float[Array, "img_tokens in_channels"],
        t: ScalarLike,
        *,
        condition: Condition,
        txt: Float[Array, "txt_tokens context"],
        vec: Float[Array, " pooled"],
        img_ids: Float[Array, "img_tokens axes"],
        guidance: ScalarLike | None = None,
        mode: Mode | None = None,
    ) -> ControlResiduals:
        """Return what is added to a transformer's image tokens at time t.

        **Arguments:** `x`, `t`, `txt`, `vec`, `img_ids`, `guidance`: as for `Flux`. `condition`:
        the image to follow: a packed latent, with as many tokens as `x`; or for a config of
        `hint_image` the image in [-1, 1], of the size that `x` is decoded to. `mode`: which kind of
        condition it is, from 0, if and only if the config has `modes`.
        **Returns:** one residual for each of the network's own blocks, in the dtype of `txt`.
        **Raises:** `ValueError` if guidance or mode is missing or is not taken, or if a size does
        not fit.
        """
        check_widths("ControlNet", self.config, x=x, txt=txt, vec=vec, img_ids=img_ids)
        prepared = self.prepare(
            in_wide_dtype(t)[None],
            condition=condition,
            txt=txt,
            vec=vec,
            img_ids=img_ids,
            guidance=guidance,
            mode=mode,
        )
        return self.residuals(x, t, prepared)

    @convert_arguments
    def prepare(
        self,
        times: Times,
        *,
        condition: Condition,
        txt: Float[Array, "txt_tokens context"],
        vec: Float[Array, " pooled"],
        img_ids: Float[Array, "img_tokens axes"],
        guidance: ScalarLike | None = None,
        mode: Mode | None = None,
        dtype: DTypeLike | None = None,
    ) -> PreparedControlNet:
        """Compute what `residuals` needs at any of several times, once for all of them.

        **Arguments:** `times`: those at which it will be called. `dtype`: of the activations, by
        default that of `txt`. The others are as for a call of the network.
        **Raises:** `ValueError` as for a call of the network.
        """
        check_widths("ControlNet", self.config, txt=txt, vec=vec, img_ids=img_ids)
        check_distilled_scale("ControlNet", guidance, taken=self.config.guidance_embed)
        _check_mode(mode, self.config.modes)
        dtype = txt.dtype if dtype is None else dtype
        tokens = self.txt_in(txt.astype(dtype))
        if self.mode_in is not None and mode is not None:
            tokens = jnp.concatenate([self.mode_in(jnp.asarray(mode)[None], dtype), tokens])
        txt_ids = jnp.zeros((len(tokens), img_ids.shape[-1]), img_ids.dtype)
        rotation = joint_rotation(self.config, txt_ids, img_ids, dtype)
        times = in_wide_dtype(times)
        embedders = Embedders(self.time_in, self.vector_in, self.guidance_in)
        vectors = embedders(times, vec.astype(dtype), guidance, self.config.time_width)
        double, single = block_modulation(self.double, self.single, vectors, remat=False)
        prepared = Prepared(times, tokens, rotation, Modulation(double, single, None))
        return PreparedControlNet(prepared, self._embed_condition(condition, img_ids, dtype))

    @convert_arguments
    def residuals(
        self,
        x: Float[Array, "img_tokens in_channels"],
        t: ScalarLike,
        prepared: PreparedControlNet,
        *,
        attention: AttentionChoice = None,
        remat: bool = False,
    ) -> ControlResiduals:
        """Return what is added to a transformer's image tokens, at one of the prepared times.

        **Arguments:** `attention`, `remat`: as for `Flux`.
        **Returns:** as for a call of the network; NaN at any other time.
        """
        check_widths("ControlNet", self.config, x=x)
        shared = prepared.prepared
        img = self.img_in(x.astype(shared.txt.dtype)) + prepared.condition
        hidden = HiddenState(img, shared.txt, shared.at(t), shared.rotation)
        run = block_runner(hidden, attention, None)
        txt_tokens = len(hidden.txt)

        def run_double(
            block: BlockAndResidual, tokens: ImageAndText, modulation: PyTree
        ) -> tuple[ImageAndText, ImgStates]:
            img, txt = run(block[0], tokens, modulation)
            return (img, txt), block[1](img)

        def run_single(
            block: BlockAndResidual, tokens: TokenStates, modulation: PyTree
        ) -> tuple[TokenStates, ImgStates]:
            tokens = run(block[0], tokens, modulation)
            return tokens, block[1](tokens[txt_tokens:])

        double, single = without_modulation(self.double, self.single)
        (img, txt), of_double = scan_blocks_with_results(
            zip_blocks(double, self.double_residual),
            (hidden.img, hidden.txt),
            run_double,
            inputs=(hidden.modulation.double,),
            remat=remat,
        )
        _, of_single = scan_blocks_with_results(
            zip_blocks(single, self.single_residual),
            jnp.concatenate([txt, img]),
            run_single,
            inputs=(hidden.modulation.single,),
            remat=remat,
        )
        return ControlResiduals(of_double, of_single, self.config.hint_image)

    def _embed_condition(
        self, condition: Condition, img_ids: Float[Array, "img_tokens axes"], dtype: DTypeLike
    ) -> Float[Array, "img_tokens width"]:
        """Return what is added to the embedded tokens of the noisy image."""
        axes = 2 if self.hint is None else 3
        if condition.ndim != axes:
            expected = "a packed latent" if self.hint is None else "an image, [height, width, 3]"
            raise ValueError(
                f"This `ControlNet(condition)` takes {expected}, got an array of {condition.ndim} "
                "axes. Make the condition with `controlnet_condition`."
            )
        features = condition.astype(dtype)
        if self.hint is not None:
            features = self.hint(features)
        if features.shape != (len(img_ids), self.config.in_channels):
            raise ValueError(
                f"`ControlNet(condition)` has {list(features.shape)} tokens and features, and the "
                f"image needs {[len(img_ids), self.config.in_channels]}. Pass a condition of the "
                "image's size."
            )
        return self.condition_in(features)


def _check_mode(mode: Mode | None, modes: int | None) -> None:
    """**Raises:** `ValueError` if a mode is missing, is not taken, or is known not to exist."""
    if modes is None and mode is not None:
        raise ValueError("This `ControlNet` has no modes. Pass mode=None.")
    if modes is not None and mode is None:
        raise ValueError(
            f"This `ControlNet` needs `mode=`, the kind of its condition, from 0 to {modes - 1}."
        )
    if isinstance(mode, int) and modes is not None and not 0 <= mode < modes:
        raise ValueError(f"`ControlNet(mode)` is 0 to {modes - 1}, got {mode}. Choose one of them.")
