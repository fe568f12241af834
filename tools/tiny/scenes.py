"""Scenes of coloured shapes: drawing them, captions, and an analytic checker that reads them back.

A scene is one object, or two in a relation, on a plain background. Sizes are radii in units of the
image's shorter side; positions are measured from the image's center in the same units. Only NumPy,
Pillow and SciPy are needed.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 180),
    "orange": (245, 135, 30),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
BACKGROUNDS = COLORS | {
    "gray": (128, 128, 128),
    "pink": (250, 160, 195),
    "teal": (20, 140, 150),
    "beige": (225, 205, 165),
    "navy": (20, 30, 90),
    "brown": (120, 75, 40),
}
SIZES = {"small": 0.105, "": 0.145, "large": 0.19}
RELATIONS = ("above", "below", "left of", "right of", "inside")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
INNER, OUTER = 0.095, 0.32
APART = 0.23
JITTER, GROWTH = 0.01, 0.025
SIZE_LIMITS = {"small": (0.0, 0.125), "": (0.0, 1.0), "large": (0.1675, 1.0)}
SUPERSAMPLE = 4
LOST_TIPS = (1.0, 1.06, 1.12)


def _circle(radius: float, points: int = 72) -> np.ndarray:
    angles = np.arange(points) * 2 * np.pi / points
    return radius * np.stack([np.cos(angles), np.sin(angles)], -1)


def _regular(corners: int, inner: float | None = None) -> np.ndarray:
    """A regular polygon, or a star whose inner corners lie at radius `inner`, one corner up."""
    count = corners if inner is None else 2 * corners
    angles = np.arange(count) * 2 * np.pi / count - np.pi / 2
    radius = np.ones(count) if inner is None else np.where(np.arange(count) % 2, inner, 1.0)
    return radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], -1)


def _heart(points: int = 72) -> np.ndarray:
    a = np.arange(points) * 2 * np.pi / points
    x = 16 * np.sin(a) ** 3
    y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a))
    return np.stack([x, y - 2.5], -1) / 16.5


_ARM = 0.34
_QUARTER = np.array([(_ARM, -1), (_ARM, -_ARM), (1, -_ARM)])
_TURN = np.array([(0, 1), (-1, 0)])
_CROSS = np.concatenate([_QUARTER @ np.linalg.matrix_power(_TURN, turns) for turns in range(4)])
# Outlines that are filled, then outlines that are cut out.
SHAPES = {
    "circle": ([_circle(0.95)], []),
    "square": ([np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])], []),
    "triangle": ([_regular(3) * 1.1 + (0, 0.15)], []),
    "diamond": ([np.array([(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)])], []),
    "star": ([_regular(5, inner=0.48) * 1.1], []),
    "heart": ([_heart()], []),
    "cross": ([_CROSS], []),
    "ring": ([_circle(1.0)], [_circle(0.58)]),
}


@dataclass(frozen=True)
class Thing:
    """An object. `size`: "small", "large" or "" for neither."""

    size: str
    color: str
    shape: str

    @property
    def phrase(self) -> str:
        return _article(" ".join(word for word in (self.size, self.color, self.shape) if word))


@dataclass(frozen=True)
class Scene:
    """One thing, or two: the first stands in `relation` to the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether the combination is kept from training: one in ten, however it is worded."""
        relation, things = self.relation, self.things
        if relation in ("below", "right of"):
            relation, things = OPPOSITE[relation], things[::-1]
        return (
            int(hashlib.sha256(f"{self.background} {relation} {things}".encode()).hexdigest(), 16)
            % 10
            == 0
        )


@dataclass(frozen=True)
class Found:
    """An object that was found in an image.

    `x`, `y`, `radius`: in units of the shorter side. `fit`: intersection over union with the ideal
    shape.
    """

    color: str
    shape: str
    x: float
    y: float
    radius: float
    fit: float


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a random scene.

    An object never has the background's colour, nor the colour of an object that it is inside of.
    """
    background = str(rng.choice(list(BACKGROUNDS)))
    colors = [c for c in COLORS if c != background]
    if rng.random() < 0.3:
        return Scene(background, (_random_thing(rng, colors, tuple(SIZES)),))
    relation = str(rng.choice(RELATIONS))
    if relation == "inside":
        outer = _random_thing(rng, colors, ("", "large"))
        inner = _random_thing(rng, [c for c in colors if c != outer.color], ("", "small"))
        return Scene(background, (inner, outer), relation)
    return Scene(
        background, tuple(_random_thing(rng, colors, tuple(SIZES)) for _ in range(2)), relation
    )


def _random_thing(rng: np.random.Generator, colors: list[str], sizes: tuple[str, ...]) -> Thing:
    return Thing(str(rng.choice(sizes)), str(rng.choice(colors)), str(rng.choice(list(SHAPES))))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Word a scene, in one of several ways. Where no background is named it is white."""
    subject = scene.things[0].phrase
    if scene.relation is not None:
        relation = scene.relation
        if relation in ("left of", "right of") and rng.random() < 0.5:
            relation = f"to the {relation}"
        subject = f"{subject} {relation} {scene.things[1].phrase}"
    ground = _article(f"{scene.background} background")
    forms = [
        f"{subject} on {ground}",
        f"{subject} on {ground}",
        f"{subject} on {scene.background}",
        f"on {ground} there is {subject}",
        f"{subject} against {ground}",
        f"{subject}, {scene.background} background",
        f"a picture of {subject} on {ground}",
    ]
    if scene.background == "white":
        forms += [subject, subject]
    return str(rng.choice(forms))


ROLES = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "shape": tuple(SHAPES),
    "relation": ("", "above", "left of", "inside"),
    "second size": tuple(SIZES),
    "second color": ("", *COLORS),
    "second shape": ("", *SHAPES),
    "background": tuple(BACKGROUNDS),
}
"""The words that say what a scene looks like, by their role; "" where there is no such word."""


def plain_scene(scene: Scene) -> Scene:
    """Return a scene as its plain caption names it: things are above and left of others.

    Two scenes that look the same are then equal.
    """
    if scene.relation in ("below", "right of"):
        return Scene(scene.background, scene.things[::-1], OPPOSITE[scene.relation])
    return scene


def plain_words(scene: Scene) -> dict[str, str]:
    """Return the words of a scene by role; "" where there is no such word."""
    plain = plain_scene(scene)
    words = dict.fromkeys(ROLES, "") | {"background": plain.background}
    words["relation"] = plain.relation or ""
    for prefix, thing in zip(("", "second "), plain.things, strict=False):
        words |= {f"{prefix}{name}": getattr(thing, name) for name in ("size", "color", "shape")}
    return words


def plain_caption(scene: Scene) -> str:
    """Return a caption that scenes have in common if they look the same."""
    plain = plain_scene(scene)
    subject = f" {plain.relation} ".join(thing.phrase for thing in plain.things)
    return f"{subject} on {_article(f'{plain.background} background')}"


def place(
    scene: Scene, height: int, width: int, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """Return the center (x, y) and radius of each object, in pixels.

    They lie at fixed positions, jittered by up to about two pixels.
    """
    short = min(height, width)

    def spot(x: float, y: float, radius: float) -> tuple[float, float, float]:
        dx, dy, grow = rng.uniform(-1, 1, 3)
        x, y = x + dx * JITTER, y + dy * JITTER
        return width / 2 + x * short, height / 2 + y * short, radius * short * (1 + GROWTH * grow)

    radii = [SIZES[thing.size] for thing in scene.things]
    if scene.relation is None:
        return [spot(0, 0, radii[0])]
    if scene.relation == "inside":
        return [spot(0, 0, INNER), spot(0, 0, OUTER)]
    first = -APART if scene.relation in ("above", "left of") else APART
    vertical = scene.relation in ("above", "below")
    spots = [(0.0, along) if vertical else (along, 0.0) for along in (first, -first)]
    return [spot(*at, radius) for at, radius in zip(spots, radii, strict=True)]


def coverage(shape: str, x: float, y: float, radius: float, height: int, width: int) -> np.ndarray:
    """Return the share of each pixel that the shape covers, [height, width] in [0, 1]."""
    canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    for outlines, value in zip(SHAPES[shape], (255, 0), strict=True):
        for outline in outlines:
            # Pillow's integer coordinates are pixel centers.
            corners = (outline * radius + (x, y)) * SUPERSAMPLE - 0.5
            draw.polygon([(float(a), float(b)) for a, b in corners], fill=value)
    return np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255


def render(scene: Scene, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene: [height, width, 3], float32 in [-1, 1]."""
    image = np.broadcast_to(np.float32(BACKGROUNDS[scene.background]), (height, width, 3)).copy()
    spots = place(scene, height, width, rng)
    for thing, spot in reversed(list(zip(scene.things, spots, strict=True))):
        alpha = coverage(thing.shape, *spot, height, width)[..., None]
        image += alpha * (np.float32(COLORS[thing.color]) - image)
    return image / 127.5 - 1


_NAMES = list(BACKGROUNDS)
_PALETTE = np.float32(list(BACKGROUNDS.values()))


def find(image: np.ndarray) -> tuple[str, list[Found]]:
    """Find the background's colour and the objects in an image, without knowing its prompt.

    **Arguments:** `image`: [height, width, 3] in [-1, 1].
    """
    rgb = (np.clip(image, -1, 1) + 1) * 127.5
    label = np.argmin(((rgb[:, :, None] - _PALETTE) ** 2).sum(-1), -1)
    border = np.concatenate(
        [label[:2].ravel(), label[-2:].ravel(), label[:, :2].ravel(), label[:, -2:].ravel()]
    )
    background = int(np.bincount(border, minlength=len(_NAMES)).argmax())
    blobs = []
    for color in range(len(_NAMES)):
        if color == background:
            continue
        # What an opening erases are the one-pixel seams where two colours blend into a third.
        mask = label == color
        mask = ndimage.binary_propagation(ndimage.binary_opening(mask), mask=mask)
        parts, count = ndimage.label(mask)
        blobs += [(color, parts == i + 1) for i in range(count)]
    least = (0.05 * min(label.shape)) ** 2 * np.pi
    blobs = [(color, mask) for color, mask in blobs if mask.sum() >= least]
    blobs = [blob for blob in blobs if not _seen_through(*blob, blobs)]
    return _NAMES[background], [_describe(color, mask, blobs) for color, mask in blobs]


def _seen_through(color: int, mask: np.ndarray, blobs: list) -> bool:
    """Return whether a blob is part of a larger one of its colour.

    It is then seen through the hole of an object in front of it.
    """
    behind = any(
        other is not mask and c == color and other.sum() > mask.sum() for c, other in blobs
    )
    return behind and any(
        c != color
        and not other[mask].any()
        and ndimage.binary_fill_holes(other)[mask].all()
        and other.sum() < 4 * mask.sum()
        for c, other in blobs
    )


def _describe(color: int, mask: np.ndarray, blobs: list) -> Found:
    """Fit every shape to the blob's bounding box and return the best fit.

    Pixels that objects in front hide are not counted. Soft edges lose the tips of a star and the
    corners of a triangle, up to an eighth of the radius, which makes the box too small; so each
    shape is tried a little larger as well.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
    hidden = np.zeros_like(mask)
    for _, other in blobs:
        if other is not mask and other.sum() < mask.sum():
            hidden |= ndimage.binary_dilation(ndimage.binary_fill_holes(other), iterations=2)
    visible = ~hidden | mask
    best: tuple[float, str, tuple[float, float, float]] = (-1.0, "", (0.0, 0.0, 0.0))
    for shape, growth in product(SHAPES, LOST_TIPS):
        spot = _fit_box(shape, box, growth)
        template = coverage(shape, *spot, *mask.shape) > 0.5
        union = ((template | mask) & visible).sum()
        fit = float((template & mask & visible).sum() / max(union, 1))
        best = max(best, (fit, shape, spot))
    fit, shape, (x, y, radius) = best
    short = min(mask.shape)
    return Found(_NAMES[color], shape, x / short, y / short, radius / short, fit)


@lru_cache
def _unit_box(shape: str) -> tuple[np.ndarray, np.ndarray]:
    outline = np.concatenate(SHAPES[shape][0])
    return outline.min(0), outline.max(0)


def _fit_box(shape: str, box: np.ndarray, growth: float) -> tuple[float, float, float]:
    """Return the center and radius for which a shape has this bounding box.

    Where width and height disagree, the box's area decides. The radius is then multiplied by
    `growth`, about the same middle.
    """
    low, high = _unit_box(shape)
    extent = box[2:] - box[:2]
    radius = growth * float(np.sqrt(np.prod(extent) / np.prod(high - low)))
    middle = (box[:2] + box[2:]) / 2 - radius * (low + high) / 2
    return float(middle[0]), float(middle[1]), radius


CHECKS = ("background", "count", "shape", "color", "size", "relation")
LEAST_FIT = 0.75


def check(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Compare an image with a scene.

    An object has the right shape only if that shape fits best, and by at least `LEAST_FIT`. Objects
    are matched to the scene's in the order that agrees best. With a missing or an extra object,
    everything but the background is wrong.
    **Returns:** whether each attribute of `CHECKS` is right, and "all".
    """
    background, found = find(image)
    verdict = dict.fromkeys(CHECKS, False)
    verdict["background"] = background == scene.background
    verdict["count"] = len(found) == len(scene.things)
    if verdict["count"]:
        orders = [found] if len(found) == 1 else [found, found[::-1]]
        best = max((_compare(order, scene) for order in orders), key=lambda v: sum(v.values()))
        verdict |= best
    return verdict | {"all": all(verdict.values())}


def _compare(found: list[Found], scene: Scene) -> dict[str, bool]:
    pairs = list(zip(found, scene.things, strict=True))
    return {
        "shape": all(f.shape == t.shape and f.fit >= LEAST_FIT for f, t in pairs),
        "color": all(f.color == t.color for f, t in pairs),
        "size": all(SIZE_LIMITS[t.size][0] < f.radius <= SIZE_LIMITS[t.size][1] for f, t in pairs),
        "relation": scene.relation is None or _holds(scene.relation, *found),
    }


def _holds(relation: str, a: Found, b: Found) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    if relation == "inside":
        return max(abs(dx), abs(dy)) + a.radius < b.radius
    along, across = (dy, dx) if relation in ("above", "below") else (dx, dy)
    return (along if relation in ("above", "left of") else -along) > max(0.1, abs(across))
