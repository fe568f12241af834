"""Step caching: a transformer that runs its blocks only when their output would change enough."""

from abc import abstractmethod
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.flow.velocity import StatefulVelocity
from fluxjax.generate.conditioning import (
    Conditioning,
    PreparedConditioning,
    Transformer,
    network_input,
    prepare_conditioning,
)
from fluxjax.generate.controls import ControlNetSet
from fluxjax.kernels.attention import Attention
from fluxjax.nets.flux_control import add_after_first
from fluxjax.nets.flux_state import HiddenState, Prepared
from fluxjax.nets.heads import JointAttention
from fluxjax.nets.layers import modulate
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.numeric import check_finite, is_concrete_number
from fluxjax.shapes import Array, Bool, Float, Int, Scalar, ScalarLike

Tokens = Float[Array, "all_tokens width"]
AttentionChoice = str | Attention | JointAttention | None


class CacheMemory(NamedTuple):
    """What a cached network carries from one evaluation to the next.

    `signal`: what the next evaluation is compared with. `distance`: accumulated since the blocks
    ran last. `residual`: what the blocks last added to the image's tokens. `known`: whether they
    have run. `reused`: how many evaluations skipped them.
    """

    signal: Float[Array, "all_tokens width"]
    distance: Scalar
    residual: Float[Array, "all_tokens width"]
    known: Bool[Array, ""]
    reused: Int[Array, ""]


class StepCache(eqx.Module):
    """When the blocks are skipped and their last output is used again.

    `threshold`: they are skipped while a distance stays below it; 0 never skips. `low`, `high`: the
    times between which they may be skipped.
    """

    threshold: ScalarLike
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0

    def __check_init__(self):
        # An infinite threshold is allowed: it skips whenever it may.
        if is_concrete_number(self.threshold) and bool(np.isnan(np.asarray(self.threshold))):
            name = type(self).__name__
            raise ValueError(f"`{name}(threshold)` is NaN. Pass a number; 0 never skips a block.")
        check_finite(type(self).__name__, low=self.low, high=self.high)

    @abstractmethod
    def signal(
        self, flux: AbstractTransformer, hidden: HiddenState, attention: AttentionChoice
    ) -> tuple[HiddenState, Tokens, int]:
        """Run what is always run.

        **Returns:** the hidden state after it, the signal to compare, and the number of the first
        double block that is still to be run.
        """

    @abstractmethod
    def accumulate(self, distance: Scalar, change: Scalar) -> Scalar:
        """Return the new distance, from the one before and the signal's relative change."""

    @abstractmethod
    def next_signal(self, old: Tokens, new: Tokens, skip: Bool[Array, ""]) -> Tokens:
        """Return the signal that the next evaluation is compared with."""


class FirstBlock(StepCache):
    """Compare what the first double block adds to the image's tokens.

    It is compared with what it added when the other blocks ran last.
    **Source:** first-block cache of ParaAttention (Cheng 2024), as in diffusers.
    """

    def signal(
        self, flux: AbstractTransformer, hidden: HiddenState, attention: AttentionChoice
    ) -> tuple[HiddenState, Tokens, int]:
        img, txt = flux.first(hidden, attention=attention)
        return hidden._replace(img=img, txt=txt), img - hidden.img, 1

    def accumulate(self, distance: Scalar, change: Scalar) -> Scalar:
        return change

    def next_signal(self, old: Tokens, new: Tokens, skip: Bool[Array, ""]) -> Tokens:
        return jnp.where(skip, old, new)


class TeaCache(StepCache):
    """Compare the modulated input of the first block with that of the evaluation before.

    A polynomial of the relative change is added up until it reaches the threshold. `polynomial`:
    its coefficients, the highest power first; by default those of FLUX.1-dev, for which thresholds
    of 0.25 to 0.8 are usual.
    **Source:** Liu et al. 2024 (2411.19108).
    """

    polynomial: tuple[float, ...] = eqx.field(
        static=True,
        default=(4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    )

    def signal(
        self, flux: AbstractTransformer, hidden: HiddenState, attention: AttentionChoice
    ) -> tuple[HiddenState, Tokens, int]:
        shift, scale = jnp.split(hidden.modulation.double.img[0], 6)[:2]
        return hidden, modulate(hidden.img, shift, scale), 0

    def accumulate(self, distance: Scalar, change: Scalar) -> Scalar:
        return distance + jnp.polyval(jnp.float32(self.polynomial), change)

    def next_signal(self, old: Tokens, new: Tokens, skip: Bool[Array, ""]) -> Tokens:
        return new


class CachedFlux(StatefulVelocity):
    """A transformer with a step cache, called as (x, t, condition) -> dx/dt.

    `flux`: the network. `cache`: `FirstBlock` or `TeaCache`. `attention`: as for the network.
    `image_axes`: names of the axes, of `jax.vmap` or `jax.shard_map`, over which all images skip
    blocks together; a decision for each image of a batch would compute both branches.
    `reference_tokens`: how many tokens the condition adds to the noisy ones. `control`:
    ControlNets beside the network, which are skipped with its blocks. `remat`: as for `Flux`.
    """

    flux: AbstractTransformer
    cache: StepCache
    attention: AttentionChoice = None
    image_axes: tuple[str, ...] = eqx.field(static=True, default=())
    reference_tokens: int = eqx.field(static=True, default=0)
    control: ControlNetSet | None = None
    remat: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if self.flux.config.double_depth < 1:
            raise ValueError(
                "A step cache compares what the first double block does, and this network has "
                "none. Leave the cache out."
            )

    def init(self, x: Float[Array, "img_tokens channels"]) -> CacheMemory:
        tokens = len(x) + self.reference_tokens
        zeros = jnp.zeros((tokens, self.flux.config.width))
        never = jnp.asarray(False)
        return CacheMemory(zeros, jnp.zeros(()), zeros, never, jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: Float[Array, "img_tokens channels"],
        t: Scalar,
        *condition: Conditioning | PreparedConditioning,
        memory: CacheMemory | None = None,
    ) -> (
        Float[Array, "img_tokens out_channels"]
        | tuple[Float[Array, "img_tokens out_channels"], CacheMemory]
    ):
        old = self.init(x) if memory is None else memory
        prepared = condition_at(self.flux, condition[0], t, self.control)
        # A cache is refused where tokens are split, so that this is prepared for all of them.
        shared: Prepared = prepared.prepared  # type: ignore[assignment]
        embedded = self.flux.embed(network_input(x, prepared), t, shared)
        attention = attention_at(self.attention, prepared, t, self.image_axes)
        hidden, signal, start = self.cache.signal(self.flux, embedded, attention)
        signal = signal.astype(jnp.float32)
        distance = self.cache.accumulate(old.distance, _relative_change(signal, old.signal))
        if self.image_axes:
            # The image of the batch that has changed most decides for all.
            distance = jax.lax.pmax(distance, self.image_axes)
        skip = self._skips(t, distance, old)

        def add_last() -> tuple[Tokens, Tokens]:
            return hidden.img + old.residual.astype(hidden.img.dtype), old.residual

        def run_blocks() -> tuple[Tokens, Tokens]:
            # What ControlNets add is in the residual too, so that they are skipped with the blocks.
            control = () if self.control is None else self.control(x, t, prepared.control)
            first = hidden
            if start and control:
                first = hidden._replace(img=add_after_first(hidden.img, control))
            img = self.flux.blocks(
                first, attention=attention, control=control, start=start, remat=self.remat
            )
            return img, (img - hidden.img).astype(jnp.float32)

        img, residual = jax.lax.cond(skip, add_last, run_blocks)
        value = self.flux.predict(img, hidden).astype(x.dtype)[: len(x)]
        if memory is None:
            return value
        new = CacheMemory(
            signal=self.cache.next_signal(old.signal, signal, skip),
            distance=jnp.where(skip, distance, 0),
            residual=residual,
            known=jnp.asarray(True),
            reused=old.reused + skip.astype(old.reused.dtype),
        )
        return value, new

    def _skips(self, t: Scalar, distance: Scalar, old: CacheMemory) -> Bool[Array, ""]:
        """Return whether the blocks are skipped, and their last change is added instead.

        **Arguments:** `distance`: how much their input has changed since they were run.
        """
        cache = self.cache
        allowed = (cache.low <= t) & (t <= cache.high)
        # A polynomial may be negative; a threshold of 0 still never skips.
        positive = jnp.asarray(cache.threshold) > 0
        return old.known & allowed & (distance < cache.threshold) & positive


def condition_at(
    flux: Transformer,
    condition: Conditioning | PreparedConditioning,
    t: Scalar,
    control: ControlNetSet | None = None,
) -> PreparedConditioning:
    """Return a condition that is prepared for t, here if it is not yet.

    **Arguments:** `control`: the ControlNets beside the transformer.
    """
    if isinstance(condition, PreparedConditioning):
        return condition
    nets = () if control is None else control.nets
    return prepare_conditioning(flux, condition, jnp.asarray(t)[None], nets)


def attention_at(
    choice: AttentionChoice,
    condition: PreparedConditioning,
    t: Scalar,
    image_axes: tuple[str, ...] = (),
) -> AttentionChoice:
    """Return the attention for a condition at time t: by regions, if it has regions.

    **Arguments:** `image_axes`: as for `CachedFlux`.
    """
    if condition.regions is None:
        return choice
    # `check_regions` refuses custom functions.
    return condition.regions.attention(t, choice, image_axes)  # type: ignore[arg-type]


def _relative_change(new: Tokens, old: Tokens) -> Scalar:
    """Return the mean absolute change over the mean absolute size of the old signal."""
    size = jnp.mean(jnp.abs(old))
    return jnp.mean(jnp.abs(new - old)) / jnp.where(size > 0, size, 1)
