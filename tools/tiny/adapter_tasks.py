"""What is trained for each of the tiny model's adapters: a model, its loss, and its file."""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from adapter_data import Encoded
from jax.typing import DTypeLike
from placed import SIZE

from fluxjax.flow.times import resolution_mu
from fluxjax.generate.conditioning import Conditioning, ReferenceTokens
from fluxjax.generate.latents import image_ids
from fluxjax.generate.load_models import Models
from fluxjax.generate.save import save
from fluxjax.generate.text import TextStates
from fluxjax.generate.velocity import ConditionalFlux
from fluxjax.lora.adapter import Lora
from fluxjax.lora.attach import attach
from fluxjax.lora.init import BLOCKS, init_lora, trainable
from fluxjax.lora.write import write_lora
from fluxjax.nets.controlnet import ControlNet
from fluxjax.nets.controlnet_config import ControlNetConfig
from fluxjax.nets.flux import Flux
from fluxjax.nets.flux_blocks import Mlp
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.train.loss import drop_captions, flow_matching_loss, logit_normal_times
from fluxjax.zoo import ZOO

DISTILLED = 1.0
MOST_GUIDANCE = 5.0
"""The largest distilled scale that the tiny model was trained with."""
TAUGHT = ("fill", "kontext")
"""The adapters that learn from the base model what is to be drawn anew."""
DROPPED = 0.1
LEAST_TIME = 0.1
"""The lowest of the uniform times. A sampler's last evaluation is at 0.27 for 20 steps, and at 0.13
for 50."""
FLOAT8 = jnp.float8_e4m3fn
"""The dtype of large files: whole networks, and LoRAs of every matrix."""


EVERY_MATRIX = (".*",)
"""The modulation matters for Kontext. After 300 training steps its loss was 0.41 with a LoRA for
every matrix, and 0.55 and 0.53 with LoRAs of rank 32 and 64 for the attention and the MLPs only.
Training all weights of the network gave 0.39."""


class Recipe(NamedTuple):
    """How an adapter is trained.

    `rate`: the highest learning rate. `features`: appended to each token. `rank`: of the matrices
    that `targets` choose. `input_rank`: of `img_in`, 0 for none. `uniform`: the share of times that
    are uniform in [`LEAST_TIME`, 1]. The others are those of the sampler, which are mostly near 1;
    but what is copied exactly is decided at the lowest ones. `dtype`: of a LoRA's file.
    """

    rate: float
    features: int = 0
    rank: int = 8
    input_rank: int = 0
    uniform: float = 0.25
    targets: tuple[str, ...] = (*BLOCKS, r"final\.linear")
    dtype: DTypeLike = jnp.bfloat16


RECIPES = {
    "fill": Recipe(2e-3, features=320, rank=16, input_rank=128, uniform=0.5, targets=EVERY_MATRIX),
    "edges": Recipe(2e-3, features=64, input_rank=64),
    "kontext": Recipe(4e-3, rank=24, uniform=0.5, targets=EVERY_MATRIX, dtype=FLOAT8),
    "controlnet": Recipe(1e-3),
}


class Stage(NamedTuple):
    """A part of the training.

    `loss`: (model, flux, batch, empty text, key=) -> scalar. `rate`: the highest learning rate.
    `trained`: which leaves of the model are. `share`: of the time.
    """

    loss: Callable[..., jax.Array]
    rate: float
    trained: Any
    share: float = 1.0


class Task(NamedTuple):
    """What is trained.

    `model`: before the first step. `flux`: the frozen transformer. `stages`: one after the other.
    `write`: (model, folder) writes its file or folders there, in the place of earlier ones.
    """

    model: eqx.Module
    flux: Flux
    stages: tuple[Stage, ...]
    write: Callable[[eqx.Module, Path], None]


def frozen_flux(flux: Flux) -> Flux:
    """Return the transformer in bfloat16, or on a CPU, where that is slow, as it is."""
    if jax.default_backend() == "cpu":
        return flux
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), flux)


def lora_task(kind: str, models: Models, key: jax.Array) -> Task:
    """Return the training of a LoRA."""
    recipe, flux = RECIPES[kind], models.flux
    of_blocks, of_input = jax.random.split(key)
    lora = init_lora(flux, recipe.rank, recipe.targets, key=of_blocks)
    if recipe.input_rank:
        entry = init_lora(
            flux, recipe.input_rank, "img_in", extra_features=recipe.features, key=of_input
        )
        lora = Lora({"flux": lora.changes["flux"] | entry.changes["flux"]}, lora.format)

    def write(lora: eqx.Module, folder: Path) -> None:
        # In kohya's names, q, k and v share one down, so the file is smaller.
        path = folder / f"{kind}.safetensors"
        write_lora(path, lora, to="kohya", dtype=recipe.dtype, overwrite=True)

    stages = (Stage(partial(lora_loss, kind), recipe.rate, trainable(lora)),)
    return Task(lora, frozen_flux(flux), stages, write)


def lora_loss(
    kind: str, lora: Lora, flux: Flux, batch: Encoded, empty: TextStates, *, key: jax.Array
) -> jax.Array:
    """Return the flow-matching loss of the network with the adapter.

    Where the base model knows what is to be drawn anew, its velocity for the caption is the target
    instead: it is the mean of the other one, which has the noise of a single example. Its distilled
    guidance is that of the example.
    """
    network = ConditionalFlux(attach(flux, [lora]), "xla")
    drop, scale, rest = jax.random.split(key, 3)
    ids = image_ids(SIZE, SIZE)
    is_taught = kind in TAUGHT
    text = batch.text if is_taught else drop_captions(drop, batch.text, empty, DROPPED)
    scales = jnp.full((len(batch.latents),), DISTILLED)
    if is_taught:
        scales = jax.random.uniform(scale, scales.shape, minval=1, maxval=MOST_GUIDANCE)

    def conditioning(text: TextStates, scale: jax.Array, condition: jax.Array) -> Conditioning:
        features, reference = condition.astype(jnp.float32), None
        if kind == "kontext":
            features, reference = None, ReferenceTokens(features, ids.at[:, 0].set(1))
        return Conditioning(text.txt, text.vec, ids, scale, features, reference)

    def plain(text: TextStates, scale: jax.Array) -> Conditioning:
        return Conditioning(text.txt, text.vec, ids, scale)

    teacher = None
    if is_taught:
        captions = batch.text if batch.caption is None else batch.caption
        base = ConditionalFlux(flux, "xla")
        teacher = Teacher(base, jax.vmap(plain)(captions, scales), batch.taught)
    conditions = jax.vmap(conditioning)(text, scales, batch.condition)
    uniform = RECIPES[kind].uniform
    return matching_loss(
        network, batch.latents, conditions, uniform=uniform, key=rest, teacher=teacher
    )


class Teacher(NamedTuple):
    """A network whose velocity is the target for some tokens.

    `velocity`: (x, t, condition) -> dx/dt. `conditions`: a batch. `tokens`: [batch, tokens], 1 for
    those that it teaches.
    """

    velocity: Callable[..., jax.Array]
    conditions: Conditioning
    tokens: jax.Array


def matching_loss(
    network: Callable[..., jax.Array],
    latents: jax.Array,
    conditions: Any,
    *,
    uniform: float,
    key: jax.Array,
    teacher: Teacher | None = None,
) -> jax.Array:
    """Return the mean flow-matching loss of (x, t, condition) -> dx/dt over a batch.

    **Arguments:** `uniform`: the share of times that are uniform; the others are distributed as
    those of the sampler. `teacher`: what gives the targets of some tokens.
    """
    when, which, evenly, noise = jax.random.split(key, 4)
    x0, defaults = latents.astype(jnp.float32), ZOO["tiny"].defaults
    mu = resolution_mu(x0.shape[1], base_shift=defaults.base_shift, max_shift=defaults.max_shift)
    times = jnp.where(
        jax.random.uniform(which, (len(x0),)) < uniform,
        jax.random.uniform(evenly, (len(x0),), minval=LEAST_TIME),
        logit_normal_times(when, len(x0), mu=mu),
    )
    noise = jax.random.normal(noise, x0.shape)

    def one(x0: jax.Array, t: jax.Array, noise: jax.Array, condition: Any) -> jax.Array:
        return flow_matching_loss(lambda x, t: network(x, t, condition), x0, t, noise)

    def taught(
        x0: jax.Array, t: jax.Array, noise: jax.Array, condition: Any, said: Any, tokens: jax.Array
    ) -> jax.Array:
        assert teacher is not None
        x = (1 - t) * x0 + t * noise
        target = jnp.where(tokens[:, None] > 0, teacher.velocity(x, t, said), noise - x0)
        error = network(x, t, condition) - jax.lax.stop_gradient(target)
        return jnp.mean(jnp.square(error))

    if teacher is None:
        return jnp.mean(jax.vmap(one)(x0, times, noise, conditions))
    said = teacher.conditions, teacher.tokens
    return jnp.mean(jax.vmap(taught)(x0, times, noise, conditions, *said))


def controlnet_config(config: FluxConfig) -> ControlNetConfig:
    """Return the sizes of a ControlNet of one block of each kind for a transformer."""
    names = ("in_channels", "width", "heads", "mlp_width", "context", "pooled", "rope_axes")
    shared = {name: getattr(config, name) for name in names}
    guidance = config.guidance_embed
    return ControlNetConfig(
        **shared, double_depth=1, single_depth=1, modes=None, guidance_embed=guidance
    )


def controlnet_task(models: Models, key: jax.Array) -> Task:
    """Return the training of a ControlNet, which begins as a copy of the first blocks.

    Its text tokens have no MLP: they only attend. Zeros take no place in a compressed file.
    """
    flux = models.flux
    control = ControlNet(controlnet_config(flux.config), key=key)

    def copied(network: Flux | ControlNet) -> tuple:
        inputs = network.img_in, network.txt_in, network.time_in, network.vector_in
        return *inputs, network.guidance_in, network.double, network.single

    *inputs, double, single = copied(flux)
    first = jax.tree.map(lambda x: x[:1], (double, single))
    control = eqx.tree_at(copied, control, (*inputs, *first))
    control = eqx.tree_at(text_mlp, control, jax.tree.map(jnp.zeros_like, text_mlp(control)))
    # The shift, the scale and the gate of the MLP are the second half; without it they stay zeros.
    half = 3 * flux.config.width
    modulation = jax.tree.map(lambda x: x.at[:, half:].set(0), control.double.txt.modulation)
    control = eqx.tree_at(lambda control: control.double.txt.modulation, control, modulation)
    trained = jax.tree.map(eqx.is_inexact_array, control)
    frozen = jax.tree.map(lambda leaf: False, text_mlp(control))
    trained = eqx.tree_at(text_mlp, trained, frozen)
    stages = (Stage(controlnet_loss, RECIPES["controlnet"].rate, trained),)
    return Task(control, frozen_flux(flux), stages, write_network)


def text_mlp(control: ControlNet) -> Mlp:
    """Return the MLP of a ControlNet's text tokens."""
    return control.double.txt.mlp


def controlnet_loss(
    control: ControlNet, flux: Flux, batch: Encoded, empty: TextStates, *, key: jax.Array
) -> jax.Array:
    """Return the flow-matching loss of the transformer with the ControlNet's residuals.

    At every distilled scale the target is the example, so that images follow the picture at each.
    """
    drop, scale, rest = jax.random.split(key, 3)
    text = drop_captions(drop, batch.text, empty, DROPPED)
    ids = image_ids(SIZE, SIZE)
    scales = jax.random.uniform(scale, (len(batch.latents),), minval=1, maxval=MOST_GUIDANCE)

    def network(x: jax.Array, t: jax.Array, condition: tuple) -> jax.Array:
        text, picture, scale = condition
        inputs = {"txt": text.txt, "vec": text.vec, "img_ids": ids, "guidance": scale}
        residuals = control(x, t, condition=picture, **inputs)
        return flux(x, t, control=[residuals], attention="xla", **inputs)

    conditions = text, batch.condition.astype(jnp.float32), scales
    uniform = RECIPES["controlnet"].uniform
    return matching_loss(network, batch.latents, conditions, uniform=uniform, key=rest)


def write_network(network: eqx.Module, folder: Path) -> None:
    """Write a network's folder in the diffusers layout, with its matrices in float8."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        (written,) = save(half, Path(temporary, "saved"), to="diffusers", dtype=FLOAT8).iterdir()
        target = folder / written.name
        shutil.rmtree(target, ignore_errors=True)
        written.rename(target)
