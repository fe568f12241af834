"""Measure what each storage of the transformer's weights costs, as the table of docs/weights.md.

For each storage: its bits, the bytes of dev, the relative error of the matrices and of the tiny
model's velocity, the PSNR of the tiny model's images against those of float32 weights from the same
noise, and how many held-out prompts come out right. Only the transformer is rounded.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from measure_quantized import VELOCITY_PROMPTS, mean_psnr, velocity_error

import fluxjax
from fluxjax.nets import Dense, decode_weights
from fluxjax.nets.packed_formats import PACKED_FORMATS
from fluxjax.nets.rounding import QUANTIZATIONS, empty_rounded, fitting_format, put_block
from fluxjax.nets.stack import block_at, is_rounded, path_name

from evaluate_tiny import generate, held_out_scenes, score  # isort: skip  (found by the import above)

GGUF = ("Q8_0", "Q4_K", "Q4_0")
CHANNELS, FACTOR = 4, 30.0
"""Input channels of each matrix that are made large, and by how much."""


def stored_as(name: str, plain: fluxjax.Flux) -> fluxjax.Flux:
    """Return the tiny transformer in a storage."""
    if name in QUANTIZATIONS:
        return fluxjax.quantize(plain, name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux.gguf"
        fluxjax.convert_weights("tiny", path, to="gguf", dtype=name, only="flux")
        return fluxjax.load_flux(path)


def matrices(flux: fluxjax.Flux) -> Iterator[np.ndarray]:
    """Yield the values of the matrices of blocks, in float32."""
    leaves = jax.tree_util.tree_leaves_with_path(
        decode_weights(flux, jnp.float32), is_leaf=lambda node: hasattr(node, "matmul")
    )
    for path, node in leaves:
        if not hasattr(node, "matmul") or not is_rounded(path_name(path)):
            continue
        value = np.asarray(node.value, np.float32)
        yield value * np.asarray(node.scale)[..., None] if hasattr(node, "scale") else value


def matrix_error(flux: fluxjax.Flux, plain: fluxjax.Flux) -> float:
    """Return the relative error of all matrices together."""
    error = size = 0.0
    for found, expected in zip(matrices(flux), matrices(plain), strict=True):
        error += float(np.sum((found - expected) ** 2))
        size += float(np.sum(expected**2))
    return float(np.sqrt(error / size))


def dev_bytes(name: str) -> float:
    """Return the bytes of dev's weights, of which 11.84 B are in matrices of blocks."""
    network = eqx.filter_eval_shape(fluxjax.Flux, fluxjax.FluxConfig.dev(), key=jax.random.key(0))
    total = 0.0
    leaves = jax.tree_util.tree_leaves_with_path(
        network, is_leaf=lambda node: isinstance(node, Dense)
    )
    for path, node in leaves:
        rounds = isinstance(node, Dense) and is_rounded(path_name(path))
        total += np.prod(node.shape) * (bits_of(name) / 8 if rounds else 2)
    return total


def bits_of(name: str) -> float:
    """Return how many bits a value of a matrix takes."""
    if name in PACKED_FORMATS:
        return PACKED_FORMATS[name].bits
    return {"float32": 32, "bfloat16": 16, "int8": 8, "fp8": 8}[name]


def outlier_errors(plain: fluxjax.Flux) -> dict[str, float]:
    """Return the relative error of a product whose rows have a few large channels, by storage.

    The matrix is the first block's `qkv`, and the rows are normal, as after its norm.
    """
    matrix = plain.double.img.qkv.weight.value[:1]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((256, matrix.shape[-1])).astype(np.float32)
    rows[:, rng.choice(matrix.shape[-1], CHANNELS, replace=False)] *= FACTOR
    expected = rows @ np.asarray(matrix[0]).T
    errors = {}
    for name in QUANTIZATIONS:
        stack = empty_rounded(matrix.shape, fitting_format(matrix.shape, name))
        weight = block_at(put_block(stack, matrix[0], 0), 0)
        found = np.asarray(weight.matmul(jnp.asarray(rows)))
        errors[name] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--storages", nargs="+", default=[*GGUF, *QUANTIZATIONS])
    options = parser.parse_args()
    plain = fluxjax.load_models("tiny", dtype="float32")
    for name, error in outlier_errors(plain.flux).items():
        print(f"{CHANNELS} channels {FACTOR:g} times as large, {name}: {error:.2g}")
    pairs = held_out_scenes(options.prompts)
    scenes, prompts = [scene for scene, _ in pairs], [prompt for _, prompt in pairs]
    print(
        "| storage | bits | dev, GB | error of matrices | of the velocity | PSNR, dB | right, % |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    expected = None
    for name in ("float32", *options.storages):
        flux = plain.flux if name == "float32" else stored_as(name, plain.flux)
        models = plain._replace(flux=flux)
        images = generate(models, prompts, steps=options.steps, guidance=3.5)
        right = score(images, scenes)["all"]
        size = f"| {name} | {bits_of(name):.3g} | {dev_bytes(name) / 1e9:.1f}"
        if expected is None:
            expected = images
            print(f"{size} | 0 | 0 | | {right:.1f} |", flush=True)
            continue
        errors = matrix_error(flux, plain.flux)
        velocity = velocity_error(models, plain, prompts[:VELOCITY_PROMPTS])
        psnr = mean_psnr(images, expected)
        print(f"{size} | {errors:.2g} | {velocity:.2g} | {psnr:.1f} | {right:.1f} |", flush=True)


if __name__ == "__main__":
    main()
