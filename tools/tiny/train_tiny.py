"""Train the tiny model from scratch, stage by stage, and export it.

The stages are vae, decoder, latents, text, flux, distill, export, in this order. They keep their
state under `--runs` and can be interrupted: a step's batch depends only on the seed and on the
step. `restore` starts from exported weights instead.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_tokenizers
from scenes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    random_scene,
    render,
)
from tiny_tokenizers import T5_LENGTH

from fluxjax.checkpoint.weights import abstract
from fluxjax.flow.times import resolution_mu
from fluxjax.generate.latents import image_ids, pack_latents
from fluxjax.generate.load_models import Models, load_models
from fluxjax.generate.save import save_models
from fluxjax.generate.tokens import Tokenizers, tokenize
from fluxjax.nets.clip import Clip, ClipConfig
from fluxjax.nets.flux import Flux
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.layers import Linear
from fluxjax.nets.t5 import T5, T5Config
from fluxjax.nets.vae import Vae, VaeConfig
from fluxjax.train.loss import drop_captions, flow_matching_loss, guided_target, logit_normal_times
from fluxjax.train.step import TrainState, make_step
from fluxjax.zoo import ZOO

SEED = 0
VAE = VaeConfig(channels=(16, 32, 64, 64), resnets=1, groups=8, scale=1.0, shift=0.0)
CLIP = ClipConfig(vocabulary=641, width=128, heads=4, depth=2, mlp_width=512, eos_token=640)
T5_ = T5Config(vocabulary=90, width=128, heads=4, head_dim=32, depth=3, mlp_width=320)
KL_WEIGHT = 3e-4
LATENT_NOISE, ABSOLUTE_WEIGHT = 0.05, 0.1


def fit(
    name: str,
    runs: Path,
    state: TrainState,
    step: Callable[..., tuple[TrainState, Any]],
    batch: Callable[[np.random.Generator, int], tuple],
    steps: int,
    *,
    report: Callable[[TrainState], str] = lambda state: "",
    every: int = 250,
) -> TrainState:
    """Run a stage to `steps`, from its checkpoint if there is one.

    **Arguments:** `name`: of the stage and its checkpoint. `batch`: returns what `step` takes
    besides the state, for a step's number. `report`: text for the log. `every`: steps from one
    checkpoint and line of the log to the next.
    """
    path = runs / f"{name}.eqx"
    if path.exists():
        state = eqx.tree_deserialise_leaves(path, state)
    start, since, losses = int(state.step), time.monotonic(), []
    for index in range(start, steps):
        key = jax.random.fold_in(jax.random.key(SEED), index)
        state, loss = step(state, *batch(np.random.default_rng((SEED, index)), index), key=key)
        losses.append(float(loss))
        if (index + 1) % every == 0 or index + 1 == steps:
            save(path, state)
            seconds = (time.monotonic() - since) / len(losses)
            note = report(state)
            progress = f"{name} {index + 1}/{steps} loss {np.mean(losses):.5f}"
            print(f"{progress} {seconds:.3f} s/step {note}", flush=True)
            since, losses = time.monotonic(), []
    return state


def save(path: Path, tree: Any) -> None:
    """Write a pytree's arrays, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".part")
    eqx.tree_serialise_leaves(partial_path, tree)
    os.replace(partial_path, path)


def draw(count: int, size: tuple[int, int], seed: int) -> np.ndarray:
    """Render training scenes as bytes, [count, height, width, 3]."""
    rng = np.random.default_rng((SEED, seed))
    images = np.empty((count, *size, 3), np.uint8)
    for index in range(count):
        images[index] = np.round((render(training_scene(rng), *size, rng) + 1) * 127.5)
    return images


def training_scene(rng: np.random.Generator):
    """Draw a scene whose combination is not held out."""
    while (scene := random_scene(rng)).held_out:
        pass
    return scene


def vae_loss(vae: Vae, images: jax.Array, *, key: jax.Array) -> jax.Array:
    """Return the squared error of the reconstruction plus the posterior's KL divergence.

    The divergence is that from a standard normal.
    """
    x = images.astype(jnp.float32) / 127.5 - 1

    def one(image, key):
        mean, log_variance = vae.moments(image)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        return jnp.mean(jnp.square(vae.decode(z) - image)) + KL_WEIGHT * divergence

    return jnp.mean(jax.vmap(one)(x, jax.random.split(key, len(x))))


def psnr(vae: Vae, images: np.ndarray) -> float:
    """Return the round trip's PSNR in dB over images in bytes."""

    @eqx.filter_jit
    def back(vae, x):
        return jax.vmap(lambda image: vae.decode(vae.encode(image)))(x)

    x = jnp.asarray(images, jnp.float32) / 127.5 - 1
    error = jnp.mean(jnp.square((jnp.clip(back(vae, x), -1, 1) - x) / 2))
    return float(-10 * jnp.log10(error))


def train_vae(runs: Path, steps: int) -> None:
    """Train the VAE on crops around the objects, then on whole images.

    The group norms' statistics must be those of whole images at the end.
    """
    images, test = draw(6000, (128, 128), 1), draw(64, (128, 128), 2)
    whole = steps - steps // 5

    def batch(rng: np.random.Generator, index: int) -> tuple:
        if index >= whole:
            return (images[rng.integers(0, len(images), 4)],)
        corners = np.clip(rng.normal(32, 24, (16, 2)), 0, 64).astype(int)
        picks = rng.integers(0, len(images), 16)
        return (
            np.stack(
                [
                    images[i, y : y + 64, x : x + 64]
                    for i, (y, x) in zip(picks, corners, strict=True)
                ]
            ),
        )

    optimizer = OPTIMIZERS["vae"](steps)
    state = TrainState.create(Vae(VAE, key=jax.random.key(SEED)), optimizer)
    report = lambda state: f"PSNR {psnr(state.ema, test):.2f} dB"  # noqa: E731
    fit(
        "vae",
        runs,
        state,
        make_step(vae_loss, optimizer, ema_decay=0.995),
        batch,
        steps,
        report=report,
    )


def decoder_loss(vae: Vae, latents: jax.Array, images: jax.Array, *, key: jax.Array) -> jax.Array:
    """Return the squared and absolute error of decoding latents with a little noise.

    The noise stands for the errors of the transformer's latents.
    """
    x = images.astype(jnp.float32) / 127.5 - 1
    z = latents.astype(jnp.float32)
    off = jax.vmap(vae.decode)(z + LATENT_NOISE * jax.random.normal(key, z.shape)) - x
    return jnp.mean(jnp.square(off)) + ABSOLUTE_WEIGHT * jnp.mean(jnp.abs(off))


def decoder_leaves(vae: Vae) -> Vae:
    """Return which leaves of a VAE are the decoder's, as a tree of booleans."""
    return eqx.tree_at(
        lambda vae: vae.decoder,
        jax.tree.map(lambda leaf: False, vae),
        jax.tree.map(lambda leaf: True, vae.decoder),
    )


def train_decoder(runs: Path, steps: int) -> None:
    """Train only the decoder, on whole scenes.

    The encoder does not change, so latents and transformer stay valid.
    """
    vae = load_stage(runs, "vae", Vae(VAE, key=jax.random.key(SEED))).ema
    encode = eqx.filter_jit(lambda vae, x: jax.vmap(vae.encode)(x.astype(jnp.float32) / 127.5 - 1))
    groups = []
    for size, count, seed in zip(SIZES_PIXELS, (6000, 1000, 1000), (5, 6, 7), strict=True):
        images = draw(count, size, seed)
        latents = [
            np.asarray(encode(vae, part)).astype(np.float16)
            for part in np.split(images, count // 100)
        ]
        groups.append((np.concatenate(latents), images))

    def batch(rng: np.random.Generator, index: int) -> tuple:
        latents, images = groups[rng.choice(len(groups), p=SHARE)]
        picks = rng.integers(0, len(images), 8)
        return latents[picks], images[picks]

    trained = decoder_leaves(vae)
    optimizer = OPTIMIZERS["decoder"](steps)
    state = TrainState.create(vae, optimizer, trainable=trained)
    step = make_step(decoder_loss, optimizer, ema_decay=0.99, trainable=trained)
    test = draw(64, (128, 128), 2)
    fit(
        "decoder",
        runs,
        state,
        step,
        batch,
        steps,
        report=lambda state: f"PSNR {psnr(state.ema, test):.2f} dB",
        every=200,
    )


class TextEncoders(eqx.Module):
    """Both text encoders, and the heads that are needed only to train them.

    A head predicts the scene's attributes from a single hidden state.
    """

    clip: Clip
    t5: T5
    clip_head: Linear
    t5_head: Linear

    def __init__(self, *, key: jax.Array):
        clip, t5, clip_head, t5_head = jax.random.split(key, 4)
        self.clip, self.t5 = Clip(CLIP, key=clip), T5(T5_, key=t5)
        outputs = sum(ATTRIBUTES)
        self.clip_head = Linear(CLIP.width, outputs, key=clip_head)
        self.t5_head = Linear(T5_.width, outputs, key=t5_head)


def _classes() -> tuple[int, ...]:
    thing = (len(SIZES), len(COLORS), len(SHAPES))
    return (len(BACKGROUNDS), 1 + len(RELATIONS), *thing, *(1 + n for n in thing))


ATTRIBUTES = _classes()
"""Number of classes of each attribute: background, relation, then size, colour and shape of the
first object, and of the second.
"""


def attributes(scene: Scene) -> list[int]:
    """Return the class of each attribute.

    The last class of each of the second object's attributes means that there is none.
    """
    names = [tuple(SIZES), tuple(COLORS), tuple(SHAPES)]
    relation = 0 if scene.relation is None else 1 + RELATIONS.index(scene.relation)
    classes = [list(BACKGROUNDS).index(scene.background), relation]
    for index in range(2):
        if index < len(scene.things):
            thing = scene.things[index]
            words = (thing.size, thing.color, thing.shape)
            classes += [name.index(word) for name, word in zip(names, words, strict=True)]
        else:
            classes += [len(name) for name in names]
    return classes


def text_loss(encoders: TextEncoders, ids, labels: jax.Array, *, key: jax.Array) -> jax.Array:
    """Return the cross-entropy of all attributes.

    They are predicted from CLIP's pooled state and from each of T5's hidden states.
    """
    del key
    clip_ids, t5_ids = ids
    pooled = encoders.clip_head(jax.vmap(encoders.clip)(clip_ids))[:, None]
    states = encoders.t5_head(jax.vmap(encoders.t5)(t5_ids))
    total = jnp.zeros(())
    for logits in (pooled, states):
        for part, label in zip(
            jnp.split(logits, np.cumsum(ATTRIBUTES)[:-1], axis=-1), labels.T, strict=True
        ):
            wanted = jnp.broadcast_to(label[:, None], part.shape[:2])
            total += optax.softmax_cross_entropy_with_integer_labels(part, wanted).mean()
    return total


def encode_ids(tokenizers: Tokenizers, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a batch for CLIP and for T5."""
    ids = [tokenize(tokenizers, prompt, max_length=T5_LENGTH) for prompt in prompts]
    return np.stack([one.clip for one in ids]), np.stack([one.t5 for one in ids])


def read_tokenizers(runs: Path) -> Tokenizers:
    """Read the tokenizers; they are written first if they are missing."""
    folder = runs / "export"
    if not (folder / "tokenizer_2" / "spiece.model").exists():
        tiny_tokenizers.write(folder)
    return Tokenizers.read(folder / "tokenizer", folder / "tokenizer_2")


def train_text(runs: Path, steps: int) -> None:
    """Train the encoders to predict a scene's attributes from its caption."""
    tokenizers = read_tokenizers(runs)

    def batch(rng: np.random.Generator, index: int) -> tuple:
        scenes = [training_scene(rng) for _ in range(64)]
        ids = encode_ids(tokenizers, [caption(scene, rng) for scene in scenes])
        return ids, np.array([attributes(scene) for scene in scenes])

    optimizer = OPTIMIZERS["text"](steps)
    state = TrainState.create(TextEncoders(key=jax.random.key(SEED + 1)), optimizer)
    fit("text", runs, state, make_step(text_loss, optimizer, ema_decay=0.99), batch, steps)


SIZES_PIXELS = ((128, 128), (128, 160), (160, 128))
SHARE = (0.8, 0.1, 0.1)
FLUX = FluxConfig(
    width=192,
    heads=6,
    double_depth=2,
    single_depth=4,
    mlp_width=768,
    context=T5_.width,
    pooled=CLIP.width,
    rope_axes=(4, 14, 14),
)
SHARD = 2000
DEFAULTS = ZOO["tiny"].defaults


class Latents(NamedTuple):
    """Encoded training scenes of one image size.

    `packed`: latents, [count, tokens, 64], float16. `scenes`: what they show.
    """

    height: int
    width: int
    packed: np.ndarray
    scenes: list[Scene]


def make_latents(runs: Path, count: int) -> None:
    """Encode `count` training images, in shards of one size each; existing shards are kept."""
    vae = load_stage(runs, "vae", Vae(VAE, key=jax.random.key(SEED))).ema
    sizes = np.random.default_rng((SEED, 3)).choice(len(SIZES_PIXELS), count // SHARD, p=SHARE)

    @eqx.filter_jit
    def encode(vae, images):
        return jax.vmap(lambda image: pack_latents(vae.encode(image)))(
            images.astype(jnp.float32) / 127.5 - 1
        )

    for shard, size in enumerate(sizes):
        path = runs / "latents" / f"{shard:03d}.npz"
        if path.exists():
            continue
        rng = np.random.default_rng((SEED, 4, shard))
        scenes = [training_scene(rng) for _ in range(SHARD)]
        height, width = SIZES_PIXELS[size]
        images = np.stack(
            [np.round((render(s, height, width, rng) + 1) * 127.5) for s in scenes]
        ).astype(np.uint8)
        packed = np.concatenate(
            [np.asarray(encode(vae, part)) for part in np.split(images, SHARD // 100)]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part.npz")
        np.savez(
            temporary,
            packed=packed.astype(np.float16),
            scenes=np.array(scenes, object),
            size=(height, width),
        )
        os.replace(temporary, path)
        moments = f"mean {packed.mean():.4f} deviation {packed.std():.4f}"
        print(f"latents {shard + 1}/{len(sizes)} {moments}", flush=True)


def read_latents(runs: Path) -> list[Latents]:
    """Read the shards and concatenate those of each size, in the order of `SIZES_PIXELS`."""
    shards = [
        np.load(path, allow_pickle=True) for path in sorted((runs / "latents").glob("???.npz"))
    ]
    joined = []
    for height, width in SIZES_PIXELS:
        mine = [shard for shard in shards if tuple(shard["size"]) == (height, width)]
        packed = np.concatenate([shard["packed"] for shard in mine])
        joined.append(
            Latents(height, width, packed, [scene for shard in mine for scene in shard["scenes"]])
        )
    return joined


def statistics(latents: list[Latents]) -> tuple[float, float]:
    """Return the mean and standard deviation of the latents.

    They are the VAE's shift, and one over its scale.
    """
    flat = latents[0].packed[:4000].astype(np.float32)
    return float(flat.mean()), float(flat.std())


class FrozenText(eqx.Module):
    """The frozen text encoders, and the token ids of the empty prompt."""

    clip: Clip
    t5: T5
    empty: tuple[jax.Array, jax.Array]

    def __call__(self, clip_ids: jax.Array, t5_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the pooled states and the hidden states of a batch of prompts."""
        return jax.vmap(self.clip)(clip_ids), jax.vmap(self.t5)(t5_ids)


def shift_of(tokens: int) -> float:
    """Return the log-shift of the model's sampling times for a number of tokens."""
    return resolution_mu(tokens, base_shift=DEFAULTS.base_shift, max_shift=DEFAULTS.max_shift)


def flux_loss(flux: Flux, x0, ids, img_ids, text: FrozenText, *, key: jax.Array) -> jax.Array:
    """Return the flow-matching loss.

    Times are logit-normal with the sampler's shift; a tenth of the captions are dropped.
    """
    drop, when, noise = jax.random.split(key, 3)
    vec, txt = jax.lax.stop_gradient(text(*drop_captions(drop, ids, text.empty, 0.1)))
    t = logit_normal_times(when, len(x0), mu=shift_of(x0.shape[1]))
    noise = jax.random.normal(noise, x0.shape)

    def one(x0, t, noise, txt, vec):
        velocity = eqx.Partial(flux, txt=txt, vec=vec, guidance=1.0, img_ids=img_ids)
        return flow_matching_loss(velocity, x0, t, noise)

    return jnp.mean(jax.vmap(one)(x0, t, noise, txt, vec))


def load_stage(runs: Path, name: str, model: eqx.Module, optimizer=None) -> TrainState:
    """Read the state of an earlier stage; `model` gives its structure."""
    state = TrainState.create(model, OPTIMIZERS[name](1) if optimizer is None else optimizer)
    return eqx.tree_deserialise_leaves(runs / f"{name}.eqx", state)


def adamw(
    peak: float, weight_decay: float, b2: float
) -> Callable[[int], optax.GradientTransformation]:
    """Return a function from steps to AdamW with gradient clipping.

    It warms up for 100 steps; then its rate falls to 1e-5 along a cosine.
    """

    def make(steps: int) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(0, peak, 100, max(steps, 101), 1e-5)
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=b2, weight_decay=weight_decay)
        )

    return make


OPTIMIZERS = {
    "vae": adamw(3e-3, 1e-4, 0.99),
    "decoder": adamw(1e-3, 1e-4, 0.99),
    "text": adamw(2e-3, 0.01, 0.999),
    "flux": adamw(2e-3, 0.01, 0.99),
    "distill": adamw(5e-4, 0.0, 0.99),
}


def flux_batches(runs: Path, count: int) -> Callable[[np.random.Generator, int], tuple]:
    """Return a function for the batches of the transformer's stages.

    A batch has latents of one image size, token ids of their captions, and positions.
    """
    tokenizers, latents = read_tokenizers(runs), read_latents(runs)
    mean, deviation = statistics(latents)

    def batch(rng: np.random.Generator, index: int) -> tuple:
        chosen = latents[rng.choice(len(latents), p=SHARE)]
        picks = rng.integers(0, len(chosen.scenes), count)
        x0 = (chosen.packed[picks].astype(np.float32) - mean) / deviation
        ids = encode_ids(tokenizers, [caption(chosen.scenes[pick], rng) for pick in picks])
        return x0, ids, image_ids(chosen.height, chosen.width)

    return batch


def read_text(runs: Path) -> FrozenText:
    """Read the trained text encoders."""
    encoders = load_stage(runs, "text", TextEncoders(key=jax.random.key(SEED + 1))).ema
    clip_ids, t5_ids = encode_ids(read_tokenizers(runs), [""])
    return FrozenText(
        encoders.clip, encoders.t5, (jnp.asarray(clip_ids[0]), jnp.asarray(t5_ids[0]))
    )


def train_flux(runs: Path, steps: int) -> None:
    """Train the transformer on conditional and unconditional velocities.

    The distilled guidance scale is 1 throughout.
    """
    optimizer = OPTIMIZERS["flux"](steps)
    state = TrainState.create(Flux(FLUX, key=jax.random.key(SEED + 2)), optimizer)
    step, text, batches = (
        make_step(flux_loss, optimizer, ema_decay=0.999),
        read_text(runs),
        flux_batches(runs, 64),
    )
    fit("flux", runs, state, step, lambda rng, index: (*batches(rng, index), text), steps)


def distill_loss(
    flux: Flux, x0, ids, img_ids, text: FrozenText, teacher: Flux, *, key: jax.Array
) -> jax.Array:
    """Return the squared error of the student's velocity against the teacher's guided one.

    The teacher uses classifier-free guidance with a random scale in [1, 5], which the student gets
    as its distilled guidance. At 1 the student keeps the conditional velocity.
    """
    when, noise, strength = jax.random.split(key, 3)
    vec, txt = text(*ids)
    no_vec, no_txt = (
        jnp.broadcast_to(one, full.shape)
        for one, full in zip(
            (text.clip(text.empty[0]), text.t5(text.empty[1])), (vec, txt), strict=True
        )
    )
    t = logit_normal_times(when, len(x0), mu=shift_of(x0.shape[1]))
    noise = jax.random.normal(noise, x0.shape)
    scale = jax.random.uniform(strength, (len(x0),), minval=1.0, maxval=5.0)
    x = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise

    def run(net, x, t, txt, vec, guidance):
        return net(x, t, txt=txt, vec=vec, guidance=guidance, img_ids=img_ids)

    ones = jnp.ones(len(x0))
    full = jax.vmap(partial(run, teacher))(x, t, txt, vec, ones)
    none = jax.vmap(partial(run, teacher))(x, t, no_txt, no_vec, ones)
    target = jax.vmap(guided_target)(full, none, scale)
    student = jax.vmap(partial(run, flux))(x, t, txt, vec, scale)
    return jnp.mean(jnp.square(student - jax.lax.stop_gradient(target)))


def distill(runs: Path, steps: int) -> None:
    """Distill classifier-free guidance into the guidance embedding.

    Teacher and first student are the average of the trained transformer.
    """
    teacher = load_stage(runs, "flux", Flux(FLUX, key=jax.random.key(SEED + 2))).ema
    optimizer = OPTIMIZERS["distill"](steps)
    state = TrainState.create(teacher, optimizer)
    step, text, batches = (
        make_step(distill_loss, optimizer, ema_decay=0.995),
        read_text(runs),
        flux_batches(runs, 48),
    )
    fit(
        "distill",
        runs,
        state,
        step,
        lambda rng, index: (*batches(rng, index), text, teacher),
        steps,
    )


def read_decoder(runs: Path) -> Vae:
    """Read the VAE with the decoder of the stage `decoder`."""
    vae = Vae(VAE, key=jax.random.key(SEED))
    state = TrainState.create(vae, OPTIMIZERS["decoder"](1), trainable=decoder_leaves(vae))
    return eqx.tree_deserialise_leaves(runs / "decoder.eqx", state).ema


def export(runs: Path, stage: str, folder: Path) -> None:
    """Write the averaged weights as a diffusers folder in bfloat16, with the tokenizers."""
    vae = read_decoder(runs)
    mean, deviation = statistics(read_latents(runs))
    normalized = abstract(Vae, replace(VAE, shift=mean, scale=1 / deviation))
    vae = jax.tree.unflatten(jax.tree.structure(normalized), jax.tree.leaves(vae))
    flux = load_stage(runs, stage, Flux(FLUX, key=jax.random.key(SEED + 2))).ema
    text = read_text(runs)
    networks = {"flux": flux, "clip": text.clip, "t5": text.t5, "vae": vae}
    small = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, networks
    )
    save_models(Models(read_tokenizers(runs), **small, defaults=DEFAULTS), folder, to="diffusers")


def restore(folder: Path, runs: Path) -> None:
    """Start the stages from exported weights, where their own state is lost.

    Optimizers and averages start from the beginning, at step 0.
    """
    models = load_models(str(folder), dtype="float32")
    vae = jax.tree.unflatten(jax.tree.structure(abstract(Vae, VAE)), jax.tree.leaves(models.vae))
    heads = TextEncoders(key=jax.random.key(SEED + 1))
    text = eqx.tree_at(
        lambda encoders: (encoders.clip, encoders.t5), heads, (models.clip, models.t5)
    )
    for name, network in (("vae", vae), ("text", text), ("flux", models.flux)):
        if (runs / f"{name}.eqx").exists():
            raise FileExistsError(
                f"{runs / name}.eqx exists, and its stage would continue from it. "
                f"Move it away to start from {folder}."
            )
        save(runs / f"{name}.eqx", TrainState.create(network, OPTIMIZERS[name](1)))


def main() -> None:
    stages = {
        "vae": (train_vae, 2400),
        "decoder": (train_decoder, 7400),
        "latents": (make_latents, 40_000),
        "text": (train_text, 1500),
        "flux": (train_flux, 6500),
        "distill": (distill, 600),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*stages, "export", "restore"])
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/tiny"), help="where the stages keep their state"
    )
    parser.add_argument(
        "--steps", type=int, help="steps of the stage in total, or images of `latents`"
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=("flux", "distill"),
        default="distill",
        help="the stage whose transformer is exported",
    )
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("weights/tiny"),
        help="folder that `export` writes and `restore` reads",
    )
    options = parser.parse_args()
    if options.stage == "export":
        export(options.runs, options.source, options.to)
        return
    if options.stage == "restore":
        restore(options.to, options.runs)
        return
    train, steps = stages[options.stage]
    train(options.runs, steps if options.steps is None else options.steps)


if __name__ == "__main__":
    main()
