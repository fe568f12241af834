"""What images are conditioned on beside a prompt, as options of the command line name it.

Each option, or group of options that belong together, becomes one `ConditionSource`: a record of
plain values, made once by a function that is listed in `_READERS`. Another one needs its options
(in `condition_options.py`, with their defaults), a subclass, and its reader in that list; then it
works for one prompt and for the lines of a file, on a mesh and in several processes.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from tqdm import tqdm

from fluxjax.cli.condition_source import (
    ConditionFacts,
    ConditionNetwork,
    ConditionOfSize,
    ConditionParts,
    ConditionSource,
)
from fluxjax.cli.console import interruptible
from fluxjax.cli.image_prompts import read_image_prompts
from fluxjax.cli.output import encodable
from fluxjax.cli.regions import read_regions
from fluxjax.cli.starts import describe_file
from fluxjax.generate.channels import check_features
from fluxjax.generate.condition_images import resize_image
from fluxjax.generate.conditioning import AddedCondition
from fluxjax.generate.control import control_condition
from fluxjax.generate.controlnet import ControlSettings, controlnet_condition
from fluxjax.generate.edges import canny_edges, import_opencv
from fluxjax.generate.image import read_image
from fluxjax.generate.limits import controlnet_config
from fluxjax.generate.load_network import load_network
from fluxjax.generate.stage_memory import AddedTokens
from fluxjax.nets.controlnet import ControlNet
from fluxjax.printable import printable
from fluxjax.shapes import Image


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlSource(ConditionSource):
    """A control image.

    `image`: in [-1, 1], of any size; it is resized to that of the images. `is_canny`: whether its
    edges are the control, and not the image itself.
    """

    path: Path
    image: Image
    is_canny: bool

    @property
    def takes(self) -> str:
        return "control"

    def describe(self) -> Mapping[str, str]:
        about = {"control": describe_file(self.path)}
        if self.is_canny:
            about["control"] += ", canny edges"
        return about

    def load(self, parts: ConditionParts) -> ConditionOfSize:
        def condition(height: int, width: int) -> AddedCondition:
            note_stretched(str(self.path), self.image, height, width)
            image = resize_image(self.image, height, width)
            # Of the resized image: the thresholds are for edges at the size that is drawn.
            control = canny_edges(image) if self.is_canny else image
            return control_condition(
                parts.vae,
                control,
                dtype=parts.dtype,
                mesh=parts.load.mesh,
                hooks=parts.hooks,
            )

        return condition


def _read_control(options: argparse.Namespace) -> ConditionSource | None:
    """Return the control image that options name, if any.

    **Raises:** `ValueError` for --canny without an image, or without OpenCV.
    """
    if options.control is None:
        if options.canny:
            raise ValueError("--canny does nothing without --control. Give an image.")
        return None
    image = jnp.asarray(interruptible(read_image, options.control))
    if options.canny:
        _check_opencv()  # before the networks are loaded
    return ControlSource(path=options.control, image=image, is_canny=options.canny)


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlNetSource(ConditionSource):
    """A ControlNet and the image that it follows.

    `number`: which of the command's it is, from 1. `source`: as for `load_controlnet`. `image`: in
    [-1, 1], of any size; it is resized to that of the images. `loaded`: the networks by source,
    shared by all, so that each is loaded once.
    """

    number: int
    source: str
    path: Path
    image: Image
    settings: ControlSettings
    loaded: dict[str, ControlNet]

    @property
    def networks(self) -> Sequence[ConditionNetwork]:
        return (ConditionNetwork("controlnet", self.source, stays=True),)

    def added_tokens(self, img_tokens: int, max_length: int) -> AddedTokens:
        config = controlnet_config(self.source)
        return AddedTokens(residuals=config.double_depth + config.single_depth)

    def check(self, facts: ConditionFacts) -> None:
        mesh = facts.load.mesh
        if mesh is not None and mesh.shape["context"] > 1:
            raise ValueError(
                "--controlnet adds to all tokens of an image, and --mesh splits them. "
                "Use context=1 with it."
            )

    def describe(self) -> Mapping[str, str]:
        settings = self.settings
        parts = [printable(self.source), describe_file(self.path), f"scale {settings.scale:g}"]
        if settings.mode is not None:
            parts.append(f"mode {settings.mode}")
        if (settings.start, settings.end) != (0, 1):
            parts.append(f"from {settings.start:g} to {settings.end:g} of the steps")
        if not settings.shared:
            parts.append("own negative")
        name = "controlnet" if self.number == 1 else f"controlnet {self.number}"
        return {name: encodable(", ".join(parts))}

    def load(self, parts: ConditionParts) -> ConditionOfSize:
        if self.source not in self.loaded:
            load = partial(load_network, "controlnet", self.source, parts.load)
            self.loaded[self.source] = cast(ControlNet, parts.time_load("controlnet", load))
        net = self.loaded[self.source]

        def condition(height: int, width: int) -> AddedCondition:
            note_stretched(str(self.path), self.image, height, width)
            return controlnet_condition(
                net,
                parts.vae,
                resize_image(self.image, height, width),
                self.settings,
                dtype=parts.dtype,
                mesh=parts.load.mesh,
                hooks=parts.hooks,
            )

        return condition


def _controlnet_sources(options: argparse.Namespace) -> Sequence[ConditionSource]:
    """Return the ControlNets that the options name, with the values of each."""
    count = len(options.controlnet)
    if len(options.controlnet_image) != count:
        raise ValueError(
            f"--controlnet takes one --controlnet-image for each, got {count} and "
            f"{len(options.controlnet_image)}. Repeat both as often."
        )
    values: list[dict] = [{"shared": options.controlnet_negative == "shared"} for _ in range(count)]
    for name in ("scale", "mode", "start", "end"):
        given = getattr(options, f"controlnet_{name}")
        if given and (count == 0 or len(given) not in (1, count)):
            raise ValueError(
                f"--controlnet-{name} is given once for all --controlnet, or once for each, got "
                f"{len(given)} for {count}. Repeat it as often as these."
            )
        for index, own in enumerate(values if given else ()):
            own[name] = given[index % len(given)]
    loaded: dict[str, ControlNet] = {}
    sources = []
    for index, (source, path) in enumerate(
        zip(options.controlnet, options.controlnet_image, strict=True)
    ):
        sources.append(
            ControlNetSource(
                number=index + 1,
                source=source,
                path=path,
                image=jnp.asarray(interruptible(read_image, path)),
                settings=ControlSettings(**values[index]),
                loaded=loaded,
            )
        )
    return sources


def _check_opencv() -> None:
    try:
        import_opencv()
    except ImportError as error:
        raise ValueError(str(error)) from None


_READERS: Sequence[Callable[[argparse.Namespace], ConditionSource | None]] = (
    _read_control,
    read_image_prompts,
    read_regions,
)
"""Functions that return the source that the options name, or None if they name none."""


def condition_sources(options: argparse.Namespace) -> tuple[ConditionSource, ...]:
    """Return what the options condition images on, in the order in which it is added.

    **Raises:** `ValueError` or `OSError` for a file that can't be read.
    """
    sources = []
    for read in _READERS:
        source = read(options)
        if source is not None:
            sources.append(source)
    return (*sources, *_controlnet_sources(options))


def check_conditions(
    sources: Sequence[ConditionSource], facts: ConditionFacts, *, features: int = 0
) -> None:
    """Check that a model takes what it is given.

    **Arguments:** `features`: appended to each token beside those of the sources.
    **Raises:** `ValueError` for conditions that the model does not take, or that it lacks.
    """
    for source in sources:
        source.check(facts)
    if facts.flux is not None:
        features += sum(source.features for source in sources)
        check_features(f"--model {facts.model}", facts.flux, features)


def load_conditions(
    sources: Sequence[ConditionSource], parts: ConditionParts
) -> tuple[ConditionOfSize, ...]:
    """Load what all sources need; each returned function keeps the condition of its last size."""
    return tuple(lru_cache(maxsize=1)(source.load(parts)) for source in sources)


def note_stretched(name: str, image: Image, height: int, width: int) -> None:
    """Print a note if an image has other proportions than the images that are drawn."""
    own_height, own_width = image.shape[:2]
    change = (width * own_height) / (height * own_width)
    if jax.process_index() == 0 and not 0.95 < change < 1.05:
        tqdm.write(
            f"fluxjax: {printable(name)} is {own_width}x{own_height} and stretched to "
            f"{width}x{height}; --height and --width can keep its proportions",
            file=sys.stderr,
        )
