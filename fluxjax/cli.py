"""The command line: `fluxjax generate "…"`."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from tqdm import tqdm

import fluxjax
from fluxjax.generate import (
    Text,
    activation_dtype,
    batches,
    decode,
    denoise,
    encode_text,
    guidance_scale,
    model_times,
    noise_batch,
    prompt_ids,
)
from fluxjax.image import write_numbered
from fluxjax.latents import image_ids
from fluxjax.shapes import Array, Times
from fluxjax.zoo import ZOO, Defaults, load_clip, load_defaults, load_flux, load_t5, load_tokenizers, load_vae

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
Loaded = TypeVar("Loaded")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake of the user's is one line on standard error and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"fluxjax: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fluxjax", description="FLUX for JAX.")
    parser.add_argument("--version", action="version", version=f"fluxjax {fluxjax.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="draw images of a prompt", description="Draw images of a prompt.")
    generate.set_defaults(run=_generate)
    add = generate.add_argument
    add("prompt", help="what the image shows")
    add("--prompt-2", help="a text for T5 alone; CLIP keeps the prompt")
    add("--model", default="tiny", help=f"{', '.join(ZOO)}, a diffusers folder, or a hub id (default: %(default)s)")
    add("--steps", type=int, help="Euler steps (default: the model's)")
    add("--guidance", type=float, help="distilled guidance scale (default: the model's)")
    add("--height", type=int, help="in pixels, a multiple of 16 (default: the model's)")
    add("--width", type=int, help="in pixels, a multiple of 16 (default: the model's)")
    add("--images", type=int, default=1, help="how many (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--max-sequence-length", type=int, help="T5 tokens (default: the model's)")
    add(
        "--dtype",
        choices=DTYPES,
        help="of weights and activations (default: the files' and, for activations, bfloat16, on CPU float32)",
    )
    add("--batch", type=int, help="images a forward pass (default: all)")
    add("--output-dir", type=Path, default=Path(), help="where flux_N.png is written (default: here)")
    cache = _cache_folder()
    add("--compilation-cache", type=Path, default=cache, metavar="DIR", help="of compiled programs (default: %(default)s)")
    add("--keep-encoders", action="store_true", help="keep the text encoders in memory while denoising")
    return parser


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fluxjax" / "compiled"


class _Clock:
    """Seconds spent on each kind of work, and a progress bar over steps that names the stage."""

    def __init__(self, evaluations: int):
        self.spent: dict[str, float] = {}
        self.compiled: dict[str, Any] = {}
        self.bar = tqdm(total=evaluations, bar_format="{desc:<16} {bar} {n_fmt}/{total_fmt} steps")

    def __enter__(self) -> "_Clock":
        return self

    def __exit__(self, *error: Any) -> None:
        jax.effects_barrier()  # the last ticks
        self.bar.set_description_str("done" if error[0] is None else "stopped")
        self.bar.close()

    @contextmanager
    def measure(self, kind: str, what: str = "") -> Iterator[None]:
        self.bar.set_description_str(f"{kind} {what}".strip())
        start = time.monotonic()
        yield
        self.spent[kind] = self.spent.get(kind, 0.0) + time.monotonic() - start

    def load(self, loader: Callable[..., Loaded], source: str, **options: Any) -> Loaded:
        with self.measure("load", loader.__name__.removeprefix("load_")):
            return jax.block_until_ready(loader(source, **options))

    def run(self, kind: str, function: Any, *arguments: Any, **options: Any) -> Any:
        """Run a jitted function on arguments of one shape, compiled the first time; the two are counted apart."""
        if kind not in self.compiled:
            with self.measure("compile", kind):
                self.compiled[kind] = function.lower(*arguments, **options).compile()
        with self.measure(kind):
            return jax.block_until_ready(self.compiled[kind](*arguments, **options))

    def tick(self, t: Any) -> None:
        self.bar.update()

    def report(self) -> str:
        parts = [f"{kind} {seconds:.2f} s" for kind, seconds in self.spent.items()]
        return f"{', '.join(parts)} ({self.spent['denoise'] / self.bar.total:.3f} s per step)"


class _Plan(NamedTuple):
    """The options with the model's defaults filled in."""

    steps: int
    height: int
    width: int
    max_length: int
    groups: list[list[int]]
    times: Times
    weights: DTypeLike | None
    activations: DTypeLike


def _plan(options: argparse.Namespace, defaults: Defaults) -> _Plan:
    """Fill in and check the options, before anything is loaded."""

    def pick(given: int | None, default: int) -> int:
        return default if given is None else given

    batch = pick(options.batch, options.images)
    if options.images < 1 or batch < 1:
        raise ValueError(f"--images and --batch need at least 1, got {options.images} and {batch}.")
    steps, height, width = (pick(getattr(options, name), getattr(defaults, name)) for name in ("steps", "height", "width"))
    image_ids(height, width)  # raises if the size won't do
    weights = DTYPES[options.dtype] if options.dtype else None
    return _Plan(
        steps,
        height,
        width,
        pick(options.max_sequence_length, defaults.max_length),
        batches(options.images, batch),
        model_times(defaults, steps, height, width),
        weights,
        activation_dtype() if weights is None else weights,
    )


def _generate(options: argparse.Namespace) -> None:
    """Encode, free the encoders, denoise, decode and write, a batch at a time."""
    defaults = load_defaults(options.model)
    plan = _plan(options, defaults)
    folder = _writable(options.output_dir)
    _use_cache(options.compilation_cache)
    written = []
    with _Clock(plan.steps * len(plan.groups)) as clock:
        encoders = [clock.load(load, options.model, dtype=plan.weights) for load in (load_clip, load_t5)]
        text = _encode(clock, encoders, options, plan)
        if not options.keep_encoders:
            encoders.clear()
        flux = clock.load(load_flux, options.model, dtype=plan.weights)
        guidance = guidance_scale(flux, defaults, options.guidance)
        vae = clock.load(load_vae, options.model, dtype=plan.weights)
        key, channels = jax.random.key(options.seed), vae.config.latent_channels
        for group in plan.groups:
            noise = noise_batch(key, group, plan.height, plan.width, channels=channels)
            latents = clock.run("denoise", denoise, flux, text, noise, plan.times, guidance, report=clock.tick)
            images = clock.run("decode", decode, vae, latents, dtype=plan.activations)
            # The last group repeats its last number.
            for number, image in zip(dict.fromkeys(group), images, strict=False):
                written.append(write_numbered(image, folder, _metadata(options, plan, guidance, number)))
    print(clock.report())
    print("\n".join(str(path) for path in written))


def _encode(clock: _Clock, encoders: list[Any], options: argparse.Namespace, plan: _Plan) -> Text:
    """Encode the prompt once and repeat it over a batch."""
    tokenizers = clock.load(load_tokenizers, options.model)
    seconds = None if options.prompt_2 is None else [options.prompt_2]
    ids = prompt_ids(tokenizers, [options.prompt], seconds, max_length=plan.max_length)
    text = clock.run("encode", encode_text, *encoders, ids, dtype=plan.activations)
    return jax.tree.map(lambda x: jnp.repeat(x, len(plan.groups[0]), axis=0), text)


def _metadata(options: argparse.Namespace, plan: _Plan, guidance: Array | None, number: int) -> dict[str, str]:
    second = {} if options.prompt_2 is None else {"prompt_2": options.prompt_2}
    return {
        "prompt": options.prompt,
        **second,
        "seed": str(options.seed),
        "image": str(number),
        "steps": str(plan.steps),
        "guidance": "none" if guidance is None else f"{float(guidance):g}",
        "size": f"{plan.width}x{plan.height}",
        "model": options.model,
        "version": f"fluxjax {fluxjax.__version__}",
    }


def _writable(folder: Path) -> Path:
    """Make a folder. **Raises:** `ValueError` if it can't be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output-dir {folder} can't be made ({error.strerror}). Choose a folder that you may write to."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--output-dir {folder} is not writable. Choose a folder that you may write to.")
    return folder


def _use_cache(folder: Path) -> None:
    """Keep every compiled program in a folder."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
