"""The FLUX transformer: a velocity dx/dt of noisy image tokens, text and time."""

from typing import TypedDict, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.arguments import convert_arguments
from fluxjax.nets.degraded import DegradedBlocks
from fluxjax.nets.flux_attention import AttentionChoice, block_attention, block_runner
from fluxjax.nets.flux_blocks import (
    DoubleBlock,
    DoubleModulation,
    FinalLayer,
    ImageAndText,
    Mlp,
    SingleBlock,
)
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.flux_state import HiddenState, ImgStates, Modulation, Prepared, Times
from fluxjax.nets.layers import Linear, rope, sinusoid
from fluxjax.nets.scan import map_blocks, scan_blocks
from fluxjax.nets.stack import block_at, map_part, stack
from fluxjax.nets.summary import describe_network
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, PRNGKeyArray, ScalarLike

ImgTokens = Float[Array, "img_tokens in_channels"]
"""A packed noisy latent."""
ImgVelocity = Float[Array, "img_tokens out_channels"]
"""dx/dt of each token."""
TxtStates = Float[Array, "txt_tokens context"]
"""Hidden states of T5, one per token."""
Pooled = Float[Array, " pooled"]
"""The pooled state of CLIP."""
ImgIds = Float[Array, "img_tokens axes"]
TxtIds = Float[Array, "txt_tokens axes"]
ConditioningVectors = Float[Array, "times width"]
"""One vector for each time, of the time, the pooled text and the guidance scale."""


class FluxOptions(TypedDict, total=False):
    """How a `Flux` computes its velocity; what is left out keeps the default.

    `attention`: the name of an implementation of `fluxjax.attention`, an `Attention`, which has
    block sizes too, or a custom function over the text's and the image's tokens. `degraded`: blocks
    to skip, or to run with another attention. `dtype`: of the activations, by default that of
    `txt`, so that a float32 sampler can run a bfloat16 network. `remat`: for a gradient, keep only
    the input of each block and compute the block again: a third more work, and the memory of one
    block.
    """

    attention: AttentionChoice
    degraded: DegradedBlocks | None
    dtype: DTypeLike | None
    remat: bool


class Flux(eqx.Module):
    """The transformer, blocks stacked.

    It takes one example. `eqx.filter_jit(eqx.filter_vmap(flux))` takes a batch.

    `img_in`, `txt_in`: from the features of a token to the width of the blocks. `time_in`,
    `vector_in`, `guidance_in`: of the time, the pooled text and the distilled guidance scale to the
    conditioning vector, which is their sum; `guidance_in` is None for networks without guidance.
    `double`, `single`: the blocks, stacked. `final`: to the prediction.
    **Source:** Black Forest Labs 2024, FLUX.1.
    """

    config: FluxConfig = eqx.field(static=True)
    img_in: Linear
    txt_in: Linear
    time_in: Mlp
    vector_in: Mlp
    guidance_in: Mlp | None
    double: DoubleBlock
    single: SingleBlock
    final: FinalLayer

    def __init__(self, config: FluxConfig, *, key: PRNGKeyArray):
        img, txt, time, vector, guidance, double, single, final = jax.random.split(key, 8)
        width = config.width
        self.config = config
        self.img_in = Linear(config.in_channels, width, key=img)
        self.txt_in = Linear(config.context, width, key=txt)
        self.time_in = Mlp(config.time_width, width, width, key=time)
        self.vector_in = Mlp(config.pooled, width, width, key=vector)
        self.guidance_in = None
        if config.guidance_embed:
            # Its key is drawn in any case, so that schnell's other weights are those of dev.
            self.guidance_in = Mlp(config.time_width, width, width, key=guidance)
        self.double = stack(
            lambda key: DoubleBlock(config, key=key), config.double_depth, key=double
        )
        self.single = stack(
            lambda key: SingleBlock(config, key=key), config.single_depth, key=single
        )
        self.final = FinalLayer(config, key=final)

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
        vec: Pooled,
        img_ids: ImgIds,
        txt_ids: TxtIds | None = None,
        guidance: ScalarLike | None = None,
        **options: Unpack[FluxOptions],
    ) -> ImgVelocity:
        """Return the velocity dx/dt of the image tokens at time t.

        **Arguments:** `x`: packed noisy latent. `t`: in [0, 1], where 1 is noise. `txt`: hidden
        states of T5. `vec`: pooled state of CLIP. `img_ids`, `txt_ids`: positions; those of the
        text are zeros by default. `guidance`: distilled guidance scale, unscaled (3.5), if and only
        if the config has `guidance_embed`. `options`: those of `FluxOptions`.
        **Returns:** dx/dt in the dtype of `x`.
        **Raises:** `ValueError` if guidance is missing, or is not taken, or if a width is not that
        of the config.
        """
        # All inputs at once, for one message about all of them.
        _check_widths(self.config, x=x, txt=txt, vec=vec, img_ids=img_ids)
        prepared = self.prepare(
            _wide(t)[None],
            txt=txt,
            vec=vec,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            dtype=options.get("dtype"),
            remat=options.get("remat", False),
        )
        return self.velocity(
            x,
            t,
            prepared,
            attention=options.get("attention"),
            degraded=options.get("degraded"),
            remat=options.get("remat", False),
        )

    @convert_arguments
    def prepare(
        self,
        times: Times,
        *,
        txt: TxtStates,
        vec: Pooled,
        img_ids: ImgIds,
        txt_ids: TxtIds | None = None,
        guidance: ScalarLike | None = None,
        dtype: DTypeLike | None = None,
        remat: bool = False,
    ) -> Prepared:
        """Compute what `velocity` needs at any of several times, once for all of them.

        The modulation layers are 3.2 of dev's 11.9 B weights; what they give takes 2 MB for each
        time, in bfloat16.

        **Arguments:** `times`: those at which `velocity` will be called. The others are as for a
        call of the network.
        **Raises:** `ValueError` as for a call of the network.
        """
        _check_widths(self.config, txt=txt, vec=vec, img_ids=img_ids)
        _check_guidance(self.config, guidance)
        if txt_ids is None:
            txt_ids = jnp.zeros((len(txt), img_ids.shape[-1]), img_ids.dtype)
        dtype = txt.dtype if dtype is None else dtype
        # The text's tokens come first in the joint attention.
        ids = jnp.concatenate([txt_ids, img_ids]).astype(wide_dtype(jnp.dtype(dtype)))
        rotation = rope(ids, self.config.rope_axes, self.config.rope_theta)
        times = _wide(times)
        conditioning = jax.nn.silu(self._conditioning(times, vec.astype(dtype), guidance))
        modulation = self._modulation(conditioning, remat)
        return Prepared(times, self.txt_in(txt.astype(dtype)), rotation, modulation)

    @convert_arguments
    def velocity(
        self,
        x: ImgTokens,
        t: ScalarLike,
        prepared: Prepared,
        *,
        attention: AttentionChoice = None,
        degraded: DegradedBlocks | None = None,
        remat: bool = False,
    ) -> ImgVelocity:
        """Return the velocity at one of the times that were prepared.

        **Arguments:** `prepared`: from `prepare`. The others are as for a call of the network.
        **Returns:** dx/dt in the dtype of `x`; NaN at any other time.
        """
        hidden = self.embed(x, t, prepared)
        img = self.blocks(hidden, attention=attention, degraded=degraded, remat=remat)
        return self.final(img, hidden.modulation.final).astype(x.dtype)

    def embed(
        self,
        x: ImgTokens,
        t: ScalarLike,
        prepared: Prepared,
    ) -> HiddenState:
        """Return the input of the blocks.

        **Arguments:** as for `velocity`.
        **Raises:** `ValueError` if the width of `x` is not that of the config.
        """
        _check_widths(self.config, x=x)
        img = self.img_in(x.astype(prepared.txt.dtype))
        return HiddenState(img, prepared.txt, prepared.at(t), prepared.rotation)

    def first(
        self,
        hidden: HiddenState,
        *,
        attention: AttentionChoice = None,
    ) -> ImageAndText:
        """Return the image's and the text's tokens after the first double block."""
        block = block_at(self.double, 0)
        modulation = block_at(hidden.modulation.double, 0)
        tokens = (hidden.img, hidden.txt)
        return block(tokens, modulation, block_attention(attention, hidden))

    def blocks(
        self,
        hidden: HiddenState,
        *,
        attention: AttentionChoice = None,
        degraded: DegradedBlocks | None = None,
        start: int = 0,
        remat: bool = False,
    ) -> ImgStates:
        """Return the image's tokens after the blocks.

        **Arguments:** `hidden`: from `embed`. `start`: number of the first double block to run. The
        others are as for a call of the network.
        """
        run = block_runner(hidden, attention, degraded)
        double_inputs: tuple[PyTree, ...] = (hidden.modulation.double,)
        single_inputs: tuple[PyTree, ...] = (hidden.modulation.single,)
        if degraded is not None:
            # Without flags the program has no branches.
            double_inputs += (degraded.double,)
            single_inputs += (degraded.single,)
        double, single = self._blocks_without_modulation()
        tokens = (hidden.img, hidden.txt)
        img, txt = scan_blocks(double, tokens, run, inputs=double_inputs, start=start, remat=remat)
        # From here on text and image are one sequence, of which the image is kept in the end.
        joint = jnp.concatenate([txt, img])
        joint = scan_blocks(single, joint, run, inputs=single_inputs, remat=remat)
        return joint[len(hidden.txt) :]

    def _blocks_without_modulation(self) -> tuple[PyTree, PyTree]:
        """Return the blocks without the layers that `prepare` ran, so that no loop fetches them."""

        def double_part(block: DoubleBlock) -> DoubleBlock:
            return eqx.tree_at(_double_modulation_layers, block, (None, None))

        def single_part(block: SingleBlock) -> SingleBlock:
            return eqx.tree_at(_single_modulation_layer, block, None)

        return map_part(self.double, double_part), map_part(self.single, single_part)

    def _conditioning(
        self,
        times: Times,
        vec: Pooled,
        guidance: ScalarLike | None,
    ) -> ConditioningVectors:
        """Return the vectors of times, pooled text and guidance that modulate every block."""

        def embed(mlp: Mlp, value: Array | ScalarLike) -> Array:
            # The sinusoid is cast after it is computed: 1000 t has no exact bfloat16.
            wave = sinusoid(1000 * _wide(value), self.config.time_width)
            return mlp(wave.astype(vec.dtype), jax.nn.silu)

        # The text's vector is the same at all times.
        total = embed(self.time_in, times) + self.vector_in(vec, jax.nn.silu)
        if self.guidance_in is not None and guidance is not None:
            total = total + embed(self.guidance_in, guidance)
        return total

    def _modulation(
        self,
        conditioning: ConditioningVectors,
        remat: bool,
    ) -> Modulation:
        """Return the modulation of all layers.

        **Arguments:** `conditioning`: after its SiLU, which all blocks share.
        """

        def double_modulation(layers: tuple[Linear, Linear]) -> DoubleModulation:
            return DoubleModulation(*(layer(conditioning) for layer in layers))

        def single_modulation(layer: Linear) -> Float[Array, "times three_width"]:
            return layer(conditioning)

        double_layers = map_part(self.double, _double_modulation_layers)
        single_layers = map_part(self.single, _single_modulation_layer)
        return Modulation(
            map_blocks(double_layers, double_modulation, remat=remat),
            map_blocks(single_layers, single_modulation, remat=remat),
            self.final.modulation(conditioning),
        )


def _double_modulation_layers(block: DoubleBlock) -> tuple[Linear, Linear]:
    return block.img.modulation, block.txt.modulation


def _single_modulation_layer(block: SingleBlock) -> Linear:
    return block.modulation


def _wide(value: Array | ScalarLike) -> Float[Array, "*shape"]:
    """Return times, or a guidance scale, in float32, or in float64 if that is their dtype."""
    array = jnp.asarray(value)
    return array.astype(wide_dtype(array.dtype))


def _check_widths(config: FluxConfig, **inputs: Array) -> None:
    """**Raises:** `ValueError` that names all inputs whose last axis does not fit the config."""
    widths = {
        "x": config.in_channels,
        "txt": config.context,
        "vec": config.pooled,
        "img_ids": len(config.rope_axes),
    }
    problems = []
    for name, value in inputs.items():
        if value.shape[-1] != widths[name]:
            problems.append(f"{name} has {value.shape[-1]} features, not {widths[name]}")
    if problems:
        raise ValueError(
            f"`Flux` got inputs that do not fit its config: {'; '.join(problems)}. Load the config "
            "that belongs to them, or make them with this model's encoders and VAE."
        )


def _check_guidance(config: FluxConfig, guidance: ScalarLike | None) -> None:
    """**Raises:** `ValueError` if guidance is missing, or is not taken."""
    if config.guidance_embed and guidance is None:
        raise ValueError(
            "This `Flux` is guidance-distilled and needs `guidance=`. Pass guidance=3.5, the "
            "default of FLUX.1-dev."
        )
    if not config.guidance_embed and guidance is not None:
        raise ValueError(
            "This `Flux` has no guidance embedder, as schnell has none. Pass guidance=None."
        )
