"""A ninth shape and a ninth colour of objects for the tiny model, from 200 images.

    python tools/tiny/new_words.py all words
    python tools/tiny/new_words.py score words/tuned

`all` writes the images with their captions, trains, scores the model before and after, and draws a
picture of both, in a new folder. The model has never seen a crescent, nor read the word "moon", and
knows teal as a background only. As many examples of each step show neither, so that what it knows
is kept (prior preservation: Ruiz et al. 2022, DreamBooth, section 3.2).
The scores are those of scenes whose combination of objects, relation and background was in no
training.

CLIP and T5 are trained together with the transformer. They have never read the letters of "moon"
either, and tell what they know of a caption in states that the transformer has long learned to
read; with the text encoders frozen, the transformer has to read states that mean nothing.

Each of the 200 images is shown in seven other palettes too: colours are exchanged pixel by pixel,
and in the captions. Small moons, whose outlines are the hardest, are more frequent than others, and
tokens with outlines count more in the loss.

The VAE's encoder is not trained. It encodes a colour that was in none of its training images like
the nearest one that was; lime would come out yellow. So the new colour is one of the backgrounds'.
The VAE's decoder has seen it as a background only, and is trained on the same images. T5 splits an
unknown word into letters. With a word longer than "moon", some captions would be longer than the 24
tokens that the model reads.
"""

import argparse
import json
import time
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scenes
from einops import reduce
from evaluate_tiny import generate, grid
from PIL import Image
from scenes import OPPOSITE, Scene, Thing, caption, check, random_scene, render
from scipy.optimize import nnls

import fluxjax
from fluxjax.flow.times import resolution_mu
from fluxjax.generate.conditioning import Conditioning
from fluxjax.generate.image import read_image, write_png
from fluxjax.generate.latents import image_ids, pack_latents, unpack_latents
from fluxjax.generate.save import save_models
from fluxjax.generate.text import PromptIds, encode_text, prompt_ids
from fluxjax.generate.velocity import ConditionalFlux
from fluxjax.nets.clip import Clip
from fluxjax.nets.flux import Flux
from fluxjax.nets.t5 import T5
from fluxjax.nets.vae import Vae
from fluxjax.train.loss import flow_matching_loss, logit_normal_times
from fluxjax.train.step import TrainState, make_step

SHAPE, COLOR = "moon", "teal"
NEW = (SHAPE, COLOR, "both")
OLD = ("old",)
SIZE = 128
TOKEN = 16
"""Pixels along a side of what a token of the transformer stands for."""
SHOWN = 6
"""New prompts in the picture, and half as many old ones: the first of each."""
KEPT = 1800
"""Images of what the model knows. Half of each step's examples are of these."""
WORDINGS = 6
"""Captions of each image, one of which is drawn whenever the image is."""
PALETTES = 8
"""How often each image with new words is shown: once as it is, then in other colours."""
OUTLINES = 3.0
"""How much more than others a token with outlines counts in the loss."""
BATCH, WARM_UP, EMA, DROPPED = 16, 50, 0.99, 0.05
GUIDANCE = 1.0
"""The distilled scale that the transformer is trained at, and the tuned model is sampled with."""
DECODER_BATCH, DECODER_STEPS, DECODER_RATE = 4, 900, 3e-4
NOISE = 0.12
"""The largest deviation of noise on latents from which the decoder learns to draw: those that the
transformer draws are not exact either."""
FLUX_RATE, TEXT_RATE = 3e-4, 5e-4
"""The highest learning rates of the transformer, and of the text encoders."""


def _crescent(points: int = 48) -> np.ndarray:
    """A disc without another one that lies to its right: its outer and its inner arc.

    It is about as thick as its radius: the VAE then draws it as well as it draws other shapes.
    """
    shift, inner = 0.8, 0.75
    # Where both circles meet, seen from either center.
    meet = (1 + shift**2 - inner**2) / (2 * shift)
    outer_angle = np.arccos(meet)
    inner_angle = np.arctan2(np.sin(outer_angle), meet - shift)
    outer = np.linspace(outer_angle, 2 * np.pi - outer_angle, points)
    back = np.linspace(2 * np.pi - inner_angle, inner_angle, points)
    arcs = [
        np.stack([np.cos(outer), np.sin(outer)], -1),
        inner * np.stack([np.cos(back), np.sin(back)], -1) + (shift, 0),
    ]
    # From -1 to `meet` along x: in the middle of its box, as the other shapes are.
    return np.concatenate(arcs) + np.array([(1 - meet) / 2, 0.0])


def extend_scenes() -> None:
    """Add the shape and the colour to those that scenes are drawn and read with."""
    scenes.SHAPES[SHAPE] = ([_crescent()], [])
    scenes.COLORS[COLOR] = scenes.BACKGROUNDS[COLOR]


def scene_of(kind: str, rng: np.random.Generator) -> Scene:
    """Return a scene with the new words of a kind in its first object, and with none elsewhere."""
    while True:
        scene = random_scene(rng)
        words = [word for thing in scene.things for word in (thing.shape, thing.color)]
        if {SHAPE, COLOR}.intersection(words):
            continue
        first, *rest = scene.things
        shape = SHAPE if kind in (SHAPE, "both") else first.shape
        color = COLOR if kind in (COLOR, "both") else first.color
        if color == scene.background:
            continue
        return Scene(scene.background, (Thing(first.size, color, shape), *rest), scene.relation)


def training_scene(kind: str, rng: np.random.Generator) -> Scene:
    """Return a scene of `scene_with_more`; small moons are more frequent than others.

    Their outline is the hardest to learn: a small one is three latents wide.
    """
    while True:
        scene = scene_with_more(kind, rng)
        moons = [thing for thing in scene.things if thing.shape == SHAPE]
        has_small = any(scene.relation == "inside" or moon.size == "small" for moon in moons)
        if has_small or not moons or rng.random() < 0.4:
            return scene


def scene_with_more(kind: str, rng: np.random.Generator) -> Scene:
    """Return a scene as of `scene_of`, in which a second object often has new words too."""
    while True:
        scene = scene_of(kind, rng)
        if kind in OLD:
            return scene
        if len(scene.things) == 1:
            # Two objects show more; fewer than half of the single ones are kept.
            if rng.random() < 0.6:
                continue
            return scene
        first, second = scene.things
        also = ("", SHAPE, COLOR, "both")[int(rng.integers(4))]
        shape = SHAPE if also in (SHAPE, "both") else second.shape
        color = COLOR if also in (COLOR, "both") else second.color
        is_hidden = scene.relation == "inside" and color == first.color
        if color != scene.background and not is_hidden:
            things = first, Thing(second.size, color, shape)
            return Scene(scene.background, things, scene.relation)


def reworded(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of a scene's captions, which may name the other object first."""
    if scene.relation in OPPOSITE and rng.random() < 0.5:
        scene = Scene(scene.background, scene.things[::-1], OPPOSITE[scene.relation])
    return caption(scene, rng)


def in_other_colors(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a training scene of the same objects in other colours, a third of them the new one.

    One new word at least is left in it.
    """
    while True:
        found = {}
        for thing in scene.things:
            is_new = rng.random() < 1 / 3
            found[thing.color] = COLOR if is_new else str(rng.choice(list(scenes.COLORS)))
        background = scene.background
        if rng.random() < 0.5:
            background = str(rng.choice(list(scenes.BACKGROUNDS)))
        things = tuple(replace(thing, color=found[thing.color]) for thing in scene.things)
        other = Scene(background, things, scene.relation)
        words = [word for thing in things for word in (thing.shape, thing.color)]
        colors = [thing.color for thing in things]
        is_hidden = scene.relation == "inside" and len(set(colors)) == 1
        has_new = bool({SHAPE, COLOR}.intersection(words))
        if has_new and background not in colors and not is_hidden and not other.held_out:
            return other


def recolored(image: np.ndarray, scene: Scene, other: Scene) -> np.ndarray:
    """Return an image of a scene in the colours of another scene of the same objects.

    Each pixel is a mixture of the background's and the objects' colours, and becomes that mixture
    of the other colours.

    **Arguments:** `image`: [height, width, 3] in [-1, 1].
    """
    names = {scene.background: other.background}
    for one, changed in zip(scene.things, other.things, strict=True):
        names[one.color] = changed.color
    old = np.array([scenes.BACKGROUNDS[name] for name in names]) / 127.5 - 1
    new = np.array([scenes.BACKGROUNDS[name] for name in names.values()]) / 127.5 - 1
    # Shares of colours are not negative, and add up to one.
    weights = np.concatenate([old.T, np.ones((1, len(old)))])
    pixels, places = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True)
    shares = np.stack([nnls(weights, np.append(pixel, 1.0))[0] for pixel in pixels])
    shares /= shares.sum(-1, keepdims=True)
    return np.float32(shares @ new)[places.reshape(-1)].reshape(image.shape)


def write_examples(
    folder: Path,
    count: int,
    kinds: tuple[str, ...],
    *,
    seed: int = 0,
    wordings: int = 1,
    palettes: int = 1,
) -> Path:
    """Write training images of several kinds in turns, and their captions.

    Scenes that are kept for scoring (`Scene.held_out`) are left out.

    **Arguments:** `folder`: new. `wordings`: the number of captions of each image. `palettes`: how
    often each image is written: once as it is, then in other colours.
    **Returns:** the file of the captions in it, a JSONL that `fluxjax train` reads: as many lines
    for each image, one after another.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines: list[str] = []
    number = 0
    while number < count:
        scene = training_scene(kinds[number % len(kinds)], rng)
        if scene.held_out:
            continue
        image = render(scene, SIZE, SIZE, rng)
        for palette in range(palettes):
            shown = scene if palette == 0 else in_other_colors(scene, rng)
            path = folder / f"{number:04d}-{palette}.png"
            write_png(recolored(image, scene, shown) if palette else image, path)
            for _ in range(wordings):
                lines.append(json.dumps({"image": path.name, "prompt": reworded(shown, rng)}))
        number += 1
    captions = folder / "captions.jsonl"
    captions.write_text("\n".join(lines) + "\n")
    return captions


class Examples(NamedTuple):
    """Encoded images with the tokens of their captions.

    `images`: [images, SIZE, SIZE, 3] in [-1, 1]. `latents`: packed, [images, tokens, channels].
    `weights`: how much each token counts in the loss, [images, tokens]. `ids`: [images, wordings,
    ...].
    """

    images: np.ndarray
    latents: np.ndarray
    weights: np.ndarray
    ids: PromptIds


def tokens_of(models: fluxjax.Models, captions: list[str]) -> PromptIds:
    """Return the token ids of captions."""
    ids = prompt_ids(models.tokenizers, captions, max_length=models.defaults.max_length)
    return jax.tree.map(np.asarray, ids)


def outline_weights(images: np.ndarray) -> np.ndarray:
    """Return how much each token of images counts in the loss: more where outlines are.

    An outline passes through pixels that differ from the one above or to the left. A token with a
    tenth of such pixels, about one straight line, or with more, counts 1 + `OUTLINES`.

    **Arguments:** `images`: [images, SIZE, SIZE, 3] in [-1, 1].
    **Returns:** [images, tokens], from 1 on.
    """
    differs = np.zeros(images.shape[:3], bool)
    for axis, later in ((1, np.s_[:, 1:]), (2, np.s_[:, :, 1:])):
        differs[later] |= np.abs(np.diff(images, axis=axis)).max(-1) > 0.1
    share = reduce(differs, "i (y h) (x w) -> i (y x)", np.mean, h=TOKEN, w=TOKEN)
    return np.float32(1 + OUTLINES * np.minimum(share / 0.1, 1))


def read_examples(models: fluxjax.Models, captions: Path) -> Examples:
    """Read and encode what `write_examples` wrote, with `WORDINGS` captions of each image."""
    encode = jax.jit(lambda image: pack_latents(models.vae.encode(image)))
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    images = np.stack([read_image(captions.parent / row["image"]) for row in rows[::WORDINGS]])
    latents = np.stack([np.asarray(encode(image)) for image in images])
    ids = tokens_of(models, [row["prompt"] for row in rows])
    split = jax.tree.map(lambda x: x.reshape(-1, WORDINGS, *x.shape[1:]), ids)
    return Examples(images, latents, outline_weights(images), split)


class Batch(NamedTuple):
    """The examples of a step, fields as of `Examples`, with one caption of each image."""

    latents: np.ndarray
    weights: np.ndarray
    ids: PromptIds


def draw_batch(examples: tuple[Examples, ...], empty: PromptIds, rng: np.random.Generator) -> Batch:
    """Return the examples of a step, as many from each of the groups.

    Of each image one of the captions is taken, or rarely the empty one.
    """
    parts = []
    for group in examples:
        rows = rng.integers(len(group.latents), size=BATCH // len(examples))
        wordings = rng.integers(WORDINGS, size=rows.shape)
        ids = jax.tree.map(itemgetter((rows, wordings)), group.ids)
        parts.append(Batch(group.latents[rows], group.weights[rows], ids))
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    dropped = rng.random(BATCH) < DROPPED
    ids = jax.tree.map(lambda x, none: np.where(dropped[:, None], none, x), joined.ids, empty)
    return joined._replace(ids=ids)


Networks = tuple[Flux, Clip, T5]
"""What is trained."""


def loss(networks: Networks, batch: Batch, *, key: jax.Array) -> jax.Array:
    """Return the flow-matching loss of a batch, the text encoded anew."""
    flux, clip, t5 = networks
    network, places = ConditionalFlux(flux, "xla"), image_ids(SIZE, SIZE)
    text = encode_text(clip, t5, batch.ids, dtype=jnp.float32)
    defaults = fluxjax.zoo.ZOO["tiny"].defaults
    shifts = {"base_shift": defaults.base_shift, "max_shift": defaults.max_shift}
    when, noise_key = jax.random.split(key)
    count, tokens, _ = batch.latents.shape
    times = logit_normal_times(when, count, mu=resolution_mu(tokens, **shifts))
    noise = jax.random.normal(noise_key, batch.latents.shape)

    def one(
        x0: jax.Array,
        t: jax.Array,
        noise: jax.Array,
        weights: jax.Array,
        txt: jax.Array,
        vec: jax.Array,
    ) -> jax.Array:
        condition = Conditioning(txt, vec, places, jnp.float32(GUIDANCE))
        return flow_matching_loss(lambda x, t: network(x, t, condition), x0, t, noise, weights)

    examples = batch.latents, times, noise, batch.weights, text.txt, text.vec
    return jnp.mean(jax.vmap(one)(*examples))


def with_rate(rate: float, steps: int) -> optax.GradientTransformation:
    """Return AdamW, whose learning rate rises to `rate` and then falls to a twentieth of it."""
    warm_up = min(WARM_UP, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0, rate, warm_up, steps, 0.05 * rate)
    adamw = optax.adamw(schedule, b2=0.99, weight_decay=0.01)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def make_optimizer(networks: Networks, steps: int) -> optax.GradientTransformation:
    """Return AdamW with a rate for the transformer and one for the text encoders."""

    names = ("flux", "text", "text")
    labels = tuple(
        jax.tree.map(lambda _, name=name: name, eqx.filter(network, eqx.is_inexact_array))
        for name, network in zip(names, networks, strict=True)
    )
    rates = {"flux": with_rate(FLUX_RATE, steps), "text": with_rate(TEXT_RATE, steps)}
    return optax.multi_transform(rates, labels)


def train(models: fluxjax.Models, examples: tuple[Examples, ...], steps: int) -> fluxjax.Models:
    """Return models whose transformer and text encoders have learned from examples."""
    networks = models.flux, models.clip, models.t5
    optimizer = make_optimizer(networks, steps)
    state = TrainState.create(networks, optimizer)
    take_step = make_step(loss, optimizer, ema_decay=EMA)
    empty = jax.tree.map(lambda x: x[:1], tokens_of(models, [""]))
    rng, losses = np.random.default_rng(0), []
    for step in range(steps):
        batch = draw_batch(examples, empty, rng)
        key = jax.random.fold_in(jax.random.key(0), step)
        state, value = take_step(state, batch, key=key)
        losses.append(float(value))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {np.mean(losses[-100:]):.4f}", flush=True)
    flux, clip, t5 = state.ema
    return models._replace(flux=flux, clip=clip, t5=t5)


class Drawn(NamedTuple):
    """Images that a model drew of held-out scenes. `kinds`: of the scenes."""

    kinds: list[str]
    scenes: list[Scene]
    images: np.ndarray


def draw_kinds(models: fluxjax.Models, kinds: tuple[str, ...], count: int, seed: int = 1) -> Drawn:
    """Draw `count` held-out scenes of kinds in turns, as the model is meant to be sampled."""
    rng = np.random.default_rng(seed)
    turns, asked, texts = [], [], []
    while len(asked) < count:
        kind = kinds[len(asked) % len(kinds)]
        scene = scene_of(kind, rng)
        if scene.held_out:
            turns.append(kind)
            asked.append(scene)
            texts.append(caption(scene, rng))
    defaults = models.defaults
    images = generate(models, texts, steps=defaults.steps, guidance=defaults.guidance)
    return Drawn(turns, asked, images)


def score(drawn: Drawn) -> dict[str, float]:
    """Return the percentage of scenes that are drawn right, in all and by kind."""
    right = [
        check(image, scene)["all"] for image, scene in zip(drawn.images, drawn.scenes, strict=True)
    ]
    found = {"all": 100 * float(np.mean(right))}
    for kind in dict.fromkeys(drawn.kinds):
        of_kind = [one for one, name in zip(right, drawn.kinds, strict=True) if name == kind]
        found[kind] = 100 * float(np.mean(of_kind))
    return found


def draw_model(path: str, count: int) -> tuple[Drawn, Drawn]:
    """Draw new and old scenes with a model, and print its scores."""
    models = fluxjax.load_models(path, dtype="float32")
    drawn = draw_kinds(models, NEW, count), draw_kinds(models, OLD, count)
    print(path, *map(json.dumps, map(score, drawn)), flush=True)
    return drawn


def decoder_loss(vae: Vae, latents: jax.Array, images: jax.Array, *, key: jax.Array) -> jax.Array:
    """Return the mean absolute plus the mean squared error of images from latents with noise."""
    much, noise = jax.random.split(key)
    deviation = jax.random.uniform(much, (len(latents), 1, 1), maxval=NOISE)
    noisy = latents + deviation * jax.random.normal(noise, latents.shape)
    drawn = jax.vmap(lambda x: vae.decode(unpack_latents(x, SIZE, SIZE)))(noisy)
    return jnp.mean(jnp.abs(drawn - images)) + jnp.mean(jnp.square(drawn - images))


def train_decoder(models: fluxjax.Models, examples: tuple[Examples, ...]) -> fluxjax.Models:
    """Return models whose VAE decodes examples better; its encoder stays as it is."""
    vae = models.vae
    trained = eqx.tree_at(
        lambda vae: vae.decoder,
        jax.tree.map(lambda leaf: False, vae),
        jax.tree.map(eqx.is_inexact_array, vae.decoder),
    )
    optimizer = with_rate(DECODER_RATE, DECODER_STEPS)
    state = TrainState.create(vae, optimizer, trainable=trained)
    take_step = make_step(decoder_loss, optimizer, ema_decay=EMA, trainable=trained)
    rng = np.random.default_rng(1)
    for step in range(DECODER_STEPS):
        picked = []
        for group in examples:
            rows = rng.integers(len(group.latents), size=DECODER_BATCH // len(examples))
            picked.append((group.latents[rows], group.images[rows]))
        latents, images = (np.concatenate(parts) for parts in zip(*picked, strict=True))
        key = jax.random.fold_in(jax.random.key(1), step)
        state, value = take_step(state, latents, images, key=key)
        if (step + 1) % 100 == 0:
            print(f"decoder step {step + 1} loss {float(value):.4f}", flush=True)
    return models._replace(vae=state.ema)


def picture(before: tuple[Drawn, Drawn], after: tuple[Drawn, Drawn]) -> Image.Image:
    """Return the first images of both: above before the training, below after it."""
    shown: list[np.ndarray] = []
    for new, old in (before, after):
        shown += [*new.images[:SHOWN], *old.images[: SHOWN // 2]]
    return grid(np.stack(shown), SHOWN + SHOWN // 2)


def run_all(folder: Path, images: int, steps: int, count: int) -> None:
    """Write, train, save, score and draw, in a new folder."""
    start = time.perf_counter(), time.process_time()
    new = write_examples(folder / "new", images, NEW, wordings=WORDINGS, palettes=PALETTES)
    kept = write_examples(folder / "kept", KEPT, OLD, seed=2, wordings=WORDINGS)
    models = fluxjax.load_models("tiny", dtype="float32")
    examples = read_examples(models, new), read_examples(models, kept)
    tuned = train_decoder(train(models, examples, steps), examples)
    tuned = tuned._replace(defaults=replace(tuned.defaults, guidance=GUIDANCE))
    save_models(tuned, folder / "tuned", to="diffusers")
    minutes = (time.perf_counter() - start[0]) / 60
    busy = (time.process_time() - start[1]) / 60
    print(f"{minutes:.1f} minutes from the images to the model, {busy:.1f} of them of a CPU")
    before, after = draw_model("tiny", count), draw_model(str(folder / "tuned"), count)
    picture(before, after).save(folder / "before_and_after.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("all", "score"))
    parser.add_argument("path", help="the new folder of `all`, or the model that is scored")
    parser.add_argument("--images", type=int, default=200, help="that have new words")
    parser.add_argument("--steps", type=int, default=5200, help="of 16 examples each")
    parser.add_argument(
        "--prompts", type=int, default=900, help="new ones, and as many old ones, to score"
    )
    options = parser.parse_args()
    extend_scenes()
    if options.action == "all":
        folder = Path(options.path)
        run_all(folder, options.images, options.steps, options.prompts)
    else:
        draw_model(options.path, options.prompts)


if __name__ == "__main__":
    main()
