"""The FLUX transformer: a velocity dx/dt of noisy image tokens, text and time."""

from typing import Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.nets.flux_blocks import DoubleBlock, FinalLayer, Mlp, SingleBlock
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.flux_prepare import (
    Embedders,
    block_modulation,
    check_distilled_scale,
    check_widths,
    in_wide_dtype,
    joint_rotation,
)
from fluxjax.nets.flux_state import Modulation, Prepared, Times, TxtLength
from fluxjax.nets.layers import Linear
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


class Flux(AbstractTransformer):
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
        self.final = FinalLayer(width, config.out_channels, key=final)

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
        txt_length: TxtLength | int | None = None,
        **options: Unpack[FluxOptions],
    ) -> ImgVelocity:
        """Return the velocity dx/dt of the image tokens at time t.

        **Arguments:** `x`: packed noisy latent. `t`: in [0, 1], where 1 is noise. `txt`: hidden
        states of T5. `vec`: pooled state of CLIP. `img_ids`, `txt_ids`: positions; those of the
        text are zeros by default. `guidance`: distilled guidance scale, unscaled (3.5), if and only
        if the config has `guidance_embed`. `txt_length`: how many of the text's tokens are attended
        to, for models that were trained without its padding; None for all of them, as FLUX.1.
        `options`: those of `FluxOptions`.
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

        The modulation layers are 3.2 of dev's 11.9 B weights; what they give takes 2 MB for each
        time, in bfloat16.

        **Arguments:** `times`: those at which `velocity` will be called. The others are as for a
        call of the network.
        **Raises:** `ValueError` as for a call of the network.
        """
        if vec is None:
            raise ValueError(
                "`Flux` reads a pooled text, and got vec=None. Pass the pooled state of CLIP."
            )
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
            _final_modulation(self.final, conditioning),
        )
        tokens = self.txt_in(txt.astype(dtype))
        return Prepared(times, tokens, rotation, modulation)


def _final_modulation(
    final: FinalLayer, conditioning: Float[Array, "times width"]
) -> Float[Array, "times two_width"]:
    assert final.modulation is not None  # only in Chroma it is elsewhere
    return final.modulation(conditioning)
