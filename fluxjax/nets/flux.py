"""The FLUX transformer: a velocity dx/dt of noisy image tokens, text and time."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.arguments import convert_arguments
from fluxjax.nets.degraded import DegradedBlocks
from fluxjax.nets.flux_attention import AttentionChoice, block_attention, block_runner
from fluxjax.nets.flux_blocks import DoubleBlock, FinalLayer, ImageAndText, Mlp, SingleBlock
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.flux_control import (
    ControlResiduals,
    add_after_double,
    add_after_single,
    check_residuals,
)
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
from fluxjax.nets.image_prompt import ImagePrompt, check_image_prompts
from fluxjax.nets.layers import Linear
from fluxjax.nets.scan import scan_blocks
from fluxjax.nets.stack import block_at, stack
from fluxjax.nets.summary import describe_network
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


class FluxOptions(TypedDict, total=False):
    """How a `Flux` computes its velocity; what is left out keeps the default.

    `attention`: the name of an implementation of `fluxjax.attention`, an `Attention`, which has
    block sizes too, or a custom function over the text's and the image's tokens. `degraded`: blocks
    to skip, or to run with another attention. `control`: residuals of ControlNets, each of which is
    added after its blocks, skipped ones too. `image_prompts`: of IP-Adapters, which blocks attend
    to as well; those that are skipped do not. `dtype`: of the activations, by default that of
    `txt`, so that a float32 sampler can run a bfloat16 network. `remat`: for a gradient, keep only
    the input of each block and compute the block again: a third more work, and the memory of one
    block.
    """

    attention: AttentionChoice
    degraded: DegradedBlocks | None
    control: Sequence[ControlResiduals]
    image_prompts: Sequence[ImagePrompt]
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
        check_widths("Flux", self.config, x=x, txt=txt, vec=vec, img_ids=img_ids)
        prepared = self.prepare(
            in_wide_dtype(t)[None],
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
        check_widths("Flux", self.config, txt=txt, vec=vec, img_ids=img_ids)
        check_distilled_scale("Flux", guidance, taken=self.config.guidance_embed)
        if txt_ids is None:
            txt_ids = jnp.zeros((len(txt), img_ids.shape[-1]), img_ids.dtype)
        dtype = txt.dtype if dtype is None else dtype
        rotation = joint_rotation(self.config, txt_ids, img_ids, dtype)
        times = in_wide_dtype(times)
        embedders = Embedders(self.time_in, self.vector_in, self.guidance_in)
        conditioning = embedders(times, vec.astype(dtype), guidance, self.config.time_width)
        modulation = Modulation(
            *block_modulation(self.double, self.single, conditioning, remat),
            self.final.modulation(conditioning),
        )
        return Prepared(times, self.txt_in(txt.astype(dtype)), rotation, modulation)

    def with_image_prompts(self, prepared: Prepared, prompts: Sequence[ImagePrompt]) -> Prepared:
        """Return what was prepared, with image prompts that the blocks attend to as well.

        **Arguments:** `prepared`: from `prepare`. `prompts`: of IP-Adapters.
        **Raises:** `ValueError` for prompts that were made for other blocks.
        """
        check_image_prompts(self.config, prompts)
        return prepared._replace(image_prompts=tuple(prompts))

    @convert_arguments
    def velocity(
        self,
        x: ImgTokens,
        t: ScalarLike,
        prepared: Prepared,
        *,
        attention: AttentionChoice = None,
        degraded: DegradedBlocks | None = None,
        control: Sequence[ControlResiduals] = (),
        remat: bool = False,
    ) -> ImgVelocity:
        """Return the velocity at one of the times that were prepared.

        **Arguments:** `prepared`: from `prepare`. The others are as for a call of the network.
        **Returns:** dx/dt in the dtype of `x`; NaN at any other time.
        """
        hidden = self.embed(x, t, prepared)
        img = self.blocks(
            hidden, attention=attention, degraded=degraded, control=control, remat=remat
        )
        return self.predict(img, hidden).astype(x.dtype)

    def predict(self, img: ImgStates, hidden: HiddenState) -> ImgVelocity:
        """Return the prediction from the image's tokens after the blocks.

        **Arguments:** `hidden`: from `embed`.
        """
        modulation = hidden.modulation.final
        assert modulation is not None  # `prepare` computes it
        return self.final(img, modulation)

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
        check_widths("Flux", self.config, x=x)
        img = self.img_in(x.astype(prepared.txt.dtype))
        return HiddenState(
            img, prepared.txt, prepared.at(t), prepared.rotation, prepared.image_prompts
        )

    def first(
        self,
        hidden: HiddenState,
        *,
        attention: AttentionChoice = None,
    ) -> ImageAndText:
        """Return the image's and the text's tokens after the first double block."""
        block = block_at(self.double, 0)
        in_double, _ = hidden.prompts_in_blocks()
        modulation, prompts = block_at((hidden.modulation.double, in_double), 0)
        tokens = (hidden.img, hidden.txt)
        return block(tokens, modulation, block_attention(attention, hidden), prompts)

    def blocks(
        self,
        hidden: HiddenState,
        *,
        attention: AttentionChoice = None,
        degraded: DegradedBlocks | None = None,
        control: Sequence[ControlResiduals] = (),
        start: int = 0,
        remat: bool = False,
    ) -> ImgStates:
        """Return the image's tokens after the blocks.

        **Arguments:** `hidden`: from `embed`. `start`: number of the first double block to run;
        what is added after those before it is in `hidden`. The others are as for a call of the
        network.
        """
        run_double = run_single = block_runner(hidden, attention, degraded)
        in_double, in_single = hidden.prompts_in_blocks()
        double_inputs: tuple[PyTree, ...] = (hidden.modulation.double, in_double)
        single_inputs: tuple[PyTree, ...] = (hidden.modulation.single, in_single)
        if degraded is not None:
            # Without flags the program has no branches.
            double_inputs += (degraded.double,)
            single_inputs += (degraded.single,)
        if control:
            check_residuals(hidden.img, control)
            config, txt_tokens = self.config, len(hidden.txt)
            run_double, numbers = add_after_double(run_double, control, config.double_depth)
            double_inputs += (numbers,)
            run_single, numbers = add_after_single(
                run_single, control, config.single_depth, txt_tokens
            )
            single_inputs += (numbers,)
        double, single = without_modulation(self.double, self.single)
        tokens = (hidden.img, hidden.txt)
        img, txt = scan_blocks(
            double, tokens, run_double, inputs=double_inputs, start=start, remat=remat
        )
        # From here on text and image are one sequence, of which the image is kept in the end.
        joint = jnp.concatenate([txt, img])
        joint = scan_blocks(single, joint, run_single, inputs=single_inputs, remat=remat)
        return joint[len(hidden.txt) :]
