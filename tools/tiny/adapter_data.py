"""The training examples of the tiny model's adapters, drawn and encoded in large batches."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from adapter_examples import Blot, Examples
from render_batch import (
    SceneArrays,
    distance_tables,
    draw_mask,
    draw_scene,
    edge_picture,
    gray_picture,
    mask_features,
    scene_arrays,
)
from scenes import ROLES, Scene, caption, plain_caption, plain_words

from fluxjax.generate.latents import pack_latents
from fluxjax.generate.load_models import Models
from fluxjax.generate.text import TextStates, encode_text, prompt_ids
from fluxjax.nets.vae import Vae

CHUNKS = {"gpu": 256, "cpu": 32}
WORDS = [(role, word) for role, words in ROLES.items() for word in words]
"""The words that scenes are made of, each with its role."""


class Encoded(NamedTuple):
    """Encoded examples, each array with a leading axis of examples.

    `latents`: packed, [tokens, 64]. `text`: of the prompts. `condition`: of the kind: features of
    each token (fill, edges), packed latents (kontext, controlnet), or a picture in bytes (redux).
    `caption`: states of the targets' full captions; of kontext and redux only. `taught`: [tokens],
    1 for those that are drawn anew where the base model knows how: hidden (fill), or changed by the
    instruction (kontext); all of redux. `words`: of redux only, the numbers in `WORDS` of those
    that the picture shows, one for each role.
    """

    latents: jax.Array
    text: TextStates
    condition: jax.Array
    caption: TextStates | None
    taught: jax.Array
    words: jax.Array | None


class _Part(NamedTuple):
    """A part of the examples as numbers."""

    target: SceneArrays
    source: SceneArrays
    mask: Blot
    known: np.ndarray


@eqx.filter_jit
def _encode_part(vae: Vae, tables: jax.Array, kind: str, part: _Part) -> tuple:
    def latent(image: jax.Array) -> jax.Array:
        return pack_latents(vae.encode(image))

    def one(part: _Part) -> tuple:
        target = draw_scene(part.target, tables)
        source = draw_scene(part.source, tables)
        drawn_anew = jnp.abs(target - source).max(-1) > 0
        if kind == "fill":
            drawn_anew = draw_mask(part.mask)
            condition = fill_features(latent, target, drawn_anew)
        elif kind == "edges":
            condition = latent(edge_picture(target))
        elif kind == "controlnet":
            condition = latent(gray_picture(target))
        elif kind == "kontext":
            condition = latent(source)
        else:
            drawn_anew = jnp.ones_like(drawn_anew)
            condition = jnp.round((source + 1) * 127.5).astype(jnp.uint8)
        if kind != "redux":
            condition = condition.astype(jnp.float16)
        taught = part.known * of_tokens(drawn_anew.astype(jnp.float16))
        return latent(target).astype(jnp.float16), condition, taught

    return jax.vmap(one)(part)


def of_tokens(mask: jax.Array) -> jax.Array:
    """Return for each image token the largest value of a mask in its 16 x 16 pixels: [tokens]."""
    rows, columns = mask.shape[0] // 16, mask.shape[1] // 16
    return mask.reshape(rows, 16, columns, 16).max((1, 3)).reshape(-1)


def fill_features(
    latent: Callable[[jax.Array], jax.Array], image: jax.Array, mask: jax.Array
) -> jax.Array:
    """Return what FLUX.1 Fill is conditioned on: [tokens, 64 + 256]."""
    visible = latent(image * (1 - mask[..., None]))
    return jnp.concatenate([visible, mask_features(mask)], axis=-1)


def encode_examples(models: Models, kind: str, examples: Examples) -> Encoded:
    """Draw and encode examples; `models` are in float32."""
    tables = jnp.asarray(distance_tables())
    known = np.array([target.known for target in examples.targets], np.float16)
    targets, sources = scene_arrays(examples.targets), scene_arrays(examples.sources)
    part = _Part(targets, sources, examples.masks, known)
    part = part._replace(mask=Blot(*(array.astype(np.float32) for array in part.mask)))
    encoded = _in_chunks(
        lambda rows: _encode_part(models.vae, tables, kind, rows), part, len(examples.prompts)
    )
    text = encode_prompts(models, examples.prompts)
    captions = words = None
    if kind == "redux":
        words = jnp.array([numbers_of_words(one.scene) for one in examples.sources])
    if kind in ("kontext", "redux"):
        rng = np.random.default_rng(1)
        worded = plain_caption if kind == "redux" else partial(caption, rng=rng)
        captions = encode_prompts(models, [worded(one.scene) for one in examples.targets])
    return Encoded(encoded[0], text, encoded[1], captions, encoded[2], words)


def numbers_of_words(scene: Scene) -> list[int]:
    """Return which of `WORDS` a scene shows, one for each role."""
    return [WORDS.index(pair) for pair in plain_words(scene).items()]


def encode_prompts(models: Models, prompts: Sequence[str]) -> TextStates:
    """Encode prompts: in bfloat16, or on a CPU, where that is slow, in float32.

    The networks compute in the dtype of the text.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    ids = prompt_ids(models.tokenizers, prompts, max_length=models.defaults.max_length)

    def run(rows):
        states = encode_text(models.clip, models.t5, rows, dtype=jnp.float32)
        return jax.tree.map(lambda x: x.astype(dtype), states)

    return _in_chunks(run, jax.tree.map(np.asarray, ids), len(prompts))


def _in_chunks(run: Callable, rows, count: int):
    """Return the results of a function over chunks of rows, concatenated."""
    results = []
    chunk = min(count, CHUNKS.get(jax.default_backend(), 256))
    for start in range(0, count, chunk):
        # The last chunk has the shape of the others, so that nothing is compiled twice.
        numbers = np.minimum(np.arange(start, start + chunk), count - 1)
        mine = run(jax.tree.map(itemgetter(numbers), rows))
        results.append(jax.tree.map(itemgetter(slice(min(chunk, count - start))), mine))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)
