"""A ninth shape and a ninth colour of objects for the tiny model, from 200 images.

    python tools/tiny/new_words.py all words
    python tools/tiny/new_words.py score words/tuned

`all` writes the images, encodes them, trains, scores the model before and after, and draws a
picture of both, in a new folder. The model has never seen a crescent, nor read the word "moon", and
knows pink as a background only. As many examples of each step show neither, so that what it knows
is kept (prior preservation: Ruiz et al. 2022, DreamBooth, section 3.2).
Scored are scenes whose combination of objects, relation and background is in no training.

The VAE is not trained, and draws no colour that none of its images had: lime would be yellow. T5
spells a new word letter by letter; with a longer one, captions would not fit its 24 tokens.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scenes
from evaluate_tiny import generate, grid
from PIL import Image
from scenes import Scene, Thing, caption, check, random_scene, render

import fluxjax
from fluxjax.cli.main import main as run
from fluxjax.generate.image import write_png

SHAPE, COLOR = "moon", "pink"
NEW = ("moon", "pink", "both")
OLD = ("old",)
CONFIG = Path(__file__).with_suffix(".toml")
SHOWN = 6
"""New prompts in the picture, and half as many old ones: the first of each."""


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
        shape = SHAPE if kind in ("moon", "both") else first.shape
        color = COLOR if kind in ("pink", "both") else first.color
        if color == scene.background:
            continue
        return Scene(scene.background, (Thing(first.size, color, shape), *rest), scene.relation)


KEPT = 3
"""Images without the new words, for each that has them. Those come so many times as often."""


def write_examples(folder: Path, count: int, kinds: tuple[str, ...], seed: int = 0) -> list[str]:
    """Write images of some kinds in turns, none of them held out; return their lines of JSON."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    while len(lines) < count:
        scene = scene_of(kinds[len(lines) % len(kinds)], rng)
        if scene.held_out:
            continue
        path = folder / f"{len(lines):04d}.png"
        write_png(render(scene, 128, 128, rng), path)
        example = {"image": f"{folder.name}/{path.name}", "prompt": caption(scene, rng)}
        lines.append(json.dumps(example))
    return lines


class Drawn(NamedTuple):
    """Images that a model drew of held-out scenes. `kinds`: of the scenes."""

    kinds: list[str]
    scenes: list[Scene]
    images: np.ndarray


def draw_kinds(models: fluxjax.Models, kinds: tuple[str, ...], count: int, seed: int = 1) -> Drawn:
    """Draw `count` held-out scenes of kinds in turns, as the model is meant to be sampled."""
    rng = np.random.default_rng(seed)
    turns, asked, texts = [], [], []
    while len(asked) < count:
        kind = kinds[len(asked) % len(kinds)]
        scene = scene_of(kind, rng)
        if scene.held_out:
            turns.append(kind)
            asked.append(scene)
            texts.append(caption(scene, rng))
    defaults = models.defaults
    images = generate(models, texts, steps=defaults.steps, guidance=defaults.guidance)
    return Drawn(turns, asked, images)


def score(drawn: Drawn) -> dict[str, float]:
    """Return the percentage of scenes that are drawn right, in all and by kind."""
    right = [
        check(image, scene)["all"] for image, scene in zip(drawn.images, drawn.scenes, strict=True)
    ]
    found = {"all": 100 * float(np.mean(right))}
    for kind in dict.fromkeys(drawn.kinds):
        of_kind = [one for one, name in zip(right, drawn.kinds, strict=True) if name == kind]
        found[kind] = 100 * float(np.mean(of_kind))
    return found


def draw_model(path: str, count: int) -> tuple[Drawn, Drawn]:
    """Draw new and old scenes with a model, and print its scores."""
    models = fluxjax.load_models(path, dtype="float32")
    drawn = draw_kinds(models, NEW, count), draw_kinds(models, OLD, count)
    print(path, *map(json.dumps, map(score, drawn)), flush=True)
    return drawn


def picture(before: tuple[Drawn, Drawn], after: tuple[Drawn, Drawn]) -> Image.Image:
    """Return the first images of both: above before the training, below after it."""
    shown: list[np.ndarray] = []
    for new, old in (before, after):
        shown += [*new.images[:SHOWN], *old.images[: SHOWN // 2]]
    return grid(np.stack(shown), SHOWN + SHOWN // 2)


def run_all(folder: Path, images: int, count: int) -> None:
    """Write, encode, train, score and draw, in a new folder."""
    start = time.perf_counter(), time.process_time()
    lines = KEPT * write_examples(folder / "new", images, NEW)
    lines += write_examples(folder / "kept", KEPT * images, OLD, seed=2)
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")
    data = ["--sources", str(folder / "examples.jsonl"), "--cache", str(folder / "encoded")]
    run(["encode", str(CONFIG), *data])
    tuned = str(folder / "tuned")
    run(["train", str(CONFIG), "--output", tuned, "--set", f"data.cache={folder / 'encoded'}"])
    minutes = (time.perf_counter() - start[0]) / 60
    busy = (time.process_time() - start[1]) / 60
    print(f"{minutes:.1f} minutes from the images to the model, {busy:.1f} of them of a CPU")
    before, after = draw_model("tiny", count), draw_model(tuned, count)
    picture(before, after).save(folder / "before_and_after.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("all", "score"))
    parser.add_argument("path", help="the new folder of `all`, or the model that is scored")
    parser.add_argument("--images", type=int, default=200, help="that have new words")
    parser.add_argument(
        "--prompts", type=int, default=100, help="new ones, and as many old ones, to score"
    )
    options = parser.parse_args()
    extend_scenes()
    if options.action == "all":
        run_all(Path(options.path).absolute(), options.images, options.prompts)
    else:
        draw_model(options.path, options.prompts)


if __name__ == "__main__":
    main()
