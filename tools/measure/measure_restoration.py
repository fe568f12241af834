"""Measure methods of restoration on the tiny model: error, what is kept, and diversity.

Each scene is drawn by code, degraded, and restored with its caption as the prompt. Results are JSON
lines on standard output, one for each problem and method; --each appends one for each scene to a
file as soon as it is restored, and --summarize averages the scenes of such a file.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import fluxjax
from fluxjax.flow import DDIM
from fluxjax.generate.degradations import Blurred, Hidden, Shrunk
from fluxjax.generate.image_to_image import Repaint, image_to_image
from fluxjax.generate.restore_image import Restoration, restore_image

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny"))
from evaluate_tiny import held_out_scenes  # found by the line above
from scenes import Scene, check, render

SIZE = 128
NOISE = 0.02
"""The standard deviation of the noise of a measurement, for images in [-1, 1]."""


def half_mask() -> np.ndarray:
    """Return the mask of an image whose right half is hidden."""
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[:, SIZE // 2 :] = 1
    return mask


def box_mask() -> np.ndarray:
    """Return the mask of an image whose middle, a quarter of its area, is hidden."""
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[SIZE // 4 : -SIZE // 4, SIZE // 4 : -SIZE // 4] = 1
    return mask


MASKS = {"half": half_mask, "box": box_mask}
DEGRADATIONS = {"sr4": lambda: Shrunk(4), "deblur": lambda: Blurred(2.0)}
"""Block means of 4x4 pixels, and a Gaussian blur of 2 pixels."""
MASK_METHODS = ("decoupled", "pigdm", "tmpd", "proximal", "ddnm", "flowdps", "flowchef")
PIXEL_METHODS = ("decoupled", "pigdm", "tmpd", "flowdps", "flowchef")
REPAINTING = {"inpaint": 1, "repaint": 5}
"""Methods that keep the state instead of the estimate, with their repeats."""


def problems() -> dict[str, tuple[str, ...]]:
    """Return the methods of each problem."""
    named = dict.fromkeys(MASKS, (*MASK_METHODS, *REPAINTING))
    return named | dict.fromkeys(DEGRADATIONS, PIXEL_METHODS)


def degrade(problem: str, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return what is left of an image; a mask's problem leaves all of it."""
    if problem in MASKS:
        return image
    left = measure_pixels(problem, image)
    return left + NOISE * rng.normal(size=left.shape).astype(np.float32)


def measure_pixels(problem: str, image: np.ndarray) -> np.ndarray:
    """Return what a problem of pixels leaves of an image [128, 128, 3], without noise."""
    operator = DEGRADATIONS[problem]().operator(SIZE, SIZE)
    return np.moveaxis(np.asarray(operator(jnp.moveaxis(jnp.asarray(image), -1, 0))), 0, -1)


def restorer(models: fluxjax.Models, problem: str, method: str, steps: int) -> Callable:
    """Return a function (left, prompt, key, images) -> restored images."""

    def repaint(left: np.ndarray, prompt: str, key: jax.Array, images: int) -> np.ndarray:
        settings = fluxjax.DrawSettings(steps=steps, images=images, step=DDIM(1.0))
        again = Repaint(strength=1.0, mask=MASKS[problem](), repeats=REPAINTING[method])
        return image_to_image(models, left, prompt, key=key, repaint=again, settings=settings)

    def restore(left: np.ndarray, prompt: str, key: jax.Array, images: int) -> np.ndarray:
        settings = fluxjax.DrawSettings(steps=steps, images=images)
        if problem in MASKS:
            restoration = Restoration(
                degradation=Hidden(MASKS[problem]()), noise=NOISE, method=method
            )
        else:
            restoration = Restoration(
                degradation=DEGRADATIONS[problem](), noise=NOISE, method=method, iterations=3
            )
        return restore_image(
            models, left, prompt, key=key, restoration=restoration, settings=settings
        )

    return repaint if method in REPAINTING else restore


def seen_error(problem: str, restored: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Return the difference of what is seen of a restored image from what was measured."""
    if problem in MASKS:
        return (restored - left)[MASKS[problem]() == 0]
    return measure_pixels(problem, restored) - left


def psnr(error: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of an error between images in [-1, 1], in dB."""
    return float(-10 * np.log10(np.mean(np.square(error / 2))))


def hidden_part(problem: str) -> np.ndarray:
    """Return 1 where the diversity of draws is measured."""
    return MASKS[problem]() if problem in MASKS else np.ones((SIZE, SIZE), np.float32)


def measure(
    models: fluxjax.Models, problem: str, method: str, options: argparse.Namespace
) -> dict[str, object]:
    """Restore scenes by one method; return its row."""
    restore = restorer(models, problem, method, options.steps)
    scenes: list[tuple[Scene, str]] = held_out_scenes(options.scenes)
    rng = np.random.default_rng(0)
    spread, rows = [], []
    for number, (scene, prompt) in enumerate(scenes):
        image = render(scene, SIZE, SIZE, rng)
        left = degrade(problem, image, rng)
        images = options.draws if number < options.diverse_scenes else 1
        start = time.perf_counter()
        drawn = np.asarray(restore(left, prompt, jax.random.key(number), images))
        seconds = time.perf_counter() - start
        about = {"problem": problem, "method": method, "scene": number, "steps": options.steps}
        row = {
            "adherence": bool(check(drawn[0], scene)["all"]),
            # JSON has no infinity: what is pasted back is exact.
            "seen_psnr_db": finite(psnr(seen_error(problem, drawn[0], left))),
            "psnr_db": round(psnr(drawn[0] - image), 2),
            "seconds": round(seconds, 2) if images == 1 else None,
        }
        rows.append(about | row)
        if options.each is not None:
            with options.each.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        if images > 1:
            deviations = drawn.std(0).mean(-1)[hidden_part(problem) == 1]
            spread.append(float(np.sqrt(np.mean(np.square(deviations)))))
    summary = summarize(rows)
    summary["diversity"] = round(float(np.mean(spread)), 3) if spread else None
    return summary


def finite(number: float) -> float | None:
    """Return a number in hundredths, or None for one that is not finite."""
    return round(number, 2) if np.isfinite(number) else None


def summarize(rows: list[dict]) -> dict[str, object]:
    """Return one row for those of several scenes, all of one problem and method."""
    seen = [row["seen_psnr_db"] for row in rows]
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    return {
        "problem": rows[0]["problem"],
        "method": rows[0]["method"],
        "scenes": len(rows),
        "steps": rows[0]["steps"],
        "adherence_percent": round(100 * float(np.mean([row["adherence"] for row in rows])), 1),
        "seen_psnr_db": None if None in seen else round(float(np.mean(seen)), 2),
        "psnr_db": round(float(np.mean([row["psnr_db"] for row in rows])), 2),
        "seconds": round(float(np.median(seconds)), 2) if seconds else None,
    }


def print_summaries(path: Path) -> None:
    """Print the row of each problem and method in a file of scenes."""
    groups: dict[tuple, list[dict]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        groups.setdefault((row["problem"], row["method"], row["steps"]), []).append(row)
    for rows in groups.values():
        print(json.dumps(summarize(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=problems(), default=[*problems()])
    parser.add_argument("--methods", nargs="+", help="of each problem; by default all it has")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--draws", type=int, default=8, help="of a scene, for the diversity")
    parser.add_argument("--diverse-scenes", type=int, default=10, help="scenes with many draws")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--each", type=Path, help="append a JSON line for each scene to this file")
    parser.add_argument("--summarize", type=Path, help="only average the scenes of such a file")
    options = parser.parse_args()
    if options.summarize is not None:
        print_summaries(options.summarize)
        return
    models = fluxjax.load_models("tiny", dtype="float32")
    jax.config.update("jax_default_matmul_precision", "highest")
    for problem in options.problems:
        for method in problems()[problem]:
            if options.methods is None or method in options.methods:
                print(json.dumps(measure(models, problem, method, options)), flush=True)


if __name__ == "__main__":
    main()
