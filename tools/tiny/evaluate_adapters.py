"""Score the tiny model's adapters that read an image: fill and edges.

Scenes are held out from training, and most of their objects lie where the base model does not put
them. An analytic checker reads the drawn images back. Results are JSON lines on standard output.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from adapter_examples import Examples, make_examples
from evaluate_tiny import grid
from placed import SIZE, drawn
from render_batch import edge_picture
from scenes import check
from scipy import ndimage

import fluxjax
from fluxjax import generate
from fluxjax.checkpoint.shipped import tiny_folder

TOLERANCE = 2
"""Pixels by which an edge may be off."""


def hidden_by(examples: Examples, row: int) -> np.ndarray:
    """Return the mask of an example, [SIZE, SIZE]: 1 where the image is hidden."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    mask = np.zeros((SIZE, SIZE), np.float32)
    for is_ellipse, middle, half in zip(*(array[row] for array in examples.masks), strict=True):
        if not half.any():
            continue
        across, down = (x - middle[0]) / half[0], (y - middle[1]) / half[1]
        if is_ellipse:
            mask[across**2 + down**2 <= 1] = 1
        else:
            mask[(abs(across) <= 1) & (abs(down) <= 1)] = 1
    return mask


def draw(models: fluxjax.Models, prompt: str, row: int, guidance: float, **settings) -> np.ndarray:
    """Draw one image, the noise of which depends on the example's number."""
    options = fluxjax.DrawSettings(distilled_guidance=guidance, **settings)
    key = jax.random.fold_in(jax.random.key(0), row)
    return np.asarray(fluxjax.text_to_image(models, prompt, key=key, settings=options)[0])


def psnr(error: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of an error between images in [-1, 1], in dB."""
    return float(-10 * np.log10(np.mean(np.square(error / 2))))


def score_fill(
    models: fluxjax.Models, adapted: fluxjax.Models, count: int, guidance: float
) -> tuple[dict, np.ndarray]:
    """Return the scores of Fill beside the base model's inpainting, and the first pictures.

    "kept_psnr_db" is measured before the kept pixels are pasted: through the VAE.
    """
    examples = make_examples("fill", count, seed=9, held_out=True)
    met, met_base, errors, limits, pictures = [], [], [], [], []
    for row, (target, prompt) in enumerate(zip(examples.targets, examples.prompts, strict=True)):
        image, mask = drawn(target), hidden_by(examples, row)
        condition = generate.fill_condition(models.vae, image, mask, dtype=jnp.float32)
        raw = draw(adapted, prompt, row, guidance, conditions=(condition,))
        filled = np.where(mask[..., None] == 1, raw, image)
        repaint = generate.Repaint(strength=1.0, mask=mask)
        key = jax.random.fold_in(jax.random.key(0), row)
        base = generate.image_to_image(models, image, prompt, key=key, repaint=repaint)[0]
        met.append(check(filled, target.scene)["all"])
        met_base.append(check(np.asarray(base), target.scene)["all"])
        seen = mask == 0
        if seen.any():
            errors.append(raw[seen] - image[seen])
            through = fluxjax.encode(models.vae, image[None], dtype=jnp.float32)
            through = fluxjax.decode(models.vae, through, dtype=jnp.float32)[0]
            limits.append(np.asarray(through)[seen] - image[seen])
        hidden = np.where(mask[..., None] == 1, 0, image)
        pictures.append([image, hidden, filled, np.asarray(base)])
    scores = {
        "adapter": "fill",
        "scenes": count,
        "guidance": guidance,
        "adherence_percent": round(100 * float(np.mean(met)), 1),
        "inpainting_percent": round(100 * float(np.mean(met_base)), 1),
        "kept_psnr_db": round(psnr(np.concatenate(errors)), 2),
        "vae_psnr_db": round(psnr(np.concatenate(limits)), 2),
    }
    return scores, np.array(pictures)


def edge_match(image: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """Return the shares of a control's edges that the image has, and of the image's edges that the
    control has, within `TOLERANCE` pixels.
    """
    wanted = edges[..., 0] > 0
    found = np.asarray(edge_picture(jnp.asarray(image)))[..., 0] > 0
    near_wanted, near_found = (
        ndimage.distance_transform_edt(~there) <= TOLERANCE for there in (wanted, found)
    )
    recall = float(near_found[wanted].mean()) if wanted.any() else 1.0
    precision = float(near_wanted[found].mean()) if found.any() else 0.0
    return recall, precision


def score_edges(
    models: fluxjax.Models, adapted: fluxjax.Models, count: int, guidance: float
) -> tuple[dict, np.ndarray]:
    """Return the scores of the edges' adapter beside drawing without it, and the first pictures."""
    examples = make_examples("edges", count, seed=9, held_out=True)
    met, matches, base_matches, pictures = [], [], [], []
    for row, (target, prompt) in enumerate(zip(examples.targets, examples.prompts, strict=True)):
        image = drawn(target)
        edges = np.asarray(edge_picture(jnp.asarray(image)), np.float32)
        condition = generate.control_condition(models.vae, edges, dtype=jnp.float32)
        followed = draw(adapted, prompt, row, guidance, conditions=(condition,))
        base = draw(models, prompt, row, 3.5)
        met.append(check(followed, target.scene)["all"])
        matches.append(edge_match(followed, edges))
        base_matches.append(edge_match(base, edges))
        pictures.append([image, edges, followed, base])
    recall, precision = 100 * np.mean(matches, 0)
    base_recall, base_precision = 100 * np.mean(base_matches, 0)
    scores = {
        "adapter": "edges",
        "scenes": count,
        "guidance": guidance,
        "adherence_percent": round(100 * float(np.mean(met)), 1),
        "edges_followed_percent": round(float(recall), 1),
        "own_edges_percent": round(100 - float(precision), 1),
        "without_followed_percent": round(float(base_recall), 1),
        "without_own_percent": round(100 - float(base_precision), 1),
    }
    return scores, np.array(pictures)


SCORES = {"fill": score_fill, "edges": score_edges}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", nargs="+", choices=SCORES, default=[*SCORES])
    parser.add_argument("--folder", type=Path, default=tiny_folder() / "loras")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--guidance", type=float, default=1.0, help="distilled, of the adapter")
    parser.add_argument("--picture", type=Path, help="folder for a PNG of each adapter")
    parser.add_argument("--shown", type=int, default=6, help="scenes in a picture")
    options = parser.parse_args()
    models = fluxjax.load_models("tiny", dtype="float32")
    for name in options.adapters:
        lora = fluxjax.read_lora(options.folder / f"{name}.safetensors")
        adapted = models._replace(flux=fluxjax.merge(models.flux, [lora], [1.0]))
        scores, pictures = SCORES[name](models, adapted, options.scenes, options.guidance)
        print(json.dumps(scores), flush=True)
        if options.picture is not None:
            options.picture.mkdir(parents=True, exist_ok=True)
            rows = pictures[: options.shown].swapaxes(0, 1)
            image = grid(rows.reshape(-1, *rows.shape[2:]), len(rows[0]))
            image.save(options.picture / f"{name}.png")


if __name__ == "__main__":
    main()
