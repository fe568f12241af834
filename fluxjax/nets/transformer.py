"""What all transformers of FLUX's blocks have in common: the blocks, and the states around them."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypedDict

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.arguments import convert_arguments
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.degraded import DegradedBlocks
from fluxjax.nets.flux_attention import AttentionChoice, block_attention, block_runner
from fluxjax.nets.flux_blocks import DoubleBlock, FinalLayer, ImageAndText, SingleBlock
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.flux_control import (
    ControlResiduals,
    add_after_double,
    add_after_single,
    check_residuals,
)
from fluxjax.nets.flux_prepare import check_widths, checked_length, without_modulation
from fluxjax.nets.flux_state import HiddenState, ImgStates, Prepared, Times, TxtLength
from fluxjax.nets.image_prompt import ImagePrompt, check_image_prompts
from fluxjax.nets.layers import Linear
from fluxjax.nets.scan import scan_blocks
from fluxjax.nets.stack import block_at
from fluxjax.shapes import Array, Float, ScalarLike

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
    """How a transformer computes its velocity; what is left out keeps the default.

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


class AbstractTransformer(eqx.Module):
    """A transformer of FLUX's blocks: the velocity dx/dt of noisy image tokens, text and time.

    It takes one example. A network of this kind says how its tokens and the modulation of all its
    blocks are prepared, in `prepare`; the rest is the same for all of them.

    `img_in`: from the features of an image token to the width of the blocks. `double`, `single`:
    the blocks, stacked. `final`: to the prediction.
    """

    config: eqx.AbstractVar[FluxConfig | ChromaConfig]
    img_in: eqx.AbstractVar[Linear]
    double: eqx.AbstractVar[DoubleBlock]
    single: eqx.AbstractVar[SingleBlock]
    final: eqx.AbstractVar[FinalLayer]

    @abstractmethod
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

        **Arguments:** `times`: those at which `velocity` will be called. `txt`: hidden states of
        T5. `vec`: pooled state of CLIP, for networks that read it. `img_ids`, `txt_ids`: positions;
        those of the text are zeros by default. `guidance`: distilled guidance scale, for networks
        that take one. `dtype`: of the activations, by default that of `txt`.
        **Raises:** `ValueError` for an input that is missing, or is not taken, or whose width is
        not that of the config.
        """

    def with_txt_length(self, prepared: Prepared, length: TxtLength | int | None) -> Prepared:
        """Return what was prepared, with the number of text tokens that are attended to.

        **Arguments:** `prepared`: from `prepare`. `length`: the text's tokens from there on are
        padding; None for all tokens. Where the text is of two prompts, as for `Nag`, one for each.
        **Raises:** `ValueError` for a Python number that is not 0 to the number of text tokens.
        """
        checked = checked_length(type(self).__name__, length, len(prepared.txt))
        return prepared._replace(txt_length=checked)

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
        check_widths(type(self).__name__, self.config, x=x)
        img = self.img_in(x.astype(prepared.txt.dtype))
        return HiddenState(
            img,
            prepared.txt,
            prepared.at(t),
            prepared.rotation,
            prepared.image_prompts,
            prepared.txt_length,
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
