"""Score the tiny model's adapters: fill, edges, kontext, controlnet and redux.

Scenes are held out from training. Their objects lie where the base model puts them, or with
`--anywhere` at random places. An analytic checker reads the drawn images back. Results are JSON
lines on standard output.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from adapter_examples import Examples, make_examples
from evaluate_tiny import grid
from placed import EDITS, SIZE, drawn
from render_batch import edge_picture, gray_picture
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


def kept_scores(errors: list[np.ndarray], limits: list[np.ndarray]) -> dict[str, float]:
    """Return how close the kept pixels are to the original picture, in dB.

    There are two numbers: the mean of the scenes' PSNRs, and the PSNR of the pixels of all scenes
    together, which depends mostly on the worst scenes. Scenes without kept pixels are left out.

    **Arguments:** `errors`: for each scene, drawn minus original at the kept pixels. `limits`: the
    same after the original has only been encoded and decoded by the VAE.
    """
    scores = {}
    for name, parts in (("kept", errors), ("vae", limits)):
        of_scenes = [psnr(part) for part in parts if part.size]
        scores[f"{name}_psnr_db"] = round(float(np.mean(of_scenes)), 2)
        scores[f"{name}_psnr_of_all_pixels_db"] = round(psnr(np.concatenate(parts)), 2)
    return scores


def percent(met: list[bool]) -> float:
    """Return the share of what is true, in percent."""
    return round(100 * float(np.mean(met)), 1)


def through_vae(vae: fluxjax.Vae, image: np.ndarray) -> np.ndarray:
    """Return an image after encoding and decoding."""
    latents = fluxjax.encode(vae, image[None], dtype=jnp.float32)
    return np.asarray(fluxjax.decode(vae, latents, dtype=jnp.float32)[0])


class Setup(NamedTuple):
    """What is scored: the base, the folder of the adapters, and the held-out scenes."""

    models: fluxjax.Models
    folder: Path
    count: int
    canonical: float
    guidance: float

    def examples(self, kind: str) -> Examples:
        """Return scenes of a kind of adapter."""
        return make_examples(kind, self.count, seed=9, held_out=True, canonical=self.canonical)

    def with_lora(self, name: str) -> fluxjax.Models:
        """Return the models with an adapter merged."""
        lora = fluxjax.read_lora(self.folder / "loras" / f"{name}.safetensors")
        return self.models._replace(flux=fluxjax.merge(self.models.flux, [lora], [1.0]))


Score = tuple[dict, np.ndarray]
"""The numbers, and for each scene a row of images, [scenes, images, SIZE, SIZE, 3]."""


def score_fill(setup: Setup) -> Score:
    """Return the scores of Fill beside the base model's inpainting.

    "kept_psnr_db" is measured before the kept pixels are pasted: through the VAE.
    """
    models, adapted = setup.models, setup.with_lora("fill")
    examples = setup.examples("fill")
    met, met_base, errors, limits, pictures = [], [], [], [], []
    for row, (target, prompt) in enumerate(zip(examples.targets, examples.prompts, strict=True)):
        image, mask = drawn(target), hidden_by(examples, row)
        condition = generate.fill_condition(models.vae, image, mask, dtype=jnp.float32)
        raw = draw(adapted, prompt, row, setup.guidance, conditions=(condition,))
        filled = np.where(mask[..., None] == 1, raw, image)
        repaint = generate.Repaint(strength=1.0, mask=mask)
        key = jax.random.fold_in(jax.random.key(0), row)
        base = generate.image_to_image(models, image, prompt, key=key, repaint=repaint)[0]
        met.append(check(filled, target.scene)["all"])
        met_base.append(check(np.asarray(base), target.scene)["all"])
        seen = mask == 0
        errors.append(raw[seen] - image[seen])
        limits.append(through_vae(models.vae, image)[seen] - image[seen])
        hidden = np.where(mask[..., None] == 1, 0, image)
        pictures.append([image, hidden, filled, np.asarray(base)])
    scores = {
        "adherence_percent": percent(met),
        "inpainting_percent": percent(met_base),
        **kept_scores(errors, limits),
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


def score_following(
    setup: Setup, draw_followed: Callable, picture_of: Callable, kind: str
) -> Score:
    """Return how well images follow a picture made of a scene, beside drawing without it.

    **Arguments:** `draw_followed`: (picture, prompt, row) -> an image that follows the picture.
    `picture_of`: of the scene's image. `kind`: of the examples.
    """
    examples = setup.examples(kind)
    met, met_base, matches, base_matches, pictures = [], [], [], [], []
    for row, (target, prompt) in enumerate(zip(examples.targets, examples.prompts, strict=True)):
        image = drawn(target)
        picture = np.asarray(picture_of(jnp.asarray(image)), np.float32)
        edges = np.asarray(edge_picture(jnp.asarray(image)))
        followed = draw_followed(picture, prompt, row)
        base = draw(setup.models, prompt, row, 3.5)
        met.append(check(followed, target.scene)["all"])
        met_base.append(check(base, target.scene)["all"])
        matches.append(edge_match(followed, edges))
        base_matches.append(edge_match(base, edges))
        pictures.append([image, picture, followed, base])
    recall, precision = np.round(100 * np.mean(matches, 0), 1).tolist()
    base_recall, base_precision = np.round(100 * np.mean(base_matches, 0), 1).tolist()
    scores = {
        "adherence_percent": percent(met),
        "without_adherence_percent": percent(met_base),
        "edges_followed_percent": recall,
        "own_edges_percent": round(100 - precision, 1),
        "without_followed_percent": base_recall,
        "without_own_percent": round(100 - base_precision, 1),
    }
    return scores, np.array(pictures)


def score_edges(setup: Setup) -> Score:
    """Return the scores of the edges' adapter."""
    adapted = setup.with_lora("edges")

    def followed(edges: np.ndarray, prompt: str, row: int) -> np.ndarray:
        condition = generate.control_condition(adapted.vae, edges, dtype=jnp.float32)
        return draw(adapted, prompt, row, setup.guidance, conditions=(condition,))

    return score_following(setup, followed, edge_picture, "edges")


def score_controlnet(setup: Setup) -> Score:
    """Return the scores of the ControlNet, which follows a gray picture."""
    models = setup.models
    controlnet = generate.load_controlnet(setup.folder / "controlnet", dtype="float32")
    settings = generate.ControlSettings(scale=1.0)

    def followed(picture: np.ndarray, prompt: str, row: int) -> np.ndarray:
        condition = generate.controlnet_condition(
            controlnet, models.vae, picture, settings, dtype=jnp.float32
        )
        return draw(models, prompt, row, setup.guidance, conditions=(condition,))

    return score_following(setup, followed, gray_picture, "controlnet")


def score_kontext(setup: Setup) -> Score:
    """Return how well instructions are followed, and what is left as it was.

    "kept_psnr_db" is of the pixels that the instruction leaves as they are.
    """
    models, adapted = setup.models, setup.with_lora("kontext")
    examples = setup.examples("kontext")
    met, errors, limits, pictures = defaultdict(list), [], [], []
    for row, (target, prompt) in enumerate(zip(examples.targets, examples.prompts, strict=True)):
        before, after = drawn(examples.sources[row]), drawn(target)
        condition = generate.kontext_condition(models.vae, [before], dtype=jnp.float32)
        edited = draw(adapted, prompt, row, setup.guidance, conditions=(condition,))
        met[instruction_kind(prompt)].append(check(edited, target.scene)["all"])
        same = np.abs(before - after).max(-1) == 0
        errors.append(edited[same] - before[same])
        limits.append(through_vae(models.vae, before)[same] - before[same])
        pictures.append([before, after, edited])
    scores = {
        "adherence_percent": percent([one for kind in met.values() for one in kind]),
        "by_instruction_percent": {kind: percent(met[kind]) for kind in EDITS if kind in met},
        **kept_scores(errors, limits),
    }
    return scores, np.array(pictures)


def instruction_kind(prompt: str) -> str:
    """Return which of `EDITS` an instruction is."""
    verb = prompt.split()[0]
    if verb in ("remove", "move", "add", "swap"):
        return verb
    if verb == "turn":
        return "reshape"
    if prompt.startswith("make the background"):
        return "background"
    return "resize" if prompt.split()[-1] in ("small", "large") else "recolor"


def score_redux(setup: Setup) -> Score:
    """Return how well images show what a picture shows, and with a prompt, what it changes."""
    models, examples = setup.with_lora("redux"), setup.examples("redux")
    siglip = generate.load_siglip(setup.folder / "image_encoder", dtype="float32")
    redux = generate.load_redux(setup.folder / "image_embedder", dtype="float32")
    met, pictures = defaultdict(list), []
    for row, (target, prompt) in enumerate(zip(examples.targets, examples.prompts, strict=True)):
        source = drawn(examples.sources[row])
        tokens = generate.redux_tokens(siglip, redux, [source], dtype=jnp.float32)
        condition = generate.redux_condition(tokens)
        image = draw(models, prompt, row, setup.guidance, conditions=(condition,))
        changed = target.scene != examples.sources[row].scene
        met["changed" if changed else "same"].append(check(image, target.scene)["all"])
        pictures.append([source, image])
    scores = {
        "adherence_percent": percent(met["same"]),
        "with_prompt_percent": percent(met["changed"]),
        "scenes_with_prompt": len(met["changed"]),
    }
    return scores, np.array(pictures)


SCORES: dict[str, Callable[[Setup], Score]] = {
    "fill": score_fill,
    "edges": score_edges,
    "kontext": score_kontext,
    "controlnet": score_controlnet,
    "redux": score_redux,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", nargs="+", choices=SCORES, default=[*SCORES])
    parser.add_argument("--folder", type=Path, default=tiny_folder())
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--anywhere", action="store_true", help="objects at random places")
    parser.add_argument("--guidance", type=float, default=1.0, help="distilled, of the adapter")
    parser.add_argument("--picture", type=Path, help="folder for a PNG of each adapter")
    parser.add_argument("--shown", type=int, default=6, help="scenes in a picture")
    options = parser.parse_args()
    models = fluxjax.load_models("tiny", dtype="float32")
    canonical = 0.0 if options.anywhere else 1.0
    setup = Setup(models, options.folder, options.scenes, canonical, options.guidance)
    for name in options.adapters:
        scores, pictures = SCORES[name](setup)
        places = "anywhere" if options.anywhere else "known"
        head = {"adapter": name, "scenes": setup.count, "places": places}
        print(json.dumps({**head, "guidance": setup.guidance, **scores}), flush=True)
        if options.picture is not None:
            options.picture.mkdir(parents=True, exist_ok=True)
            rows = pictures[: options.shown].swapaxes(0, 1)
            image = grid(rows.reshape(-1, *rows.shape[2:]), len(rows[0]))
            image.save(options.picture / f"{name}.png")


if __name__ == "__main__":
    main()
