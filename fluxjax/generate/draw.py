"""Text to image: the public parts composed, each stage a jitted function of its networks and inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.devices.offload import fetch
from fluxjax.devices.shard import on_mesh
from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.flow.guidance import ClassifierFree, Guided, Rule, WeakModel
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.sample import check_times, evaluation_times, sample
from fluxjax.flow.step import Step, StochasticStep
from fluxjax.flow.stochastic import Churn
from fluxjax.flow.times import flow_times
from fluxjax.flow.velocity import StatefulVelocity, initial_memory
from fluxjax.generate.autoencode import decode
from fluxjax.generate.cache import CachedFlux, CacheMemory, StepCache
from fluxjax.generate.latents import (
    CELL,
    PATCH,
    image_ids,
    initial_noise,
    pack_latents,
    unpack_latents,
)
from fluxjax.generate.load import (
    Models,
    activation_dtype,
)
from fluxjax.generate.text import Text, encode_text, prompt_ids
from fluxjax.kernels.attention import Attention
from fluxjax.kernels.guided_attention import Nag
from fluxjax.nets.flux import DegradedBlocks, Flux, JointAttention
from fluxjax.nets.layers import check_ids
from fluxjax.numeric import check_finite, wide_dtype
from fluxjax.shapes import Array, Bool, Float, PerImage, PRNGKeyArray, Scalar, Times
from fluxjax.zoo import Defaults

Tree = TypeVar("Tree")
Encoded = TypeVar("Encoded")
"""A `Text`, or None where there is none."""
Network = TypeVar("Network", bound=eqx.Module)


@eqx.filter_jit
def denoise(
    flux: Flux,
    text: Text,
    noise: Float[Array, "images latent_channels rows columns"],
    times: Times,
    guidance: PerImage | None,
    *,
    step: Step = Euler(),
    keys: Array | None = None,
    negative: Text | None = None,
    cfg: PerImage = 1.0,
    rule: Rule = ClassifierFree(),
    nag: Nag | None = None,
    weaken: DegradedBlocks | None = None,
    strength: PerImage = 0.0,
    reuse: StepCache | None = None,
    attention: str | Attention | JointAttention | None = None,
    report: Callable[[Array], None] | None = None,
    watch: Callable[[float, bool, int], None] | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "images latent_channels rows columns"]:
    """Integrate the transformer's velocity from noise to latents, a batch at once.

    **Arguments:** `noise`: from `initial_noise`, float32. `times`: from `flow_times` or another timer. `guidance`: distilled
    scale, or None for a network without it. `step`: the integrator. `keys`: of a step that draws noise, one an image.
    `negative`: what true classifier-free guidance guides away from, by the scale `cfg`, combined by `rule`, and `nag`, if
    given, inside of the attention. `weaken`, `strength`: blocks to degrade, and by how much to guide away from that. `reuse`:
    of what the blocks computed before, decided for the batch. `attention`: as of `Flux`; of `nag` too. `report`: called with t
    at every evaluation, on the host. `watch`: called after it with t, whether every image's velocity is finite, and how many of
    the networks' evaluations reused what their blocks computed (with `reuse`). `mesh`: of devices, from `make_mesh`; `flux` is
    then from `shard`. `guidance`, `cfg` and `strength` are one number for all images, or one for each.
    **Raises:** `ValueError` for nag without `negative`, or with another attention of one's own; as `on_mesh` and `OnTokens`.
    """
    _check_guidance(negative, nag, weaken, attention)
    if reuse is not None and mesh is not None and mesh.shape["context"] > 1:
        raise ValueError(
            "`denoise(reuse)` compares all tokens of an image. Use a mesh of context=1 with it."
        )
    height, width = CELL * noise.shape[-2], CELL * noise.shape[-1]
    everywhere = ("images",) if mesh is None else ("images", "data", "fsdp")
    if nag is not None:
        named: Any = nag.implementation if attention is None else attention
        nag = Nag(nag.scale, nag.tau, nag.alpha, named, head_axes=() if mesh is None else ("tensor",))

    def run(flux: Flux, rows: Any, rest: Any) -> Array:
        times, shared, step, rule, nag, weaken, reuse = rest
        ids, mix, asked = (
            image_ids(height, width),
            attention if nag is None else nag,
            evaluation_times(step, times),
        )
        call: Any = flux if mesh is None or mesh.shape["context"] == 1 else TokenParallelFlux(flux)

        def one(
            noise: Array,
            text: Text,
            negative: Text | None,
            key: PRNGKeyArray | None,
            own: Mapping[str, Array],
        ) -> Array:
            scales = {**shared, **own}
            guidance = scales["guidance"]

            def prepare(text: Text, times: Array) -> Any:
                return call.prepare(
                    times, txt=text.txt, vec=text.vec, img_ids=ids, guidance=guidance
                )

            def network(
                x: Array, t: Scalar, given: Any, weaken: DegradedBlocks | None = None
            ) -> Array:
                prepared = prepare(given, t[None]) if isinstance(given, Text) else given
                return call.velocity(x, t, prepared, attention=mix, weaken=weaken)

            def spoilt(x: Array, t: Scalar, given: Any) -> Array:
                return network(x, t, given, weaken)

            velocity = (
                network
                if reuse is None
                else CachedFlux(flux, reuse, ids, guidance, mix, over=everywhere)
            )
            weak = None if weaken is None else WeakModel(spoilt, scales["strength"])
            if nag is not None and negative is not None:
                text, negative = (
                    Text(jnp.concatenate([negative.txt, one.txt]), one.vec)
                    for one in (text, negative)
                )
            positive, away = text, negative
            if asked is not None:
                positive, away = (
                    prepare(text, asked),
                    None if negative is None else prepare(negative, asked),
                )
            guided = Guided(velocity, positive, away, scales["cfg"], rule, weak=weak)
            axes = () if mesh is None else mesh.axis_names
            told = (
                guided
                if report is None and watch is None
                else _Told(guided, report, watch, axes, everywhere)
            )
            return unpack_latents(
                sample(told, pack_latents(noise), times, step=step, key=key).x, height, width
            )

        return jax.vmap(one, axis_name="images")(*rows)

    shared, own = _split_scales(len(noise), guidance=guidance, cfg=cfg, strength=strength)
    rows, rest = (noise, text, negative, keys, own), (times, shared, step, rule, nag, weaken, reuse)
    return run(flux, rows, rest) if mesh is None else on_mesh(run, mesh, flux, rows, rest)


def _split_scales(
    images: int, **scales: PerImage | None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the scales that all images share, and those with one number for each image."""
    own = {
        name: jnp.asarray(scale)
        for name, scale in scales.items()
        if scale is not None and jnp.ndim(scale) == 1
    }
    for name, scale in own.items():
        _check_count("denoise", name, len(scale), images)
    return {name: scale for name, scale in scales.items() if name not in own}, own


def _check_count(call: str, name: str, given: int, images: int) -> None:
    if given != images:
        raise ValueError(
            f"`{call}({name})` takes one number, or one for each of the {images} images, got {given}."
        )


class _Told(StatefulVelocity):
    """A velocity whose evaluations are reported, by one device of those along `axes`. `rows`: the axes along which the images
    lie."""

    velocity: Guided
    report: Callable[[Array], None] | None = eqx.field(static=True)
    watch: Callable[[float, bool, int], None] | None = eqx.field(static=True)
    axes: tuple[str, ...] = eqx.field(static=True)
    rows: tuple[str, ...] = eqx.field(static=True)

    def init(self, x: Array) -> Any:
        return initial_memory(self.velocity, x)

    def __call__(self, x: Array, t: Scalar, *condition: Any, memory: Any = None) -> Any:
        number = jax.lax.axis_index(self.axes) if self.axes else 0
        report = self.report
        if report is not None:
            jax.debug.callback(lambda t, number: report(t) if number == 0 else None, t, number)
        result = self.velocity(x, t, memory=memory)
        if self.watch is not None:
            value, after = (result, None) if memory is None else result
            _watched(self.watch, self.rows, t, number, value, _reused(after) - _reused(memory))
        return result


def _watched(
    watch: Callable[[float, bool, int], None],
    rows: tuple[str, ...],
    t: Scalar,
    number: Any,
    value: Array,
    reused: Any,
):
    """Call `watch` on the host for all images at once. `number`: of the device, of which the first calls."""
    wrong = jax.lax.pmax((~jnp.isfinite(value).all()).astype(jnp.int32), rows)
    reused = jax.lax.pmax(jnp.asarray(reused, jnp.int32), rows)

    def call(t: Any, number: Any, wrong: Any, reused: Any) -> None:
        if number == 0:
            watch(float(t), not wrong, int(reused))

    jax.debug.callback(call, t, number, wrong, reused)


def _reused(memory: Any) -> Any:
    """Return how often the caches in a velocity's memory have reused what their blocks said."""
    found = jax.tree.leaves(memory, is_leaf=lambda node: isinstance(node, CacheMemory))
    return sum(node.reused for node in found if isinstance(node, CacheMemory))


def _check_guidance(
    negative: Text | None, nag: Nag | None, weaken: DegradedBlocks | None, attention: Any
) -> None:
    if nag is not None and negative is None:
        raise ValueError("`denoise(nag)` needs the text to lead away from. Pass negative=.")
    if nag is not None and weaken is not None and weaken.attention is not None:
        raise ValueError(
            "`denoise` takes one attention of its own: nag, or that of weaken. Leave one out."
        )
    if nag is not None and callable(attention) and not isinstance(attention, Attention):
        raise ValueError(
            "`denoise(nag)` has an attention of its own. Pass attention= by name, or leave one out."
        )


def noise_batch(
    key: PRNGKeyArray, numbers: Sequence[int], height: int, width: int, *, channels: int
) -> Float[Array, "images channels rows columns"]:
    """Draw the noise of the images of these numbers; an image's noise depends on the key and its number alone."""
    return jnp.stack(
        [
            initial_noise(jax.random.fold_in(key, n), height, width, channels=channels)
            for n in numbers
        ]
    )


_STEPS = 2**32 - 1


def step_keys(key: PRNGKeyArray, numbers: Sequence[int], step: Step) -> Array | None:
    """Return a key for each image of these numbers, apart from that of its first noise, or None for a step that draws none."""
    if not isinstance(step, StochasticStep | Churn):
        return None
    root = jax.random.fold_in(key, _STEPS)
    return jnp.stack([jax.random.fold_in(root, n) for n in numbers])


def model_times(defaults: Defaults, steps: int, height: int, width: int) -> Times:
    """Return the model's schedule for an image of `height` x `width` pixels."""
    side = CELL * PATCH
    tokens = (height // side) * (width // side) if defaults.shift else None
    return flow_times(
        steps, tokens=tokens, base_shift=defaults.base_shift, max_shift=defaults.max_shift
    )


@convert_arguments
def text_to_image(
    models: Models,
    prompt: str | Sequence[str],
    *,
    key: PRNGKeyArray,
    prompt_2: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] = "",
    cfg: PerImage = 1.0,
    rule: Rule = ClassifierFree(),
    nag: Nag | None = None,
    weaken: DegradedBlocks | None = None,
    strength: PerImage = 0.0,
    reuse: StepCache | None = None,
    attention: str | Attention | JointAttention | None = None,
    images: int = 1,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    times: Times | None = None,
    step: Step = Euler(),
    guidance: PerImage | None = None,
    max_length: int | None = None,
    batch: int | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "images height width 3"]:
    """Draw images of prompts.

    **Arguments:** `models`: from `load_models`. `prompt`: one, or several. `prompt_2`: as many, for T5 alone.
    `negative_prompt`: one for all prompts, or one for each; `cfg`, `rule`: true classifier-free guidance away from it, its
    scale (1 is none, and another takes twice the work) and its rule; `nag` guides away from it inside of the attention.
    `weaken`, `strength`: blocks to degrade, and by how much to guide away from that. `reuse`: of what the blocks computed a
    step before. `attention`: as of `Flux`. `images`: of each prompt. `height`, `width`: in pixels, multiples of 16. `steps`: of
    the model's timer, or `times`: nodes of another. `step`: the integrator. `guidance`: distilled scale. `max_length`: T5
    tokens. `batch`: images a forward pass, by default all. `dtype`: of the activations. None takes the model's default, for
    `dtype` that of `activation_dtype`. `cfg`, `strength` and `guidance` are one number, or one for each image.
    **Returns:** float32 in [-1, 1]; prompt by prompt, the images of each one after another.
    **Raises:** `ValueError` for sizes that are not multiples of 16, no steps, no images, steps and times, numbers that are not
    finite or not as many as images, a guidance that the model does not take, a negative prompt that cfg = 1 without nag would
    leave unused, a strength without weaken, what `denoise` refuses, or an image that is not finite (where it is not traced).
    """
    prompts, seconds, away = _texts(prompt, prompt_2, negative_prompt, cfg, nag)
    defaults, count = models.defaults, images * len(prompts)
    batch = count if batch is None else min(batch, count)
    if count < 1 or batch < 1:
        raise ValueError(
            f"`text_to_image` needs at least one prompt, image and batch, got {len(prompts)}, {images}, {batch}."
        )
    _check_numbers(count, cfg=cfg, strength=strength, guidance=guidance)
    if weaken is None and not _is_all(strength, 0):
        raise ValueError(
            f"`text_to_image(strength={strength})` does nothing without blocks to weaken. Pass weaken=."
        )
    height = defaults.height if height is None else height
    width = defaults.width if width is None else width
    times = _times(defaults, steps, times, height, width)
    dtype = activation_dtype() if dtype is None else dtype
    text, negative = _encoded(
        models,
        prompts,
        seconds,
        away,
        defaults.max_length if max_length is None else max_length,
        dtype,
    )
    scale = guidance_scale(models.flux, defaults, guidance)
    drawn = []
    checks = {
        "the text encoders": [all_finite(text), all_finite(negative)],
        "denoising": [],
        "decoding": [],
    }
    for numbers in batches(count, batch):
        rows = np.array(numbers) // images
        noise = noise_batch(key, numbers, height, width, channels=models.vae.config.latent_channels)
        latents = denoise(
            *(
                models.flux,
                _rows(text, rows),
                noise.astype(wide_dtype(jnp.dtype(dtype))),
                times,
                _of_images(scale, numbers),
            ),
            step=step,
            keys=step_keys(key, numbers, step),
            negative=_rows(negative, rows),
            cfg=_of_images(jnp.asarray(cfg, jnp.float32), numbers),
            rule=traced(rule),
            nag=traced(nag),
            weaken=weaken,
            strength=_of_images(jnp.asarray(strength, jnp.float32), numbers),
            reuse=traced(reuse),
            attention=attention,
            mesh=models.mesh,
        )
        drawn.append(decode(models.vae, latents, dtype=dtype, mesh=models.mesh))
        checks["denoising"].append(all_finite(latents))
        checks["decoding"].append(all_finite(drawn[-1]))
    _check_stages(checks)
    return jnp.concatenate(drawn)[:count]


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Return whether no number in a pytree of arrays is NaN or infinite."""
    return jnp.all(
        jnp.stack(
            [jnp.asarray(True), *(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))]
        )
    )


def _check_stages(checks: Mapping[str, Sequence[Array]]) -> None:
    """**Raises:** `ValueError` that names the first stage whose result is not finite; not under a transformation of JAX's."""
    for stage, flags in checks.items():
        if any(not isinstance(flag, jax.core.Tracer) and not flag for flag in flags):
            raise ValueError(
                f"`text_to_image` has NaN or infinity after {stage}. Pass dtype=jnp.float32 if it is float16 that overflows; "
                "else look at the weights and adapters."
            )


def _texts(
    prompt: str | Sequence[str],
    prompt_2: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str],
    cfg: PerImage,
    nag: Nag | None,
) -> tuple[list[str], Sequence[str] | None, list[str] | None]:
    """Return the prompts, those for T5, and the negative ones, one a prompt, or None if nothing is guided by them."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    one = isinstance(negative_prompt, str)
    negatives = (
        [negative_prompt] * len(prompts)
        if isinstance(negative_prompt, str)
        else list(negative_prompt)
    )
    if len(negatives) != len(prompts):
        raise ValueError(
            f"`text_to_image(negative_prompt)` takes one text, or one for each of {len(prompts)} prompts, got {len(negatives)}."
        )
    # An array's number is a variable of a program, whose value may well be 1 at times.
    plain = nag is None and not isinstance(cfg, jax.Array) and _is_all(cfg, 1)
    if plain and (not one or negative_prompt):
        raise ValueError(
            "`text_to_image(negative_prompt)` does nothing at cfg = 1. Pass cfg=, as 3.0, or nag=."
        )
    return (
        prompts,
        [prompt_2] if isinstance(prompt_2, str) else prompt_2,
        None if plain else negatives,
    )


def _times(
    defaults: Defaults, steps: int | None, times: Times | None, height: int, width: int
) -> Times:
    if times is None:
        return model_times(defaults, defaults.steps if steps is None else steps, height, width)
    if steps is not None:
        raise ValueError(
            "`text_to_image` takes `steps` of the model's timer, or `times` of your own, not both."
        )
    check_times("text_to_image", times, rising=False, step="drawing")
    return times


def _check_numbers(images: int, **numbers: PerImage | None) -> None:
    check_finite("text_to_image", **numbers)
    for name, number in numbers.items():
        if number is not None and jnp.ndim(number) == 1:
            _check_count("text_to_image", name, jnp.size(number), images)


def _is_all(number: PerImage, value: float) -> bool:
    """Whether a number, or each of some, is known and equals a value."""
    return not isinstance(number, jax.core.Tracer) and bool(np.all(np.asarray(number) == value))


def _of_images(scale: Any, numbers: Sequence[int]) -> Any:
    """Return the scale of the images of these numbers: the one of all, or their own."""
    return scale if scale is None or scale.ndim == 0 else scale[np.array(numbers)]


def _rows(text: Encoded, rows: np.ndarray) -> Encoded:
    return jax.tree.map(lambda x: x[rows], text)


def _encoded(
    models: Models,
    prompts: Sequence[str],
    seconds: Sequence[str] | None,
    negative_prompts: Sequence[str] | None,
    max_length: int,
    dtype: DTypeLike,
) -> tuple[Text, Text | None]:
    """Encode prompts, and negative ones if there are some, by encoders that are fetched for it."""
    encoders = fetch(models.clip), fetch(models.t5)

    def run(prompts: Sequence[str], seconds: Sequence[str] | None) -> Text:
        ids = prompt_ids(models.tokenizers, prompts, seconds, max_length=max_length)
        check_ids("Clip", ids.clip, models.clip.config.vocabulary)
        check_ids("T5", ids.t5, models.t5.config.vocabulary)
        return encode_text(*encoders, ids, dtype=dtype, mesh=models.mesh)

    if negative_prompts is None:
        return run(prompts, seconds), None
    different = list(dict.fromkeys(negative_prompts))
    away = run(different, None)
    return run(prompts, seconds), _rows(
        away, np.array([different.index(text) for text in negative_prompts])
    )


def traced(tree: Tree) -> Tree:
    """Return a pytree with its Python numbers as float32 arrays, so that others compile nothing."""
    return jax.tree.map(
        lambda leaf: jnp.float32(leaf) if isinstance(leaf, int | float) else leaf, tree
    )


def repeated(text: Text, count: int) -> Text:
    """Return one encoded prompt as a batch of them."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), text)


def guidance_scale(
    flux: Flux, defaults: Defaults, guidance: PerImage | None
) -> Float[Array, "*images"] | None:
    """Return the scale, or one for each image, as an array, by default the model's.

    **Raises:** `ValueError` if the model takes none.
    """
    if flux.config.guidance_embed:
        scale = defaults.guidance if guidance is None else guidance
        return jnp.asarray(3.5 if scale is None else scale, jnp.float32)
    if guidance is not None:
        raise ValueError(
            f"This model has no guidance embedder (as schnell), so guidance={guidance} would do nothing. Leave it out."
        )
    return None


def batches(count: int, size: int) -> list[list[int]]:
    """Split range(count) into lists of one size, the last filled up with its last number, so that one shape serves all."""
    starts = range(0, count, size)
    return [[min(n, count - 1) for n in range(start, start + size)] for start in starts]
