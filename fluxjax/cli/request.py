"""The options of `fluxjax generate` as values: checked, with the model's defaults filled in."""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.family import family_of_source
from fluxjax.cli.adapters import read_adapter, with_shipped_adapters
from fluxjax.cli.condition_source import ConditionFacts, ConditionSource
from fluxjax.cli.conditions import check_conditions, condition_sources
from fluxjax.cli.console import interruptible
from fluxjax.cli.options import PREVIEW_STEPS
from fluxjax.cli.output import encodable, writable
from fluxjax.cli.output_pattern import OutputPattern
from fluxjax.cli.places import BatchSize, PlannedImage
from fluxjax.cli.prompts import Line
from fluxjax.cli.starts import describe_file, start_of_options
from fluxjax.devices.mesh import make_mesh
from fluxjax.generate.draw import Recipe
from fluxjax.generate.image_to_image import Repaint
from fluxjax.generate.latents import aspect_size, check_size, image_tokens
from fluxjax.generate.limits import (
    check_files,
    check_finite_times,
    check_memory,
    default_vae_memory,
    first_device,
    known_flux_config,
    read_configs,
)
from fluxjax.generate.load import LoadOptions, activation_dtype
from fluxjax.generate.memory_plan import BFLOAT16, Choice, Fixed, with_storage
from fluxjax.generate.network_bytes import STREAMED
from fluxjax.generate.prompted import as_arrays
from fluxjax.generate.samplers import RULES, integrator, step_cache, timer
from fluxjax.generate.stage_memory import AddedTokens, Configs, Demand
from fluxjax.generate.storages import check_storage
from fluxjax.generate.times_file import TIMES_SUFFIX, read_times
from fluxjax.generate.velocity import Guidance
from fluxjax.kernels.attention import Attention
from fluxjax.kernels.guided_attention import Nag
from fluxjax.lora.widen import adapted_config
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.printable import printable
from fluxjax.shapes import Times
from fluxjax.version import __version__
from fluxjax.zoo import APPENDED_FEATURES, FLUX1, Defaults, Family

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
        height, width = _or_default(line.height, self.height), _or_default(line.width, self.width)
        check_size("its size", height, width)
        steps = _or_default(line.steps, self.steps)
        about = {"steps": str(steps), "size": f"{width}x{height}"}
        changed = replace(
            self,
            timer=self.timer if line.steps is None else self.timers(steps),
            distilled=_or_default(line.guidance, self.distilled),
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
        return f"{_or_default(self.defaults.guidance, FLUX1.guidance):g}"


class _Sizes(NamedTuple):
    """The numbers of what is drawn, with the model's defaults filled in; as in `Request`.

    `times`: of the file that the timer names, if it names one.
    """

    height: int
    width: int
    times: Times | None
    steps: int
    max_length: int
    batch: int


def read_request(
    options: argparse.Namespace, *, takes: str | None = None, reference_tokens: int = 0
) -> Request:
    """Return the options as values, before anything is loaded.

    **Arguments:** `takes`: what the command needs the model to take, as in `fluxjax.zoo.Model`.
    `reference_tokens`: of images that the command gives the model beside the one that is drawn.
    **Raises:** `ValueError` for options that do not go together or can't be met.
    """
    request = replace(request_of_options(options, takes=takes), reference_tokens=reference_tokens)
    # An image that is drawn again has its own size, which is checked when it is read.
    if options.init_image is None:
        check_request_memory(request)
    if request.load.quantize is not None:
        check_storage(request.load.quantize, first_device())
    request.check_conditions(known_flux_config(options.flux or options.model))
    if request.output is not None:
        return request
    return replace(request, folder=writable(options.output_dir))


_AS_GIVEN = (
    *("model", "prompts", "negative_prompt", "images", "first_image", "output", "overwrite"),
    *("keep_encoders", "offload_encoders", "show_memory", "quiet", "preview"),
    *("drawn_in", "recorded", "given"),
)
"""Fields of a request that are options as they are."""


def request_of_options(options: argparse.Namespace, *, takes: str | None = None) -> Request:
    """Return the options as values, without a look at the machine. Arguments as `read_request`."""
    check_files(_files(options), family_of_source(options.model))
    conditions = condition_sources(options)
    needs = [takes, *(condition.takes for condition in conditions)]
    options.lora = with_shipped_adapters(options.model, options.lora, needs)
    defaults = _defaults(options, conditions)
    sizes = _sizes(options, defaults)
    _check_guidance(options)
    dtype = activation_dtype() if options.dtype is None else jnp.dtype(options.dtype)
    mesh = _mesh(options)
    timers = _timers(options, sizes, defaults)
    times = timers(sizes.steps)
    as_given: dict[str, Any] = {name: getattr(options, name) for name in _AS_GIVEN}
    request = Request(
        **as_given,
        family=family_of_source(options.model),
        defaults=defaults,
        lines=_lines(options),
        start=start_of_options(options),
        timer=times,
        timers=timers,
        batch=sizes.batch,
        seeds=_seeds(options),
        height=sizes.height,
        width=sizes.width,
        max_length=sizes.max_length,
        recipe=_recipe(options, times(sizes.height, sizes.width)),
        distilled=options.guidance,
        vae_memory=None,
        load=_load_options(options, mesh),
        dtype=dtype,
        conditions=conditions,
        features=APPENDED_FEATURES.get(takes or "", 0),
        folder=options.output_dir,
        preview_every=_or_default(options.preview_every, PREVIEW_STEPS),
        description=_description(options, sizes, conditions),
        fixed=_fixed(options),
    )
    return replace(request, vae_memory=vae_memory_of(options, request))


def _recipe(options: argparse.Namespace, times: Times) -> Recipe:
    return Recipe(
        times,
        integrator(options.integrator, eta=options.eta, churn=options.churn),
        _guidance(options),
        _attention(options),
    )


def _defaults(options: argparse.Namespace, conditions: Sequence[ConditionSource]) -> Defaults:
    """Return how the model is sampled with these conditions; fill in its scale of true guidance."""
    defaults = interruptible(load_defaults, options.model)
    for condition in conditions:
        defaults = condition.change_defaults(defaults)
    if options.cfg is None:
        options.cfg = defaults.cfg
    return defaults


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


def _fixed(options: argparse.Namespace) -> Fixed:
    """Return what the options leave no choice of."""
    excluded = []
    if options.dtype is not None:
        excluded.append(BFLOAT16)
    if options.unroll:
        excluded.append(STREAMED)
    offloads = None
    if options.offload_encoders or options.keep_encoders:
        offloads = options.offload_encoders
    return Fixed(
        storage=STREAMED if options.stream_blocks else options.quantize,
        batch=options.batch,
        offloads=offloads,
        excluded=tuple(excluded),
    )


def vae_memory_of(options: argparse.Namespace, request: Request) -> float | None:
    """Return the bytes that the VAE may need beside its weights; None for no limit.

    **Raises:** `ValueError` for a limit on a mesh.
    """
    if request.load.mesh is not None:
        if options.vae_memory is not None:
            raise ValueError(
                "--vae-memory is for one device; on a mesh, the axes tensor and context split the "
                "rows of an image. Leave out --vae-memory or --mesh."
            )
        return None
    if options.vae_memory is not None:
        return options.vae_memory
    return default_vae_memory(demand_of(request), configs_of(request))


def _sizes(options: argparse.Namespace, defaults: Defaults) -> _Sizes:
    height, width = _size(options, defaults)
    check_size("--height and --width", height, width)
    if options.prompts is not None:
        batch = _or_default(options.batch, 1)
    elif options.drawn_in is not None:
        batch = options.drawn_in.rows
    else:
        # Never more rows than images: what is drawn beyond them would be thrown away.
        count = options.images * len(_seeds(options)) * len(_texts(options))
        batch = min(_or_default(options.batch, count), count)
    times = _times_of_file(options)
    return _Sizes(
        height=height,
        width=width,
        times=times,
        steps=_or_default(options.steps, defaults.steps) if times is None else len(times) - 1,
        max_length=_or_default(options.max_sequence_length, defaults.max_length),
        batch=batch,
    )


def _size(options: argparse.Namespace, defaults: Defaults) -> tuple[int, int]:
    """Return the height and width that are drawn, in pixels."""
    if options.aspect is not None:
        if options.height is not None or options.width is not None:
            raise ValueError(
                "--aspect chooses the height and the width. Leave out --height and --width, or it."
            )
        return aspect_size(options.aspect, defaults.height * defaults.width)
    height = _or_default(options.height, defaults.height)
    return height, _or_default(options.width, defaults.width)


def _seeds(options: argparse.Namespace) -> tuple[int, ...]:
    """Return the seeds of one prompt."""
    if options.seeds is not None:
        return tuple(options.seeds)
    return (_or_default(options.seed, 0),)


def _times_of_file(options: argparse.Namespace) -> Times | None:
    """Return the times of the file that the timer names, if it names one."""
    if not options.timer.endswith(TIMES_SUFFIX):
        return None
    times = read_times(options.timer)
    steps = len(times) - 1
    if options.steps not in (None, steps):
        raise ValueError(
            f"--timer {printable(options.timer)} has {steps} steps, and --steps is "
            f"{options.steps}. Leave out --steps, or plan other times."
        )
    if options.shift is not None:
        raise ValueError("--shift does nothing with a file of times. Leave it out.")
    return times


def _timers(
    options: argparse.Namespace, sizes: _Sizes, defaults: Defaults
) -> Callable[[int], Callable[[int, int], Times]]:
    """Return the function that gives, for a number of steps, the timer of heights and widths."""

    def timer_of(steps: int) -> Callable[[int, int], Times]:
        if sizes.times is not None and steps != sizes.steps:
            raise ValueError(
                f"its {steps} steps are not those of the file of times, {sizes.steps}; leave them "
                "out"
            )

        def times(height: int, width: int) -> Times:
            if sizes.times is not None:
                return sizes.times
            nodes = timer(options.timer, steps, defaults, height, width, shift=options.shift)
            check_finite_times(nodes)
            return nodes

        return times

    return timer_of


def _texts(options: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line."""
    return options.texts or [options.prompt]


def _lines(options: argparse.Namespace) -> tuple[Line, ...]:
    """Return the prompts of the command line, unless a file of prompts is given."""
    if options.prompts is not None:
        return ()
    seed = _seeds(options)[0]
    lines = []
    for text in _texts(options):
        line = Line(text, options.prompt_2, options.negative_prompt, "", seed)
        if options.init_image is not None:
            mask = None if options.mask is None else str(options.mask)
            line = line._replace(init_image=str(options.init_image), mask=mask)
        lines.append(line)
    return tuple(lines)


def _files(options: argparse.Namespace) -> dict[str, str]:
    """Return the files that replace networks of the model, as `LoadOptions` takes them."""
    names = ("flux", "vae", "t5", "clip")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _load_options(options: argparse.Namespace, mesh: jax.sharding.Mesh | None) -> LoadOptions:
    adapters = []
    for adapter in options.lora:
        adapters.append((read_adapter(adapter), adapter.scale))
    return LoadOptions(
        dtype=None if options.dtype is None else jnp.dtype(options.dtype),
        files=_files(options),
        mesh=mesh,
        adapters=tuple(adapters),
        quantize=options.quantize,
        stream=options.stream_blocks,
        unroll=options.unroll,
    )


def _or_default(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _check_guidance(options: argparse.Namespace) -> None:
    if options.negative_prompt is not None and options.cfg == 1 and options.nag is None:
        raise ValueError(
            "--negative-prompt does nothing at --cfg 1 without --nag. Give a scale, as --cfg 3."
        )
    if options.rule != "cfg" and options.cfg == 1:
        raise ValueError("--rule does nothing at --cfg 1. Give a scale, as --cfg 3.")


def _mesh(options: argparse.Namespace) -> jax.sharding.Mesh | None:
    if options.mesh is None:
        return None
    # Each process draws lines of a file alone, but the images of one prompt with all others.
    devices = jax.devices() if options.prompts is None else jax.local_devices()
    return make_mesh(**options.mesh, devices=devices)


def _guidance(options: argparse.Namespace) -> Guidance:
    """Return the guidance with arrays as numbers, so that other numbers do not compile anew."""
    guidance = Guidance(
        scale=options.cfg,
        rule=RULES[options.rule](),
        nag=None if options.nag is None else Nag(options.nag),
        cache=None if options.cache is None else step_cache(options.cache),
    )
    return as_arrays(guidance)


def _attention(options: argparse.Namespace) -> Attention | None:
    if options.attention is None and options.flash_block_sizes is None:
        return None
    return Attention(options.attention, options.flash_block_sizes)


def _description(
    options: argparse.Namespace, sizes: _Sizes, conditions: Sequence[ConditionSource]
) -> dict[str, str]:
    """Return what images say of the options, in the order in which their metadata have them."""
    about = {"steps": str(sizes.steps)}
    about["integrator"] = options.integrator
    if options.eta is not None:
        about["integrator"] += f", eta {options.eta:g}"
    if options.churn is not None:
        about["integrator"] += f", churn {options.churn:g}"
    about["timer"] = options.timer
    if sizes.times is not None:
        # With a hash: a file of the same name may hold other times in the next run, and existing
        # images are compared by this entry.
        about["timer"] = describe_file(Path(options.timer))
    if options.shift is not None:
        about["timer"] += f", shift {options.shift:g}"
    if options.cfg != 1:
        about |= {"cfg": f"{options.cfg:g}", "rule": options.rule}
    if options.nag is not None:
        about["nag"] = f"{options.nag:g}"
    if options.cache is not None:
        about["cache"] = options.cache
    about["size"] = f"{sizes.width}x{sizes.height}"
    if options.max_sequence_length is not None:
        about["max_sequence_length"] = str(options.max_sequence_length)
    about["model"] = encodable(options.model)
    for name, file in _files(options).items():
        about[name] = encodable(file)
    for name in ("dtype", "quantize"):
        value = getattr(options, name)
        if value is not None:
            about[name] = value
    if options.lora:
        adapters = [f"{adapter.name}:{adapter.scale:g}" for adapter in options.lora]
        about["lora"] = encodable(", ".join(adapters))
    for condition in conditions:
        about |= condition.describe()
    about["version"] = f"fluxjax {__version__}"
    return about
