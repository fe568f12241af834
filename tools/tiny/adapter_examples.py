"""Training examples of the tiny model's adapters as scenes and prompts, before they are drawn.

Only NumPy, Pillow and SciPy are needed, so that several processes can make them quickly.
"""

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from placed import EDITS, SIZE, Placed, Spot, canonical_spots, random_placed
from scenes import BACKGROUNDS, Scene, caption, plain_caption, random_scene

KINDS = ("fill", "edges", "kontext", "controlnet", "redux")
BLOTS = 2


class Blot(NamedTuple):
    """A rectangle or an ellipse of a mask: its middle and half its sides in pixels."""

    is_ellipse: np.ndarray
    middle: np.ndarray
    half: np.ndarray


class Examples(NamedTuple):
    """Examples before they are encoded, a list entry or a row for each.

    `targets`: what is to be drawn. `prompts`: their texts. `sources`: the scenes of the pictures
    that they are conditioned on. `masks`: what is hidden of the target.
    """

    targets: list[Placed]
    prompts: list[str]
    sources: list[Placed]
    masks: Blot


Draw = tuple[Placed, str, Placed]
"""A target, a prompt, and the source."""


def random_mask(placed: Placed, rng: np.random.Generator) -> list[tuple[bool, tuple, tuple]]:
    """Return the blots of a mask: over one object, over all, anywhere, or over everything."""
    mode = rng.random()
    if mode < 0.1:
        return [(False, (SIZE / 2, SIZE / 2), (SIZE, SIZE))]
    if mode < 0.25:
        return [(rng.random() < 0.5, tuple(rng.uniform(10, 118, 2)), tuple(rng.uniform(8, 56, 2)))]
    chosen = list(placed.spots)
    if mode < 0.85:
        chosen = [chosen[int(rng.integers(len(chosen)))]]
    return [_blot_over(spot, rng) for spot in chosen]


def _blot_over(spot: Spot, rng: np.random.Generator) -> tuple[bool, tuple, tuple]:
    x, y, radius = ((spot[0] + 0.5) * SIZE, (spot[1] + 0.5) * SIZE, spot[2] * SIZE)
    is_ellipse = rng.random() < 0.4
    least = radius * (1.35 if is_ellipse else 1.12) + 2
    half = least + rng.uniform(0, 14, 2)
    shift = rng.uniform(-1, 1, 2) * (half - least)
    return is_ellipse, (x + shift[0], y + shift[1]), tuple(half)


def _plain(rng: np.random.Generator, canonical: float) -> Draw:
    placed = random_placed(rng, canonical=canonical)
    return placed, caption(placed.scene, rng), placed


def _edit(rng: np.random.Generator, canonical: float) -> Draw | None:
    """Return an edited scene, the instruction, and the scene before it.

    Of a scene as the base model draws it, the edited one is so too: what is moved or added lies
    where the model puts the objects of the new scene. What is left when another is removed stays.
    """
    kind = str(rng.choice(list(EDITS)))
    for _ in range(40):
        source = random_placed(rng, canonical=canonical)
        found = EDITS[kind](source, rng)
        if found is not None:
            target, words = found
            if source.known and not target.known and kind != "remove":
                target = canonical_spots(target.scene, rng)
            return target, words, source
    return None


def _picture(rng: np.random.Generator, canonical: float) -> Draw:
    """Return a scene and the same one in the picture, or one of which the prompt names a change.

    All objects lie where the base model puts them, since Redux follows what a picture shows, not
    where.
    """
    del canonical
    source = canonical_spots(random_scene(rng), rng)
    mode = rng.random()
    if mode < 0.6:
        target = canonical_spots(source.scene, rng)
        return target, "", source
    if mode < 0.7:
        target = canonical_spots(source.scene, rng)
        return target, caption(source.scene, rng), source
    scene, prompt = mixed(source.scene, rng)
    return canonical_spots(scene, rng), prompt, source


def mixed(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """Return a scene with another background or other objects, and the prompt that names them."""
    if rng.random() < 0.5:
        taken = {scene.background, *(thing.color for thing in scene.things)}
        color = str(rng.choice([color for color in BACKGROUNDS if color not in taken]))
        ground = "an" if color[0] in "aeiou" else "a"
        return replace(scene, background=color), f"on {ground} {color} background"
    while True:
        other = random_scene(rng)
        if all(thing.color != scene.background for thing in other.things):
            break
    changed = Scene(scene.background, other.things, other.relation)
    return changed, plain_caption(changed).split(" on ")[0]


DRAWS: dict[str, Callable[[np.random.Generator, float], Draw | None]] = {
    "fill": _plain,
    "edges": _plain,
    "controlnet": _plain,
    "kontext": _edit,
    "redux": _picture,
}

CANONICAL = {"fill": 0.8, "edges": 0.3, "controlnet": 0.3, "kontext": 1.0, "redux": 1.0}
"""Shares of the scenes whose objects lie where the base model puts them."""


def make_examples(
    kind: str, count: int, seed: int, *, held_out: bool = False, canonical: float | None = None
) -> Examples:
    """Draw examples of a kind.

    **Arguments:** `held_out`: whether the targets' combinations are those kept from training.
    `canonical`: the share of scenes whose objects lie where the base model puts them; that of the
    kind by default.
    """
    share = CANONICAL[kind] if canonical is None else canonical
    rng = np.random.default_rng((2027, KINDS.index(kind), seed))
    examples = Examples([], [], [], Blot(*(np.zeros((count, BLOTS, *n)) for n in ((), (2,), (2,)))))
    while len(examples.targets) < count:
        drawn = DRAWS[kind](rng, share)
        if drawn is None:
            continue
        target, prompt, source = drawn
        if target.scene.held_out != held_out or (source.scene.held_out and not held_out):
            continue
        row = len(examples.targets)
        for lst, value in zip(examples[:3], (target, prompt, source), strict=True):
            lst.append(value)
        for index, blot in enumerate(random_mask(target, rng)):
            for array, value in zip(examples.masks, blot, strict=True):
                array[row, index] = value
    return examples


def make_examples_in_parallel(kind: str, count: int, seed: int, workers: int) -> Examples:
    """Draw examples in several processes."""
    share = -(-count // workers)
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number in range(workers):
            path = Path(folder) / f"{number}.pickle"
            settings = (kind, str(share), str(1000 * seed + number), str(path))
            running.append((subprocess.Popen([sys.executable, __file__, *settings]), path))
        parts = []
        for process, path in running:
            if process.wait():
                raise RuntimeError("A process that draws scenes has failed; see its output above.")
            parts.append(Examples(*pickle.loads(path.read_bytes())))
    joined = [list(chain(*lists)) for lists in zip(*(part[:3] for part in parts), strict=True)]
    masks = [np.concatenate(rows) for rows in zip(*(part.masks for part in parts), strict=True)]
    return Examples(*joined, Blot(*masks))


def main() -> None:
    kind, count, seed, path = sys.argv[1:]
    examples = make_examples(kind, int(count), int(seed))
    # Plain tuples: classes of this module have another name in the process that reads them.
    Path(path).write_bytes(pickle.dumps((*examples[:3], tuple(examples.masks))))


if __name__ == "__main__":
    main()
