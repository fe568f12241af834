"""The stages of `fluxjax generate` that draw images: denoising and decoding, a batch at once."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from fluxjax.cli.image_groups import ImageGroup
from fluxjax.cli.loaded_networks import LoadedNetworks
from fluxjax.cli.progress import Clock
from fluxjax.cli.request import Request
from fluxjax.cli.starts import StartImage
from fluxjax.cli.text_stages import EncodedPrompts
from fluxjax.generate.autoencode import encode
from fluxjax.generate.draw import DenoisedBatch, decode_batch, denoise_batch
from fluxjax.generate.image_batch import ImageBatch, Recipe
from fluxjax.generate.image_to_image import begin_from_images
from fluxjax.generate.latents import keys_of_steps, noise_batch, seed_key, step_keys
from fluxjax.generate.prompt_batch import prompt_batch
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Bool


class DenoisedGroup(NamedTuple):
    """A group of images that are denoised and not decoded.

    `finite_prompts`: which of its encoded prompts are finite. `starts`: what each image was drawn
    from, or None.
    """

    batch: DenoisedBatch
    finite_prompts: np.ndarray
    starts: Sequence[StartImage | None]


class DrawnImages(NamedTuple):
    """Drawn images on this host.

    `lost`: for each, the first stage after which it is not finite, or None. `reused`: the number of
    evaluations of the network that a step cache skipped.
    """

    images: list[np.ndarray]
    lost: list[str | None]
    reused: int


class ImageStages(NamedTuple):
    """Draws groups of images; the clock times each stage.

    `request`: of the run, for what its groups share. Each has its own for its size and its steps.
    """

    clock: Clock
    request: Request

    def denoise(
        self,
        networks: LoadedNetworks,
        prompts: EncodedPrompts,
        group: ImageGroup,
        seeds: Sequence[tuple[int, int]],
        starts: Sequence[StartImage | None],
    ) -> DenoisedGroup:
        """Denoise a group.

        **Arguments:** `prompts`: one for each image. `seeds`: the seed and the number of each
        image. `starts`: the images that are drawn again, or None for each.
        """
        request = group.request
        batch = _batch_from_noise(networks, prompts, request, seeds)
        recipe = request.recipe
        if group.facts is not None:
            loaded = [start for start in starts if start is not None]
            batch, recipe = self._begin(networks, batch, group, seeds, loaded)
        denoised = denoise_batch(
            networks.flux,
            networks.vae,
            batch,
            recipe,
            dtype=request.dtype,
            mesh=request.load.mesh,
            hooks=self.clock,
        )
        return DenoisedGroup(denoised, on_host(finite_rows(prompts)), starts)

    def _begin(
        self,
        networks: LoadedNetworks,
        batch: ImageBatch,
        group: ImageGroup,
        seeds: Sequence[tuple[int, int]],
        starts: Sequence[StartImage],
    ) -> tuple[ImageBatch, Recipe]:
        """Return the batch that begins with images, and its recipe."""
        assert group.facts is not None
        images = jnp.stack([start.padded_image() for start in starts])
        latents = self.clock.run(
            "encode",
            encode,
            networks.vae,
            images,
            dtype=self.request.dtype,
            mesh=self.request.load.mesh,
        )
        cells = [mask for mask in (start.cells() for start in starts) if mask is not None]
        keys = [keys_of_steps(seed_key(seed), [number]) for seed, number in seeds]
        return begin_from_images(
            batch,
            group.request.recipe,
            latents,
            group.facts.repaint,
            cells=jnp.stack(cells) if cells else None,
            keys=jnp.concatenate(keys),
        )

    def decode(self, vae: Vae, group: DenoisedGroup) -> DrawnImages:
        """Decode a group, and look which of its images are finite."""
        request = self.request
        drawn = decode_batch(
            vae,
            group.batch,
            dtype=request.dtype,
            mesh=request.load.mesh,
            hooks=self.clock,
        )
        images = on_host(drawn.images)
        finished = []
        for image, start in zip(images, group.starts, strict=False):
            finished.append(image if start is None else start.finish(image))
        lost = _lost_after(group, images, request.steps)
        reused = int(on_host(group.batch.reused))
        return DrawnImages(finished, lost, reused)


def _lost_after(group: DenoisedGroup, images: np.ndarray, steps: int) -> list[str | None]:
    """Return for each image the first stage after which it is not finite, or None.

    **Arguments:** `images`: decoded. `steps`: the number that the stage of a step is said with.
    """
    finite = {
        "the text encoders": group.finite_prompts,
        "denoising": on_host(finite_rows(group.batch.latents)),
        "decoding": np.isfinite(images).reshape(len(images), -1).all(1),
    }
    finite_steps = on_host(group.batch.finite_steps)
    lost = []
    for row in range(len(images)):
        stage = next((name for name, rows in finite.items() if not rows[row]), None)
        if stage == "denoising":
            stage = f"denoising (step {finite_steps[row] + 1} of {steps})"
        lost.append(stage)
    return lost


def _batch_from_noise(
    networks: LoadedNetworks,
    prompts: EncodedPrompts,
    request: Request,
    seeds: Sequence[tuple[int, int]],
) -> ImageBatch:
    """Return the batch that begins with the noise of each image at t = 1."""
    size = request.height, request.width
    channels = networks.vae.config.latent_channels
    noise, keys = [], []
    for seed, number in seeds:
        key = seed_key(seed)
        noise.append(noise_batch(key, [number], *size, channels=channels))
        image_keys = step_keys(key, [number], request.recipe.step)
        if image_keys is not None:
            keys.append(image_keys)
    times = request.recipe.times
    return prompt_batch(
        prompts.positive,
        prompts.negative,
        noise=jnp.concatenate(noise),
        keys=jnp.concatenate(keys) if keys else None,
        distilled=networks.guidance,
        conditions=[of_size(*size).for_times(times) for of_size in networks.conditions],
    )


def on_host(x: Array) -> np.ndarray:
    """Return an array that may lie on the devices of several processes."""
    if not x.is_fully_addressable:
        x = process_allgather(x, tiled=True)
    return np.asarray(x)


@jax.jit
def finite_rows(tree: object) -> Bool[Array, " rows"]:
    """Return for each row of a pytree of arrays whether all its numbers are finite."""
    rows = [jnp.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(rows).all(0)


def not_finite_problem(stage: str) -> str:
    """Return what an error says of an image that is not finite. **Arguments:** `stage`: after
    which."""
    return (
        f"is not finite after {stage}, and is not written. If it is float16 that overflows, leave "
        "out --dtype; else look at the weights and adapters."
    )
