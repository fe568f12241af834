"""Pictures of many scenes at once, masks and edges, as compiled functions of arrays.

A shape is a table of signed distances, so that a batch is drawn where the networks run.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from adapter_examples import Blot
from PIL import Image, ImageDraw
from placed import SIZE, Placed
from scenes import BACKGROUNDS, COLORS, SHAPES
from scipy import ndimage

MOST_THINGS = 2
GRID, EXTENT = 256, 1.3
LOW, HIGH = 50, 200
HYSTERESIS = 24


class SceneArrays(NamedTuple):
    """Scenes as numbers, each with a leading axis of scenes.

    `ground`: RGB of the background, [3]. `color`: of each object, [things, 3]. `shape`: its number.
    `spot`: its center (x, y) and radius, in pixels; a radius of 0 is no object.
    """

    ground: np.ndarray
    color: np.ndarray
    shape: np.ndarray
    spot: np.ndarray


def scene_arrays(scenes: Sequence[Placed]) -> SceneArrays:
    """Return scenes as numbers."""
    count, names = len(scenes), list(SHAPES)
    arrays = SceneArrays(
        np.zeros((count, 3), np.float32),
        np.zeros((count, MOST_THINGS, 3), np.float32),
        np.zeros((count, MOST_THINGS), np.int32),
        np.zeros((count, MOST_THINGS, 3), np.float32),
    )
    for row, placed in enumerate(scenes):
        arrays.ground[row] = BACKGROUNDS[placed.scene.background]
        for index, (thing, (x, y, radius)) in enumerate(
            zip(placed.scene.things, placed.spots, strict=True)
        ):
            arrays.color[row, index] = COLORS[thing.color]
            arrays.shape[row, index] = names.index(thing.shape)
            arrays.spot[row, index] = ((x + 0.5) * SIZE, (y + 0.5) * SIZE, radius * SIZE)
    return arrays


@lru_cache
def distance_tables() -> np.ndarray:
    """Return the signed distance from the outline of each shape of radius 1, negative inside.

    **Returns:** [shapes, GRID, GRID], over the square from -EXTENT to EXTENT.
    """
    fine = 4 * GRID
    tables = []
    for filled, cut in SHAPES.values():
        canvas = Image.new("1", (fine, fine))
        draw = ImageDraw.Draw(canvas)
        for outlines, value in ((filled, 1), (cut, 0)):
            for outline in outlines:
                corners = (outline + EXTENT) / (2 * EXTENT) * fine - 0.5
                draw.polygon([(float(x), float(y)) for x, y in corners], fill=value)
        inside = np.asarray(canvas, bool)
        outer, inner = (
            ndimage.distance_transform_edt(~inside),
            ndimage.distance_transform_edt(inside),
        )
        distance = (outer - inner) * 2 * EXTENT / fine
        tables.append(distance.reshape(GRID, 4, GRID, 4).mean((1, 3)))
    return np.stack(tables).astype(np.float32)


def draw_scene(scene: SceneArrays, tables: jax.Array) -> jax.Array:
    """Draw one scene: [128, 128, 3] in [-1, 1]."""
    y, x = jnp.mgrid[:SIZE, :SIZE] + 0.5
    image = jnp.broadcast_to(scene.ground, (SIZE, SIZE, 3))
    for index in reversed(range(MOST_THINGS)):
        left, top, radius = scene.spot[index]
        scale = GRID / (2 * EXTENT) / jnp.maximum(radius, 1e-3)
        at = [(offset * scale + GRID / 2 - 0.5) for offset in (y - top, x - left)]
        table = tables[scene.shape[index]]
        distance = jax.scipy.ndimage.map_coordinates(table, at, order=1, mode="nearest")
        alpha = jnp.where(radius > 0, jnp.clip(0.5 - distance * radius, 0, 1), 0)[..., None]
        image = image + alpha * (scene.color[index] - image)
    return image / 127.5 - 1


@jax.jit
def draw_scenes(scenes: SceneArrays, tables: jax.Array) -> jax.Array:
    """Draw a batch of scenes: [scenes, 128, 128, 3] in [-1, 1]."""
    return jax.vmap(draw_scene, in_axes=(0, None))(scenes, tables)


def gray_picture(image: jax.Array) -> jax.Array:
    """Return the luminance of an image in all three channels."""
    luminance = image @ jnp.array([0.299, 0.587, 0.114])
    return jnp.repeat(luminance[..., None], 3, axis=-1)


def edge_picture(image: jax.Array) -> jax.Array:
    """Return Canny edges of one image in [-1, 1] as a picture, white on black: -1 or 1.

    Thresholds of 50 and 200 for the sum of both absolute Sobel derivatives, in the channel where it
    is largest.
    **Source:** Canny 1986; the details are those of OpenCV.
    """
    pixels = jnp.round((image + 1) * 127.5)
    padded = jnp.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = padded[:, 2:] - padded[:, :-2]
    down = padded[2:] - padded[:-2]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    sizes = jnp.abs(dx) + jnp.abs(dy)
    channel = jnp.argmax(sizes, axis=-1, keepdims=True)
    size, dx, dy = (jnp.take_along_axis(a, channel, -1)[..., 0] for a in (sizes, dx, dy))
    thin = _is_largest_across(size, dx, dy)
    weak, strong = thin & (size > LOW), thin & (size > HIGH)
    for _ in range(HYSTERESIS):
        near = jax.lax.reduce_window(strong, False, jnp.logical_or, (3, 3), (1, 1), "SAME")
        strong = near & weak
    return jnp.where(strong[..., None], 1.0, -1.0) * jnp.ones(3)


def _is_largest_across(size: jax.Array, dx: jax.Array, dy: jax.Array) -> jax.Array:
    """Return where the gradient is larger than that of both neighbours along its direction."""
    around = jnp.pad(size, 1)

    def neighbour(row: int, column: int) -> jax.Array:
        return around[1 + row : 1 + row + SIZE, 1 + column : 1 + column + SIZE]

    flat, steep = jnp.abs(dy) < 0.41421356 * jnp.abs(dx), jnp.abs(dy) > 2.41421356 * jnp.abs(dx)
    sideways = (size > neighbour(0, -1)) & (size >= neighbour(0, 1))
    upright = (size > neighbour(-1, 0)) & (size >= neighbour(1, 0))
    falling = (size > neighbour(-1, -1)) & (size > neighbour(1, 1))
    rising = (size > neighbour(-1, 1)) & (size > neighbour(1, -1))
    diagonal = jnp.where(dx * dy < 0, rising, falling)
    return jnp.where(flat, sideways, jnp.where(steep, upright, diagonal))


def draw_mask(blots: Blot) -> jax.Array:
    """Draw one mask, [128, 128]: 1 where one of its blots lies."""
    y, x = jnp.mgrid[:SIZE, :SIZE] + 0.5
    at = jnp.stack([x, y], axis=-1)

    def one(is_ellipse: jax.Array, middle: jax.Array, half: jax.Array) -> jax.Array:
        offset = jnp.abs(at - middle) / jnp.maximum(half, 1e-3)
        round_ = jnp.square(offset).sum(-1) <= 1
        return jnp.where(is_ellipse, round_, offset.max(-1) <= 1) & (half.min() > 0)

    return jax.vmap(one)(*blots).any(0).astype(jnp.float32)


def mask_features(mask: jax.Array) -> jax.Array:
    """Return a mask as features of image tokens, as FLUX.1 Fill takes them: [tokens, 256].

    Feature (py * 8 + px) * 4 + dy * 2 + dx is the pixel
    (16 row + 8 dy + py, 16 column + 8 dx + px).
    """
    rows, columns = mask.shape[0] // 16, mask.shape[1] // 16
    cells = mask.reshape(rows, 2, 8, columns, 2, 8)
    ordered = cells.transpose(0, 3, 2, 5, 1, 4)  # row, column, py, px, dy, dx
    return ordered.reshape(rows * columns, 256)
