"""Measure training steps of a LoRA on full-size dev, in turns with diffusers and peft on torch.

The weights are random and frozen in bfloat16 or 8 bits, the latents and the states of the texts are
computed before the steps are timed. For the gradient each block is computed a second time. If a
contender fails, its row has the error, and the others are still measured.

If a program crashes on the GPU, the process can't use the GPU any more, and the rows after it fail.
Then measure each library in a process of its own: fluxjax with `--no-diffusers`, diffusers with
`--weights` followed by no format.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from bench_parts import error_line, random_flux, seconds_in_turns, seconds_of, summarize_times
from bench_train import LORA
from torch_parts import (
    diffusers_flux,
    finish,
    library_versions,
    set_fastest_attention,
    torch_device,
)

from fluxjax import Flux, FluxConfig, quantize
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.devices.mesh import make_mesh
from fluxjax.generate import TextStates
from fluxjax.generate.latents import image_tokens
from fluxjax.kernels import select_attention
from fluxjax.kernels.attention import IMPLEMENTATIONS
from fluxjax.nets.rounding import QUANTIZATIONS
from fluxjax.train.batch import TrainBatch
from fluxjax.train.config import TrainConfig, train_config
from fluxjax.train.cost import TokenCounts, step_cost, training_flop
from fluxjax.train.loop import lower_step
from fluxjax.train.place import SharedInputs, StepRows, place_batch
from fluxjax.train.setup import TrainingSetup, set_up_training, training_shapes
from fluxjax.train.step import TrainState

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

FORMATS = ("bfloat16", *QUANTIZATIONS)
TXT_TOKENS = 512
BACKENDS = ("native", "_native_flash", "_native_efficient")
"""Attention implementations of diffusers that have a gradient; the fastest is used."""
# What `fluxjax.lora.init.BLOCKS` covers: the attention and the MLP of every block, and not the
# modulation. fluxjax has one product of queries, keys and values, and in single blocks of the MLP
# as well, and so one down factor for all of them. Diffusers' layers of them are apart, each with
# a down factor of its own: 2 more in each of the two streams of a double block, and 3 more in a
# single block. At rank 16 dev's adapter has (19 * 4 + 38 * 3) * 16 * 3072 = 9.3 M more numbers.
TARGETS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
)
"""The layers of diffusers' transformer that are adapted, as a regular expression for peft."""

Step = Callable[[], float]
"""Takes a training step, waits for it, and returns its loss."""


class Work(NamedTuple):
    """The images of a training step. `size`: their side in pixels. `batch`: how many there are."""

    size: int
    batch: int


class Contender(NamedTuple):
    """A row of the results, and a function that prepares its step.

    `make`: adds to the row what preparing the step shows (such as the memory), and returns it.
    """

    row: dict[str, Any]
    make: Callable[[dict[str, Any]], Step]


def compile_as_command_line(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program with the option of `fluxjax.cli.xla_options`.

    As an option of this program, because other benches use JAX when they are imported, after which
    `XLA_FLAGS` has no effect.
    """
    if jax.default_backend() != "gpu":
        return lowered.compile()
    try:
        return lowered.compile({"xla_gpu_enable_triton_gemm": False})
    except (RuntimeError, ValueError) as error:
        if "option" not in str(error):
            raise
        print(f"compiling with the default options: {error_line(error)}", flush=True)
        return lowered.compile()


class Training:
    """A training of fluxjax and its state, which every step donates to the next."""

    def __init__(self, setup: TrainingSetup):
        self.setup = setup
        self.state: TrainState = setup.first_state()

    def restore(self) -> None:
        """Make a new state if a failed step has deleted the old one, which steps donate."""
        if self.state.step.is_deleted():
            self.state = self.setup.first_state()

    def take(self, compiled: jax.stages.Compiled, rows: StepRows, shared: SharedInputs) -> float:
        """Run one training step, wait until it is done, and return its loss."""
        setup = self.setup
        self.state, metrics = compiled(self.state, setup.frozen, rows, shared, setup.key)
        jax.block_until_ready(self.state)
        return float(metrics.loss)


class Ours:
    """fluxjax's trainings by the format of the frozen weights, made when they are first needed.

    Dev's weights take 24 GB in bfloat16 and 12 GB in 8 bits. `end`: the time until which programs
    are waited for.
    """

    def __init__(self, config: FluxConfig, options: argparse.Namespace, end: float):
        self.config, self.options, self.end = config, options, end
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self.defaults = load_defaults("dev")
        self.networks: dict[str, Flux] = {}
        self.trainings: dict[str, Training] = {}

    def settings(self, weights: str, work: Work) -> TrainConfig:
        """Return the configuration of `fluxjax train`."""
        method = dict(LORA["train"])
        if weights != "bfloat16":
            method["quantize"] = weights
        data = {"size": work.size, "max_length": TXT_TOKENS}
        values = {**LORA, "train": method, "batch": work.batch, "data": data}
        if self.options.attention is not None:
            values["attention"] = self.options.attention
        return train_config(values)

    def shapes(self, weights: str) -> Flux:
        """Return the shapes of the transformer with this format of weights."""
        shapes = eqx.filter_eval_shape(random_flux, self.config)
        if weights == "bfloat16":
            return shapes
        return eqx.filter_eval_shape(quantize, shapes, weights)

    def compile(self, weights: str, work: Work, pool: ThreadPoolExecutor) -> Future:
        """Start to compile the step; the future has the program and the seconds that it took.

        It is compiled from shapes, so that the weights can be drawn meanwhile.
        """
        start = time.perf_counter()
        config = self.settings(weights, work)
        setup = training_shapes(config, self.shapes(weights), self.mesh, self.defaults)
        lowered = lower_step(setup, config).lowered

        def compiled() -> tuple[jax.stages.Compiled, float]:
            return compile_as_command_line(lowered), time.perf_counter() - start

        return pool.submit(compiled)

    def training(self, weights: str, work: Work) -> Training:
        """Return the training with this format of the frozen weights."""
        if weights not in self.trainings:
            config = self.settings(weights, work)
            setup = set_up_training(config, self._network(weights), self.mesh, self.defaults)
            self.trainings[weights] = Training(setup)
        return self.trainings[weights]

    def _network(self, weights: str) -> Flux:
        if weights not in self.networks:
            if weights == "bfloat16":
                flux = random_flux(self.config)
            elif "bfloat16" in self.options.weights:
                flux = quantize(self._network("bfloat16"), weights)
            else:
                flux = quantize(random_flux(self.config), weights, donate=True)
            self.networks[weights] = flux
        return self.networks[weights]

    def inputs(self, work: Work) -> tuple[StepRows, SharedInputs]:
        """Return a random batch on the device, and the states of the empty caption."""
        config, batch = self.config, work.batch
        tokens = image_tokens(work.size, work.size)
        drawn = np.random.default_rng(0)

        def normal(*shape: int) -> np.ndarray:
            return drawn.standard_normal(shape, np.float32)

        def texts(count: int) -> TextStates:
            return TextStates(
                normal(count, TXT_TOKENS, config.context), normal(count, config.pooled)
            )

        rows = TrainBatch(
            normal(batch, tokens, config.out_channels),
            texts(batch),
            np.ones(batch, np.float32),
            np.arange(batch, dtype=np.int32),
            size=(work.size, work.size),
        )
        return place_batch(rows, texts(1), self.mesh)


def fluxjax_contender(ours: Ours, weights: str, work: Work, program: Future) -> Contender:
    """Return the contender that takes the steps of `fluxjax train`.

    **Arguments:** `program`: from `Ours.compile`.
    """

    def make(row: dict[str, Any]) -> Step:
        # Chosen by trying it on this device, which may fail as all the rest.
        row["attention"] = ours.options.attention or select_attention(heads, heads)
        training = ours.training(weights, work)
        row["trained"] = sum(leaf.size for leaf in training.setup.weights.values())
        try:
            compiled, seconds = program.result(max(1.0, ours.end - time.perf_counter()))
        except TimeoutError as error:
            raise TimeoutError("it is not compiled within --minutes") from error
        row["compile s"] = round(seconds, 2)
        cost = step_cost(compiled, 0.0, jax.devices()[0])
        row["memory GB"] = round(cost.bytes / 1e9, 2)
        row["temporaries GB"] = round(cost.temporaries / 1e9, 2)
        training.restore()
        rows, shared = ours.inputs(work)
        return lambda: training.take(compiled, rows, shared)

    tokens = image_tokens(work.size, work.size) + TXT_TOKENS
    config = ours.config
    heads = jax.ShapeDtypeStruct((tokens, config.heads, config.head_dim), jnp.bfloat16)
    row = {
        "what": "fluxjax",
        "weights": weights,
        "factors": ours.settings(weights, work).train.weights_dtype,
    }
    return Contender(row, make)


class Theirs:
    """Diffusers' transformer with an adapter of peft, and AdamW, made when it is first needed.

    The factors are bfloat16 as peft makes them beside such weights. Float32 factors would need
    autocast, in which torch is slower: it computes the norms of the tokens in float32.
    """

    def __init__(self, config: FluxConfig, options: argparse.Namespace):
        self.config, self.options = config, options
        self.network: Any = None
        self.optimizer: Any = None
        self.trained: list[Any] = []

    def prepare(self) -> None:
        """Make the network and the optimizer, unless they are made."""
        import torch
        from peft import LoraConfig

        if self.network is not None:
            return
        # The gradient of cuDNN's attention fails in torch 2.11 on an H200: it ends with an illegal
        # memory access, or with "mha_graph.execute … is_good()".
        torch.backends.cuda.enable_cudnn_sdp(False)
        method, device = LORA["train"], torch_device()
        adapter = LoraConfig(
            r=method["rank"],
            lora_alpha=method["rank"],
            init_lora_weights="gaussian",
            target_modules=TARGETS,
        )
        made = diffusers_flux(self.config).requires_grad_(False)
        made.add_adapter(adapter)
        made = made.to(device).train()
        made.enable_gradient_checkpointing()
        if self.options.torch_compile:
            # `torch.compiler.set_stance` turns compilation off again.
            made.compile_repeated_blocks(dynamic=False)
        self.trained = [leaf for leaf in made.parameters() if leaf.requires_grad]
        # With the settings of `fluxjax.train.optimizers`.
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01, fused=device == "cuda"
        )
        self.network = made  # kept only once all of this has succeeded

    def step(self, work: Work, compiled: bool) -> Step:
        """Return a step on a random batch."""
        import torch

        config, device = self.config, torch_device()
        tokens, side = image_tokens(work.size, work.size), work.size // 16
        with torch.device(device):
            latents = torch.randn(work.batch, tokens, config.in_channels)
            ids = torch.zeros(side, side, 3)
            ids[..., 1] = torch.arange(side)[:, None]
            ids[..., 2] = torch.arange(side)[None, :]
            txt = torch.randn(work.batch, TXT_TOKENS, config.context, dtype=torch.bfloat16)
            vec = torch.randn(work.batch, config.pooled, dtype=torch.bfloat16)
            same = {
                "encoder_hidden_states": txt,
                "pooled_projections": vec,
                "guidance": torch.ones(work.batch) if config.guidance_embed else None,
                "img_ids": ids.reshape(tokens, 3).to(torch.bfloat16),
                "txt_ids": torch.zeros(TXT_TOKENS, 3, dtype=torch.bfloat16),
                "return_dict": False,
            }

        def differentiate() -> Any:
            noise = torch.randn_like(latents)
            t = torch.sigmoid(torch.randn(work.batch, device=device))
            share = t[:, None, None]
            noisy = ((1 - share) * latents + share * noise).to(torch.bfloat16)
            predicted = self.network(hidden_states=noisy, timestep=t, **same)[0]
            loss = torch.nn.functional.mse_loss(predicted.float(), noise - latents)
            loss.backward()
            return loss

        def step() -> float:
            with torch.compiler.set_stance("default" if compiled else "force_eager"):
                loss = differentiate()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            finish()
            return loss.item()

        return step


def diffusers_contender(theirs: Theirs, compiled: bool, work: Work) -> Contender:
    """Return the contender that takes steps with diffusers, peft and torch.

    Its blocks are run as they are, or each is compiled.
    """

    def make(row: dict[str, Any]) -> Step:
        import torch

        theirs.prepare()
        row["trained"] = sum(leaf.numel() for leaf in theirs.trained)
        row["factors"] = str(theirs.trained[0].dtype).removeprefix("torch.")
        row["attention"] = set_fastest_attention(theirs.network, BACKENDS, theirs.step(work, False))
        step = theirs.step(work, compiled)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            start = time.perf_counter()
            step()
            if compiled:
                row["compile s"] = round(time.perf_counter() - start, 2)
            step()
        except Exception:
            theirs.optimizer.zero_grad(set_to_none=True)
            raise
        if torch.cuda.is_available():
            row["memory GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return step

    row = {
        "what": "diffusers",
        "weights": "bfloat16",
        "compiled": compiled,
    }
    return Contender(row, make)


def contenders_of(
    ours: Ours, theirs: Theirs, work: Work, pool: ThreadPoolExecutor, options: argparse.Namespace
) -> list[Contender]:
    """Return the contenders of a size and batch, the most important first.

    All of fluxjax's programs are compiled beside one another, and meanwhile the networks are made.
    """
    found = []
    for weights in options.weights:
        try:
            program = ours.compile(weights, work, pool)
        except Exception as error:
            program = Future()  # its error becomes that of the row
            program.set_exception(error)
        found.append(fluxjax_contender(ours, weights, work, program))
    if options.beside:
        beside = [diffusers_contender(theirs, False, work)]
        if options.torch_compile:
            beside.append(diffusers_contender(theirs, True, work))
        found[1:1] = beside
    makers: list[Callable[[], object]] = []
    for weights in options.weights:
        makers.append(partial(ours.training, weights, work))
    if options.beside:
        makers.insert(1, theirs.prepare)
    for make in makers:
        try:
            make()
        except Exception as error:  # the contender tries again, and its row has the error
            print(f"not made yet: {error_line(error)}", flush=True)
    return found


def measure_in_turns(
    contenders: list[Contender], end: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Prepare all steps, then time them in turns, at least once. Print each row at once.

    **Arguments:** `end`: the time after which no other row is started and no further turn.
    """
    steps = dict[int, Step]()
    for number, (row, make) in enumerate(contenders):
        if time.perf_counter() > end:
            row["left out"] = "--minutes are spent"
            print(row, flush=True)
            continue
        try:
            step = make(row)
            row["loss"] = step()
            # Printed at once, so that the log has a time even if a later contender hangs. Programs
            # that are still compiled may disturb it.
            print(f"made; a step took {1000 * seconds_of(step):.1f} ms: {row}", flush=True)
            steps[number] = step
        except Exception as error:
            row["error"] = error_line(error)
            print(row, flush=True)
    spent, errors = seconds_in_turns(steps, options.repeats, lambda: time.perf_counter() > end)
    for number, text in errors.items():
        contenders[number].row["error"] = text
    for number, turns in spent.items():
        times = summarize_times(turns)
        row = contenders[number].row
        row["ms per step"] = round(1000 * times.pop("seconds"), 2)
        row.update(times)
    return [row for row, _ in contenders]


def compared(rows: list[dict[str, Any]], tflop: float) -> None:
    """Add the operations in a second, and fluxjax's speed relative to diffusers' fastest."""
    times = []
    for row in rows:
        if row["what"] == "diffusers" and "ms per step" in row:
            times.append(row["ms per step"])
    for row in rows:
        if "ms per step" not in row:
            continue
        row["TFLOP"] = round(tflop, 2)
        row["TFLOP/s"] = round(tflop / row["ms per step"] * 1000, 1)
        if row["what"] == "fluxjax" and times:
            row["ratio"] = round(min(times) / row["ms per step"], 3)


def bench_train_step(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each size and batch, and print its rows at once."""
    end = time.perf_counter() + 60 * options.minutes
    config = FluxConfig.dev()
    if options.blocks:
        config = replace(config, double_depth=options.blocks[0], single_depth=options.blocks[1])
    ours, theirs = Ours(config, options, end), Theirs(config, options)
    shapes = ours.shapes("bfloat16")
    common = {"bench": "train", "blocks": f"{config.double_depth}+{config.single_depth}"}
    common |= {
        **library_versions("torch", "diffusers", "peft"),
        "flags": os.environ.get("XLA_FLAGS", ""),
    }
    rows: list[dict[str, Any]] = []
    pool = ThreadPoolExecutor(max(1, len(options.weights)))
    for size in options.sizes:
        for batch in options.batches:
            if time.perf_counter() > end:
                print(f"left out: size {size}, batch {batch}", flush=True)
                continue
            work = Work(size, batch)
            contenders = contenders_of(ours, theirs, work, pool, options)
            found = measure_in_turns(contenders, end, options)
            # By the same formula for all: what is computed again in the backward pass, and what
            # the factors need, is not counted.
            tokens = TokenCounts(image_tokens(size, size), TXT_TOKENS)
            compared(found, batch * training_flop(shapes, tokens, {}) / 1e12)
            for row in found:
                rows.append({"size": size, "batch": batch, **row, **common})
                print(rows[-1], flush=True)
            del contenders
            _free()
    return rows


def _free() -> None:
    """Let JAX have the memory that torch keeps for later."""
    gc.collect()
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def add_commands(commands: Any) -> None:
    """Add the sub-command."""
    train = commands.add_parser(
        "train", help="training steps of a LoRA on full-size dev, compared with diffusers"
    )
    train.set_defaults(run=bench_train_step)
    add = train.add_argument
    add("--sizes", nargs="+", type=int, default=[512, 1024], help="pixels along a side")
    add("--batches", nargs="+", type=int, default=[1])
    add(
        "--weights",
        nargs="*",
        choices=FORMATS,
        default=["bfloat16", "int8"],
        help="formats of the frozen weights; none leaves fluxjax out (default: bfloat16 int8)",
    )
    add("--attention", choices=IMPLEMENTATIONS, help="of fluxjax (default: the device's)")
    add("--repeats", type=int, default=5, help="timings; the median counts (default: %(default)s)")
    add(
        "--no-diffusers",
        dest="beside",
        action="store_false",
        help="leave out diffusers",
    )
    add(
        "--torch-compile",
        action="store_true",
        help="run diffusers with each block compiled as well, which takes minutes",
    )
    add(
        "--blocks",
        type=int,
        nargs=2,
        metavar=("DOUBLE", "SINGLE"),
        help="fewer blocks, for a small machine",
    )
    add(
        "--minutes",
        type=float,
        default=10.0,
        help="after which no new row is started (default: %(default)s)",
    )
    add("--output", type=Path, help="append the rows as JSON lines to this file")
