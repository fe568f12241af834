"""The FLUX transformer: a velocity dx/dt from noisy image tokens, text, and time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import Attention, resolve_implementation
from fluxjax.nets.heads import Heads, Projection, heads_of, turn_of
from fluxjax.nets.layers import Linear, RmsNorm, Rotation, gelu, modulate, rope, sinusoid
from fluxjax.nets.stack import map_blocks, map_part, scan_blocks, stack, take
from fluxjax.nets.weight import materialize
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Bool, Float, PRNGKeyArray, ScalarLike

JointAttention = Callable[[Heads, Heads, Heads, int], Heads]
"""(q, k, v, txt_tokens) -> mixed values: an attention over the text's tokens, then the image's."""
Mix = Callable[..., Float[Array, "tokens width"]]
"""(width, *parts) -> their attention, heads joined; q, k and v have `width` columns each."""


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """The numbers of a FLUX transformer; the defaults are FLUX.1-dev's.

    `in_channels`: features of an input token; `out_channels`: of an output token. `mlp_width`: hidden features of the
    MLPs. `context`: features of a text token; `pooled`: of the pooled text vector. `rope_axes`: features of a head
    that turn with each id column. `time_width`: features of the time sinusoid. `guidance_embed`: whether the network
    takes a distilled guidance scale.
    """

    in_channels: int = 64
    out_channels: int = 64
    width: int = 3072
    heads: int = 24
    double_depth: int = 19
    single_depth: int = 38
    mlp_width: int = 12288
    context: int = 4096
    pooled: int = 768
    rope_axes: tuple[int, ...] = (16, 56, 56)
    rope_theta: float = 10_000.0
    time_width: int = 256
    guidance_embed: bool = True

    def __post_init__(self):
        if self.heads * sum(self.rope_axes) != self.width or any(
            axis % 2 for axis in self.rope_axes
        ):
            raise ValueError(
                "`FluxConfig` needs even rope_axes whose sum times heads is width, got "
                f"rope_axes={self.rope_axes}, heads={self.heads}, width={self.width}."
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @classmethod
    def dev(cls) -> "FluxConfig":
        """FLUX.1-dev: 11.9 B parameters, guidance-distilled."""
        return cls()

    @classmethod
    def schnell(cls) -> "FluxConfig":
        """FLUX.1-schnell: dev without the guidance embedder."""
        return replace(cls.dev(), guidance_embed=False)


class Mlp(eqx.Module):
    """down(activation(up(x)))."""

    up: Linear
    down: Linear

    def __init__(self, features: int, hidden: int, out: int, *, key: PRNGKeyArray):
        up, down = jax.random.split(key)
        self.up, self.down = Linear(features, hidden, key=up), Linear(hidden, out, key=down)

    def __call__(self, x, activation):
        return self.down(materialize(activation(self.up(x))))


class Stream(eqx.Module):
    """The half of a double block that belongs to one modality."""

    modulation: Linear
    qkv: Linear
    query_norm: RmsNorm
    key_norm: RmsNorm
    out: Linear
    mlp: Mlp

    def __init__(self, config: FluxConfig, *, key: PRNGKeyArray):
        modulation, qkv, out, mlp = jax.random.split(key, 4)
        width = config.width
        self.modulation = Linear(
            width, 6 * width, scale=0, key=modulation
        )  # adaLN-zero: a new block is the identity
        self.qkv = Linear(width, 3 * width, key=qkv)
        self.query_norm, self.key_norm = RmsNorm(config.head_dim), RmsNorm(config.head_dim)
        self.out = Linear(width, width, key=out)
        self.mlp = Mlp(width, config.mlp_width, width, key=mlp)

    def project(self, x: Float[Array, "tokens width"], shift, scale) -> Projection:
        """Return what queries, keys and values of these tokens are made of."""
        return Projection(self.qkv(modulate(x, shift, scale)), self.query_norm, self.key_norm)

    def finish(
        self, x: Float[Array, "tokens width"], mixed, gate1, shift2, scale2, gate2
    ) -> Float[Array, "tokens width"]:
        """Add the attention's output, then the MLP's, each through its gate."""
        x = x + gate1 * self.out(mixed)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2), gelu)


class DoubleBlock(eqx.Module):
    """Image and text with weights of their own, mixed by one joint attention. Source: Esser et al. 2024, fig. 2b."""

    img: Stream
    txt: Stream

    def __init__(self, config: FluxConfig, *, key: PRNGKeyArray):
        img, txt = jax.random.split(key)
        self.img, self.txt = Stream(config, key=img), Stream(config, key=txt)

    def __call__(
        self, carry: tuple[Array, Array], steer: "DoubleModulation", mix: Mix
    ) -> tuple[Array, Array]:
        """Return the image's and the text's tokens. `steer`: of this block."""
        img, txt = carry
        shift1, scale1, *img_rest = jnp.split(steer.img, 6)
        txt_shift1, txt_scale1, *txt_rest = jnp.split(steer.txt, 6)
        parts = self.txt.project(txt, txt_shift1, txt_scale1), self.img.project(img, shift1, scale1)
        mixed = mix(parts[0].projected.shape[-1] // 3, *parts)
        txt_mixed, img_mixed = mixed[: len(txt)], mixed[len(txt) :]
        return self.img.finish(img, img_mixed, *img_rest), self.txt.finish(
            txt, txt_mixed, *txt_rest
        )


class SingleBlock(eqx.Module):
    """Text and image as one sequence; attention and MLP in parallel. Source: Dehghani et al. 2023, section 2."""

    modulation: Linear
    linear1: Linear
    query_norm: RmsNorm
    key_norm: RmsNorm
    linear2: Linear

    def __init__(self, config: FluxConfig, *, key: PRNGKeyArray):
        modulation, first, second = jax.random.split(key, 3)
        width, hidden = config.width, config.mlp_width
        self.modulation = Linear(width, 3 * width, scale=0, key=modulation)
        self.linear1 = Linear(width, 3 * width + hidden, key=first)
        self.query_norm, self.key_norm = RmsNorm(config.head_dim), RmsNorm(config.head_dim)
        self.linear2 = Linear(width + hidden, width, key=second)

    def __call__(
        self, x: Float[Array, "tokens width"], steer: Float[Array, " three_width"], mix: Mix
    ):
        shift, scale, gate = jnp.split(steer, 3)
        # Of 3 a + m features out and a + m in, a are attention's: by shape, so that a share of the heads is a block too.
        attended = (self.linear1.weight.shape[-2] - self.linear2.weight.shape[-1]) // 2
        projected = materialize(self.linear1(modulate(x, shift, scale)))
        mixed = mix(attended, Projection(projected, self.query_norm, self.key_norm))
        hidden = materialize(gelu(projected[:, 3 * attended :]))
        return x + gate * self.linear2(jnp.concatenate([mixed, hidden], axis=-1))


class FinalLayer(eqx.Module):
    """Modulate, then project to the output channels."""

    modulation: Linear
    linear: Linear

    def __init__(self, config: FluxConfig, *, key: PRNGKeyArray):
        modulation, linear = jax.random.split(key)
        self.modulation = Linear(config.width, 2 * config.width, scale=0, key=modulation)
        self.linear = Linear(config.width, config.out_channels, scale=0, key=linear)

    def __call__(
        self, x: Float[Array, "tokens width"], steer: Float[Array, " two_width"]
    ) -> Float[Array, "tokens out_channels"]:
        shift, scale = jnp.split(steer, 2)
        return self.linear(modulate(x, shift, scale))


class DegradedBlocks(eqx.Module):
    """A network made worse on purpose in some of its blocks, to be led away from: they are skipped, or attend otherwise.

    `double`, `single`: flags, one a block. `attention`: in place of theirs; None skips the blocks.
    **Source:** skip-layer guidance of Stable Diffusion 3.5; with `isolated_attention`, PAG (Ahn et al. 2024).
    """

    double: Bool[Array, " double_depth"]
    single: Bool[Array, " single_depth"]
    attention: JointAttention | None

    def __init__(
        self,
        config: FluxConfig,
        *,
        double: Sequence[int] = (),
        single: Sequence[int] = (),
        attention: JointAttention | None = None,
    ):
        """Name the blocks by number. **Raises:** `ValueError` for none, or one that the config does not have."""
        if not (double or single):
            raise ValueError(
                "`Weaken` needs a block to weaken. Pass double=(number, …) or single=(number, …)."
            )
        self.double = _flags("double", config.double_depth, double)
        self.single = _flags("single", config.single_depth, single)
        self.attention = attention


def _flags(kind: str, depth: int, numbers: Sequence[int]) -> Bool[Array, " depth"]:
    wrong = [number for number in numbers if not 0 <= number < depth]
    if wrong:
        raise ValueError(
            f"`Weaken({kind})` got {wrong}; this network has {kind} blocks 0 to {depth - 1}."
        )
    return jnp.asarray(np.isin(np.arange(depth), numbers))


class DoubleModulation(NamedTuple):
    """What modulates a double block: shifts, scales and gates, not yet split."""

    img: Float[Array, "*rows six_width"]
    txt: Float[Array, "*rows six_width"]


class Modulation(NamedTuple):
    """What modulates the network, at one time or at some."""

    double: DoubleModulation
    single: Float[Array, "single_depth *times three_width"]
    final: Float[Array, "*times two_width"]


class Prepared(NamedTuple):
    """All of one example's evaluations that does not depend on the image, from `Flux.prepare`: the text's tokens, embedded, the
    rotations of the text's and the image's tokens, and the modulation at each of the times."""

    times: Float[Array, " times"]
    txt: Float[Array, "txt_tokens width"]
    rotation: Rotation
    modulation: Modulation

    def at(self, t: ScalarLike) -> Modulation:
        """Return the modulation at t; not a number where t is none of the times, to 1e-6."""
        apart = jnp.abs(self.times - jnp.asarray(t, self.times.dtype))
        number = jnp.argmin(apart)
        double, single, final = self.modulation
        found = Modulation(
            DoubleModulation(double.img[:, number], double.txt[:, number]),
            single[:, number],
            final[number],
        )
        return jax.tree.map(lambda row: jnp.where(apart[number] <= 1e-6, row, jnp.nan), found)


class Hidden(NamedTuple):
    """What goes through the blocks, of one example, with what steers them."""

    img: Float[Array, "img_tokens width"]
    txt: Float[Array, "txt_tokens width"]
    modulation: Modulation
    rotation: Rotation


class Flux(eqx.Module):
    """The transformer, blocks stacked. Source: Black Forest Labs 2024, FLUX.1."""

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
        self.guidance_in = (
            Mlp(config.time_width, width, width, key=guidance) if config.guidance_embed else None
        )
        self.double = stack(
            lambda key: DoubleBlock(config, key=key), config.double_depth, key=double
        )
        self.single = stack(
            lambda key: SingleBlock(config, key=key), config.single_depth, key=single
        )
        self.final = FinalLayer(config, key=final)

    @convert_arguments
    def __call__(
        self,
        x: Float[Array, "img_tokens in_channels"],
        t: ScalarLike,
        *,
        txt: Float[Array, "txt_tokens context"],
        vec: Float[Array, " pooled"],
        img_ids: Float[Array, "img_tokens axes"],
        txt_ids: Float[Array, "txt_tokens axes"] | None = None,
        guidance: ScalarLike | None = None,
        attention: str | Attention | JointAttention | None = None,
        weaken: DegradedBlocks | None = None,
        dtype: DTypeLike | None = None,
        remat: bool = False,
    ) -> Float[Array, "img_tokens out_channels"]:
        """Return the velocity dx/dt of the image tokens at time t.

        **Arguments:** `x`: packed noisy latent. `t`: in [0, 1], 1 is noise.
        `txt`: T5's states. `vec`: CLIP's pooled state. `img_ids`, `txt_ids`: positions; text at zeros by default.
        `guidance`: distilled scale, unscaled (3.5), if and only if the config has `guidance_embed`. `attention`: the
        name of an implementation of `fluxjax.attention`, an `Attention`, which may say block sizes too, or a function of your
        own over the text's tokens and the image's.
        `weaken`: blocks to spoil. `dtype`: of the activations, by default that of `txt`, so that a
        float32 sampler can run a bfloat16 network. `remat`: a gradient recomputes each block instead of keeping what it
        computed: a third more work, memory for one block and for each block's input.
        **Returns:** dx/dt in the dtype of `x`.
        **Raises:** `ValueError` if guidance is missing or not taken, or a width is not the config's.
        """
        _check_widths(self.config, x=x, txt=txt, vec=vec, img_ids=img_ids)
        times = _wide_times(t)[None]
        given: dict[str, Any] = {
            "txt": txt,
            "vec": vec,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "guidance": guidance,
        }
        prepared = self.prepare(times, **given, dtype=dtype, remat=remat)
        return self.velocity(x, t, prepared, attention=attention, weaken=weaken, remat=remat)

    @convert_arguments
    def prepare(
        self,
        times: Float[Array, " times"],
        *,
        txt: Float[Array, "txt_tokens context"],
        vec: Float[Array, " pooled"],
        img_ids: Float[Array, "img_tokens axes"],
        txt_ids: Float[Array, "txt_tokens axes"] | None = None,
        guidance: ScalarLike | None = None,
        dtype: DTypeLike | None = None,
        remat: bool = False,
    ) -> Prepared:
        """Return what `velocity` takes at any of `times`, computed once: dev's modulation is 3.2 of its 11.9 B weights, and
        2 MB a time in bfloat16. Arguments and errors as for the call."""
        _check_widths(self.config, txt=txt, vec=vec, img_ids=img_ids)
        _check_guidance(self.config, guidance)
        if txt_ids is None:
            txt_ids = jnp.zeros((len(txt), img_ids.shape[-1]), img_ids.dtype)
        dtype = txt.dtype if dtype is None else dtype
        ids = jnp.concatenate([txt_ids, img_ids]).astype(wide_dtype(jnp.dtype(dtype)))
        rotation = rope(ids, self.config.rope_axes, self.config.rope_theta)
        times = _wide_times(times)
        steer = jax.nn.silu(self._condition(times, vec.astype(dtype), guidance))
        double = map_part(self.double, lambda block: (block.img.modulation, block.txt.modulation))
        single = map_part(self.single, lambda block: block.modulation)
        modulation = Modulation(
            map_blocks(
                double,
                lambda layers: DoubleModulation(*(layer(steer) for layer in layers)),
                remat=remat,
            ),
            map_blocks(single, lambda layer: layer(steer), remat=remat),
            self.final.modulation(steer),
        )
        return Prepared(times, self.txt_in(txt.astype(dtype)), rotation, modulation)

    @convert_arguments
    def velocity(
        self,
        x: Float[Array, "img_tokens in_channels"],
        t: ScalarLike,
        prepared: Prepared,
        *,
        attention: str | Attention | JointAttention | None = None,
        weaken: DegradedBlocks | None = None,
        remat: bool = False,
    ) -> Float[Array, "img_tokens out_channels"]:
        """Return the velocity at one of the times that were prepared; not a number at another. Arguments as for the call."""
        hidden = self.embed(x, t, prepared)
        img = self.blocks(hidden, attention=attention, weaken=weaken, remat=remat)
        return self.final(img, hidden.modulation.final).astype(x.dtype)

    def embed(
        self, x: Float[Array, "img_tokens in_channels"], t: ScalarLike, prepared: Prepared
    ) -> Hidden:
        """Return what goes through the blocks. **Raises:** `ValueError` if the width of `x` is not the config's."""
        _check_widths(self.config, x=x)
        img = self.img_in(x.astype(prepared.txt.dtype))
        return Hidden(img, prepared.txt, prepared.at(t), prepared.rotation)

    def first(
        self, hidden: Hidden, *, attention: str | Attention | JointAttention | None = None
    ) -> tuple[Array, Array]:
        """Return the image's and the text's tokens after the first double block."""
        block, steer = take(self.double, 0), take(hidden.modulation.double, 0)
        return block((hidden.img, hidden.txt), steer, _mix(attention, hidden))

    def blocks(
        self,
        hidden: Hidden,
        *,
        attention: str | Attention | JointAttention | None = None,
        weaken: DegradedBlocks | None = None,
        start: int = 0,
        remat: bool = False,
    ) -> Float[Array, "img_tokens width"]:
        """Return the image's tokens after the blocks. `start`: the first double block; the rest as for the call."""
        count, (double, single, _) = len(hidden.txt), hidden.modulation
        mix = _mix(attention, hidden)
        worse = (
            None if weaken is None or weaken.attention is None else _mix(weaken.attention, hidden)
        )

        def run(block: Any, carry: Any, steer: Any, *flag: Bool[Array, ""]) -> Any:
            if not flag:
                return block(carry, steer, mix)
            spoilt = (lambda: carry) if worse is None else (lambda: block(carry, steer, worse))
            return jax.lax.cond(flag[0], spoilt, lambda: block(carry, steer, mix))

        flags: Any = ((), ()) if weaken is None else ((weaken.double,), (weaken.single,))
        # Left out, so that no loop fetches what is not used there.
        double_modulation = lambda block: (block.img.modulation, block.txt.modulation)  # noqa: E731
        doubles = map_part(
            self.double, lambda block: eqx.tree_at(double_modulation, block, (None, None))
        )
        singles = map_part(
            self.single, lambda block: eqx.tree_at(lambda block: block.modulation, block, None)
        )
        both = hidden.img, hidden.txt
        img, txt = scan_blocks(
            doubles, both, run, rows=(double, *flags[0]), start=start, remat=remat
        )
        joint = jnp.concatenate([txt, img])
        return scan_blocks(singles, joint, run, rows=(single, *flags[1]), remat=remat)[count:]

    def _condition(
        self,
        times: Float[Array, " times"],
        vec: Float[Array, " pooled"],
        guidance: ScalarLike | None,
    ) -> Float[Array, "times width"]:
        """Return the vectors that modulate every block, before their SiLU."""

        def embed(mlp: Mlp, value: Array | ScalarLike) -> Array:
            wave = sinusoid(1000 * _wide_times(value), self.config.time_width)
            return mlp(wave.astype(vec.dtype), jax.nn.silu)

        total = embed(self.time_in, times) + self.vector_in(vec, jax.nn.silu)
        if self.guidance_in is not None and guidance is not None:
            total = total + embed(self.guidance_in, guidance)
        return total


def _wide_times(t: Array | ScalarLike) -> Float[Array, "*shape"]:
    """Return times, or a guidance scale, in float32, or in float64 if that is what they are."""
    t = jnp.asarray(t)
    return t.astype(wide_dtype(t.dtype))


def _mix(attention: str | Attention | JointAttention | None, hidden: Hidden) -> Mix:
    """Return the attention of these tokens: normed, rotated, mixed, heads joined."""
    turn = turn_of(hidden.rotation)

    def mix(width: int, *parts: Projection) -> Float[Array, "tokens width"]:
        tokens, norm = sum(len(part.projected) for part in parts), parts[0].query_norm
        shape = jax.ShapeDtypeStruct(
            (tokens, width // len(norm.scale), len(norm.scale)), parts[0].projected.dtype
        )
        # In a program that the compiler splits among devices there can be no flash_tpu, and so none of its kind.
        fused = resolve_implementation(attention, shape, shape) == "flash_tpu"
        q, k, v = heads_of(parts, turn, width, fused=fused)
        mixed = (attention if callable(attention) else Attention(attention))(
            q, k, v, len(hidden.txt)
        )
        return rearrange(mixed, "tokens heads dim -> tokens (heads dim)")

    return mix


def _check_widths(config: FluxConfig, **inputs: Array) -> None:
    widths = {
        "x": config.in_channels,
        "txt": config.context,
        "vec": config.pooled,
        "img_ids": len(config.rope_axes),
    }
    wrong = [
        f"{name} has {given.shape[-1]} features, not {widths[name]}"
        for name, given in inputs.items()
        if given.shape[-1] != widths[name]
    ]
    if wrong:
        raise ValueError(f"`Flux` got inputs that do not fit its config: {'; '.join(wrong)}.")


def _check_guidance(config: FluxConfig, guidance: ScalarLike | None) -> None:
    if config.guidance_embed and guidance is None:
        raise ValueError(
            "This `Flux` is guidance-distilled and needs `guidance=`. Pass guidance=3.5, FLUX.1-dev's default."
        )
    if not config.guidance_embed and guidance is not None:
        raise ValueError("This `Flux` has no guidance embedder (as schnell). Pass guidance=None.")
