"""Scenes with a place for each object: anywhere in the image, or where the tiny model puts it.

The tiny model knows one place for each object of a relation. Adapters that follow an image are
trained and scored on scenes whose objects lie anywhere.
"""

from dataclasses import dataclass, replace

import numpy as np
from scenes import (
    BACKGROUNDS,
    COLORS,
    INNER,
    OPPOSITE,
    OUTER,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    coverage,
    place,
    random_scene,
)

SIZE = 128
RADII = {"small": (0.09, 0.115), "": (0.125, 0.165), "large": (0.178, 0.22)}
OUTER_RADII = (0.26, 0.34)
REACH = 1.12  # the farthest point of any shape, in radii
MARGIN = 0.02  # between objects, and to the border
CANONICAL = 0.3

Spot = tuple[float, float, float]
"""The center (x, y) of an object and its radius: from the image's center, in sides of the image."""


@dataclass(frozen=True)
class Placed:
    """A scene, and the spot of each of its objects.

    `known`: whether the spots are those where the tiny model puts the objects.
    """

    scene: Scene
    spots: tuple[Spot, ...]
    known: bool = False


def random_placed(rng: np.random.Generator, *, canonical: float = CANONICAL) -> Placed:
    """Draw a scene with spots that are free, or canonical with this probability."""
    while True:
        scene = random_scene(rng)
        if rng.random() < canonical:
            return canonical_spots(scene, rng)
        found = free_spots(scene, rng)
        if found is not None:
            return found


def canonical_spots(scene: Scene, rng: np.random.Generator) -> Placed:
    """Return a scene with the spots that the tiny model knows."""
    pixels = place(scene, SIZE, SIZE, rng)
    spots = tuple((x / SIZE - 0.5, y / SIZE - 0.5, r / SIZE) for x, y, r in pixels)
    return Placed(scene, spots, known=True)


def free_spots(scene: Scene, rng: np.random.Generator, tries: int = 60) -> Placed | None:
    """Return a scene with random spots that fit its sizes and its relation; None if none fit."""
    if scene.relation == "inside":
        outer = float(rng.uniform(*OUTER_RADII))
        x, y = _random_center(outer, rng)
        return Placed(scene, ((x, y, outer * INNER / OUTER), (x, y, outer)))
    radii = [float(rng.uniform(*RADII[thing.size])) for thing in scene.things]
    for _ in range(tries):
        spots = tuple((*_random_center(radius, rng), radius) for radius in radii)
        placed = Placed(scene, spots)
        if fits(placed):
            return placed
    return None


def _random_center(radius: float, rng: np.random.Generator) -> tuple[float, float]:
    most = 0.5 - MARGIN - REACH * radius
    x, y = rng.uniform(-most, most, 2)
    return float(x), float(y)


def fits(placed: Placed) -> bool:
    """Return whether all objects are in the image, apart, and in the scene's relation."""
    for x, y, radius in placed.spots:
        if max(abs(x), abs(y)) + REACH * radius > 0.5 - MARGIN / 2:
            return False
    if len(placed.spots) == 1 or placed.scene.relation == "inside":
        return True
    first, second = placed.spots
    apart = np.hypot(first[0] - second[0], first[1] - second[1])
    if apart < REACH * (first[2] + second[2]) + MARGIN:
        return False
    return relation_holds(placed.scene.relation, first, second)


def relation_holds(relation: str | None, first: Spot, second: Spot) -> bool:
    """Return whether the first spot is clearly above, below, left of or right of the second."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = (dy, dx) if relation in ("above", "below") else (dx, dy)
    if relation in ("below", "right of"):
        along = -along
    return along > max(0.14, 1.2 * abs(across))


def drawn(placed: Placed) -> np.ndarray:
    """Draw a scene with its spots: [128, 128, 3], float32 in [-1, 1]."""
    image = np.full((SIZE, SIZE, 3), BACKGROUNDS[placed.scene.background], np.float32)
    for thing, (x, y, radius) in reversed(
        list(zip(placed.scene.things, placed.spots, strict=True))
    ):
        spot = ((x + 0.5) * SIZE, (y + 0.5) * SIZE, radius * SIZE)
        alpha = coverage(thing.shape, *spot, SIZE, SIZE)[..., None]
        image += alpha * (np.float32(COLORS[thing.color]) - image)
    return image / 127.5 - 1


# Instructions: each returns the scene that it leads to, and its words, or None where it cannot be.

Edit = tuple[Placed, str]


def name_of(scene: Scene, index: int, rng: np.random.Generator) -> str | None:
    """Return words that name one object of a scene, as "red star".

    In a scene of two objects the name has the colour and the shape. An object that is alone in its
    scene is called by its shape only in half of the cases. If both objects have the same colour and
    shape, no name tells them apart, and None is returned.
    """
    thing = scene.things[index]
    others = [other for number, other in enumerate(scene.things) if number != index]
    if not others and rng.random() < 0.5:
        return thing.shape
    if any((other.color, other.shape) == (thing.color, thing.shape) for other in others):
        return None
    return f"{thing.color} {thing.shape}"


def _with_thing(placed: Placed, index: int, thing: Thing, spot: Spot | None = None) -> Placed:
    things, spots = list(placed.scene.things), list(placed.spots)
    things[index] = thing
    spots[index] = spots[index] if spot is None else spot
    known = placed.known and spot is None
    return Placed(replace(placed.scene, things=tuple(things)), tuple(spots), known)


def recolor(placed: Placed, rng: np.random.Generator) -> Edit | None:
    """make the red star blue"""
    index, name = _pick(placed, rng)
    if name is None:
        return None
    taken = {placed.scene.background, *(thing.color for thing in placed.scene.things)}
    color = str(rng.choice([color for color in COLORS if color not in taken]))
    thing = replace(placed.scene.things[index], color=color)
    return _with_thing(placed, index, thing), f"make the {name} {color}"


def change_background(placed: Placed, rng: np.random.Generator) -> Edit | None:
    """make the background gray"""
    taken = {placed.scene.background, *(thing.color for thing in placed.scene.things)}
    color = str(rng.choice([color for color in BACKGROUNDS if color not in taken]))
    scene = replace(placed.scene, background=color)
    return Placed(scene, placed.spots, placed.known), f"make the background {color}"


def reshape(placed: Placed, rng: np.random.Generator) -> Edit | None:
    """turn the red star into a heart"""
    index, name = _pick(placed, rng)
    if name is None:
        return None
    shapes = [shape for shape in SHAPES if all(t.shape != shape for t in placed.scene.things)]
    shape = str(rng.choice(shapes))
    thing = replace(placed.scene.things[index], shape=shape)
    return _with_thing(placed, index, thing), f"turn the {name} into a {shape}"


def resize(placed: Placed, rng: np.random.Generator) -> Edit | None:
    """make the red star large"""
    index, name = _pick(placed, rng)
    thing = placed.scene.things[index]
    if name is None or placed.scene.relation == "inside":
        return None
    size = str(rng.choice([size for size in ("small", "large") if size != thing.size]))
    x, y, _ = placed.spots[index]
    edited = _with_thing(placed, index, replace(thing, size=size), (x, y, SIZES[size]))
    return (edited, f"make the {name} {size}") if fits(edited) else None


def remove(placed: Placed, rng: np.random.Generator) -> Edit | None:
    """remove the blue ring"""
    if len(placed.spots) == 1:
        return None
    index, name = _pick(placed, rng)
    if name is None:
        return None
    scene = replace(placed.scene, relation=None, things=(placed.scene.things[1 - index],))
    if placed.scene.relation == "inside":  # the one that stays says nothing about its size
        scene = replace(scene, things=(replace(scene.things[0], size=""),))
    return Placed(scene, (placed.spots[1 - index],)), f"remove the {name}"


def _beside(relation: str, other: Spot, radius: float) -> Spot:
    """Return the spot of an object of this radius that is next to another, in a relation."""
    distance = REACH * (radius + other[2]) + 0.06
    x, y = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}[relation]
    return other[0] + x * distance, other[1] + y * distance, radius


def move(placed: Placed, rng: np.random.Generator) -> Edit | None:
    """move the red star below the blue ring"""
    scene = placed.scene
    if len(placed.spots) == 1 or scene.relation == "inside":
        return None
    index = int(rng.integers(2))
    names = name_of(scene, index, rng), name_of(scene, 1 - index, rng)
    if None in names:
        return None
    relation = str(rng.choice([r for r in RELATIONS[:4] if r != scene.relation]))
    other, radius = placed.spots[1 - index], placed.spots[index][2]
    things = (scene.things[index], scene.things[1 - index])
    if index == 1 and relation == OPPOSITE[str(scene.relation)]:
        return None
    edited = Placed(
        replace(scene, relation=relation, things=things), (_beside(relation, other, radius), other)
    )
    if not fits(edited):
        return None
    return edited, f"move the {names[0]} {_worded(relation, rng)} the {names[1]}"


def add(placed: Placed, rng: np.random.Generator) -> Edit | None:
    """add a red star below the blue ring"""
    scene = placed.scene
    if len(placed.spots) == 2:
        return None
    relation = str(rng.choice(RELATIONS[:4]))
    colors = [color for color in COLORS if color != scene.background]
    shapes = [shape for shape in SHAPES if shape != scene.things[0].shape]
    size = str(rng.choice(list(SIZES)))
    thing = Thing(size, str(rng.choice(colors)), str(rng.choice(shapes)))
    spot = _beside(relation, placed.spots[0], SIZES[size])
    edited = Placed(
        replace(scene, relation=relation, things=(thing, *scene.things)), (spot, *placed.spots)
    )
    name = name_of(scene, 0, rng)
    if name is None or not fits(edited):
        return None
    return edited, f"add {thing.phrase} {_worded(relation, rng)} the {name}"


def swap(placed: Placed, rng: np.random.Generator) -> Edit | None:
    """swap the red star and the blue ring"""
    scene = placed.scene
    if len(placed.spots) == 1 or scene.relation == "inside":
        return None
    names = name_of(scene, 0, rng), name_of(scene, 1, rng)
    if None in names:
        return None
    (x0, y0, first), (x1, y1, second) = placed.spots
    edited = Placed(
        replace(scene, relation=OPPOSITE[str(scene.relation)]), ((x1, y1, first), (x0, y0, second))
    )
    order = names if rng.random() < 0.5 else names[::-1]
    return (edited, f"swap the {order[0]} and the {order[1]}") if fits(edited) else None


def _pick(placed: Placed, rng: np.random.Generator) -> tuple[int, str | None]:
    index = int(rng.integers(len(placed.spots)))
    return index, name_of(placed.scene, index, rng)


def _worded(relation: str, rng: np.random.Generator) -> str:
    sideways = relation in ("left of", "right of")
    return f"to the {relation}" if sideways and rng.random() < 0.5 else relation


EDITS = {
    "recolor": recolor,
    "background": change_background,
    "reshape": reshape,
    "resize": resize,
    "remove": remove,
    "move": move,
    "add": add,
    "swap": swap,
}
"""Kinds of instruction."""
