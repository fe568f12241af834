"""Measure methods of editing on the tiny model: whether the edit is made, and what stays the same.

An image is drawn by the model from the source prompt, and edited to the target prompt, which
differs in one object. An analytic checker reads whether the target is met; the change of the image
away from that object, where nothing is to change, says what stays. The image and its edit have
different keys, so that what the prompts leave open, such as the exact place of a second object, can
get lost. Results are JSON lines on standard output.
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
SECONDS = ("blue cross", "green ring", "black square", "white circle", "purple diamond")
RELATIONS = ("above", "below", "left of", "right of")
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


def beside_edits() -> Iterator[tuple[Scene, Scene]]:
    """Return scenes of a star beside another object, and the same with a heart."""
    for second, relation in itertools.product(SECONDS, RELATIONS):
        color, shape = second.split()
        other = Thing("", color, shape)
        scenes = []
        for edited in ("star", "heart"):
            scenes.append(Scene("beige", (Thing("large", "red", edited), other), relation))
        yield scenes[0], scenes[1]


EDITS = {
    "star to heart": shape_edits,
    "red to blue": color_edits,
    "star to heart, beside another object": beside_edits,
}


def prompt_of(scene: Scene) -> str:
    phrases = [thing.phrase for thing in scene.things]
    return f"{f' {scene.relation} '.join(phrases)} on a {scene.background} background"


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


def unedited_part(scene: Scene, height: int, width: int) -> np.ndarray:
    """Return where an edit of a scene's first object changes nothing, [height, width] booleans."""
    kept = np.ones((height, width), bool)
    if scene.relation is None:
        kept[BORDER:-BORDER, BORDER:-BORDER] = False
    elif scene.relation == "above":
        kept[: height // 2] = False
    elif scene.relation == "below":
        kept[height // 2 :] = False
    elif scene.relation == "left of":
        kept[:, : width // 2] = False
    else:
        kept[:, width // 2 :] = False
    return kept


def unwanted_change(edited: np.ndarray, image: np.ndarray, scene: Scene) -> float:
    """Return the RMS change where nothing is to change, in levels of 255."""
    kept = unedited_part(scene, *image.shape[:2])
    return float(127.5 * np.sqrt(np.mean(np.square((edited - image)[kept]))))


def measure(models: fluxjax.Models, edit: str, method: str, steps: int) -> dict[str, object]:
    """Edit all scenes by one method; return its row."""
    settings = fluxjax.DrawSettings(steps=steps)
    met, changes = [], []
    for number, (before, after) in enumerate(EDITS[edit]()):
        image_key, key = jax.random.split(jax.random.key(number))
        source, target = prompt_of(before), prompt_of(after)
        image = fluxjax.text_to_image(models, source, key=image_key, settings=settings)[0]
        edited = generate.edit_image(
            models, image, target, key=key, method=methods(source)[method], settings=settings
        )[0]
        met.append(check(np.asarray(edited), after)["all"])
        changes.append(unwanted_change(np.asarray(edited), np.asarray(image), before))
    return {
        "edit": edit,
        "method": method,
        "scenes": len(met),
        "steps": steps,
        "adherence_percent": round(100 * float(np.mean(met)), 1),
        "unwanted_change": round(float(np.mean(changes)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--edits", nargs="+", choices=EDITS, default=[*EDITS])
    parser.add_argument("--methods", nargs="+", choices=methods(""), default=[*methods("")])
    options = parser.parse_args()
    models = fluxjax.load_models("tiny", dtype="float32")
    for edit in options.edits:
        for method in options.methods:
            print(json.dumps(measure(models, edit, method, options.steps)), flush=True)


if __name__ == "__main__":
    main()
