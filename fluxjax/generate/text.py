"""Prompts to what the transformer is given of them."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.devices.run import on_mesh
from fluxjax.generate.tokens import Tokenizers, tokenize
from fluxjax.nets.clip import Clip
from fluxjax.nets.t5 import T5
from fluxjax.shapes import Array, Float, Int


class Ids(NamedTuple):
    """The token ids of a batch of prompts."""

    clip: Int[Array, "images clip_tokens"]
    t5: Int[Array, "images txt_tokens"]


class Text(NamedTuple):
    """A batch of encoded prompts: T5's states and CLIP's pooled states."""

    txt: Float[Array, "images txt_tokens context"]
    vec: Float[Array, "images pooled"]


def prompt_ids(
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    max_length: int,
) -> Ids:
    """Tokenize a batch of prompts; `prompts_2`, one a prompt, feeds T5 in their place.

    **Raises:** `ValueError` if there are not as many of both.
    """
    seconds = [None] * len(prompts) if prompts_2 is None else prompts_2
    if len(seconds) != len(prompts):
        raise ValueError(
            f"`prompt_ids` got {len(prompts)} prompts and {len(seconds)} second prompts. Pass one second prompt a prompt."
        )
    ids = [
        tokenize(tokenizers, *pair, max_length=max_length)
        for pair in zip(prompts, seconds, strict=True)
    ]
    return Ids(
        jnp.asarray(np.stack([one.clip for one in ids])),
        jnp.asarray(np.stack([one.t5 for one in ids])),
    )


@eqx.filter_jit
def encode_text(
    clip: Clip, t5: T5, ids: Ids, *, dtype: DTypeLike, mesh: Mesh | None = None
) -> Text:
    """Encode a batch of prompts, in activations of `dtype`. `mesh`: of devices; the encoders are then from `shard`."""

    def run(networks: tuple[Clip, T5], ids: Ids, rest: None) -> Text:
        clip, t5 = networks
        vec = jax.vmap(lambda one: clip(one, dtype=dtype))(ids.clip)
        return Text(jax.vmap(lambda one: t5(one, dtype=dtype))(ids.t5), vec)

    # A prompt is encoded once: rows that only fill are no loss worth an error.
    return (
        run((clip, t5), ids, None)
        if mesh is None
        else on_mesh(run, mesh, (clip, t5), ids, fill=True)
    )
