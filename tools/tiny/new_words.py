"""A ninth shape and a ninth colour of objects for the tiny model, from 200 images.

    python tools/tiny/new_words.py all words
    python tools/tiny/new_words.py score words/tuned

`all` writes the images, encodes them, trains, scores the model before and after, and draws a
picture of both, in a new folder. The model has never seen a crescent, nor read the word, and knows
pink as a background only. Half of the images have neither, so that what it knows is kept. Scored
are scenes whose combination of objects, relation and background is in no training.

The VAE is not trained, and draws no colour that none of its images had: lime would be yellow.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scenes
from evaluate_tiny import generate, grid
from scenes import Scene, Thing, caption, check, random_scene, render

import fluxjax
from fluxjax.cli.main import main as run
from fluxjax.generate.image import write_png

SHAPE, COLOR = "crescent", "pink"
KINDS = ("crescent", "pink", "both", "old")
CONFIG = Path(__file__).with_suffix(".toml")
SHOWN = 3
"""Prompts of each kind in the picture: the first ones."""


def _crescent(points: int = 48) -> np.ndarray:
    """A disc without another one that lies to its right: its outer and its inner arc."""
    shift, inner = 0.7, 0.75
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
    return np.concatenate(arcs) + np.array([0.17, 0.0])


def extend_scenes() -> None:
    """Add the shape and the colour to those that scenes are drawn and read with."""
    scenes.SHAPES[SHAPE] = ([_crescent()], [])
    scenes.COLORS[COLOR] = scenes.BACKGROUNDS[COLOR]


def scene_of(kind: str, rng: np.random.Generator) -> Scene:
    """Return a scene with the new words of a kind in its first object, and with none elsewhere."""
    while True:
        scene = random_scene(rng)
        words = [word for thing in scene.things for word in (thing.shape, thing.color)]
        if {SHAPE, COLOR}.intersection(words):
            continue
        first, *rest = scene.things
        shape = SHAPE if kind in ("crescent", "both") else first.shape
        color = COLOR if kind in ("pink", "both") else first.color
        if color == scene.background:
            continue
        return Scene(scene.background, (Thing(first.size, color, shape), *rest), scene.relation)


MIXED = ("old", "crescent", "old", "pink", "old", "both")
"""The kinds of images, in turns: half of them are old."""


def write_examples(folder: Path, count: int, seed: int = 0, kinds: tuple[str, ...] = MIXED) -> None:
    """Write captioned images of some kinds in turns, none of them held out."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    while written < count:
        scene = scene_of(kinds[written % len(kinds)], rng)
        if scene.held_out:
            continue
        write_png(render(scene, 128, 128, rng), folder / f"{written:03d}.png")
        (folder / f"{written:03d}.txt").write_text(caption(scene, rng) + "\n")
        written += 1


class Drawn(NamedTuple):
    """Images that a model drew of held-out scenes of a kind."""

    scenes: list[Scene]
    images: np.ndarray


def draw_kinds(models: fluxjax.Models, count: int, seed: int = 1) -> dict[str, Drawn]:
    """Draw `count` held-out scenes of each kind, as the model is meant to be sampled."""
    drawn = {}
    for kind in KINDS:
        rng, pairs = np.random.default_rng((seed, *kind.encode())), []
        while len(pairs) < count:
            scene = scene_of(kind, rng)
            if scene.held_out:
                pairs.append((scene, caption(scene, rng)))
        texts = [text for _, text in pairs]
        defaults = models.defaults
        images = generate(models, texts, steps=defaults.steps, guidance=defaults.guidance)
        drawn[kind] = Drawn([scene for scene, _ in pairs], images)
    return drawn


def score(drawn: dict[str, Drawn]) -> dict[str, dict[str, float]]:
    """Return the percentage of scenes that are drawn right, by kind and attribute."""
    found = {}
    for kind, (asked, images) in drawn.items():
        verdicts = [check(image, scene) for image, scene in zip(images, asked, strict=True)]
        found[kind] = {
            name: 100 * float(np.mean([one[name] for one in verdicts]))
            for name in ("shape", "color", "all")
        }
    return found


def draw_model(path: str, count: int) -> dict[str, Drawn]:
    """Draw all kinds with a model, and print its scores."""
    drawn = draw_kinds(fluxjax.load_models(path, dtype="float32"), count)
    print(path, json.dumps(score(drawn), indent=2), flush=True)
    return drawn


def run_all(folder: Path, images: int, count: int) -> None:
    """Write, encode, train, score and draw, in a new folder."""
    start = time.perf_counter(), time.process_time()
    write_examples(folder / "images", images)
    data = ["--sources", str(folder / "images"), "--cache", str(folder / "encoded")]
    run(["encode", str(CONFIG), *data])
    tuned = str(folder / "tuned")
    run(["train", str(CONFIG), "--output", tuned, "--set", f"data.cache={folder / 'encoded'}"])
    minutes = (time.perf_counter() - start[0]) / 60
    busy = (time.process_time() - start[1]) / 60
    print(f"{minutes:.1f} minutes from the images to the model, {busy:.1f} of them of a CPU")
    before, after = draw_model("tiny", count), draw_model(tuned, count)
    shown: list[np.ndarray] = []
    for drawn in (before, after):
        for kind in KINDS:
            shown.extend(drawn[kind].images[:SHOWN])
    grid(np.stack(shown), SHOWN * len(KINDS)).save(folder / "before_and_after.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("all", "score"))
    parser.add_argument("path", help="the new folder of `all`, or the model that is scored")
    parser.add_argument("--images", type=int, default=200, help="to train on")
    parser.add_argument("--prompts", type=int, default=100, help="of each kind, to score")
    options = parser.parse_args()
    extend_scenes()
    if options.action == "all":
        run_all(Path(options.path).absolute(), options.images, options.prompts)
    else:
        draw_model(options.path, options.prompts)


if __name__ == "__main__":
    main()
