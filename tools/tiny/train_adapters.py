"""Train one of the tiny model's adapters: fill, edges, kontext, controlnet or redux.

The training ends by itself after `--minutes`, with a learning rate that falls to nearly 0 by then.
What is written is the moving average of the weights.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from adapter_data import Encoded, encode_examples, encode_prompts
from adapter_examples import KINDS, make_examples_in_parallel
from adapter_tasks import Stage, Task, controlnet_task, lora_task
from redux_task import redux_task

from fluxjax.generate.load_models import Models, load_models
from fluxjax.generate.text import TextStates
from fluxjax.lora.adapter import Change, Lora
from fluxjax.lora.read import read_lora
from fluxjax.lora.terms import LowRankTerm
from fluxjax.nets.flux import Flux
from fluxjax.train.step import TrainState, make_step

STARTED = time.monotonic()
EMA = 0.998
WARM_UP = 0.04
LAST_RATE = 0.03
STOP_EARLY = 4.0  # seconds that the last write may take


def make_task(kind: str, models: Models, key: jax.Array) -> Task:
    """Return the training of a kind of adapter."""
    if kind == "controlnet":
        return controlnet_task(models, key)
    if kind == "redux":
        return redux_task(models, key)
    return lora_task(kind, models, key)


def like(model: Lora, started: Lora) -> Lora:
    """Return an adapter with the values of one that was written earlier, in the places of `model`.

    **Raises:** `ValueError` for an adapter of other ranks.
    """
    changes = {}
    for name, (change,) in model.changes["flux"].items():
        if name not in started.changes["flux"]:
            changes[name] = (change,)
            continue
        # Written for diffusers, the parts of a fused matrix are apart, each with the same down.
        parts = {one.part: one.term for one in started.changes["flux"][name]}
        order = [part for part in ("q", "k", "v", "qkv", "mlp", None) if part in parts]
        up = jnp.concatenate([parts[part].up * parts[part].factor for part in order])
        term = LowRankTerm(up.astype(jnp.float32), parts[order[0]].down, jnp.float32(1))
        term = eqx.tree_at(lambda term: term.down, term, term.down.astype(jnp.float32))
        if jax.tree.map(jnp.shape, term) != jax.tree.map(jnp.shape, change.term):
            raise ValueError("--start has other ranks than this kind of adapter is trained with.")
        changes[name] = (Change(term, None, False),)
    return Lora({"flux": changes}, model.format)


def make_optimizer(rate: float) -> optax.GradientTransformation:
    """Return AdamW with clipped gradients; the loop sets its learning rate."""
    adamw = optax.inject_hyperparams(optax.adamw)(rate, b2=0.99, weight_decay=0.01)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def with_rate(state: TrainState, rate: float) -> TrainState:
    """Return a state with another learning rate."""
    where = lambda state: state.optimizer[1].hyperparams["learning_rate"]  # noqa: E731
    return eqx.tree_at(where, state, jnp.float32(rate))


def rate_at(share: float, highest: float) -> float:
    """Return the learning rate after a share of the training: a warm-up, then a cosine."""
    if share < WARM_UP:
        return highest * (0.05 + 0.95 * share / WARM_UP)
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARM_UP) / (1 - WARM_UP))))
    return highest * (LAST_RATE + (1 - LAST_RATE) * falling)


def compiled_steps(stage: Stage, optimizer: Any) -> Callable:
    """Return a function of several steps to compile, one for each batch of `batches`.

    Several steps are a loop of the compiled program. On a CPU the gradients of convolutions take
    several times as long within such a loop. So `batches` may also be one batch, without the axis
    of batches, for one step without a loop.
    """
    step = make_step(stage.loss, optimizer, ema_decay=EMA, trainable=stage.trained)

    def steps(state, flux, batches: Encoded, empty, key):
        if batches.latents.ndim == 3:
            return step(state, flux, batches, empty, key=key)

        def one(state, scanned):
            key, batch = scanned
            return step(state, flux, batch, empty, key=key)

        keys = jax.random.split(key, len(batches.latents))
        return jax.lax.scan(one, state, (keys, batches))

    return jax.jit(steps, donate_argnums=0)


class Batches:
    """Draws random batches of the examples.

    On a CPU NumPy reads the rows: within a compiled step that took longer than all the rest.
    """

    def __init__(self, data: Encoded, shape: tuple[int, ...], seed: int):
        on_cpu = jax.default_backend() == "cpu"
        self.data = jax.tree.map(np.asarray, data) if on_cpu else data
        self.shape, self.rng = shape, np.random.default_rng(seed)

    def draw(self) -> Encoded:
        """Return examples with leading axes of the shape."""
        rows = self.rng.integers(len(self.data.latents), size=self.shape)
        return jax.tree.map(lambda array: array[rows], self.data)


def compile_quickly(function: Callable, *arguments: Any) -> Callable:
    """Compile a function; on a GPU without trying kernels, which takes long on a busy one."""
    lowered = function.lower(*arguments)
    if jax.default_backend() != "gpu":
        return lowered.compile()
    options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
    try:
        return lowered.compile(options)
    except (RuntimeError, ValueError) as error:
        print(f"compiling with the default options: {error}", flush=True)
        return lowered.compile()


class Clock:
    """The share of a stage that is over, by time or by steps, whichever is more."""

    def __init__(self, seconds: float, steps: float | None):
        self.begin, self.steps = time.monotonic(), steps
        self.seconds = max(seconds, 1e-3)

    def share(self, step: int) -> float:
        by_time = (time.monotonic() - self.begin) / self.seconds
        return by_time if self.steps is None else max(by_time, step / self.steps)


def train(options: argparse.Namespace) -> None:
    kind, key = options.kind, jax.random.key(options.seed)
    if options.scan is None:
        options.scan = 1 if jax.default_backend() == "cpu" else 20
    options.output.mkdir(parents=True, exist_ok=True)
    examples = make_examples_in_parallel(kind, options.examples, options.seed, options.workers)
    _log(kind, f"{len(examples.prompts)} examples")
    models = load_models("tiny", dtype="float32")
    data = encode_examples(models, kind, examples)
    empty = jax.tree.map(lambda x: x[0], encode_prompts(models, [""]))
    jax.block_until_ready(data)
    _log(kind, "encoded")
    task = make_task(kind, models, key)
    if options.start is not None:
        task = task._replace(model=like(task.model, read_lora(options.start)))
    model = task.model
    for number, stage in enumerate(task.stages):
        shape = (options.batch,) if options.scan == 1 else (options.scan, options.batch)
        batches = Batches(data, shape, seed=number)
        inputs = task.flux, batches, empty
        model = train_stage(options, task, stage, model, inputs, jax.random.fold_in(key, number))
    task.write(model, options.output)
    _log(kind, f"finished: {options.output}")


def train_stage(
    options: argparse.Namespace,
    task: Task,
    stage: Stage,
    model: eqx.Module,
    inputs: tuple[Flux, Batches, TextStates],
    key: jax.Array,
) -> eqx.Module:
    """Return the average of the model over the steps of a stage.

    **Arguments:** `model`: before them. `inputs`: the frozen transformer, the batches, and the
    states of the empty prompt.
    """
    rate = options.rate or stage.rate
    optimizer = make_optimizer(rate)
    # Copies, since arrays of the model and of its average would be donated twice.
    state = TrainState.create(model, optimizer, trainable=stage.trained)
    state = jax.tree.map(jnp.array, state)
    flux, batches, empty = inputs
    made = compiled_steps(stage, optimizer)
    steps = compile_quickly(made, state, flux, batches.draw(), empty, key)
    _log(options.kind, "compiled")
    log = Log(options.kind, options.report)
    rest = 60 * options.minutes - STOP_EARLY - process_seconds()
    seconds = rest if stage is task.stages[-1] else stage.share * rest
    count = None if options.steps is None else stage.share * options.steps
    clock, done, written = Clock(seconds, count), 0, time.monotonic()
    while (share := clock.share(done)) < 1:
        state = with_rate(state, rate_at(share, rate))
        step_key = jax.random.fold_in(key, done)
        state, losses = steps(state, flux, batches.draw(), empty, step_key)
        done += options.scan
        log.add(done, float(jnp.mean(losses)))
        if time.monotonic() - written >= options.save:
            task.write(state.ema, options.output)
            written = time.monotonic()
    _log(options.kind, f"{done} steps")
    return state.ema


class Log:
    """Prints the mean loss and the speed from time to time."""

    def __init__(self, kind: str, seconds: float):
        self.kind, self.seconds = kind, seconds
        self.since, self.first, self.losses = time.monotonic(), 0, []

    def add(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        passed = time.monotonic() - self.since
        if passed >= self.seconds:
            mean, speed = sum(self.losses) / len(self.losses), (step - self.first) / passed
            _log(self.kind, f"step {step} loss {mean:.5f} {speed:.1f} steps/s")
            self.since, self.first, self.losses = time.monotonic(), step, []


def process_seconds() -> float:
    """Return the seconds since this program has been imported."""
    return time.monotonic() - STARTED


def _log(kind: str, text: str) -> None:
    print(f"{kind} {process_seconds():.0f} s: {text}", flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = made.add_argument
    add("kind", choices=KINDS)
    add("--minutes", type=float, required=True, help="from the start to the last write")
    add("--output", type=Path, required=True, help="folder of what is written")
    add("--examples", type=int, default=32768, help="scenes that are drawn and encoded first")
    add("--workers", type=int, default=3, help="processes that draw the scenes")
    add("--batch", type=int, default=256, help="examples of a step")
    add("--scan", type=int, help="steps of a call (default: 20, and 1 on a CPU)")
    add("--steps", type=int, help="end after so many steps, if the time is not over before")
    add("--rate", type=float, help="the highest learning rate (default: that of the kind)")
    add("--report", type=float, default=20, help="seconds between two lines of the log")
    add("--save", type=float, default=60, help="seconds between two written files")
    add("--start", type=Path, help="go on from an adapter that was written earlier")
    add("--seed", type=int, default=0)
    return made


if __name__ == "__main__":
    train(parser().parse_args())
