"""What is trained for each of the tiny model's adapters: a model, its loss, and its file."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from adapter_data import Encoded
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
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.redux import Redux, ReduxConfig
from fluxjax.nets.siglip import Siglip, SiglipConfig
from fluxjax.train.loss import drop_captions, flow_matching_loss, logit_normal_times
from fluxjax.zoo import ZOO

DISTILLED = 1.0
MOST_GUIDANCE = 5.0
"""The largest distilled scale that the tiny model was trained with."""
TAUGHT = ("fill", "kontext")
"""The adapters that learn from the base model what is to be drawn anew."""
DROPPED = 0.1
SIGLIP = SiglipConfig(image_size=SIZE, patch=16, width=96, heads=3, depth=2, mlp_width=384)
CAPTION_WEIGHT = 0.05


class Recipe(NamedTuple):
    """How an adapter is trained.

    `rate`: the highest learning rate. `features`: appended to each token. `rank`: of the blocks'
    matrices and of the last layer. `input_rank`: of `img_in`, 0 for none. `uniform`: the share of
    times that are uniform in [0, 1]. The others are those of the sampler, which are mostly near 1;
    but what is copied exactly is decided near 0.
    """

    rate: float
    features: int = 0
    rank: int = 8
    input_rank: int = 0
    uniform: float = 0.25


RECIPES = {
    "fill": Recipe(2e-3, features=320, rank=16, input_rank=128, uniform=0.5),
    "edges": Recipe(2e-3, features=64, input_rank=64),
    "kontext": Recipe(2e-3, rank=16, uniform=0.5),
    "controlnet": Recipe(1e-3),
    "redux": Recipe(1.5e-3, rank=0, uniform=0.0),
}
TARGETS = (*BLOCKS, r"final\.linear")


class Task(NamedTuple):
    """What is trained.

    `model`: before the first step. `trained`: which of its leaves are. `flux`: the frozen
    transformer. `loss`: (model, flux, batch, empty text, key=) -> scalar. `write`: (model, path)
    writes the file.
    """

    model: eqx.Module
    trained: Any
    flux: Flux
    loss: Callable[..., jax.Array]
    write: Callable[[eqx.Module, Path], None]


def make_task(kind: str, models: Models, key: jax.Array) -> Task:
    """Return the training of a kind of adapter."""
    if kind == "controlnet":
        return controlnet_task(models, key)
    if kind == "redux":
        return redux_task(models, key)
    return lora_task(kind, models, key)


def _frozen(flux: Flux) -> Flux:
    """Return the transformer in bfloat16, or on a CPU, where that is slow, as it is."""
    if jax.default_backend() == "cpu":
        return flux
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), flux)


def lora_task(kind: str, models: Models, key: jax.Array) -> Task:
    """Return the training of a LoRA."""
    recipe, flux = RECIPES[kind], models.flux
    of_blocks, of_input = jax.random.split(key)
    lora = init_lora(flux, recipe.rank, TARGETS, key=of_blocks)
    if recipe.input_rank:
        entry = init_lora(
            flux, recipe.input_rank, "img_in", extra_features=recipe.features, key=of_input
        )
        lora = Lora({"flux": lora.changes["flux"] | entry.changes["flux"]}, lora.format)

    def write(lora: eqx.Module, path: Path) -> None:
        # In kohya's names, q, k and v share one down, so the file is smaller.
        write_lora(path, lora, to="kohya", dtype=jnp.bfloat16, overwrite=True)

    return Task(lora, trainable(lora), _frozen(flux), partial(lora_loss, kind), write)


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
        jax.random.uniform(evenly, (len(x0),), minval=1e-3),
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
    """Return the sizes of a ControlNet of one double block for a transformer."""
    names = ("in_channels", "width", "heads", "mlp_width", "context", "pooled", "rope_axes")
    shared = {name: getattr(config, name) for name in names}
    guidance = config.guidance_embed
    return ControlNetConfig(
        **shared, double_depth=1, single_depth=0, modes=None, guidance_embed=guidance
    )


def controlnet_task(models: Models, key: jax.Array) -> Task:
    """Return the training of a ControlNet, which begins as a copy of the first double block."""
    flux = models.flux
    control = ControlNet(controlnet_config(flux.config), key=key)

    def copied(network: Flux | ControlNet) -> tuple:
        inputs = network.img_in, network.txt_in, network.time_in, network.vector_in
        return *inputs, network.guidance_in, network.double

    first = jax.tree.map(lambda x: x[:1], flux.double)
    control = eqx.tree_at(copied, control, (*copied(flux)[:-1], first))
    trained = jax.tree.map(eqx.is_inexact_array, control)
    return Task(control, trained, _frozen(flux), controlnet_loss, _save)


def controlnet_loss(
    control: ControlNet, flux: Flux, batch: Encoded, empty: TextStates, *, key: jax.Array
) -> jax.Array:
    """Return the flow-matching loss of the transformer with the ControlNet's residuals."""
    drop, rest = jax.random.split(key)
    text = drop_captions(drop, batch.text, empty, DROPPED)
    ids = image_ids(SIZE, SIZE)

    def network(x: jax.Array, t: jax.Array, condition: tuple) -> jax.Array:
        text, picture = condition
        inputs = {"txt": text.txt, "vec": text.vec, "img_ids": ids, "guidance": DISTILLED}
        residuals = control(x, t, condition=picture, **inputs)
        return flux(x, t, control=[residuals], attention="xla", **inputs)

    conditions = text, batch.condition.astype(jnp.float32)
    uniform = RECIPES["controlnet"].uniform
    return matching_loss(network, batch.latents, conditions, uniform=uniform, key=rest)


class ReduxNetworks(eqx.Module):
    """An image encoder, and the embedder of its states."""

    siglip: Siglip
    redux: Redux

    def __call__(self, picture: jax.Array) -> jax.Array:
        """Return the tokens of a picture in bytes, [tokens, context]."""
        return self.redux(self.siglip(picture.astype(jnp.float32) / 127.5 - 1))


def redux_task(models: Models, key: jax.Array) -> Task:
    """Return the training of an image encoder with its embedder."""
    encoder, embedder = jax.random.split(key)
    config = ReduxConfig(features=SIGLIP.width, hidden=384, context=models.flux.config.context)
    networks = ReduxNetworks(Siglip(SIGLIP, key=encoder), Redux(config, key=embedder))
    # Redux does not use the pooled state. Zeros take no place in a compressed file.
    pooler = jax.tree.map(jnp.zeros_like, networks.siglip.pooler)
    networks = eqx.tree_at(lambda n: n.siglip.pooler, networks, pooler)
    trained = eqx.tree_at(
        lambda n: n.siglip.pooler,
        jax.tree.map(eqx.is_inexact_array, networks),
        jax.tree.map(lambda leaf: False, pooler),
    )

    def write(networks: eqx.Module, path: Path) -> None:
        _save(networks.siglip, path)
        _save(networks.redux, path.with_name("redux_embedder.safetensors"))

    return Task(networks, trained, _frozen(models.flux), redux_loss, write)


def _save(network: eqx.Module, path: Path) -> None:
    """Write a network in bfloat16, in the place of an earlier file."""
    path.unlink(missing_ok=True)
    save(network, path, dtype=jnp.bfloat16)


def redux_loss(
    networks: ReduxNetworks, flux: Flux, batch: Encoded, empty: TextStates, *, key: jax.Array
) -> jax.Array:
    """Return the flow-matching loss with the pictures' tokens after the prompts'.

    A little of the squared error of their mean against that of the caption's states is added, by
    which the encoder finds the attributes sooner.
    """
    del empty
    tokens = jax.vmap(networks)(batch.condition)
    dtype = batch.text.txt.dtype
    ids = image_ids(SIZE, SIZE)

    def conditioning(text: TextStates, tokens: jax.Array) -> Conditioning:
        joined = jnp.concatenate([text.txt, tokens.astype(dtype)])
        return Conditioning(joined, text.vec, ids, jnp.float32(DISTILLED))

    conditions = jax.vmap(conditioning)(batch.text, tokens)
    network = ConditionalFlux(flux, "xla")
    uniform = RECIPES["redux"].uniform
    matching = matching_loss(network, batch.latents, conditions, uniform=uniform, key=key)
    caption = jnp.mean(batch.caption.txt.astype(jnp.float32), axis=1)
    distance = jnp.mean(jnp.square(jnp.mean(tokens, axis=1) - caption))
    return matching + CAPTION_WEIGHT * distance
