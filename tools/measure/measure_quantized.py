"""Print what 8 bits cost the tiny model, as docs/performance.md has it: the velocity's relative error, how far images are,
and how many held-out prompts still come out right.

Transformer and T5 are rounded; the images of 8 bits are compared with those of float32 from the same noise.
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
from evaluate_tiny import generate, held_out_scenes, score  # noqa: E402 (found by the line above)

SIZE = 128


@jax.jit
def velocities(flux: fluxjax.Flux, noise: jax.Array, text: TextStates, t: jax.Array) -> jax.Array:
    """Return the velocity of each prompt at time t."""
    ids = image_ids(SIZE, SIZE)

    def one(x: jax.Array, text: TextStates) -> jax.Array:
        return flux(x, t, txt=text.txt, vec=text.vec, img_ids=ids, guidance=jnp.float32(3.5))

    return jax.vmap(one)(noise, text)


def velocity_error(models: fluxjax.Models, plain: fluxjax.Models, prompts: list[str]) -> float:
    """Return the relative error of the velocity at pure noise and on the way, each network with its own text."""
    ids = prompt_ids(plain.tokenizers, prompts, max_length=plain.defaults.max_length)
    noise = jnp.stack(
        [pack_latents(initial_noise(jax.random.key(i), SIZE, SIZE)) for i in range(len(prompts))]
    )
    errors = []
    for t in (1.0, 0.75, 0.5, 0.25):
        found, expected = (
            velocities(
                one.flux,
                noise,
                encode_text(one.clip, one.t5, ids, dtype=jnp.float32),
                jnp.float32(t),
            )
            for one in (models, plain)
        )
        errors.append(float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)))
    return float(np.mean(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="(default: %(default)s)")
    options = parser.parse_args()
    plain = fluxjax.load_models("tiny", dtype="float32")
    scenes, prompts = zip(*held_out_scenes(options.prompts), strict=True)
    expected = generate(plain, list(prompts), steps=20, guidance=3.5)
    print("| weights | velocity's relative error | PSNR of the images, dB | prompts right, % |")
    print("| --- | --- | --- | --- |")
    print(f"| float32 | 0 | | {score(expected, list(scenes))['all']:.1f} |", flush=True)
    for name in EIGHT_BITS:
        models = plain._replace(
            flux=fluxjax.quantize(plain.flux, name), t5=fluxjax.quantize(plain.t5, name)
        )
        images = generate(models, list(prompts), steps=20, guidance=3.5)
        psnr = np.mean(
            [
                10 * np.log10(4 / np.mean((a - b) ** 2))
                for a, b in zip(images, expected, strict=True)
            ]
        )
        error = velocity_error(models, plain, list(prompts[:16]))
        print(
            f"| {name} | {error:.2g} | {psnr:.1f} | {score(images, list(scenes))['all']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
