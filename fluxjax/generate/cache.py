"""Step caching: a FLUX transformer that runs its blocks only when what they would say has changed enough."""

from abc import abstractmethod
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.flow.velocity import StatefulVelocity
from fluxjax.kernels.attention import Attention
from fluxjax.nets.flux import Flux, HiddenState, JointAttention, Prepared
from fluxjax.nets.layers import modulate
from fluxjax.numeric import check_finite, is_concrete_number
from fluxjax.shapes import Array, Bool, Float, Int, Scalar, ScalarLike

Tokens = Float[Array, "img_tokens width"]


class CacheMemory(NamedTuple):
    """What a cached network remembers: the `signal` that it compares and the `distance` gathered so far; what the blocks last
    added to the image's tokens, `residual`; whether there is one; and how often it was `reused`."""

    signal: Float[Array, "img_tokens width"]
    distance: Scalar
    residual: Float[Array, "img_tokens width"]
    known: Bool[Array, ""]
    reused: Int[Array, ""]


class StepCache(eqx.Module):
    """When the blocks are not run: while a distance is below `threshold`, at times from `low` to `high`. 0 never reuses."""

    threshold: ScalarLike
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0

    def __check_init__(self):
        # An infinite threshold always reuses.
        if is_concrete_number(self.threshold) and bool(np.isnan(np.asarray(self.threshold))):
            raise ValueError(
                f"`{type(self).__name__}(threshold)` is NaN. Pass a number; 0 never reuses."
            )
        check_finite(type(self).__name__, low=self.low, high=self.high)

    @abstractmethod
    def look(
        self, flux: Flux, hidden: HiddenState, attention: str | Attention | JointAttention | None
    ) -> tuple[HiddenState, Tokens, int]:
        """Return the hidden state after what is always run, the signal, and the first double block left."""

    @abstractmethod
    def gather(self, before: Scalar, change: Scalar) -> Scalar:
        """Return the distance, from that before this evaluation and the signal's relative change."""

    @abstractmethod
    def remember(self, old: Tokens, new: Tokens, reuse: Bool[Array, ""]) -> Tokens:
        """Return the signal that the next one is compared with."""


class FirstBlock(StepCache):
    """Compares what the first block adds to the image's tokens with what it added when the others were last run.

    Source: first-block cache of ParaAttention (Cheng 2024), as in diffusers.
    """

    def look(
        self, flux: Flux, hidden: HiddenState, attention: str | Attention | JointAttention | None
    ) -> tuple[HiddenState, Tokens, int]:
        img, txt = flux.first(hidden, attention=attention)
        return hidden._replace(img=img, txt=txt), img - hidden.img, 1

    def gather(self, before: Scalar, change: Scalar) -> Scalar:
        return change

    def remember(self, old: Tokens, new: Tokens, reuse: Bool[Array, ""]) -> Tokens:
        return jnp.where(reuse, old, new)


class TeaCache(StepCache):
    """Compares the first block's modulated input with that of the evaluation before, and adds up a polynomial of the change
    until it reaches the threshold.

    `polynomial`: its coefficients, the highest power first; FLUX.1-dev's by default, of which thresholds are 0.25 to 0.8.
    Source: Liu et al. 2024 (2411.19108).
    """

    polynomial: tuple[float, ...] = eqx.field(
        static=True,
        default=(4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    )

    def look(
        self, flux: Flux, hidden: HiddenState, attention: str | Attention | JointAttention | None
    ) -> tuple[HiddenState, Tokens, int]:
        shift, scale = jnp.split(hidden.modulation.double.img[0], 6)[:2]
        return hidden, modulate(hidden.img, shift, scale), 0

    def gather(self, before: Scalar, change: Scalar) -> Scalar:
        return before + jnp.polyval(jnp.float32(self.polynomial), change)

    def remember(self, old: Tokens, new: Tokens, reuse: Bool[Array, ""]) -> Tokens:
        return new


class CachedFlux(StatefulVelocity):
    """A FLUX transformer that remembers, (x, t, (txt, vec)) -> dx/dt; `Guided(cached, (txt, vec))` makes a `Velocity` of it.
    In place of (txt, vec) it takes what `Flux.prepare` makes of them.

    `flux`, `guidance`, `img_ids`, `attention`: as for the network's call. `reuse`: `FirstBlock` or `TeaCache`. `over`: the
    names of axes, of `jax.vmap` or `jax.shard_map`, over which all reuse together or none does: a choice of each row of a batch
    would compute both ways.
    """

    flux: Flux
    reuse: StepCache
    img_ids: Float[Array, "img_tokens axes"]
    guidance: ScalarLike | None = None
    attention: str | Attention | JointAttention | None = None
    over: tuple[str, ...] = eqx.field(static=True, default=())

    def __check_init__(self):
        if self.flux.config.double_depth < 1:
            raise ValueError(
                "`Cached` compares what the first double block does, and this network has none. Leave caching out."
            )

    def init(self, x: Float[Array, "img_tokens in_channels"]) -> CacheMemory:
        zeros, none = jnp.zeros((len(x), self.flux.config.width)), jnp.zeros(())
        return CacheMemory(zeros, none, zeros, jnp.asarray(False), jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: Float[Array, "img_tokens in_channels"],
        t: Scalar,
        *condition: Any,
        memory: Any = None,
    ) -> Any:
        old = self.init(x) if memory is None else memory
        whole = self.flux.embed(x, t, self._prepared(t, condition[0]))
        hidden, signal, start = self.reuse.look(self.flux, whole, self.attention)
        distance = self.reuse.gather(old.distance, _change(signal.astype(jnp.float32), old.signal))
        # Of all the rows of a batch the one that has changed most decides.
        distance = jax.lax.pmax(distance, self.over) if self.over else distance
        timely = (self.reuse.low <= t) & (t <= self.reuse.high)
        # A polynomial may be negative, and 0 is still never.
        reuse = (
            old.known
            & timely
            & (distance < self.reuse.threshold)
            & (jnp.asarray(self.reuse.threshold) > 0)
        )

        def recall() -> tuple[Tokens, Tokens]:
            return hidden.img + old.residual.astype(hidden.img.dtype), old.residual

        def run() -> tuple[Tokens, Tokens]:
            img = self.flux.blocks(hidden, attention=self.attention, start=start)
            return img, (img - hidden.img).astype(jnp.float32)

        img, residual = jax.lax.cond(reuse, recall, run)
        value = self.flux.final(img, hidden.modulation.final).astype(x.dtype)
        if memory is None:
            return value
        kept = self.reuse.remember(old.signal, signal.astype(jnp.float32), reuse)
        return value, CacheMemory(
            kept,
            jnp.where(reuse, distance, 0),
            residual,
            jnp.asarray(True),
            old.reused + reuse.astype(old.reused.dtype),
        )

    def _prepared(self, t: Scalar, given: Any) -> Prepared:
        if isinstance(given, Prepared):
            return given
        txt, vec = given
        times = jnp.asarray(t, jnp.float32)[None]
        return self.flux.prepare(
            times, txt=txt, vec=vec, img_ids=self.img_ids, guidance=self.guidance
        )


def _change(new: Tokens, old: Tokens) -> Scalar:
    """Return the mean change over the mean size."""
    size = jnp.mean(jnp.abs(old))
    return jnp.mean(jnp.abs(new - old)) / jnp.where(size > 0, size, 1)
