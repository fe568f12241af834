"""Score the tiny model's style adapters on held-out prompts, scale by scale."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from evaluate_tiny import generate, grid, held_out_scenes
from scenes import Scene
from styles import STYLES, adheres, distance, lacks

import fluxjax
from fluxjax.checkpoint.shipped import tiny_folder

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = "a large red star above a small blue ring on a beige background"


def prompts_without(style: str, count: int) -> list[tuple[Scene, str]]:
    """Return held-out scenes in which nothing has the style yet, with a caption of each."""
    return [pair for pair in held_out_scenes(4 * count, seed=3) if lacks(pair[0], style)][:count]


def adapted(
    models: fluxjax.Models, paths: Sequence[Path], scales: Sequence[float]
) -> fluxjax.Models:
    """Return the models with adapters merged into the transformer."""
    loras = [fluxjax.read_lora(path) for path in paths]
    return models._replace(flux=fluxjax.merge(models.flux, loras, list(scales)))


def score(
    models: fluxjax.Models, path: Path, style: str, count: int, scales: Sequence[float] = SCALES
) -> dict:
    """Return how well an adapter changes the style and keeps the scene.

    **Returns:** "distance": the mean distance from the style, by scale. At the last of the scales,
    "moved": the percentage of images whose distance is less than half of that at the first scale;
    "kept": the percentage of images with the right shapes and relation.
    """
    pairs = prompts_without(style, count)
    scenes, texts = [scene for scene, _ in pairs], [text for _, text in pairs]
    distances = []
    for scale in scales:
        drawn = adapted(models, [path], [scale])
        images = generate(
            drawn, texts, steps=models.defaults.steps, guidance=models.defaults.guidance
        )
        distances.append([distance(image, style) for image in images])
    moved = np.array(distances[-1]) < 0.5 * np.array(distances[0])
    kept = [adheres(image, scene) for image, scene in zip(images, scenes, strict=True)]
    by_scale = {
        str(scale): float(np.mean(row)) for scale, row in zip(scales, distances, strict=True)
    }
    return {
        "moved": 100 * float(moved.mean()),
        "kept": 100 * float(np.mean(kept)),
        "distance": by_scale,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="tiny", help="the model that they are merged into (default: %(default)s)"
    )
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=SCALES,
        help="the last one is scored (default: 0 to 1)",
    )
    parser.add_argument(
        "--loras", type=Path, default=tiny_folder() / "loras", help="folder of the adapters"
    )
    parser.add_argument(
        "--prompts", type=int, default=100, help="held-out prompts (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, help="write a PNG: no adapter, each one, both")
    options = parser.parse_args()
    models = fluxjax.load_models(options.model, dtype="float32")
    paths = {style: options.loras / f"{style}.safetensors" for style in STYLES}
    for style, path in paths.items():
        print(
            style,
            json.dumps(score(models, path, style, options.prompts, options.scales)),
            flush=True,
        )
    if options.picture:
        chosen = ([], ["kraft"], ["chalk"], ["kraft", "chalk"])
        drawn = [
            adapted(models, [paths[style] for style in styles], [1.0] * len(styles))
            for styles in chosen
        ]
        images = [
            generate(one, [SHOWN], steps=one.defaults.steps, guidance=one.defaults.guidance)[0]
            for one in drawn
        ]
        grid(np.stack(images), len(images)).save(options.picture)


if __name__ == "__main__":
    main()
