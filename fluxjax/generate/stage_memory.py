"""The memory that each stage of drawing takes beside the weights, by formulas of its shapes.

The formulas are those of programs compiled for GPUs (`tools/bench memory-aot`), in which they are
linear in the tokens and in the pixels.
"""

from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from fluxjax.devices.vae_memory import choose_strips, strips_bytes
from fluxjax.generate.latents import image_tokens
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.t5 import T5Config
from fluxjax.nets.vae import VaeConfig

_CHUNK_BYTES = 2**26
"""The most bytes of the logits of a chunk, where attention is xla_chunked."""


class AddedTokens(NamedTuple):
    """What an image is conditioned on beside its prompt, in tokens.

    `txt`: after those of the prompt, as of Redux and regions. `reference`: after those of the
    image, as of Kontext. `residuals`: how many ControlNets' residuals of all image tokens there
    are.
    """

    txt: int = 0
    reference: int = 0
    residuals: int = 0

    def plus(self, other: "AddedTokens") -> "AddedTokens":
        """Return both together."""
        return AddedTokens(
            self.txt + other.txt,
            self.reference + other.reference,
            self.residuals + other.residuals,
        )


class Demand(NamedTuple):
    """What is drawn at once.

    `rows`: images in a forward pass. `height`, `width`: in pixels. `tokens`: of a prompt, for T5.
    `dtype`: of the activations. `added`: tokens beside those of the prompt and the image.
    `conditions`: how many are evaluated side by side for each image: 2 with true guidance.
    """

    rows: int
    height: int
    width: int
    steps: int
    tokens: int
    dtype: DTypeLike
    added: AddedTokens = AddedTokens()
    conditions: int = 1

    @property
    def img_tokens(self) -> int:
        """Tokens of an image."""
        return image_tokens(self.height, self.width)

    @property
    def sequence(self) -> int:
        """Tokens of a forward pass of one image."""
        return self.img_tokens + self.tokens + self.added.txt + self.added.reference

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.height * self.width

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the activations."""
        return np.dtype(self.dtype).itemsize


class Configs(NamedTuple):
    """The configs of the networks that need the most memory."""

    t5: T5Config
    flux: FluxConfig | ChromaConfig
    vae: VaeConfig


def modulation_bytes(demand: Demand, flux: FluxConfig | ChromaConfig) -> int:
    """Return the bytes of the modulations of all steps of one image."""
    vectors = 12 * flux.double_depth + 3 * flux.single_depth + 2
    return demand.itemsize * demand.steps * flux.width * vectors


def text_bytes(demand: Demand, t5: T5Config) -> int:
    """Return the temporaries of encoding the prompts of a batch by T5.

    For each prompt the logits of all heads in float32, and two hidden layers of the MLP in float32;
    once the position bias, and two matrices, which are copied out of their stack.
    """
    logits = 4 * t5.heads * demand.tokens**2
    of_prompt = logits + 8 * demand.tokens * t5.mlp_width
    return demand.rows * of_prompt + logits + 2 * demand.itemsize * t5.width * t5.mlp_width


def denoise_bytes(
    demand: Demand, flux: FluxConfig | ChromaConfig, *, plain_attention: bool, eight_bits: bool
) -> int:
    """Return the temporaries of denoising a batch.

    Of a single block: the fused projection of all tokens, what the last product takes, and two
    copies of the tokens. While the modulations are computed, before the first step: the matrices of
    a double block's.

    **Arguments:** `plain_attention`: whether attention is xla_chunked. `eight_bits`: whether
    products are of 8 bits, whose operands and float32 results are written too.
    """
    width, size = flux.width, demand.itemsize
    rows = demand.rows * demand.conditions
    of_token = size * (6 * width + 2 * flux.mlp_width)
    if eight_bits:
        of_token += 4 * 3 * width
    if plain_attention:
        of_token += 4 * width
    tokens = rows * demand.sequence * of_token
    residuals = size * rows * demand.img_tokens * width * demand.added.residuals
    beside = 0
    if plain_attention:  # logits of a chunk, and the weights of these
        beside = 2 * min(_CHUNK_BYTES, 4 * demand.sequence**2)
    once = 12 * size * width**2
    return rows * modulation_bytes(demand, flux) + max(tokens + residuals + beside, once)


def decode_bytes(demand: Demand, vae: VaeConfig, memory: float | None = None) -> int:
    """Return the temporaries of decoding: images one after another, and all of them in float32.

    Of one image, inputs and outputs of the convolutions at its full size, or what its strips need.

    **Arguments:** `memory`: bytes from which on the VAE is run in strips; None for never.
    """
    images = 2 * 4 * 3 * demand.rows * demand.pixels
    in_strips = _bytes_in_strips(demand, vae, memory)
    if in_strips is not None:
        return in_strips + images
    return 6 * demand.itemsize * vae.channels[0] * demand.pixels + images


def encode_bytes(demand: Demand, vae: VaeConfig, memory: float | None = None) -> int:
    """Return the temporaries of encoding images, one after another. `memory`: as for decoding."""
    images = 4 * 3 * demand.rows * demand.pixels
    in_strips = _bytes_in_strips(demand, vae, memory)
    if in_strips is not None:
        return in_strips + images
    return 3 * demand.itemsize * vae.channels[0] * demand.pixels + images


def _bytes_in_strips(demand: Demand, vae: VaeConfig, memory: float | None) -> int | None:
    """Return what an image in strips needs; None where it is run whole."""
    if memory is None:
        return None
    height, width = demand.height, demand.width
    strips = choose_strips(vae, height, width, dtype=demand.dtype, memory=memory)
    if strips is None:
        return None
    rows, columns = height // vae.factor, width // vae.factor
    return round(strips_bytes(vae, rows, columns, demand.itemsize, strips))


def least_bytes(demand: Demand, configs: Configs) -> dict[str, int]:
    """Return the least bytes that each stage needs on one device, beside the weights.

    They are lower bounds: the arrays that must exist together, without what a compiler adds.

    - encoding: T5's position bias, [heads, tokens, tokens] in float32, and two hidden layers of its
      MLP.
    - denoising: each block's fused projection, [tokens, 3 width + MLP], the modulations of all
      steps, and the residuals of ControlNets.
    - decoding: the attention's input, keys and values, at the latent's resolution; the images in
      float32. What is larger can be run in strips.
    """
    t5, flux, vae = configs
    size = demand.itemsize
    bias = 4 * t5.heads * demand.tokens**2
    tokens = demand.rows * demand.sequence * (3 * flux.width + flux.mlp_width)
    residuals = demand.rows * demand.img_tokens * flux.width * demand.added.residuals
    return {
        "encoding": bias + 2 * size * demand.rows * demand.tokens * t5.mlp_width,
        "denoising": size * (tokens + residuals) + modulation_bytes(demand, flux),
        "decoding": 3 * size * demand.pixels // vae.factor**2 * vae.channels[-1]
        + 4 * demand.rows * demand.pixels * 3,
    }
