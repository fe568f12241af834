"""The frozen networks that turn images and captions into what a transformer is trained on."""

import hashlib
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.family import family_of_source
from fluxjax.generate.fill import mask_features
from fluxjax.generate.latents import pack_latents
from fluxjax.generate.load import activation_dtype, load_tokenizers
from fluxjax.generate.load_network import LoadOptions, load_network
from fluxjax.generate.text import TextStates, encode_text, prompt_ids
from fluxjax.generate.tokens import Tokenizers
from fluxjax.nets.clip import Clip
from fluxjax.nets.t5 import T5
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float
from fluxjax.train.data_settings import DataSettings
from fluxjax.train.prepare import PreparedExample
from fluxjax.zoo import Defaults

_SMALL = 4096
"""Values of an array that a fingerprint reads."""


class Encoders(NamedTuple):
    """The networks that encode examples; their weights are not trained.

    `clip`: None for families without it. `dtype`: of the text encoders' activations; the VAE
    computes in float32. `defaults`: of the model. `model`: its name.
    """

    tokenizers: Tokenizers
    clip: Clip | None
    t5: T5
    vae: Vae
    dtype: DTypeLike
    defaults: Defaults
    model: str

    @property
    def side(self) -> int:
        """The side of a square with as many pixels as the model's own size, a multiple of 16."""
        return round((self.defaults.height * self.defaults.width) ** 0.5 / 16) * 16


@convert_arguments
def load_encoders(source: str | Path, *, dtype: DTypeLike | None = None) -> Encoders:
    """Load the VAE, in float32, and the text encoders of a model.

    **Arguments:** `source`: a zoo name, a diffusers folder or a hub id. `dtype`: of the text
    encoders' weights and activations; by default bfloat16, on a CPU float32.
    **Raises:** as `load_models`.
    """
    dtype = activation_dtype() if dtype is None else dtype
    family = family_of_source(source)
    networks: dict[str, Any] = {}
    for name in family.text_encoders:
        networks[name] = load_network(name, source, LoadOptions(dtype=dtype))
    vae = load_network("vae", source, LoadOptions(dtype=jnp.float32))
    return Encoders(
        load_tokenizers(source),
        networks.get("clip"),
        networks["t5"],
        vae,
        dtype,
        load_defaults(source),
        str(source),
    )


def fingerprint(encoders: Encoders) -> str:
    """Return a hash of the encoders' configurations and of their small arrays.

    It tells encoders apart without reading all of their weights.
    """
    digest = hashlib.sha256()
    for network in (encoders.vae, encoders.clip, encoders.t5):
        if network is None:
            continue
        digest.update(repr(network.config).encode())
        for leaf in jax.tree.leaves(eqx.filter(network, eqx.is_array)):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            if leaf.size <= _SMALL:
                digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


class ImageStates(NamedTuple):
    """A batch of encoded images, on the host.

    `latent`: packed means of the posterior, scaled and shifted, [images, tokens, channels].
    `log_variance`: of the posterior, likewise scaled; None if latents are not drawn. `condition`:
    packed latents of the condition's images. `hidden`: mask features of Fill as bits, [images,
    tokens, 32]. `counted`: how much each token counts in the loss, [images, tokens].
    """

    latent: np.ndarray
    log_variance: np.ndarray | None = None
    condition: np.ndarray | None = None
    hidden: np.ndarray | None = None
    counted: np.ndarray | None = None


@eqx.filter_jit
def _packed_moments(
    vae: Vae, images: Float[Array, "images height width 3"]
) -> tuple[Float[Array, "images tokens channels"], Float[Array, "images tokens channels"]]:
    """Return means and log-variances of latents, one image after another."""
    scale = vae.config.scale

    def one(image: Float[Array, "height width 3"]) -> tuple[Array, Array]:
        mean, log_variance = vae.moments(image)
        scaled = (mean - vae.config.shift) * scale
        return pack_latents(scaled), pack_latents(log_variance + 2 * log(scale))

    return jax.lax.map(one, images)


@eqx.filter_jit
def _packed_means(
    vae: Vae, images: Float[Array, "images height width 3"]
) -> Float[Array, "images tokens channels"]:
    return jax.lax.map(lambda image: pack_latents(vae.encode(image)), images)


_mask_features = jax.jit(jax.vmap(mask_features))


def encode_prepared(
    encoders: Encoders, rows: Sequence[PreparedExample], *, sample_posterior: bool
) -> ImageStates:
    """Encode the images of examples of one size.

    **Arguments:** `sample_posterior`: whether the log-variances are returned too.
    """
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *map(_arrays, rows))
    images = jnp.asarray(stacked["image"])
    variance = condition = hidden = None
    if sample_posterior:
        latent, variance = map(np.asarray, _packed_moments(encoders.vae, images))
    else:
        latent = np.asarray(_packed_means(encoders.vae, images))
    if "condition" in stacked:
        means = _packed_means(encoders.vae, jnp.asarray(stacked["condition"]))
        condition = np.asarray(means)
    if "hidden" in stacked:
        features = _mask_features(jnp.asarray(stacked["hidden"]))
        hidden = np.packbits(np.asarray(features) > 0, axis=-1)
    return ImageStates(latent, variance, condition, hidden, stacked.get("counted"))


def _arrays(row: PreparedExample) -> dict[str, np.ndarray]:
    """Return the arrays of an example by name, without those that it lacks."""
    values = row._asdict()
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def encode_captions(
    encoders: Encoders, captions: Sequence[str], settings: DataSettings
) -> TextStates:
    """Encode a batch of captions; states are kept in `settings.text_dtype`.

    **Arguments:** `settings`: whose `max_length` is a number.
    """
    ids = prompt_ids(
        encoders.tokenizers,
        captions,
        max_length=settings.max_length or encoders.defaults.max_length,
        visible_padding=encoders.defaults.visible_padding,
    )
    states = encode_text(encoders.clip, encoders.t5, ids, dtype=encoders.dtype)
    if settings.text_dtype is None:
        return states
    vec = states.vec if states.vec is None else states.vec.astype(settings.text_dtype)
    return states._replace(txt=states.txt.astype(settings.text_dtype), vec=vec)
