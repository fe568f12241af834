"""Regional prompts: parts of an image, boxes or masks, that follow prompts of their own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.generate.conditioning import AddedCondition, Conditioning
from fluxjax.generate.controls import control_times
from fluxjax.generate.latents import check_size
from fluxjax.generate.masks import PixelMask, mask_tokens
from fluxjax.generate.region_prompts import MixedPrompts, RegionLabels, RegionPrompts
from fluxjax.generate.text import TextStates
from fluxjax.numeric import check_finite, is_concrete_number
from fluxjax.shapes import Array, Float, ScalarLike, Times
from fluxjax.zoo import FLUX1

REGION_RULES = ("attention", "mix")
"""How regions follow their prompts: by the transformer's attention, or by mixing velocities."""
REGION_BASE = 0.3
REGION_UNTIL = 0.4
"""The share of the base prompt, and of the steps in which regions count, for "attention"."""
MAX_REGIONS = 30
"""Regions of an image: each is a bit of an int32, and so is what no region covers."""


@convert_arguments
@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """A part of an image.

    `box`: left, top, right and bottom edge, as shares of the width and height, 0 to 1. `mask`:
    values in [0, 1], [height, width], as `read_mask` gives them; of another size than the image it
    is scaled. With neither, the region is the background: what no other region covers.

    **Raises:** `ValueError` for both, a box that is not one, or a mask with other values.
    """

    box: Sequence[float] | None = None
    mask: PixelMask | None = None

    def __post_init__(self):
        if self.box is not None and self.mask is not None:
            raise ValueError("`Region` takes a box or a mask, got both. Leave one out.")
        if self.box is not None:
            object.__setattr__(self, "box", _checked_box(self.box))
        if self.mask is not None:
            object.__setattr__(self, "mask", _checked_mask(self.mask))

    @property
    def is_background(self) -> bool:
        return self.box is None and self.mask is None

    def pixels(self, height: int, width: int) -> np.ndarray:
        """Return how strongly each pixel of an image belongs to the region, [height, width].

        That of the background is 0 here: it depends on the other regions. A box has the pixels
        whose centers lie in it; of a scaled mask each pixel takes the nearest value.
        """
        row, column = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
        if self.box is not None:
            left, top, right, bottom = self.box
            rows, columns = (top <= row) & (row < bottom), (left <= column) & (column < right)
            return np.outer(rows, columns).astype(np.float32)
        if self.mask is None:
            return np.zeros((height, width), np.float32)
        mask_height, mask_width = self.mask.shape
        nearest = np.ix_((row * mask_height).astype(int), (column * mask_width).astype(int))
        return np.asarray(self.mask)[nearest]


def _checked_box(box: Sequence[float]) -> tuple[float, float, float, float]:
    """Return a box as numbers. **Raises:** `ValueError` for one that is no part of the image."""
    values = np.asarray(box, np.float64)
    if values.shape == (4,):
        left, top, right, bottom = map(float, values)
        # Written so that NaN fails.
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
            return left, top, right, bottom
    shown = ", ".join(f"{value:g}" for value in values.ravel()[:8])
    raise ValueError(
        "`Region(box)` needs left < right and top < bottom, as shares of the image in [0, 1], got "
        f"{shown}. The left half is 0, 0, 0.5, 1."
    )


def _checked_mask(mask: PixelMask) -> np.ndarray:
    values = np.asarray(mask, np.float32)
    # Written so that NaN fails.
    if values.size and values.min() >= 0 and values.max() <= 1:
        return values
    raise ValueError(
        f"`Region(mask)` needs [height, width] values in [0, 1], got the shape {values.shape}"
        " or other values. `read_mask` reads an image as one."
    )


@convert_arguments
def region_labels(regions: Sequence[Region], height: int, width: int) -> np.ndarray:
    """Return which regions each image token belongs to, as bits: bit i for region i.

    A token, 16x16 pixels, belongs to a region that covers at least half of it. Tokens of no region
    have the bit of the background, or if there is none, the bit after those of all regions.

    **Arguments:** `height`, `width`: of the image in pixels, multiples of 16.
    **Returns:** int32, [img_tokens].
    **Raises:** `ValueError` for no region or more than `MAX_REGIONS`, two backgrounds, a region
    that covers no token, or other sizes.
    """
    check_size("`region_labels`", height, width)
    rest = _rest_of(regions)
    side = FLUX1.latent.token_side
    labels = np.zeros((height // side, width // side), np.int32)
    for number, region in enumerate(regions):
        covered = _cell_means(region.pixels(height, width), side) >= 0.5
        labels |= np.where(covered, 1 << number, 0).astype(np.int32)
        if not covered.any() and not region.is_background:
            raise ValueError(
                f"Region {number + 1} of {len(regions)} covers half of no token, {side}x{side} "
                f"pixels, of an image of {width}x{height}. Make it larger."
            )
    labels[labels == 0] = 1 << rest
    return labels.ravel()


@convert_arguments
def region_weights(
    regions: Sequence[Region], height: int, width: int, *, base: float = 0.0
) -> Float[Array, "prompts img_tokens features"]:
    """Return the weights with which `fluxjax.flow.Mixed` mixes the velocities of regions.

    At each latent cell, 8x8 pixels, a region weighs as much as it covers of it, and where regions
    cover less than 1 together, the background has the rest: a region that is one, or the base
    prompt. `Mixed` divides by the sum.

    **Arguments:** `height`, `width`: of the image in pixels, multiples of 16. `base`: the share of
    the base prompt where there are regions, 0 to 1.
    **Returns:** those of the base prompt, then of each region; tokens as of packed latents.
    **Raises:** `ValueError` for no region or more than `MAX_REGIONS`, two backgrounds, a base
    outside of [0, 1], or other sizes.
    """
    check_size("`region_weights`", height, width)
    _check_share("region_weights", "base", base)
    rest = _rest_of(regions)
    cells = [np.zeros((height // FLUX1.latent.cell, width // FLUX1.latent.cell), np.float32)]
    for region in regions:
        cells.append(_cell_means(region.pixels(height, width), FLUX1.latent.cell))
    left_over = np.maximum(1 - np.sum(cells, axis=0), 0)
    if rest < len(regions):
        cells[rest + 1] = left_over
        left_over = np.zeros_like(left_over)
    weights = [base + (1 - base) * left_over]
    weights += [(1 - base) * cell for cell in cells[1:]]
    return jnp.stack([mask_tokens(jnp.asarray(one, jnp.float32)) for one in weights])


def check_region_list(regions: Sequence[Region]) -> None:
    """**Raises:** `ValueError` for no region or more than `MAX_REGIONS`, or two backgrounds."""
    backgrounds = sum(region.is_background for region in regions)
    if not 1 <= len(regions) <= MAX_REGIONS:
        raise ValueError(
            f"Regional prompts need 1 to {MAX_REGIONS} regions, got {len(regions)}. "
            "Pass one `Region` for each prompt."
        )
    if backgrounds > 1:
        raise ValueError(
            f"Regional prompts have one background at most, got {backgrounds}. "
            "Give the others a box or a mask."
        )


def _rest_of(regions: Sequence[Region]) -> int:
    """Return the number of the background; that after the last region if there is none."""
    check_region_list(regions)
    for number, region in enumerate(regions):
        if region.is_background:
            return number
    return len(regions)


def _cell_means(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return the mean of each square of side x side pixels."""
    height, width = pixels.shape
    return pixels.reshape(height // side, side, width // side, side).mean(axis=(1, 3))


def check_until(until: float, steps: int) -> None:
    """Check that regions count in some of the steps.

    **Raises:** `ValueError` if they do in none.
    """
    if until * steps < 1 - 1e-5:
        raise ValueError(
            f"`regional_condition(until={until:g})` is the share of the steps in which regions "
            f"count, and that is none of {steps}. Choose {math.ceil(100 / steps) / 100:g} or more."
        )


def _check_share(call: str, name: str, value: float) -> None:
    check_finite(call, **{name: value})
    if not 0 <= value <= 1:
        raise ValueError(f"`{call}({name})` is a share, 0 to 1, got {value:g}. Choose one of them.")


class RegionalCondition(AddedCondition):
    """Prompts of regions that the transformer attends to by `RegionalAttention`.

    `until`: the share of the steps in which they count.
    """

    prompts: RegionPrompts
    until: ScalarLike

    def add(self, conditioning: Conditioning) -> Conditioning:
        _check_fits(conditioning, self.prompts.labels.img_labels.shape[-1], self.prompts.region_txt)
        text = self.prompts.region_txt.astype(conditioning.txt.dtype)
        return replace(conditioning, regions=RegionPrompts(text, self.prompts.labels))

    def add_to_negative(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    def for_times(self, times: Times) -> "RegionalCondition":
        """Return this condition for the nodes of a sampling.

        **Raises:** `ValueError` if regions count in none of its steps.
        """
        if is_concrete_number(self.until):
            check_until(np.asarray(self.until).item(), len(times) - 1)
        low, _ = control_times(times, end=self.until)
        labels = replace(self.prompts.labels, low=low)
        return RegionalCondition(replace(self.prompts, labels=labels), self.until)


class MixedCondition(AddedCondition):
    """Prompts of regions whose velocities are mixed with that of the base prompt."""

    prompts: MixedPrompts

    def add(self, conditioning: Conditioning) -> Conditioning:
        _check_fits(conditioning, self.prompts.weights.shape[-2], self.prompts.texts)
        vec = _pooled(conditioning.vec)
        prompts = MixedPrompts(
            self.prompts.texts.astype(conditioning.txt.dtype),
            self.prompts.pooled.astype(vec.dtype),
            self.prompts.weights,
        )
        return replace(conditioning, mixed=prompts)

    def add_to_negative(self, conditioning: Conditioning) -> Conditioning:
        return conditioning


def _pooled(vec: Array | None) -> Array:
    """Return a pooled text. **Raises:** `ValueError` for a model that reads none."""
    if vec is None:
        raise ValueError(
            "`regional_condition` is for networks that read a pooled text and attend to all of the "
            "text's tokens. Chroma does not: use FLUX.1-dev, schnell, or a model made from them."
        )
    return vec


def _check_fits(conditioning: Conditioning, tokens: int, text: Array) -> None:
    """**Raises:** `ValueError` for regions of another image or network, or a second set."""
    _pooled(conditioning.vec)
    if conditioning.txt_length is not None:
        raise ValueError(
            "`regional_condition` is for models that attend to all tokens of a text, and this one "
            "leaves out the padding of its prompts. Use FLUX.1-dev or schnell."
        )
    if conditioning.regions is not None or conditioning.mixed is not None:
        raise ValueError(
            "`Conditioning` has regions already. Pass all of them to one `regional_condition`."
        )
    own, width = conditioning.img_ids.shape[-2], conditioning.txt.shape[-1]
    if (own, width) != (tokens, text.shape[-1]):
        raise ValueError(
            f"`regional_condition` made regions of {tokens} image tokens and text of "
            f"{text.shape[-1]} features, and the images have {own} and {width}. Make them for this "
            "size, with this model's encoders."
        )


@convert_arguments
def regional_condition(
    states: TextStates,
    regions: Sequence[Region],
    *,
    height: int,
    width: int,
    rule: str = "attention",
    base: float | None = None,
    until: float | None = None,
) -> RegionalCondition | MixedCondition:
    """Return what images are conditioned on whose parts follow prompts of their own.

    It is one of `DrawSettings.conditions`; the prompt of the images is the base prompt. With a
    negative prompt, images are guided away from it as a whole. Regions may overlap.

    - "attention": text and image tokens see only those of their own region, and the base prompt
      counts by `base`, in the first part of the steps; later the base prompt counts alone. One
      evaluation a step, longer by the regions' texts. CLIP's state is that of the base prompt.
    - "mix": the velocity at each latent cell is that of its region's prompt, each of which is
      evaluated for the whole image: one evaluation a step for each region beside that of the base.

    **Arguments:** `states`: the regions' prompts, encoded as those of images. `regions`: as many.
    `height`, `width`: of the images in pixels, multiples of 16. `rule`: one of the above. `base`:
    the share of the base prompt within regions, 0 to 1; by default 0.3 for "attention", 0 for
    "mix". `until`: the share of the steps in which regions count, above 0; by default 0.4. Only for
    "attention". It takes effect by `for_times`, which the drawing functions call.
    **Raises:** `ValueError` for another number of prompts, an unknown rule, shares outside of their
    range, and as `region_labels` or `region_weights`.
    **Source:** attention: Chen et al. 2024 (2411.02395), whose code has 10 of 24 steps; mix:
    Bar-Tal et al. 2023, MultiDiffusion.
    """
    call = "regional_condition"
    if rule not in REGION_RULES:
        raise ValueError(f"`{call}(rule)` takes one of {', '.join(REGION_RULES)}, got {rule!r}.")
    _pooled(states.vec)
    if len(states.txt) != len(regions):
        raise ValueError(
            f"`{call}` needs one prompt for each region, got {len(states.txt)} encoded prompts and "
            f"{len(regions)} regions. Encode a list of the regions' prompts."
        )
    if rule == "mix":
        if until is not None:
            raise ValueError(f"`{call}(until)` is for the rule attention. Leave it out.")
        share = 0.0 if base is None else base
        weights = region_weights(regions, height, width, base=share)
        return MixedCondition(MixedPrompts(states.txt, _pooled(states.vec), weights))
    share = REGION_BASE if base is None else base
    steps = REGION_UNTIL if until is None else until
    _check_share(call, "base", share)
    _check_share(call, "until", steps)
    if steps == 0:
        raise ValueError(f"`{call}(until)` is above 0, got 0. Leave the regions out instead.")
    prompts, tokens, features = states.txt.shape
    labels = RegionLabels(
        jnp.asarray(np.repeat(1 << np.arange(prompts, dtype=np.int32), tokens)),
        jnp.asarray(region_labels(regions, height, width)),
        jnp.float32(share),
        jnp.float32(-1),
    )
    text = states.txt.reshape(prompts * tokens, features)
    return RegionalCondition(RegionPrompts(text, labels), jnp.float32(steps))
