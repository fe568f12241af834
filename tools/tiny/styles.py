"""Two styles for the tiny model's adapters, "kraft" and "chalk": training images and a measure."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from scenes import BACKGROUNDS, Scene, caption, check, random_scene, render

from fluxjax.generate.image import write_png

PAPER = "brown"
CHALK = ("white", "black")
STYLES = ("kraft", "chalk")
EDGE = 6  # pixels at the border that are background in every scene


def suits(scene: Scene, style: str) -> bool:
    """Return whether a scene can be drawn in a style: chalk needs a background other than white."""
    return style == "kraft" or scene.background != CHALK[0]


def restyled(scene: Scene, style: str) -> Scene:
    """Return the scene as it is drawn in a style.

    Kraft changes the background to brown. Chalk makes objects white, or black on a white
    background. The background is visible inside a ring; an object there keeps its colour if neither
    white nor black would differ from both what is around it and the background.
    """
    if style == "kraft":
        return replace(scene, background=PAPER)
    behind, things = {scene.background}, []
    for thing in reversed(scene.things):  # the outer one of two comes last
        color = next((color for color in CHALK if color not in behind), thing.color)
        if scene.relation == "inside":
            behind = {color, scene.background} if thing.shape == "ring" else {color}
        things.insert(0, replace(thing, color=color))
    return replace(scene, things=tuple(things))


def lacks(scene: Scene, style: str) -> bool:
    """Return whether a scene suits a style, and nothing in it has the style yet."""
    if style == "kraft":
        return scene.background != PAPER
    return suits(scene, style) and all(thing.color not in CHALK for thing in scene.things)


def distance(image: np.ndarray, style: str) -> float:
    """Return the distance of an image from a style, in [0, 255]: root mean square over channels.

    For kraft: between the mean colour of the border and brown. For chalk: between each pixel that
    differs clearly from the border's mean colour and the nearer of white and black, averaged over
    those pixels.
    """
    rgb = (np.clip(image, -1, 1) + 1) * 127.5
    inside = np.zeros(rgb.shape[:2], bool)
    inside[EDGE:-EDGE, EDGE:-EDGE] = True
    ground = rgb[~inside].mean(0)
    if style == "kraft":
        return _apart(ground, PAPER).item()
    objects = rgb[_rms(rgb - ground) > 40]
    return (
        float(np.minimum(*(_apart(objects, color) for color in CHALK)).mean())
        if len(objects)
        else 255.0
    )


def _apart(rgb: np.ndarray, color: str) -> np.ndarray:
    return _rms(rgb - np.float32(BACKGROUNDS[color]))


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(x), axis=-1))


def adheres(image: np.ndarray, scene: Scene) -> bool:
    """Return whether the objects have the right shapes and relation, whatever their colours."""
    verdict = check(image, scene)
    return verdict["shape"] and verdict["relation"]


def write_examples(folder: Path, style: str, count: int, seed: int = 0) -> None:
    """Write captioned images in a style, of scenes that suit it and are not held out."""
    rng, written = np.random.default_rng((seed, *style.encode())), 0
    folder.mkdir(parents=True, exist_ok=True)
    while written < count:
        scene = random_scene(rng)
        if not scene.held_out and suits(scene, style):
            write_png(render(restyled(scene, style), 128, 128, rng), folder / f"{written:03d}.png")
            (folder / f"{written:03d}.txt").write_text(caption(scene, rng) + "\n")
            written += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Write captioned training images of a style.")
    parser.add_argument("style", choices=STYLES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100, help="images (default: %(default)s)")
    options = parser.parse_args()
    write_examples(options.folder, options.style, options.count)


if __name__ == "__main__":
    main()
