"""A ninth shape and a tenth colour for the tiny model: images to train it on, and a measure.

    python tools/tiny/new_words.py write words
    fluxjax train tools/tiny/new_words.toml
    python tools/tiny/new_words.py score words-tuned

The model has never seen a crescent, nor an object that is lime. Half of the images have neither, so
that what it knows is kept.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import scenes
from evaluate_tiny import generate
from scenes import Scene, Thing, caption, check, random_scene, render

import fluxjax
from fluxjax.generate.image import write_png

SHAPE, COLOR = "crescent", "lime"
LIME = (170, 240, 40)
KINDS = ("crescent", "lime", "both", "old")


def _crescent(points: int = 48) -> np.ndarray:
    """A disc without another one that lies to its right: its outer and its inner arc."""
    shift, inner = 0.55, 0.8
    # Where both circles meet, seen from either center.
    meet = (1 + shift**2 - inner**2) / (2 * shift)
    outer_angle = np.arccos(meet)
    inner_angle = np.arctan2(np.sin(outer_angle), meet - shift)
    outer = np.linspace(outer_angle, 2 * np.pi - outer_angle, points)
    back = np.linspace(2 * np.pi - inner_angle, inner_angle, points)
    arcs = [
        np.stack([np.cos(outer), np.sin(outer)], -1),
        inner * np.stack([np.cos(back), np.sin(back)], -1) + (shift, 0),
    ]
    return np.concatenate(arcs) + np.array([0.2, 0.0])


def extend_scenes() -> None:
    """Add the shape and the colour to those that scenes are drawn and read with."""
    scenes.SHAPES[SHAPE] = ([_crescent()], [])
    for palette in (scenes.COLORS, scenes.BACKGROUNDS):
        palette[COLOR] = LIME
    scenes._NAMES[:] = list(scenes.BACKGROUNDS)
    scenes._PALETTE = np.float32(list(scenes.BACKGROUNDS.values()))


def scene_of(kind: str, rng: np.random.Generator) -> Scene:
    """Return a scene with the new words of a kind in its first object, and with none elsewhere."""
    while True:
        scene = random_scene(rng)
        words = [word for thing in scene.things for word in (thing.shape, thing.color)]
        if {SHAPE, COLOR} & {*words, scene.background}:
            continue
        first, *rest = scene.things
        shape = SHAPE if kind in ("crescent", "both") else first.shape
        color = COLOR if kind in ("lime", "both") else first.color
        return Scene(scene.background, (Thing(first.size, color, shape), *rest), scene.relation)


def write_examples(folder: Path, count: int, seed: int = 0) -> None:
    """Write captioned images: a sixth of each kind with new words, and half without."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    order = ("old", "crescent", "old", "lime", "old", "both")
    written = 0
    while written < count:
        scene = scene_of(order[written % len(order)], rng)
        if scene.held_out:
            continue
        write_png(render(scene, 128, 128, rng), folder / f"{written:03d}.png")
        (folder / f"{written:03d}.txt").write_text(caption(scene, rng) + "\n")
        written += 1


def score(models: fluxjax.Models, count: int, seed: int = 1) -> dict[str, dict[str, float]]:
    """Return the percentage of held-out scenes that are drawn right, by kind and attribute."""
    found = {}
    for kind in KINDS:
        rng, pairs = np.random.default_rng((seed, *kind.encode())), []
        while len(pairs) < count:
            scene = scene_of(kind, rng)
            if scene.held_out:
                pairs.append((scene, caption(scene, rng)))
        texts = [text for _, text in pairs]
        defaults = models.defaults
        images = generate(models, texts, steps=defaults.steps, guidance=defaults.guidance)
        verdicts = [check(image, scene) for image, (scene, _) in zip(images, pairs, strict=True)]
        found[kind] = {
            name: 100 * float(np.mean([one[name] for one in verdicts]))
            for name in ("shape", "color", "all")
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("write", "score"))
    parser.add_argument("path", help="the folder of the images, or the model that is scored")
    parser.add_argument("--count", type=int, default=200, help="images, or prompts of each kind")
    options = parser.parse_args()
    extend_scenes()
    if options.action == "write":
        write_examples(Path(options.path), options.count)
    else:
        models = fluxjax.load_models(options.path, dtype="float32")
        print(json.dumps(score(models, options.count), indent=2))


if __name__ == "__main__":
    main()
