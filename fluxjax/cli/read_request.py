"""The options of a drawing command as a `Request`: checked, with the model's defaults filled in."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.family import family_of_source
from fluxjax.cli.adapters import read_adapter, with_shipped_adapters
from fluxjax.cli.condition_source import ConditionSource
from fluxjax.cli.conditions import condition_sources
from fluxjax.cli.console import interruptible
from fluxjax.cli.options import PREVIEW_STEPS
from fluxjax.cli.output import encodable, writable
from fluxjax.cli.prompts import Line
from fluxjax.cli.request import Request, check_request_memory, configs_of, demand_of, or_default
from fluxjax.cli.request_sizes import (
    RequestSizes,
    seeds_of_options,
    sizes_of_options,
    texts_of_options,
    timers_of_options,
)
from fluxjax.cli.starts import describe_file, start_of_options
from fluxjax.devices.mesh import make_mesh
from fluxjax.generate.image_batch import Recipe
from fluxjax.generate.limits import check_files, default_vae_memory, first_device, known_flux_config
from fluxjax.generate.load import activation_dtype
from fluxjax.generate.load_network import LoadOptions
from fluxjax.generate.memory_plan import BFLOAT16, Fixed
from fluxjax.generate.network_bytes import STREAMED
from fluxjax.generate.prompt_batch import as_arrays
from fluxjax.generate.samplers import RULES, integrator, step_cache
from fluxjax.generate.storages import check_storage
from fluxjax.generate.velocity import Guidance
from fluxjax.kernels.attention import Attention
from fluxjax.kernels.guided_attention import Nag
from fluxjax.shapes import Times
from fluxjax.version import __version__
from fluxjax.zoo import APPENDED_FEATURES, Defaults


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
    sizes = sizes_of_options(options, defaults)
    _check_guidance(options)
    dtype = activation_dtype() if options.dtype is None else jnp.dtype(options.dtype)
    mesh = _mesh(options)
    timers = timers_of_options(options, sizes, defaults)
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
        seeds=seeds_of_options(options),
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
        preview_every=or_default(options.preview_every, PREVIEW_STEPS),
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


def _lines(options: argparse.Namespace) -> tuple[Line, ...]:
    """Return the prompts of the command line, unless a file of prompts is given."""
    if options.prompts is not None:
        return ()
    seed = seeds_of_options(options)[0]
    lines = []
    for text in texts_of_options(options):
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
    """Return how networks are loaded by the options, with their adapters read."""
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
    options: argparse.Namespace, sizes: RequestSizes, conditions: Sequence[ConditionSource]
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
