"""The command `fluxjax generate`: images of a prompt, or of a file of them."""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.multihost_utils import process_allgather
from jax.typing import DTypeLike
from tqdm import tqdm

import fluxjax
from fluxjax.cache import Reuse
from fluxjax.generate import (
    Text,
    activation_dtype,
    batches,
    decode,
    denoise,
    encode_text,
    guidance_scale,
    noise_batch,
    prompt_ids,
    repeated,
    step_keys,
    traced,
)
from fluxjax.image import write_numbered, write_png
from fluxjax.integrate.base import Step
from fluxjax.kernels.attention import Attention
from fluxjax.kernels.guiding import Nag
from fluxjax.latents import image_ids
from fluxjax.lora.attach import attach
from fluxjax.lora.merge import merge
from fluxjax.lora.read import Lora, read_lora
from fluxjax.memory import fetch, offload, residency, stream_blocks
from fluxjax.named import RULES, cache, integrator, timer
from fluxjax.prompts import Line, read_prompts, share
from fluxjax.quantize import quantize
from fluxjax.shapes import Array, Times
from fluxjax.shard import make_mesh, shard, shardings
from fluxjax.tokens import Tokenizers
from fluxjax.unroll import unroll
from fluxjax.zoo import Defaults, load_clip, load_defaults, load_flux, load_t5, load_tokenizers, load_vae

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
Loaded = TypeVar("Loaded")


def _merged(network: Any, kind: str, loras: Sequence[tuple[Lora, float]]) -> Any:
    """Return a network with the adapters that change it."""
    mine = [(lora, scale) for lora, scale in loras if kind in lora.changes]
    return merge(network, [lora for lora, _ in mine], [scale for _, scale in mine], donate=True) if mine else network


_BAR = "{desc:<16} {bar} {n_fmt}/{total_fmt} evaluations"


class _Clock:
    """Seconds spent on each kind of work, and a progress bar over the network's evaluations that names the stage."""

    def __init__(self, steps: int, evaluations: int, *, silent: bool = False):
        self.steps = steps
        self.spent: dict[str, float] = {}
        self.compiled: dict[str, Any] = {}
        self.bar = tqdm(total=steps * evaluations, bar_format=_BAR, disable=silent)

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
        return f"{', '.join(parts)} ({self.spent['denoise'] / self.steps:.3f} s per step)"


class _Plan(NamedTuple):
    """The options with the model's defaults filled in."""

    steps: int
    height: int
    width: int
    max_length: int
    groups: list[list[int]]
    times: Times
    step: Step
    nag: Nag | None
    reuse: Reuse | None
    attention: Attention | None
    loras: list[tuple[Lora, float]]
    seed: int
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
    if options.negative_prompt is not None and options.cfg == 1 and options.nag is None:
        raise ValueError("--negative-prompt does nothing at --cfg 1 without --nag. Give a scale, as --cfg 3.")
    if options.rule != "cfg" and options.cfg == 1:
        raise ValueError("--rule does nothing at --cfg 1. Give a scale, as --cfg 3.")
    weights = DTYPES[options.dtype] if options.dtype else None
    attention = None
    if options.attention is not None or options.flash_block_sizes is not None:
        attention = Attention(options.attention, options.flash_block_sizes)
    return _Plan(
        steps,
        height,
        width,
        pick(options.max_sequence_length, defaults.max_length),
        batches(options.images, batch),
        timer(options.timer, steps, defaults, height, width, shift=options.shift),
        integrator(options.integrator, eta=options.eta),
        None if options.nag is None else traced(Nag(options.nag)),
        None if options.cache is None else traced(cache(options.cache)),
        attention,
        [(read_lora(adapter.file()), adapter.scale) for adapter in options.lora],
        pick(options.seed, 0),
        weights,
        activation_dtype() if weights is None else weights,
    )


def generate(options: argparse.Namespace) -> None:
    """Encode, free the encoders, denoise, decode and write, a batch at a time; or all that a file of prompts asks for."""
    _join(options)
    if options.mesh is not None:
        # Lines of a file are drawn by each process alone, the images of a prompt by all together.
        options.mesh = make_mesh(**options.mesh, devices=jax.devices() if options.prompts is None else jax.local_devices())
    if options.prompts is not None:
        _generate_file(options)
        return
    defaults = load_defaults(options.model)
    plan = _plan(options, defaults)
    folder = writable(options.output_dir)
    use_cache(options.compilation_cache)
    written = []
    first = jax.process_index() == 0  # of several, the one that writes
    with _Clock(plan.steps * len(plan.groups), plan.step.evaluations, silent=not first) as clock:
        stage = _Stage(clock, options, plan, defaults)
        encoders = stage.encoders()
        count = len(plan.groups[0])
        asked = [Line(options.prompt, options.prompt_2, options.negative_prompt, "", plan.seed)]
        text, unwanted = stage.encode(encoders, asked)
        text, unwanted = repeated(text, count), None if unwanted is None else repeated(unwanted, count)
        stage.tell(encoders, None)
        kept = encoders if options.keep_encoders else None
        del encoders
        networks = stage.networks()
        stage.tell(kept, networks)
        key, channels = jax.random.key(plan.seed), networks.vae.config.latent_channels
        for group in plan.groups:
            noise = noise_batch(key, group, plan.height, plan.width, channels=channels)
            images = stage.draw(networks, text, unwanted, noise, step_keys(key, group, plan.step))
            if not images.is_fully_addressable:
                images = process_allgather(images, tiled=True)
            # The last group repeats its last number.
            for number, image in zip(dict.fromkeys(group) if first else (), images, strict=False):
                told = stage.metadata(asked[0], networks.guidance) | {"image": str(number)}
                written.append(write_numbered(image, folder, told))
    if first:
        print(clock.report())
        print("\n".join(str(path) for path in written))


def _join(options: argparse.Namespace) -> None:
    """Check what goes with what, and join the job's other processes, before anything asks for devices."""
    if options.stream_blocks and options.mesh is not None:
        raise ValueError("--stream-blocks passes the weights through one device. Leave out --mesh, which splits them.")
    if options.stream_blocks and options.quantize:
        raise ValueError("--stream-blocks passes the weights as they are. Leave out --quantize, or keep them on the device.")
    if options.stream_blocks and options.unroll:
        raise ValueError("--stream-blocks fetches a block a turn of a loop. Leave out --unroll, which has none.")
    if options.prompts is None and options.offload_encoders:
        raise ValueError("--offload-encoders does nothing for one prompt: once it is encoded they are freed. Leave it out.")
    if options.distributed and options.prompts is None and options.mesh is None:
        raise ValueError("--distributed shares the lines of --prompts among processes, or a prompt's --mesh. Give one of them.")
    useless = {
        "--prompt-2": options.prompt_2,
        "--seed": options.seed,
        "--images": None if options.images == 1 else options.images,
        "--keep-encoders": options.keep_encoders or None,
    }
    given = [name for name, value in useless.items() if value is not None]
    if given and options.prompts is not None:
        raise ValueError(f"{', '.join(given)} does nothing with --prompts: the lines say it, and encoders stay. Leave it out.")
    if options.distributed:
        environment = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
        where: dict[str, Any] = {name: int(value) for name, value in environment.items() if value is not None}
        # A process that is killed ends the others within half a minute; one that is done waits for them.
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=30, shutdown_timeout_seconds=24 * 3600)


def _generate_file(options: argparse.Namespace) -> None:
    """Draw this process's share of a file's lines, in batches of one size, each image whole or not at all; what is there stays.

    An image depends on its line alone, and the size of the batches.
    """
    defaults = load_defaults(options.model)
    plan = _plan(options, defaults)
    folder = writable(options.output_dir)
    use_cache(options.compilation_cache)
    lines, problems = read_prompts(options.prompts, guided=options.cfg != 1 or plan.nag is not None)
    todo = share(lines, folder, jax.process_index(), jax.process_count())
    groups = batches(len(todo), 1 if options.batch is None else options.batch)
    if groups:
        with _Clock(plan.steps * len(groups), plan.step.evaluations) as clock:
            stage = _Stage(clock, options, plan, defaults)
            encoders, networks = stage.encoders(), stage.networks()
            stage.tell(encoders, networks)
            for group in groups:
                _draw_lines(stage, encoders, networks, [todo[number] for number in group], folder)
        print(clock.report())
    print(f"{len(todo)} images written to {folder}, {len(lines)} lines in all")
    if problems:
        raise ValueError(f"{options.prompts}: " + "; ".join(problems))


def _draw_lines(stage: "_Stage", encoders: "_Encoders", networks: "_Networks", lines: Sequence[Line], folder: Path) -> None:
    plan, channels = stage.plan, networks.vae.config.latent_channels
    text, unwanted = stage.encode(encoders, lines)
    keys = [jax.random.key(line.seed) for line in lines]
    noise = jnp.concatenate([noise_batch(key, [0], plan.height, plan.width, channels=channels) for key in keys])
    drawn = [one for key in keys if (one := step_keys(key, [0], plan.step)) is not None]
    images = stage.draw(networks, text, unwanted, noise, jnp.concatenate(drawn) if drawn else None)
    # The last group repeats its last line.
    for line, image in zip(dict.fromkeys(lines), images, strict=False):
        with suppress(FileExistsError):  # another process has begun anew with what was this one's
            write_png(image, line.image(folder), stage.metadata(line, networks.guidance))


class _Encoders(NamedTuple):
    """What prompts are encoded with."""

    tokenizers: Tokenizers
    clip: Any
    t5: Any


class _Networks(NamedTuple):
    """What a batch is drawn with."""

    flux: Any
    vae: Any
    guidance: Array | None


class _Stage(NamedTuple):
    """The stages of drawing, each timed."""

    clock: _Clock
    options: argparse.Namespace
    plan: _Plan
    defaults: Defaults

    def encoders(self) -> _Encoders:
        """Load the tokenizers and text encoders, into host memory if they are to stay there."""
        tokenizers = self.clock.load(load_tokenizers, self.options.model)
        clip, t5 = self._network(load_clip, "clip"), self._network(load_t5, "t5", blocks=True)
        away = self.options.offload_encoders
        return _Encoders(tokenizers, *(offload(network) if away else network for network in (clip, t5)))

    def networks(self) -> _Networks:
        """Load the transformer and the VAE."""
        flux = self._network(load_flux, "flux", blocks=True)
        scale = guidance_scale(flux, self.defaults, self.options.guidance)
        return _Networks(flux, self._network(load_vae, "vae"), scale)

    def _network(self, loader: Callable[..., Any], kind: str, *, blocks: bool = False) -> Any:
        """Load a network and merge its adapters, on the mesh if there is one; `blocks`: that may be streamed or rounded."""
        if blocks and self.options.stream_blocks:
            return self._streamed(loader, kind)
        mesh, eight = self.options.mesh, self.options.quantize if blocks else None
        adapted = any(kind in lora.changes for lora, _ in self.plan.loras)
        how: dict[str, Any] = {} if mesh is None else {"sharding": lambda network: shardings(network, mesh)}
        if eight and mesh is None and not adapted:  # never whole in memory
            network = self.clock.load(loader, self.options.model, dtype=self.plan.weights, quantize=eight)
        else:
            whole = self.clock.load(loader, self.options.model, dtype=self.plan.weights, **how)
            network = _merged(whole, kind, self.plan.loras)
            network = quantize(network, eight, donate=True) if eight else network
        network = unroll(network, donate=True) if blocks and self.options.unroll else network
        return network if mesh is None else shard(network, mesh)

    def _streamed(self, loader: Callable[..., Any], kind: str) -> Any:
        """Load a network whose blocks stay in the host's memory, or, where that is the device's own, in their files; what
        would be merged is attached."""
        load = partial(self.clock.load, loader, self.options.model, dtype=self.plan.weights)
        if jax.default_backend() == "cpu":
            network = load(stream=True)
        else:
            host = jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
            network = stream_blocks(load(sharding=host))
        mine = [(lora, scale) for lora, scale in self.plan.loras if kind in lora.changes]
        return attach(network, [lora for lora, _ in mine], [scale for _, scale in mine]) if mine else network

    def tell(self, encoders: _Encoders | None, networks: _Networks | None) -> None:
        """Print what is resident where, if it is wanted."""
        if not self.options.show_memory:
            return
        clip, t5 = (None, None) if encoders is None else (encoders.clip, encoders.t5)
        flux, vae = (None, None) if networks is None else (networks.flux, networks.vae)
        tqdm.write(residency({"clip": clip, "t5": t5, "flux": flux, "vae": vae}) + "\n")

    def encode(self, encoders: _Encoders, lines: Sequence[Line]) -> tuple[Text, Text | None]:
        """Encode prompts, and what is led away from if anything is."""
        networks = fetch(encoders.clip), fetch(encoders.t5)

        def run(prompts: list[str], seconds: list[str]) -> Text:
            ids = prompt_ids(encoders.tokenizers, prompts, seconds, max_length=self.plan.max_length)
            return self.clock.run("encode", encode_text, *networks, ids, dtype=self.plan.activations, mesh=self.options.mesh)

        text = run([line.prompt for line in lines], [line.prompt if line.prompt_2 is None else line.prompt_2 for line in lines])
        if self.options.cfg == 1 and self.plan.nag is None:
            return text, None
        away = [_away(line, self.options) for line in lines]
        return text, run(away, away)

    def draw(self, networks: _Networks, text: Text, unwanted: Text | None, noise: Array, keys: Array | None) -> Array:
        """Denoise and decode a batch."""
        plan, options = self.plan, self.options
        latents = self.clock.run(
            "denoise",
            denoise,
            *(networks.flux, text, noise, plan.times, networks.guidance),
            step=plan.step,
            keys=keys,
            unwanted=unwanted,
            cfg=jnp.float32(options.cfg),
            rule=traced(RULES[options.rule]()),
            nag=plan.nag,
            reuse=plan.reuse,
            attention=plan.attention,
            mesh=options.mesh,
            report=self.clock.tick,
        )
        return self.clock.run("decode", decode, networks.vae, latents, dtype=plan.activations, mesh=options.mesh)

    def metadata(self, line: Line, guidance: Array | None) -> dict[str, str]:
        """Return what an image says of how it was made."""
        options, plan = self.options, self.plan
        return {
            "prompt": line.prompt,
            **({} if line.prompt_2 is None else {"prompt_2": line.prompt_2}),
            "seed": str(line.seed),
            "steps": str(plan.steps),
            "guidance": "none" if guidance is None else f"{float(guidance):g}",
            "integrator": options.integrator + ("" if options.eta is None else f", eta {options.eta:g}"),
            "timer": options.timer + ("" if options.shift is None else f", shift {options.shift:g}"),
            **_led_away(options, line),
            **({} if options.cache is None else {"cache": options.cache}),
            "size": f"{plan.width}x{plan.height}",
            "model": options.model,
            **({"quantize": options.quantize} if options.quantize else {}),
            **({"lora": ", ".join(f"{one.name}:{one.scale:g}" for one in options.lora)} if options.lora else {}),
            "version": f"fluxjax {fluxjax.__version__}",
        }


def _led_away(options: argparse.Namespace, line: Line) -> dict[str, str]:
    """Return what there is to tell of the negative prompt's guidance."""
    if options.cfg == 1 and options.nag is None:
        return {}
    cfg = {} if options.cfg == 1 else {"cfg": f"{options.cfg:g}", "rule": options.rule}
    nag = {} if options.nag is None else {"nag": f"{options.nag:g}"}
    return {**cfg, **nag, "negative_prompt": _away(line, options)}


def _away(line: Line, options: argparse.Namespace) -> str:
    """Return what a line is led away from: its own negative prompt, else the command's, else the empty one."""
    given = (line.negative_prompt, options.negative_prompt, "")
    return next(text for text in given if text is not None)


def writable(folder: Path) -> Path:
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


def use_cache(folder: Path) -> None:
    """Keep every compiled program in a folder."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
