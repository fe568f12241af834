"""Measure what 8-bit weights cost the tiny model, as the table of docs/performance.md.

For each 8-bit format: the relative error of the velocity, the PSNR of the images, and how many
held-out prompts still come out right. The transformer and T5 are rounded; their images are compared
with those of float32 weights from the same noise.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import fluxjax
from fluxjax.generate.latents import image_ids, initial_noise, pack_latents
from fluxjax.generate.text import TextStates, encode_text, prompt_ids
from fluxjax.nets.quantized import EIGHT_BITS

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny"))
from evaluate_tiny import generate, held_out_scenes, score  # found by the line above

SIZE = 128
"""Pixels along a side of the images."""
TIMES = (1.0, 0.75, 0.5, 0.25)
"""Times at which the velocities are compared."""
VELOCITY_PROMPTS = 16
"""Prompts for which the velocities are compared."""


@jax.jit
def velocities(flux: fluxjax.Flux, noise: jax.Array, states: TextStates, t: jax.Array) -> jax.Array:
    """Return the velocity of each prompt at time t."""
    ids = image_ids(SIZE, SIZE)

    def velocity(x: jax.Array, states: TextStates) -> jax.Array:
        guidance = jnp.float32(3.5)
        return flux(x, t, txt=states.txt, vec=states.vec, img_ids=ids, guidance=guidance)

    return jax.vmap(velocity)(noise, states)


def velocity_error(models: fluxjax.Models, reference: fluxjax.Models, prompts: list[str]) -> float:
    """Return the relative error of the velocity, the mean over `TIMES`.

    Each model encodes the prompts itself, so T5's error counts too.
    """
    ids = prompt_ids(reference.tokenizers, prompts, max_length=reference.defaults.max_length)
    packed = []
    for number in range(len(prompts)):
        packed.append(pack_latents(initial_noise(jax.random.key(number), SIZE, SIZE)))
    noise = jnp.stack(packed)

    def velocities_of(models: fluxjax.Models, t: float) -> jax.Array:
        states = encode_text(models.clip, models.t5, ids, dtype=jnp.float32)
        return velocities(models.flux, noise, states, jnp.float32(t))

    errors = []
    for t in TIMES:
        expected = velocities_of(reference, t)
        difference = velocities_of(models, t) - expected
        errors.append(float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected)))
    return float(np.mean(errors))


def mean_psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean over images in [-1, 1] of their PSNR, in dB."""
    values = []
    for image, expected in zip(images, reference, strict=True):
        values.append(10 * np.log10(4 / np.mean((image - expected) ** 2)))
    return float(np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=int, default=200, help="held-out prompts (default: %(default)s)"
    )
    options = parser.parse_args()
    plain = fluxjax.load_models("tiny", dtype="float32")
    pairs = held_out_scenes(options.prompts)
    scenes, prompts = [scene for scene, _ in pairs], [prompt for _, prompt in pairs]
    expected = generate(plain, prompts, steps=20, guidance=3.5)
    print("| weights | velocity's relative error | PSNR of the images, dB | prompts right, % |")
    print("| --- | --- | --- | --- |")
    print(f"| float32 | 0 | | {score(expected, scenes)['all']:.1f} |", flush=True)
    for name in EIGHT_BITS:
        flux, t5 = fluxjax.quantize(plain.flux, name), fluxjax.quantize(plain.t5, name)
        models = plain._replace(flux=flux, t5=t5)
        images = generate(models, prompts, steps=20, guidance=3.5)
        psnr = mean_psnr(images, expected)
        error = velocity_error(models, plain, prompts[:VELOCITY_PROMPTS])
        right = score(images, scenes)["all"]
        print(f"| {name} | {error:.2g} | {psnr:.1f} | {right:.1f} |", flush=True)


if __name__ == "__main__":
    main()
