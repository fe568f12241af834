"""Score the tiny model on held-out prompts, and write the table of its model card.

Held-out prompts combine attributes in ways that were kept from training. An analytic checker reads
the objects back from each image, without a network.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import scenes as scene_module
from PIL import Image
from scenes import CHECKS, Scene, caption, check, random_scene, render

import fluxjax
from fluxjax.generate.image import to_bytes

SIZE = 128


def held_out_scenes(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Return random scenes whose attributes' combination was held out, with a caption of each."""
    rng, chosen = np.random.default_rng((2026, seed)), []
    while len(chosen) < count:
        if (scene := random_scene(rng)).held_out:
            chosen.append((scene, caption(scene, rng)))
    return chosen


def generate(
    models: fluxjax.Models, prompts: list[str], *, steps: int, guidance: float, batch: int = 50
) -> np.ndarray:
    """Draw one image of each prompt; the noise depends on the prompt's place in the list."""
    settings = fluxjax.DrawSettings(steps=steps, distilled_guidance=guidance)
    images = []
    for start in range(0, len(prompts), batch):
        mine = prompts[start : start + batch]
        key = jax.random.fold_in(jax.random.key(0), start)
        images.append(np.asarray(fluxjax.text_to_image(models, mine, key=key, settings=settings)))
    return np.concatenate(images)


def score(images: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Return the percentage of images that are right, for each attribute and for all together."""
    verdicts = [check(image, scene) for image, scene in zip(images, scenes, strict=True)]
    return {name: 100 * float(np.mean([v[name] for v in verdicts])) for name in (*CHECKS, "all")}


def checker_score(count: int) -> float:
    """Return the percentage of rendered scenes that the checker reads right.

    They have three aspect ratios.
    """
    rng = np.random.default_rng(7)
    sizes = ((SIZE, SIZE), (96, 160), (160, 96))
    scenes = [random_scene(rng) for _ in range(count)]
    right = [check(render(s, *sizes[i % 3], rng), s)["all"] for i, s in enumerate(scenes)]
    return 100 * float(np.mean(right))


def vae_scores(models: fluxjax.Models, scenes: list[Scene]) -> tuple[float, float]:
    """Return how well the VAE reconstructs rendered scenes.

    **Returns:** the PSNR in dB, of the mean squared error over all images; and the percentage that
    the checker still reads right, which is an upper bound for any transformer.
    """
    rng = np.random.default_rng(8)
    images = np.stack([render(scene, SIZE, SIZE, rng) for scene in scenes])
    trip = jax.jit(lambda vae, x: jax.lax.map(lambda one: vae.decode(vae.encode(one)), x))
    back = np.clip(trip(models.vae, images), -1, 1)
    return float(-10 * np.log10(np.mean(np.square((back - images) / 2)))), score(back, scenes)[
        "all"
    ]


def score_by_box(images: np.ndarray, scenes: list[Scene]) -> float:
    """Return the percentage right if shapes are fitted only to their bounding box.

    Versions 1 and 2 of the model were scored so.
    """
    tried, scene_module.LOST_TIPS = scene_module.LOST_TIPS, (1.0,)
    try:
        return score(images, scenes)["all"]
    finally:
        scene_module.LOST_TIPS = tried


def by_kind(images: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Return the percentage right for scenes of each relation."""
    groups = defaultdict(list)
    for image, scene in zip(images, scenes, strict=True):
        groups[scene.relation or "one object"].append(check(image, scene)["all"])
    return {name: 100 * float(np.mean(right)) for name, right in sorted(groups.items())}


def grid(images: np.ndarray, columns: int) -> Image.Image:
    """Return the images as one picture, in rows of `columns`."""
    rows = [
        np.concatenate(list(to_bytes(images[i : i + columns])), axis=1)
        for i in range(0, len(images), columns)
    ]
    return Image.fromarray(np.concatenate(rows))


def table(rows: list[tuple[int, float, dict[str, float]]]) -> str:
    """Return the scores as a Markdown table."""
    names = (*CHECKS, "all")
    lines = ["| steps | guidance | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 2)]
    for steps, guidance, scores in rows:
        lines.append(
            f"| {steps} | {guidance:g} | "
            + " | ".join(f"{scores[name]:.1f}" for name in names)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="tiny", help="a zoo name or a folder (default: %(default)s)"
    )
    parser.add_argument(
        "--prompts", type=int, default=500, help="held-out prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--default-only", action="store_true", help="score only the default steps and guidance"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for table.md, scores.json and samples.png"
    )
    options = parser.parse_args()
    models = fluxjax.load_models(options.model, dtype="float32")
    pairs = held_out_scenes(options.prompts)
    scenes, prompts = [scene for scene, _ in pairs], [text for _, text in pairs]
    default = (models.defaults.steps, models.defaults.guidance)
    settings = (
        [default] if options.default_only else [(s, g) for g in (3.5, 1.0) for s in (20, 8, 4)]
    )
    psnr, kept = vae_scores(models, scenes)
    rows, report = (
        [],
        {
            "prompts": len(prompts),
            "checker": checker_score(500),
            "vae_psnr": psnr,
            "vae_kept": kept,
        },
    )
    for steps, guidance in settings:
        images = generate(models, prompts, steps=steps, guidance=guidance)
        rows.append((steps, guidance, score(images, scenes)))
        if (steps, guidance) == default:
            report |= {"by_relation": by_kind(images, scenes)}
            samples = grid(images[:32], 8)
            report |= {"box_alone": score_by_box(images, scenes)}
    report["scores"] = [{"steps": s, "guidance": g, **scores} for s, g, scores in rows]
    print(table(rows))
    print(json.dumps({name: value for name, value in report.items() if name != "scores"}, indent=1))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "table.md").write_text(table(rows) + "\n")
        (options.output / "scores.json").write_text(json.dumps(report, indent=1) + "\n")
        samples.save(options.output / "samples.png")


if __name__ == "__main__":
    main()
