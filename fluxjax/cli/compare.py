"""The command `fluxjax compare`: samplers side by side."""

import argparse

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.console import interruptible
from fluxjax.cli.device import name_device
from fluxjax.cli.output import encodable, writable
from fluxjax.generate.compare import Comparison, Run, compare
from fluxjax.generate.comparison_files import comparison_csv, write_comparison
from fluxjax.generate.comparison_grid import comparison_grid
from fluxjax.generate.latents import check_size, seed_key
from fluxjax.generate.limits import check_devices, check_memory, read_configs
from fluxjax.generate.load import activation_dtype
from fluxjax.generate.load_models import Models, load_models
from fluxjax.generate.stage_memory import Demand
from fluxjax.zoo import Defaults


def run_compare(options: argparse.Namespace) -> None:
    """Draw the prompt with each sampler; write a labelled grid and a table, and print the table."""
    check_devices()
    folder = writable(options.output_dir)
    use_cache(options.compilation_cache)
    defaults = interruptible(load_defaults, options.model)
    _check_demand(options, defaults)
    name_device()
    models = interruptible(load_models, options.model, dtype=_dtype_of(options))
    runs, images = _draw_runs(options, models)
    picture = np.asarray(comparison_grid(runs, images), np.float32) / 127.5 - 1
    metadata = {"prompt": options.prompt, "model": encodable(options.model)}
    metadata["seed"] = str(options.seed)
    for name in ("guidance", "cfg", "eta", "shift"):
        value = getattr(options, name)
        if value is not None:
            metadata[name] = f"{value:g}"
    if options.negative_prompt:
        metadata["negative_prompt"] = options.negative_prompt
    rows = comparison_csv(runs)
    picture_path, table_path = write_comparison(folder, picture, rows, metadata)
    print(rows, end="")
    print(f"{picture_path}\n{table_path}")


def _dtype_of(options: argparse.Namespace) -> jnp.dtype | None:
    """Return the dtype of weights and activations, or None for the defaults of both."""
    if options.dtype is None:
        return None
    return jnp.dtype(options.dtype)


def _check_demand(options: argparse.Namespace, defaults: Defaults) -> None:
    """Check the image's size, and that drawing can fit in memory, before weights are loaded."""
    height = options.height or defaults.height
    width = options.width or defaults.width
    check_size("--height and --width", height, width)
    most_steps = max(*options.steps, options.reference_steps)
    dtype: DTypeLike | None = _dtype_of(options)
    if dtype is None:
        dtype = activation_dtype()
    demand = Demand(1, height, width, most_steps, defaults.max_length, dtype)
    check_memory(demand, read_configs(options.model))


def _draw_runs(options: argparse.Namespace, models: Models) -> tuple[list[Run], list[np.ndarray]]:
    """Draw with each sampler in a worker thread, while a bar shows how many are done."""
    count = len(options.integrators) * len(options.timers) * len(options.steps)
    with tqdm(total=count, unit="run") as bar:
        comparison = Comparison(
            integrators=options.integrators,
            timers=options.timers,
            steps=options.steps,
            reference_steps=options.reference_steps,
            guidance=options.guidance,
            cfg=options.cfg,
            negative_prompt=options.negative_prompt,
            eta=options.eta,
            shift=options.shift,
            height=options.height,
            width=options.width,
            dtype=_dtype_of(options),
        )
        return interruptible(
            compare,
            models,
            options.prompt,
            comparison,
            key=seed_key(options.seed),
            report=lambda run: bar.update(),
        )
