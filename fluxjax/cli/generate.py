"""The command `fluxjax generate`: images of a prompt, or of a file of them."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.typing import DTypeLike
from tqdm import tqdm

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.locate import download_file, shipped_lora
from fluxjax.cli.console import complain, interruptible
from fluxjax.cli.prompts import Line, difference, read_prompts, share
from fluxjax.devices.mesh import make_mesh
from fluxjax.devices.offload import fetch, offload, residency
from fluxjax.devices.shard import shard
from fluxjax.devices.specs import shardings
from fluxjax.devices.stream import stream_blocks
from fluxjax.flow.step import Step
from fluxjax.generate.autoencode import decode
from fluxjax.generate.cache import StepCache
from fluxjax.generate.draw import batches, denoise, guidance_scale, noise_batch, step_keys, traced
from fluxjax.generate.image import read_metadata, write_numbered, write_png
from fluxjax.generate.latents import check_size, seed_key
from fluxjax.generate.limits import (
    Demand,
    check_devices,
    check_finite_times,
    check_memory,
    read_configs,
)
from fluxjax.generate.load import (
    activation_dtype,
    load_clip,
    load_flux,
    load_t5,
    load_tokenizers,
    load_vae,
)
from fluxjax.generate.samplers import RULES, cache, integrator, timer
from fluxjax.generate.text import Text, encode_text, prompt_ids
from fluxjax.generate.tokens import Tokenizers, token_counts
from fluxjax.kernels.attention import Attention
from fluxjax.kernels.guided_attention import Nag
from fluxjax.lora.attach import attach
from fluxjax.lora.merge import merge, notes_of
from fluxjax.lora.read import Lora, read_lora
from fluxjax.nets.quantized import quantize
from fluxjax.nets.stack import unroll
from fluxjax.shapes import Array, Bool, Times
from fluxjax.version import __version__
from fluxjax.zoo import Defaults

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
Loaded = TypeVar("Loaded")


def _merged(network: Any, kind: str, loras: Sequence[tuple[Lora, float]]) -> Any:
    """Return a network with the adapters that change it, having printed what has no effect on it."""
    mine = _adapters_of(network, kind, loras)
    return (
        merge(network, [lora for lora, _ in mine], [scale for _, scale in mine], donate=True)
        if mine
        else network
    )


def _adapters_of(
    network: Any, kind: str, loras: Sequence[tuple[Lora, float]]
) -> list[tuple[Lora, float]]:
    """Return the adapters that change a network, and print what of them has no effect on it."""
    mine = [(lora, scale) for lora, scale in loras if kind in lora.changes]
    for lora, _ in mine:
        for note in notes_of(network, lora):
            complain(f"an adapter ({lora.format}): {note}")
    return mine


_BAR = "{desc:<16} {bar} {n_fmt}/{total_fmt} evaluations"


class _Clock:
    """Seconds spent on each kind of work, and a progress bar over the network's evaluations that names the stage.

    What takes long runs in another thread, so that a signal ends it at once."""

    def __init__(self, times: Times, groups: int, evaluations: int, *, silent: bool = False):
        self.times = np.asarray(times)
        self.steps = (len(self.times) - 1) * groups
        self.spent: dict[str, float] = {}
        self.compiled: dict[str, Any] = {}
        self.reused = 0
        self.lost_at: float | None = None  # the time of the first evaluation that was not finite
        self.bar = tqdm(total=self.steps * evaluations, bar_format=_BAR, disable=silent)

    def __enter__(self) -> "_Clock":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            jax.effects_barrier()  # the last ticks; after a signal they would take as long as all steps
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
            return interruptible(lambda: jax.block_until_ready(loader(source, **options)))

    def run(self, kind: str, function: Any, *arguments: Any, **options: Any) -> Any:
        """Run a jitted function on arguments of one shape, compiled the first time; the two are counted apart."""
        if kind not in self.compiled:
            with self.measure("compile", kind):
                self.compiled[kind] = interruptible(
                    lambda: function.lower(*arguments, **options).compile()
                )
        with self.measure(kind):
            return interruptible(
                lambda: jax.block_until_ready(self.compiled[kind](*arguments, **options))
            )

    def tick(self, t: Any) -> None:
        self.bar.update()

    def watch(self, t: float, finite: bool, reused: int) -> None:
        self.reused += reused
        if not finite and (self.lost_at is None or t > self.lost_at):
            self.lost_at = t

    def lost_step(self) -> str:
        """Return at which step the first velocity was not finite, for a message."""
        jax.effects_barrier()
        if self.lost_at is None:
            return "denoising"
        return (
            f"denoising (step {int((self.times >= self.lost_at).sum())} of {len(self.times) - 1})"
        )

    def report(self, *, evaluations: int | None = None) -> str:
        """Return what was spent. `evaluations`: of the networks, of which a cache skipped some."""
        parts = [f"{kind} {seconds:.2f} s" for kind, seconds in self.spent.items()]
        said = f"{', '.join(parts)} ({self.spent['denoise'] / self.steps:.3f} s per step)"
        return (
            said
            if evaluations is None
            else f"{said}, cache: {self.reused} of {evaluations} evaluations skipped"
        )


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
    reuse: StepCache | None
    attention: Attention | None
    loras: list[tuple[Lora, float]]
    seed: int
    weights: DTypeLike | None
    activations: DTypeLike

    def evaluations(self, options: argparse.Namespace, groups: int) -> int | None:
        """Return how many evaluations of the networks a cache may skip, or None without one."""
        sides = 1 if options.cfg == 1 else 2
        return None if self.reuse is None else self.steps * self.step.evaluations * groups * sides


def _pick(given: int | None, default: int) -> int:
    return default if given is None else given


def _plan(options: argparse.Namespace, defaults: Defaults) -> _Plan:
    """Fill in and check the options, before anything is loaded."""
    # Never more rows than images: what is drawn beyond them would be thrown away.
    batch = min(_pick(options.batch, options.images), options.images)
    steps, height, width = (
        _pick(getattr(options, name), getattr(defaults, name))
        for name in ("steps", "height", "width")
    )
    check_size("--height and --width", height, width)
    _check_negative(options)
    weights = DTYPES[options.dtype] if options.dtype else None
    activations = activation_dtype() if weights is None else weights
    max_length = _pick(options.max_sequence_length, defaults.max_length)
    rows = batch if options.prompts is None else _pick(options.batch, 1)
    _check_memory(options, Demand(rows, height, width, steps, max_length, activations))
    attention = None
    if options.attention is not None or options.flash_block_sizes is not None:
        attention = Attention(options.attention, options.flash_block_sizes)
    plan = _Plan(
        steps,
        height,
        width,
        max_length,
        batches(options.images, batch),
        timer(options.timer, steps, defaults, height, width, shift=options.shift),
        integrator(options.integrator, eta=options.eta),
        None if options.nag is None else traced(Nag(options.nag)),
        None if options.cache is None else traced(cache(options.cache)),
        attention,
        [],
        _pick(options.seed, 0),
        weights,
        activations,
    )
    check_finite_times(plan.times)
    return plan._replace(loras=[(read_adapter(adapter), adapter.scale) for adapter in options.lora])


def _check_memory(options: argparse.Namespace, demand: Demand) -> None:
    devices = 1 if options.mesh is None else options.mesh.size
    check_memory(demand, read_configs(options.model), devices=devices)


def _check_negative(options: argparse.Namespace) -> None:
    if options.negative_prompt is not None and options.cfg == 1 and options.nag is None:
        raise ValueError(
            "--negative-prompt does nothing at --cfg 1 without --nag. Give a scale, as --cfg 3."
        )
    if options.rule != "cfg" and options.cfg == 1:
        raise ValueError("--rule does nothing at --cfg 1. Give a scale, as --cfg 3.")


def read_adapter(adapter: Any) -> Lora:
    """Read an adapter, downloaded if need be, and print what it holds that has no effect."""
    lora = read_lora(interruptible(adapter_file, adapter.place))
    for note in lora.notes:
        complain(f"{adapter.name}: {note}")
    return lora


def adapter_file(place: str) -> Path:
    """Return the file of an adapter as the command line names it, downloaded if need be."""
    kind, _, rest = place.partition(":")
    if kind == "tiny":
        return shipped_lora(rest)
    if kind != "hub":
        return Path(place)
    owner, repository, file = rest.split("/", 2)
    return download_file(f"{owner}/{repository}", file)


def generate(options: argparse.Namespace) -> None:
    """Encode, free the encoders, denoise, decode and write, a batch at a time; or all that a file of prompts asks for."""
    _join(options)
    check_devices()
    if options.mesh is not None:
        # Lines of a file are drawn by each process alone, the images of a prompt by all together.
        options.mesh = make_mesh(
            **options.mesh,
            devices=jax.devices() if options.prompts is None else jax.local_devices(),
        )
    defaults = interruptible(load_defaults, options.model)
    plan = _plan(options, defaults)
    folder = writable(options.output_dir)
    use_cache(options.compilation_cache)
    (_generate_prompt if options.prompts is None else _generate_file)(
        options, plan, defaults, folder
    )


def _generate_prompt(
    options: argparse.Namespace, plan: _Plan, defaults: Defaults, folder: Path
) -> None:
    written: list[Path] = []
    first = jax.process_index() == 0  # of several, the one that writes
    line = Line(options.prompt, options.prompt_2, options.negative_prompt, "", plan.seed)
    with _Clock(plan.times, len(plan.groups), plan.step.evaluations, silent=not first) as clock:
        stage = _Stage(clock, options, plan, defaults)
        encoders = stage.encoders()
        stage.note_cuts(encoders.tokenizers, [line] if first else [])
        texts = stage.encode(encoders, [line])
        stage.tell(encoders, None)
        kept = encoders if options.keep_encoders else None
        del encoders
        networks = stage.networks()
        stage.tell(kept, networks)
        key, channels = seed_key(plan.seed), networks.vae.config.latent_channels
        for group in plan.groups:
            noise = noise_batch(key, group, plan.height, plan.width, channels=channels)
            rows = jax.tree.map(lambda x, count=len(group): jnp.repeat(x, count, axis=0), texts)
            images, lost = stage.draw(networks, rows, noise, step_keys(key, group, plan.step))
            # The last group repeats its last number.
            for number, image, where in zip(dict.fromkeys(group), images, lost, strict=False):
                if where is not None:
                    raise ValueError(f"Image {number} {_not_finite(where)}")
                metadata = stage.metadata(line, guidance_text(networks.guidance)) | {
                    "image": str(number)
                }
                written += [write_numbered(image, folder, metadata)] if first else []
    if first:
        print(clock.report(evaluations=plan.evaluations(options, len(plan.groups))))
        print("\n".join(str(path) for path in written))


def _not_finite(stage: str) -> str:
    return (
        f"is not finite after {stage}, and is not written. If it is float16 that overflows, leave out --dtype; else look at "
        "the weights and adapters."
    )


_TOGETHER = (
    (
        "stream_blocks",
        "mesh",
        "--stream-blocks passes the weights through one device. Leave out --mesh, which splits them.",
    ),
    (
        "stream_blocks",
        "quantize",
        "--stream-blocks passes the weights as they are. Leave out --quantize.",
    ),
    (
        "stream_blocks",
        "unroll",
        "--stream-blocks fetches one block per iteration of a loop, which --unroll removes. Leave out --unroll.",
    ),
)


def _join(options: argparse.Namespace) -> None:
    """Check what goes with what, and join the job's other processes, before anything asks for devices."""
    for one, other, message in _TOGETHER:
        if getattr(options, one) and getattr(options, other):
            raise ValueError(message)
    if options.prompts is None and options.offload_encoders:
        raise ValueError(
            "--offload-encoders does nothing for one prompt: once it is encoded they are freed. Leave it out."
        )
    if options.prompts is None and options.overwrite:
        raise ValueError(
            "--overwrite does nothing without --prompts: the images of one prompt get new numbers. Leave it out."
        )
    if options.distributed and options.prompts is None and options.mesh is None:
        raise ValueError(
            "--distributed shares the lines of --prompts among processes, or a prompt's --mesh. Give one of them."
        )
    useless = {
        "--prompt-2": options.prompt_2,
        "--seed": options.seed,
        "--images": None if options.images == 1 else options.images,
        "--keep-encoders": options.keep_encoders or None,
    }
    given = [name for name, value in useless.items() if value is not None]
    if given and options.prompts is not None:
        raise ValueError(
            f"{', '.join(given)} does nothing with --prompts: the lines say it, and encoders stay. Leave it out."
        )
    if options.distributed:
        _initialize()


def _initialize() -> None:
    """Join a job. **Raises:** `ValueError` for a job that is not described, or whose description is none."""
    environment = {
        name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")
    }
    given = {name: value for name, value in environment.items() if value is not None}
    for name, value in given.items():
        if not value.isdecimal():
            raise ValueError(
                f"--distributed needs a whole number as JAX_{name.upper()}, got {value!r}. Set it anew."
            )
    where: dict[str, Any] = {name: int(value) for name, value in given.items()}
    # It would take SIGTERM for itself, so that the command would run on.
    jax.config.update("jax_enable_preemption_service", False)
    # A process that is killed ends the others within half a minute; one that is done waits for them.
    interruptible(
        jax.distributed.initialize,
        **where,
        heartbeat_timeout_seconds=30,
        shutdown_timeout_seconds=24 * 3600,
    )


class _Job(NamedTuple):
    """A file's lines that this process draws: those whose images are to be replaced, `stale`, too. `kept`: how many images
    are there already. `problems`: of lines that are not drawn."""

    todo: list[Line]
    stale: set[str]
    kept: int
    problems: list[str]


def _generate_file(
    options: argparse.Namespace, plan: _Plan, defaults: Defaults, folder: Path
) -> None:
    """Draw this process's share of a file's lines, in batches of one size, each image whole or not at all; what is there stays.

    An image depends on its line alone, and the size of the batches.
    """
    lines, problems = read_prompts(options.prompts, guided=options.cfg != 1 or plan.nag is not None)
    mine = share(lines, jax.process_index(), jax.process_count())
    job = _sorted(options, plan, defaults, mine, folder)
    groups = batches(len(job.todo), min(_pick(options.batch, 1), max(len(lines), 1)))
    written = 0
    problems += job.problems
    if groups:
        with _Clock(plan.times, len(groups), plan.step.evaluations) as clock:
            stage = _Stage(clock, options, plan, defaults)
            encoders, networks = stage.encoders(), stage.networks()
            stage.note_cuts(encoders.tokenizers, job.todo)
            stage.tell(encoders, networks)
            for group in groups:
                count, more = _draw_lines(
                    stage,
                    encoders,
                    networks,
                    [job.todo[number] for number in group],
                    folder,
                    job.stale,
                )
                written, problems = written + count, problems + more
        print(clock.report(evaluations=plan.evaluations(options, len(groups))))
    print(f"{written} images written to {folder}, {job.kept} were there, {len(lines)} lines in all")
    _raise_problems(options.prompts, problems)


def _raise_problems(path: Path, problems: Sequence[str]) -> None:
    """Print what is wrong with each line. **Raises:** `ValueError` with the last of them."""
    for problem in problems[:-1]:
        complain(f"{path}: {problem}")
    if problems:
        raise ValueError(f"{path}: {problems[-1]}")


def _sorted(
    options: argparse.Namespace,
    plan: _Plan,
    defaults: Defaults,
    lines: Sequence[Line],
    folder: Path,
) -> _Job:
    """Sort lines by whether their images are there, and are theirs."""
    todo, stale, kept, problems = [], set(), 0, []
    for line in lines:
        path = line.image(folder)
        if not path.exists() and not path.is_symlink():
            todo.append(line)
            continue
        found = read_metadata(path)
        reason = difference(
            found, metadata(options, plan, line, _guidance_of(found, options, defaults))
        )
        if reason is None:
            kept += 1
        elif options.overwrite:
            todo.append(line)
            stale.add(line.id)
        else:
            problems.append(f"line {line.number}: {reason}; remove {path.name} or pass --overwrite")
    return _Job(todo, stale, kept, problems)


def _guidance_of(found: dict[str, str], options: argparse.Namespace, defaults: Defaults) -> str:
    """Return the distilled guidance that an image should tell. Without --guidance it is the model's, or none, as the network
    takes it or not, which is not known before it is loaded."""
    if options.guidance is not None:
        return f"{options.guidance:g}"
    own = f"{3.5 if defaults.guidance is None else defaults.guidance:g}"
    return "none" if found.get("guidance") == "none" else own


def _draw_lines(
    stage: "_Stage",
    encoders: "_Encoders",
    networks: "_Networks",
    lines: Sequence[Line],
    folder: Path,
    stale: set[str],
) -> tuple[int, list[str]]:
    """Draw a batch of lines; return how many images were written, and what is wrong with the others."""
    plan, channels = stage.plan, networks.vae.config.latent_channels
    keys = [seed_key(line.seed) for line in lines]
    noise = jnp.concatenate(
        [noise_batch(key, [0], plan.height, plan.width, channels=channels) for key in keys]
    )
    drawn = [one for key in keys if (one := step_keys(key, [0], plan.step)) is not None]
    images, lost = stage.draw(
        networks, stage.encode(encoders, lines), noise, jnp.concatenate(drawn) if drawn else None
    )
    written, problems = 0, []
    # The last group repeats its last line.
    for line, image, where in zip(dict.fromkeys(lines), images, lost, strict=False):
        if where is not None:
            problems.append(f"line {line.number}: its image {_not_finite(where)}")
            continue
        with suppress(FileExistsError):  # another process has drawn it since
            said = stage.metadata(line, guidance_text(networks.guidance))
            write_png(image, line.image(folder), said, overwrite=line.id in stale)
            written += 1
    return written, problems


class _Texts(NamedTuple):
    """A batch of encoded prompts, and of what is led away from, if anything is."""

    text: Text
    negative: Text | None


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
        return _Encoders(
            tokenizers, *(offload(network) if away else network for network in (clip, t5))
        )

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
        how: dict[str, Any] = (
            {} if mesh is None else {"sharding": lambda network: shardings(network, mesh)}
        )
        if eight and mesh is None and not adapted:  # never whole in memory
            network = self.clock.load(
                loader, self.options.model, dtype=self.plan.weights, quantize=eight
            )
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
            host = jax.sharding.SingleDeviceSharding(
                jax.local_devices()[0], memory_kind="pinned_host"
            )
            network = stream_blocks(load(sharding=host))
        mine = _adapters_of(network, kind, self.plan.loras)
        return (
            attach(network, [lora for lora, _ in mine], [scale for _, scale in mine])
            if mine
            else network
        )

    def tell(self, encoders: _Encoders | None, networks: _Networks | None) -> None:
        """Print what is resident where, if it is positive."""
        if not self.options.show_memory:
            return
        clip, t5 = (None, None) if encoders is None else (encoders.clip, encoders.t5)
        flux, vae = (None, None) if networks is None else (networks.flux, networks.vae)
        tqdm.write(residency({"clip": clip, "t5": t5, "flux": flux, "vae": vae}) + "\n")

    def note_cuts(self, tokenizers: Tokenizers, lines: Sequence[Line]) -> None:
        """Print which prompts are longer than the encoders read."""
        for line in lines:
            for cut in cuts(tokenizers, line, self.plan.max_length):
                tqdm.write(
                    f"fluxjax: {f'line {line.number}: ' if line.number else ''}{cut}",
                    file=sys.stderr,
                )

    def encode(self, encoders: _Encoders, lines: Sequence[Line]) -> _Texts:
        """Encode prompts, and what is led away from if anything is."""
        networks = fetch(encoders.clip), fetch(encoders.t5)

        def run(prompts: list[str], seconds: list[str]) -> Text:
            ids = prompt_ids(encoders.tokenizers, prompts, seconds, max_length=self.plan.max_length)
            return self.clock.run(
                "encode",
                encode_text,
                *networks,
                ids,
                dtype=self.plan.activations,
                mesh=self.options.mesh,
            )

        text = run(
            [line.prompt for line in lines],
            [line.prompt if line.prompt_2 is None else line.prompt_2 for line in lines],
        )
        if self.options.cfg == 1 and self.plan.nag is None:
            return _Texts(text, None)
        away = [_away(line, self.options) for line in lines]
        return _Texts(text, run(away, away))

    def draw(
        self, networks: _Networks, texts: _Texts, noise: Array, keys: Array | None
    ) -> tuple[np.ndarray, list[str | None]]:
        """Denoise and decode a batch; return the images, and for each the first stage after which it is not finite, if any."""
        plan, options = self.plan, self.options
        latents = self.clock.run(
            "denoise",
            denoise,
            *(networks.flux, texts.text, noise, plan.times, networks.guidance),
            step=plan.step,
            keys=keys,
            negative=texts.negative,
            cfg=jnp.float32(options.cfg),
            rule=traced(RULES[options.rule]()),
            nag=plan.nag,
            reuse=plan.reuse,
            attention=plan.attention,
            mesh=options.mesh,
            report=self.clock.tick,
            watch=self.clock.watch,
        )
        images = self.clock.run(
            "decode", decode, networks.vae, latents, dtype=plan.activations, mesh=options.mesh
        )
        return _on_host(images), self._lost(texts, latents, images)

    def _lost(self, texts: _Texts, latents: Array, images: Array) -> list[str | None]:
        """Return for each image of a batch the first stage after which it is not finite, if there is one."""
        stages = {"the text encoders": texts, "denoising": latents, "decoding": images}
        found: list[str | None] = [None] * len(images)
        for stage, tree in stages.items():
            wrong = ~_on_host(finite_rows(tree))
            if stage == "denoising" and wrong.any():
                stage = self.clock.lost_step()
            found = [
                stage if before is None and now else before
                for before, now in zip(found, wrong, strict=True)
            ]
        return found

    def metadata(self, line: Line, guidance: str) -> dict[str, str]:
        """Return what an image says of how it was made."""
        return metadata(self.options, self.plan, line, guidance)


def _on_host(x: Array) -> np.ndarray:
    """Return an array of all processes' devices on this host."""
    return np.asarray(x if x.is_fully_addressable else process_allgather(x, tiled=True))


@jax.jit
def finite_rows(tree: Any) -> Bool[Array, " rows"]:
    """Return for each row of a pytree of arrays whether all its numbers are finite."""
    rows = [jnp.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(rows).all(0)


def cuts(tokenizers: Tokenizers, line: Line, max_length: int) -> list[str]:
    """Return what to tell of a line's texts that are longer than CLIP or T5 reads."""
    told = []
    for name, text in line.texts().items():
        clip, t5 = token_counts(tokenizers, text)
        parts = (
            [f"CLIP reads {tokenizers.clip_length} of {clip} tokens"]
            if clip > tokenizers.clip_length
            else []
        )
        parts += [f"T5 reads {max_length} of {t5}"] if t5 > max_length else []
        if name == "prompt_2":  # CLIP does not read it
            parts = parts[-1:] if t5 > max_length else []
        elif name == "prompt" and line.prompt_2 is not None:  # nor T5 this
            parts = parts[:1] if clip > tokenizers.clip_length else []
        told += [f"the {name} is cut: {', '.join(parts)}"] if parts else []
    return told


def guidance_text(guidance: Array | None) -> str:
    return "none" if guidance is None else f"{float(guidance):g}"


def metadata(options: argparse.Namespace, plan: _Plan, line: Line, guidance: str) -> dict[str, str]:
    """Return what an image says of how it was made: all that decides it."""
    loras = ", ".join(f"{one.name}:{one.scale:g}" for one in options.lora)
    return {
        "prompt": line.prompt,
        **({} if line.prompt_2 is None else {"prompt_2": line.prompt_2}),
        "seed": str(line.seed),
        "steps": str(plan.steps),
        "guidance": guidance,
        "integrator": options.integrator
        + ("" if options.eta is None else f", eta {options.eta:g}"),
        "timer": options.timer + ("" if options.shift is None else f", shift {options.shift:g}"),
        **_led_away(options, line),
        **({} if options.cache is None else {"cache": options.cache}),
        "size": f"{plan.width}x{plan.height}",
        **(
            {}
            if options.max_sequence_length is None
            else {"max_sequence_length": str(plan.max_length)}
        ),
        "model": encodable(options.model),
        **({} if options.dtype is None else {"dtype": options.dtype}),
        **({"quantize": options.quantize} if options.quantize else {}),
        **({"lora": encodable(loras)} if loras else {}),
        "version": f"fluxjax {__version__}",
    }


def encodable(name: str) -> str:
    """Return a path as text; bytes of it that are not valid UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


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
        folder.absolute()  # raises for a relative one in a current folder that was deleted
    except OSError as error:
        raise ValueError(
            f"--output-dir {folder} can't be made ({error.strerror}). Choose a folder that you may write to."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"--output-dir {folder} is not writable. Choose a folder that you may write to."
        )
    return folder


def use_cache(folder: Path | None) -> None:
    """Keep every compiled program in a folder, if there is one."""
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
