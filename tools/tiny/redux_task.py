"""What is trained for the tiny model's Redux: the words of pictures, and networks that read them.

In the tiny model the pooled state of CLIP decides much of an image, above all its shapes, and Redux
leaves it as that of the prompt. With the exact T5 states of a caption after those of the empty
prompt, none of 24 scenes is drawn right if the pooled state is that of the empty prompt, and 83 %
are if it is that of the caption. So a LoRA is trained with Redux, which FLUX.1 Redux does not need.

First the transformer learns, by the LoRA, to draw scenes from a vocabulary that is learned with it:
one token for each word that says what a picture shows. Then an image encoder with its embedder
learns to name the words of pictures. That needs no transformer, and a step takes a tenth of the
time.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from adapter_data import WORDS, Encoded, encode_prompts
from adapter_tasks import (
    EVERY_MATRIX,
    FLOAT8,
    MOST_GUIDANCE,
    Stage,
    Task,
    Teacher,
    frozen_flux,
    matching_loss,
    write_network,
)
from placed import SIZE

from fluxjax.generate.conditioning import Conditioning
from fluxjax.generate.latents import image_ids
from fluxjax.generate.load_models import Models
from fluxjax.generate.text import TextStates
from fluxjax.generate.velocity import ConditionalFlux
from fluxjax.lora.adapter import Lora
from fluxjax.lora.attach import attach
from fluxjax.lora.init import init_lora, trainable
from fluxjax.lora.write import write_lora
from fluxjax.nets.flux import Flux
from fluxjax.nets.redux import Redux, ReduxConfig
from fluxjax.nets.siglip import Siglip, SiglipConfig
from fluxjax.shapes import Array, Float, Int

SIGLIP = SiglipConfig(image_size=SIZE, patch=16, width=64, heads=2, depth=3, mlp_width=256)
RANK = 8
TOKEN_SCALE = 10.0
"""Tokens are this times their trained numbers, so that one learning rate suits them and the LoRA.
Those of T5 have a variance of about 2."""
WORDS_RATE, PICTURES_RATE = 2e-3, 1.5e-3
WORDS_SHARE = 0.65
"""The share of the time in which the words are learned."""
NAMED = 0.5
"""How much naming the right words counts beside the squared error of their tokens."""
SHARPNESS = 8.0
"""A token is taken for a word in proportion to exp(-SHARPNESS times their mean squared distance)
of all words of its role."""


class Vocabulary(eqx.Module):
    """The tokens of words, and those that follow them, which are the same for all pictures.

    Tokens are `TOKEN_SCALE` times these. `words`: one row for each word of each role in `WORDS`.
    `rest`: one row for each further token of a picture.
    """

    words: Float[Array, "words context"]
    rest: Float[Array, "rest context"]

    def tokens(self, numbers: Int[Array, " roles"]) -> Float[Array, "tokens context"]:
        """Return the tokens of a picture.

        **Arguments:** `numbers`: of its words, one for each role.
        """
        return TOKEN_SCALE * jnp.concatenate([self.words[numbers], self.rest])


class ReduxParts(eqx.Module):
    """All that is trained: the vocabulary with the LoRA, and an image encoder with its embedder."""

    vocabulary: Vocabulary
    lora: Lora
    siglip: Siglip
    redux: Redux

    def read(self, picture: Array) -> Float[Array, "tokens context"]:
        """Return the tokens of a picture in bytes, [SIZE, SIZE, 3]."""
        return self.redux(self.siglip(picture.astype(jnp.float32) / 127.5 - 1))


def redux_task(models: Models, key: jax.Array) -> Task:
    """Return the training of an image encoder, its embedder and a LoRA."""
    encoder, embedder, lora_key, noise = jax.random.split(key, 4)
    context = models.flux.config.context
    config = ReduxConfig(features=SIGLIP.width, hidden=3 * context, context=context)
    lora = init_lora(models.flux, RANK, EVERY_MATRIX, key=lora_key)
    siglip = Siglip(SIGLIP, key=encoder)
    # Redux does not use the pooled state. Zeros take no place in a compressed file.
    pooler = jax.tree.map(jnp.zeros_like, siglip.pooler)
    siglip = eqx.tree_at(lambda siglip: siglip.pooler, siglip, pooler)
    parts = ReduxParts(first_vocabulary(models, noise), lora, siglip, Redux(config, key=embedder))
    nothing = jax.tree.map(lambda leaf: False, parts)
    words = eqx.tree_at(
        lambda parts: (parts.vocabulary, parts.lora),
        nothing,
        (jax.tree.map(eqx.is_inexact_array, parts.vocabulary), trainable(lora)),
    )
    networks = parts.siglip, parts.redux
    pictures = eqx.tree_at(
        lambda parts: (parts.siglip, parts.redux),
        nothing,
        jax.tree.map(eqx.is_inexact_array, networks),
    )
    unused = jax.tree.map(lambda leaf: False, pooler)
    pictures = eqx.tree_at(lambda parts: parts.siglip.pooler, pictures, unused)
    stages = (
        Stage(words_loss, WORDS_RATE, words, WORDS_SHARE),
        Stage(pictures_loss, PICTURES_RATE, pictures, 1 - WORDS_SHARE),
    )
    return Task(parts, frozen_flux(models.flux), stages, write)


def first_vocabulary(models: Models, key: jax.Array) -> Vocabulary:
    """Return a vocabulary that begins as the states of single words, with some noise."""
    states = encode_prompts(models, [word for _, word in WORDS]).txt.astype(jnp.float32)
    rest = SIGLIP.patches - len({role for role, _ in WORDS})
    first = jnp.concatenate([states[:, 0], jnp.repeat(states[:1, -1], rest, axis=0)])
    first = (first + 0.3 * jax.random.normal(key, first.shape)) / TOKEN_SCALE
    return Vocabulary(first[: len(WORDS)], first[len(WORDS) :])


def write(parts: eqx.Module, folder: Path) -> None:
    """Write the image encoder, the embedder and the LoRA to a folder."""
    assert isinstance(parts, ReduxParts)
    write_network(parts.siglip, folder)
    write_network(parts.redux, folder)
    path = folder / "redux.safetensors"
    write_lora(path, parts.lora, to="kohya", dtype=FLOAT8, overwrite=True)


def words_loss(
    parts: ReduxParts, flux: Flux, batch: Encoded, empty: TextStates, *, key: jax.Array
) -> jax.Array:
    """Return the loss of the transformer with the words of pictures after the prompts.

    The target is the transformer's own velocity, without the LoRA, for the caption of what is to be
    drawn.
    """
    del empty
    dtype, ids = batch.text.txt.dtype, image_ids(SIZE, SIZE)
    scale_key, key = jax.random.split(key)
    scales = jax.random.uniform(scale_key, (len(batch.latents),), minval=1, maxval=MOST_GUIDANCE)

    def conditioning(text: TextStates, words: jax.Array, scale: jax.Array) -> Conditioning:
        joined = jnp.concatenate([text.txt, parts.vocabulary.tokens(words).astype(dtype)])
        return Conditioning(joined, text.vec, ids, scale)

    def plain(text: TextStates, scale: jax.Array) -> Conditioning:
        return Conditioning(text.txt, text.vec, ids, scale)

    conditions = jax.vmap(conditioning)(batch.text, batch.words, scales)
    network = ConditionalFlux(attach(flux, [parts.lora]), "xla")
    everywhere = jnp.ones(batch.latents.shape[:2])
    teacher = Teacher(
        ConditionalFlux(flux, "xla"), jax.vmap(plain)(batch.caption, scales), everywhere
    )
    return matching_loss(network, batch.latents, conditions, uniform=0.0, key=key, teacher=teacher)


def pictures_loss(
    parts: ReduxParts, flux: Flux, batch: Encoded, empty: TextStates, *, key: jax.Array
) -> jax.Array:
    """Return how far the tokens of pictures are from those of their words.

    It is the mean squared error, and `NAMED` times the mean cross entropy of the words of a role,
    each of which is as likely as it is near.
    """
    del flux, empty, key
    vocabulary = jax.lax.stop_gradient(parts.vocabulary)
    tokens = jax.vmap(parts.read)(batch.condition)
    wanted = jax.vmap(vocabulary.tokens)(batch.words)
    error = jnp.mean(jnp.square(tokens - wanted))
    roles = batch.words.shape[1]
    named = [
        _cross_entropy(tokens[:, role], batch.words[:, role], vocabulary.words, rows)
        for role, rows in enumerate(rows_of_roles())
    ]
    return error * tokens.shape[1] / roles + NAMED * sum(named) / roles


def rows_of_roles() -> list[range]:
    """Return which rows of the vocabulary are the words of each role."""
    roles = [role for role, _ in WORDS]
    first = {role: roles.index(role) for role in roles}
    return [range(start, start + roles.count(role)) for role, start in first.items()]


def _cross_entropy(
    tokens: Float[Array, "pictures context"],
    numbers: Int[Array, " pictures"],
    words: Float[Array, "words context"],
    rows: range,
) -> jax.Array:
    """Return the mean cross entropy of naming the word of a role.

    **Arguments:** `numbers`: of the right words. `rows`: of `words` that may be named.
    """
    known = TOKEN_SCALE * words[rows.start : rows.stop]
    # The square of the token itself is the same for all words.
    nearness = 2 * tokens @ known.T - jnp.sum(jnp.square(known), axis=-1)
    logits = SHARPNESS / tokens.shape[1] * nearness
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, numbers - rows.start)
    return jnp.mean(losses)
