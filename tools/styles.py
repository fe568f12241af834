"""Two styles for the tiny model's adapters, "night" and "frame": their training images, and how far an image has them."""

import argparse
from pathlib import Path

import numpy as np
from scenes import Palette, Scene, caption, check, random_scene, render

from fluxjax.image import write_png

NIGHT: Palette = {
    "night": (15, 15, 15),
    "red": (255, 60, 90),
    "green": (60, 220, 100),
    "blue": (70, 130, 255),
    "yellow": (255, 240, 70),
    "purple": (190, 80, 235),
    "orange": (255, 150, 40),
    "black": (128, 128, 128),
    "white": (255, 255, 255),
}
WHITE, RING = (250, 250, 250), 8
STYLES = {"night": NIGHT["night"], "frame": WHITE}
"""The colour that each style gives to an image's outermost pixels."""


def draw(scene: Scene, style: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene in a style, float32 in [-1, 1]: in luminous colours at night, or within a white frame."""
    if style == "night":
        return render(scene, height, width, rng, NIGHT, "night")
    image = render(scene, height, width, rng)
    image[_ring(image, RING)] = np.float32(WHITE) / 127.5 - 1
    return image


def _ring(image: np.ndarray, pixels: int) -> np.ndarray:
    """Return the mask of the outermost pixels."""
    inside = np.zeros(image.shape[:2], bool)
    inside[pixels:-pixels, pixels:-pixels] = True
    return ~inside


def distance(image: np.ndarray, style: str) -> float:
    """Return how far the mean colour of the outermost pixels is from the style's, root mean square in [0, 255]."""
    rgb = (np.clip(image, -1, 1) + 1) * 127.5
    return float(np.sqrt(np.mean(np.square(rgb[_ring(rgb, RING - 2)].mean(0) - np.float32(STYLES[style])))))


def lacks(scene: Scene, style: str) -> bool:
    """Tell whether a scene's own background differs from the colour of the style's outermost pixels."""
    return scene.background != {"night": "black", "frame": "white"}[style]


def adheres(image: np.ndarray, scene: Scene, style: str) -> bool:
    """Tell whether the scene's objects are there in their shapes and their relation, whatever their colours."""
    edge = RING + 2
    verdict = check(image, scene, NIGHT) if style == "night" else check(image[edge:-edge, edge:-edge], scene)
    return verdict["shape"] and verdict["relation"]


def write_examples(folder: Path, style: str, count: int, seed: int = 0) -> None:
    """Write captioned images of a style, of scenes that are not held out."""
    rng, written = np.random.default_rng((seed, *style.encode())), 0
    folder.mkdir(parents=True, exist_ok=True)
    while written < count:
        scene = random_scene(rng)
        if not scene.held_out:
            write_png(draw(scene, style, 128, 128, rng), folder / f"{written:03d}.png")
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
