"""What a drawing command draws, how, and where it is written, as one record of checked values."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from jax.typing import DTypeLike

from fluxjax.cli.condition_source import ConditionFacts, ConditionSource
from fluxjax.cli.conditions import check_conditions
from fluxjax.cli.output_pattern import OutputPattern
from fluxjax.cli.places import BatchSize, PlannedImage
from fluxjax.cli.prompts import Line
from fluxjax.generate.image_batch import Recipe
from fluxjax.generate.image_to_image import Repaint
from fluxjax.generate.latents import check_size, image_tokens
from fluxjax.generate.limits import check_memory, read_configs
from fluxjax.generate.load_network import LoadOptions
from fluxjax.generate.memory_plan import Choice, Fixed, with_storage
from fluxjax.generate.stage_memory import AddedTokens, Configs, Demand
from fluxjax.lora.widen import adapted_config
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.shapes import Times
from fluxjax.zoo import FLUX1, Defaults, Family

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be drawn, how, and where it is written.

    - `model`: its name, folder or hub id; `family`: of it; `defaults`: its default settings.
    - `lines`: the prompts of the command line; none if `prompts` names a file of prompts.
    - `start`: strength and repeats for lines that start from an image of their own. Their masks are
      read later.
    - `timer`: a function of height and width (pixels) that returns the sampling times; `timers`:
      of a number of steps, returns another timer.
    - `negative_prompt`: for lines without one; None if the option is not given.
    - `images`, `batch`: the number of images of each seed, and how many are drawn at once.
    - `seeds`: of the images of one prompt. `first_image`: the number of the first image of each.
    - `height`, `width`: of the images in pixels. An image that a line starts from is drawn at its
      own size instead.
    - `output`: the pattern of the images' paths; None writes numbered files, or those of the
      lines' ids, to `folder`.
    - `drawn_in`: of an image that is drawn again, the size of its batch.
    - `recorded`: metadata that the image must have, of one that is drawn again.
    - `given`: the words of each option that was given, by its name.
    - `max_length`: the number of T5 tokens.
    - `recipe`: times, integrator and guidance.
    - `distilled`: the distilled guidance scale; None takes the model's.
    - `vae_memory`: bytes that the VAE may need beside its weights; None for no limit.
    - `load`: how networks are loaded; `dtype`: of the activations.
    - `conditions`: what all images are conditioned on beside their prompts. `features`: how many
      the command itself appends to each image token.
    - `preview`: a file that shows what images are becoming, or None; `preview_every`: the steps
      between two of them.
    - `quiet`: whether only the files of the images are printed.
    - `description`: the entries of each image's metadata that describe the options, in order.
    - `fixed`: what a plan of the memory may not change; `choice`: what it has chosen, or None.
    - `reference_tokens`: of images that the command itself gives the model to look at.
    """

    model: str
    family: Family
    defaults: Defaults
    lines: tuple[Line, ...]
    prompts: Path | None
    start: Repaint
    timer: Callable[[int, int], Times]
    timers: Callable[[int], Callable[[int, int], Times]]
    negative_prompt: str | None
    images: int
    batch: int
    seeds: tuple[int, ...]
    first_image: int
    height: int
    width: int
    max_length: int
    recipe: Recipe
    distilled: float | None
    vae_memory: float | None
    load: LoadOptions
    dtype: DTypeLike
    conditions: tuple[ConditionSource, ...]
    features: int
    folder: Path
    output: OutputPattern | None
    overwrite: bool
    keep_encoders: bool
    offload_encoders: bool
    show_memory: bool
    quiet: bool
    preview: Path | None
    preview_every: int
    description: Mapping[str, str]
    fixed: Fixed
    recorded: Mapping[str, str]
    given: Mapping[str, Sequence[str]]
    choice: Choice | None = None
    reference_tokens: int = 0
    drawn_in: BatchSize | None = None

    @property
    def line(self) -> Line | None:
        """The first prompt of the command line, if there is one."""
        return self.lines[0] if self.lines else None

    @property
    def draws(self) -> list[PlannedImage]:
        """The images of the command line's prompts, in order."""
        numbers = range(self.first_image, self.first_image + self.images)
        planned = itertools.product(range(len(self.lines)), self.seeds, numbers)
        return [PlannedImage(*one) for one in planned]

    @property
    def steps(self) -> int:
        return len(self.recipe.times) - 1

    @property
    def is_guided(self) -> bool:
        """Whether images are guided away from a negative prompt."""
        return self.guides_by_scale or self.recipe.guidance.nag is not None

    @property
    def guides_by_scale(self) -> bool:
        return "cfg" in self.description

    def load_of(self, name: str) -> LoadOptions:
        """Return how a network is loaded, with what the plan has chosen for it."""
        if self.choice is None or name in ("clip", "vae"):
            return self.load
        storage = self.choice.text if name == "t5" else self.choice.transformer
        return with_storage(self.load, storage)

    def check_conditions(self, flux: FluxConfig | ChromaConfig | None) -> None:
        """Check the conditions against the transformer's config, if that is known.

        **Raises:** `ValueError` for those that it does not take, or one that it lacks.
        """
        if isinstance(flux, FluxConfig):
            flux = adapted_config(flux, [lora for lora, _ in self.load.adapters])
        size = None
        if self.line is not None and self.line.init_image is None:
            # Lines of a file may start from images of their own sizes.
            size = (self.height, self.width)
        facts = ConditionFacts(self.model, flux, self.is_guided, self.load, size, self.steps)
        check_conditions(self.conditions, facts, features=self.features)

    def negative_of(self, line: Line) -> str:
        """Return what a line is guided away from: its own negative prompt, the command's, or ""."""
        for text in (line.negative_prompt, self.negative_prompt):
            if text is not None:
                return text
        return ""

    def at_size(self, height: int, width: int) -> "Request":
        """Return the request for another image size, in pixels, with the times for it."""
        recipe = replace(self.recipe, times=self.timer(height, width))
        return replace(self, height=height, width=width, recipe=recipe)

    def of_line(self, line: Line) -> "Request":
        """Return the request with a line's own size, steps and guidance.

        **Raises:** `ValueError` for a size that is none of an image, or steps of a file of times.
        """
        if (line.height, line.width, line.steps, line.guidance) == (None,) * 4:
            return self
        height, width = or_default(line.height, self.height), or_default(line.width, self.width)
        check_size("its size", height, width)
        steps = or_default(line.steps, self.steps)
        about = {"steps": str(steps), "size": f"{width}x{height}"}
        changed = replace(
            self,
            timer=self.timer if line.steps is None else self.timers(steps),
            distilled=or_default(line.guidance, self.distilled),
            description={**self.description, **about},
        )
        return changed.at_size(height, width)

    def metadata(
        self, line: Line, guidance: str, changes: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, str]:
        """Return what an image's metadata say: everything that determines the image.

        `changes`: what they say of the image that it is drawn from, and of its own size.
        """
        entries = {"prompt": line.prompt}
        if line.prompt_2 is not None:
            entries["prompt_2"] = line.prompt_2
        entries["seed"] = str(line.seed)
        for name, value in changes.items():
            if name not in self.description:
                entries[name] = value
        for name, value in self.description.items():
            if name in ("cache", "size") and self.is_guided:
                entries.setdefault("negative_prompt", self.negative_of(line))
            entries[name] = changes.get(name, value)
            if name == "steps":
                entries["guidance"] = guidance
        return entries

    def expected_guidance(self, found: Mapping[str, str]) -> str:
        """Return the distilled guidance that the metadata of an image should have.

        Without --guidance it is the model's, or none; which of them depends on the network, and is
        not known before that is loaded, so that the image's own "none" is accepted.
        """
        if self.distilled is not None:
            return f"{self.distilled:g}"
        if found.get("guidance") == "none":
            return "none"
        return f"{or_default(self.defaults.guidance, FLUX1.guidance):g}"


def demand_of(request: Request) -> Demand:
    """Return what is drawn at once: a batch."""
    added = AddedTokens(reference=request.reference_tokens)
    tokens = image_tokens(request.height, request.width)
    for condition in request.conditions:
        added = added.plus(condition.added_tokens(tokens, request.max_length))
    return Demand(
        request.batch,
        request.height,
        request.width,
        request.steps,
        request.max_length,
        request.dtype,
        added,
        2 if request.guides_by_scale else 1,
    )


def configs_of(request: Request) -> Configs:
    """Return the configs of the networks that a request is drawn with."""
    return read_configs(request.model, request.load.files)


def check_request_memory(request: Request) -> None:
    """**Raises:** `ValueError` if what is requested can't fit in memory."""
    mesh = request.load.mesh
    devices = 1 if mesh is None else mesh.size
    check_memory(demand_of(request), configs_of(request), devices=devices)


def or_default(value: Value | None, default: Value) -> Value:
    """Return a value that may be left out, or its default."""
    return default if value is None else value
