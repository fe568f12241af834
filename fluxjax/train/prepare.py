"""One example on the host: its images read, resized to its size, and masked."""

from typing import NamedTuple

import numpy as np

from fluxjax.generate.image import decode_image
from fluxjax.train.buckets import Size, resize_to_cover, token_means
from fluxjax.train.catalog import Catalog
from fluxjax.train.data_settings import DataSettings
from fluxjax.train.examples import AbstractBytes, Example

_FLIP, _MASK, _LATENT = range(3)
"""What random numbers of an example are for."""
_WHOLE_SHARE = 0.1
"""Of random masks, those that hide the whole image."""
_MOST_RECTANGLES = 3
_PROPORTION_TOLERANCE = 0.02
"""How far the proportions of a control image or a mask may be from the image's, relatively."""


class PreparedExample(NamedTuple):
    """An example whose images are read.

    `image`: in [-1, 1], [height, width, 3]. `condition`: likewise, the image that is encoded for
    the condition, if there is one. `hidden`: of Fill, 1 where the image is repainted, else 0,
    [height, width]. `counted`: how much each token counts in the loss, [tokens].
    """

    image: np.ndarray
    caption: str
    weight: float
    condition: np.ndarray | None = None
    hidden: np.ndarray | None = None
    counted: np.ndarray | None = None


def prepare_example(
    catalog: Catalog, settings: DataSettings, number: int, epoch: int, *, flip: bool
) -> PreparedExample:
    """Read an example.

    **Arguments:** `number`: of the example in the catalog. `epoch`: which a random mask depends on.
    `flip`: mirror all its images.
    **Raises:** `OSError` and `ValueError` for an image that can't be read, or a control image or a
    mask of other proportions than the image.
    """
    example = catalog.examples[number]
    size = catalog.sizes[number]
    pixels = decode_image(example.image.read(), example.name)
    image = resize_to_cover(pixels, size)
    is_fill = settings.condition == "fill"
    mask = None
    if example.mask is not None and (settings.masked_loss or is_fill):
        mask = _read_mask(example.mask, pixels.shape, size)
    hidden = None
    if is_fill:
        rng = example_rng(settings.seed, epoch, number, _MASK)
        hidden = random_mask(rng, size) if mask is None else np.round(mask)
    condition = _condition(example, settings, size, image, hidden, pixels.shape)
    counted = None
    if settings.masked_loss:
        counted = np.ones(size, np.float32) if mask is None else mask
    if flip:
        image = np.ascontiguousarray(image[:, ::-1])
        condition = _mirrored(condition)
        hidden = _mirrored(hidden)
        counted = _mirrored(counted)
    return PreparedExample(
        image=image,
        caption=example.caption,
        weight=example.weight,
        condition=condition,
        hidden=hidden,
        counted=None if counted is None else token_means(counted),
    )


def _condition(
    example: Example,
    settings: DataSettings,
    size: Size,
    image: np.ndarray,
    hidden: np.ndarray | None,
    shape: tuple[int, ...],
) -> np.ndarray | None:
    """Return the image that is encoded for the condition.

    **Arguments:** `image`: resized. `shape`: of the image before.
    """
    if hidden is not None:
        # Hidden pixels become 0, which is gray.
        return image * (1 - hidden[..., None])
    if settings.condition == "control" and example.control is not None:
        control = decode_image(example.control.read(), example.control.name)
        _check_proportions("control image", control.shape, shape)
        return resize_to_cover(control, size)
    if settings.condition == "reference" and example.source is not None:
        source = decode_image(example.source.read(), example.source.name)
        return resize_to_cover(source, size)
    return None


def _read_mask(data: AbstractBytes, shape: tuple[int, ...], size: Size) -> np.ndarray:
    """Return a mask in [0, 1], [height, width], at the size of the training.

    **Arguments:** `shape`: of the image that it belongs to, before that is resized.
    **Raises:** `ValueError` for a mask of other proportions.
    """
    pixels = decode_image(data.read(), data.name)
    mask = (pixels.mean(axis=-1, keepdims=True) + 1) / 2
    _check_proportions("mask", mask.shape, shape)
    resized = resize_to_cover(mask, size, smooth=True)
    return np.clip(resized[..., 0], 0, 1)


def _check_proportions(what: str, shape: tuple[int, ...], of_image: tuple[int, ...]) -> None:
    """**Raises:** `ValueError` for a shape of other proportions than the image's."""
    height, width = shape[:2]
    image_height, image_width = of_image[:2]
    ratio = width * image_height / (height * image_width)
    if abs(ratio - 1) > _PROPORTION_TOLERANCE:
        raise ValueError(
            f"its {what} has {width}x{height} pixels, other proportions than the image's "
            f"{image_width}x{image_height}"
        )


def _mirrored(values: np.ndarray | None) -> np.ndarray | None:
    """Return an image or a mask with left and right exchanged."""
    if values is None:
        return None
    return np.ascontiguousarray(values[:, ::-1])


def random_mask(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Return a mask for Fill: 1 where the image is hidden, else 0, float32.

    One in ten hides the whole image; the others are 1 to 3 rectangles, whose sides are from an
    eighth of the image's to all of them.
    """
    if rng.random() < _WHOLE_SHARE:
        return np.ones(size, np.float32)
    mask = np.zeros(size, np.float32)
    for _ in range(rng.integers(1, _MOST_RECTANGLES + 1)):
        height = int(rng.integers(size[0] // 8, size[0] + 1))
        width = int(rng.integers(size[1] // 8, size[1] + 1))
        top = int(rng.integers(0, size[0] - height + 1))
        left = int(rng.integers(0, size[1] - width + 1))
        mask[top : top + height, left : left + width] = 1
    return mask


def example_rng(seed: int, epoch: int, number: int, purpose: int) -> np.random.Generator:
    """Return random numbers that depend on nothing else.

    **Arguments:** `seed`: of the training. `number`: of the example. `purpose`: what they are for.
    """
    return np.random.default_rng((seed, epoch, number, purpose))


def is_flipped(settings: DataSettings, epoch: int, number: int) -> bool:
    """Return whether an example is mirrored in an epoch."""
    if not settings.flip:
        return False
    rng = example_rng(settings.seed, epoch, number, _FLIP)
    return bool(rng.random() < 0.5)


def latent_noise(
    settings: DataSettings, epoch: int, number: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Return the noise by which an example's latent is drawn from its posterior, float32."""
    rng = example_rng(settings.seed, epoch, number, _LATENT)
    return rng.standard_normal(shape, np.float32)


def blank_example(settings: DataSettings, size: Size) -> PreparedExample:
    """Return a gray image without a caption and without weight, to fill a batch."""
    image = np.zeros((*size, 3), np.float32)
    hidden = counted = None
    if settings.condition == "fill":
        hidden = np.zeros(size, np.float32)
    if settings.masked_loss:
        counted = token_means(np.ones(size, np.float32))
    return PreparedExample(
        image=image,
        caption="",
        weight=0.0,
        condition=None if settings.condition is None else image,
        hidden=hidden,
        counted=counted,
    )
