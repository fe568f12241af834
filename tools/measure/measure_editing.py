"""Measure methods of editing on the tiny model: whether the edit is made, and what stays the same.

Each scene has one object. Its image is drawn by the model from the source prompt, and edited to the
target prompt. An analytic checker reads whether the target is met; the change of the border, where
nothing is to change, says what stays. Results are JSON lines on standard output.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

import fluxjax
from fluxjax import generate

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny"))
from scenes import Scene, Thing, check  # found by the line above

BACKGROUNDS = ("beige", "navy", "white", "pink", "teal")
COLORS = ("red", "green", "yellow", "purple", "orange")
SHAPES = ("star", "circle", "square", "ring", "cross")
BORDER = 16
"""Pixels along each side in which no object lies."""


def shape_edits() -> Iterator[tuple[Scene, Scene]]:
    """Return scenes of a star, and the same with a heart."""
    for background, color in itertools.product(BACKGROUNDS, COLORS):
        scenes = [Scene(background, (Thing("large", color, s),)) for s in ("star", "heart")]
        yield scenes[0], scenes[1]


def color_edits() -> Iterator[tuple[Scene, Scene]]:
    """Return scenes of something red, and the same in blue."""
    for background, shape in itertools.product(BACKGROUNDS, SHAPES):
        scenes = [Scene(background, (Thing("large", c, shape),)) for c in ("red", "blue")]
        yield scenes[0], scenes[1]


EDITS = {"star to heart": shape_edits, "red to blue": color_edits}


def prompt_of(scene: Scene) -> str:
    (thing,) = scene.things
    return f"a {thing.size} {thing.color} {thing.shape} on a {scene.background} background"


def methods(source: str) -> dict[str, generate.EditMethod]:
    """Return the methods that are compared, with the start times of SDEdit in their names."""
    found: dict[str, generate.EditMethod] = {
        "flowedit": generate.FlowEditing(source_prompt=source),
        "fireflow": generate.FireFlowEditing(source_prompt=source),
        "rf-inversion": generate.RFInverting(source_prompt=source),
        "diffedit": generate.DiffEditing(source_prompt=source),
    }
    for strength in (0.1, 0.3, 0.5, 0.7, 0.9):
        found[f"sdedit {strength}"] = generate.SDEditing(strength=strength)
    return found


def border_change(edited: np.ndarray, image: np.ndarray) -> float:
    """Return the RMS change of the border of an image, in levels of 255."""
    inner = np.zeros(image.shape[:2], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    return float(127.5 * np.sqrt(np.mean(np.square((edited - image)[~inner]))))


def measure(models: fluxjax.Models, edit: str, method: str, steps: int) -> dict[str, object]:
    """Edit all scenes by one method; return its row."""
    settings = fluxjax.DrawSettings(steps=steps)
    met, changes = [], []
    for number, (before, after) in enumerate(EDITS[edit]()):
        key = jax.random.key(number)
        source, target = prompt_of(before), prompt_of(after)
        image = fluxjax.text_to_image(models, source, key=key, settings=settings)[0]
        edited = generate.edit_image(
            models, image, target, key=key, method=methods(source)[method], settings=settings
        )[0]
        met.append(check(np.asarray(edited), after)["all"])
        changes.append(border_change(np.asarray(edited), np.asarray(image)))
    return {
        "edit": edit,
        "method": method,
        "scenes": len(met),
        "steps": steps,
        "adherence_percent": round(100 * float(np.mean(met)), 1),
        "border_change": round(float(np.mean(changes)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=28)
    options = parser.parse_args()
    models = fluxjax.load_models("tiny", dtype="float32")
    for edit in EDITS:
        for method in methods(""):
            print(json.dumps(measure(models, edit, method, options.steps)), flush=True)


if __name__ == "__main__":
    main()
