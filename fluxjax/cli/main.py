"""The command line: `fluxjax generate`, `compare`, `convert`, `inspect`, `download` and `lora`."""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from fluxjax.checkpoint.convert import adapter_notes, convert_weights
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.inspect import inspect_weights
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.locate import WHOLE, download, locate
from fluxjax.checkpoint.write import LAYOUTS
from fluxjax.cli.console import complain, interruptible, run_command
from fluxjax.cli.generate import (
    DTYPES,
    adapter_file,
    encodable,
    generate,
    read_adapter,
    use_cache,
    writable,
)
from fluxjax.cli.options import (
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_STEPS,
    MOST_TOKENS,
    Parser,
    adapter,
    any_text,
    block_sizes,
    byte_count,
    finite_number,
    images,
    mesh_sizes,
    names,
    path,
    pixels,
    positive_number,
    rank,
    seed,
    step_counts,
    whole_number,
)
from fluxjax.generate.compare import Run, compare, grid, table, write_comparison
from fluxjax.generate.latents import check_size, seed_key
from fluxjax.generate.limits import Demand, check_devices, check_memory, read_configs
from fluxjax.generate.load import Models, activation_dtype, load_models
from fluxjax.generate.samplers import INTEGRATORS, RULES, TIMERS
from fluxjax.kernels.attention import IMPLEMENTATIONS
from fluxjax.kernels.blocks import PRESETS
from fluxjax.lora.describe import describe_lora
from fluxjax.lora.extract import extract_lora
from fluxjax.lora.write import FORMATS, write_lora
from fluxjax.nets.quantized import EIGHT_BITS
from fluxjax.version import __version__
from fluxjax.zoo import ZOO


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake of the user's is one line on standard error and exit code 2.

    **Raises:** `SystemExit`, but for success. Without `arguments` a signal ends the whole process.
    """

    def command() -> None:
        options = _parser().parse_args(arguments)
        options.run(options)

    run_command(command, program=arguments is None)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fluxjax", description="FLUX for JAX.")
    parser.add_argument("--version", action="version", version=f"fluxjax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_compare(commands)
    _add_weights(commands)
    _add_lora(commands)
    return parser


def _add_generate(commands: Any) -> None:
    """Add the command that draws."""
    about = "Draw images of a prompt, or of a file of them."
    parser = commands.add_parser("generate", help="draw images of a prompt", description=about)
    parser.set_defaults(run=generate)
    add = parser.add_argument
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("prompt", nargs="?", type=any_text, help="what the image shows")
    about = "in its place, a JSON object a line: prompt, and, if wanted, prompt_2, negative_prompt, id, and seed"
    asked.add_argument("--prompts", type=path, metavar="FILE", help=about)
    add("--prompt-2", type=any_text, help="a text for T5 alone; CLIP keeps the prompt")
    add(
        "--model",
        default="tiny",
        help=f"{', '.join(ZOO)}, a diffusers folder, or a hub id (default: %(default)s)",
    )
    add(
        "--steps",
        type=whole_number(1, MOST_STEPS),
        help=f"of the integrator, up to {MOST_STEPS} (default: the model's)",
    )
    add("--guidance", type=finite_number(), help="distilled guidance scale (default: the model's)")
    add(
        "--negative-prompt",
        type=any_text,
        help="what classifier-free guidance leads away from (default: the empty prompt)",
    )
    add(
        "--cfg",
        type=finite_number(),
        default=1.0,
        help="classifier-free guidance scale, twice the work (default: 1, none)",
    )
    add("--rule", choices=RULES, default="cfg", help="of --cfg (default: %(default)s)")
    add(
        "--nag",
        type=finite_number(),
        metavar="SCALE",
        help="normalized attention guidance, away from the negative prompt",
    )
    add(
        "--cache",
        metavar="[KIND:]THRESHOLD",
        help="skip blocks that change little: 0.1, or teacache:0.4 (default: never)",
    )
    about = "implementation of the attention (default: the best that suits; docs/performance.md says which)"
    add("--attention", choices=IMPLEMENTATIONS, help=about)
    blocked = "flash_tpu, flash_gpu or xla_chunked"
    about = f"tokens a block of --attention {blocked}: a number, two (queries,keys), or {', '.join(PRESETS)}"
    add("--flash-block-sizes", type=block_sizes, metavar="SIZES", help=about)
    add(
        "--timer",
        choices=TIMERS,
        default="model",
        help="how the times are spaced (default: as the model's)",
    )
    add("--shift", type=positive_number, help="factor of flux_static's shift (default: 3)")
    add("--integrator", choices=INTEGRATORS, default="euler", help="(default: %(default)s)")
    add(
        "--eta",
        type=finite_number(0, 1),
        help="noise of ddim, sde, dpmpp_2m_sde, in [0, 1] (default: 0 of ddim, else 1)",
    )
    add(
        "--height",
        type=pixels,
        help=f"in pixels, a multiple of 16 up to {MOST_PIXELS} (default: the model's)",
    )
    add("--width", type=pixels, help="the same")
    add(
        "--images",
        type=images,
        default=1,
        help=f"how many, up to {MOST_IMAGES} (default: %(default)s)",
    )
    add(
        "--seed",
        type=seed,
        help="of the noise, below 2^63 (default: 0; of --prompts, a line's number)",
    )
    tokens = whole_number(1, MOST_TOKENS)
    add(
        "--max-sequence-length",
        type=tokens,
        help=f"T5 tokens, up to {MOST_TOKENS} (default: the model's)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="of weights and activations (default: the files' and, for activations, bfloat16, on CPU float32)",
    )
    add(
        "--unroll",
        action="store_true",
        help="compile each block by itself: slower to start, fewer bytes moved on GPUs",
    )
    add(
        "--quantize",
        choices=EIGHT_BITS,
        help="multiply the matrices of transformer and T5 in 8 bits (default: never)",
    )
    add("--batch", type=images, help="images a forward pass (default: all; of --prompts, one)")
    about = "merge an adapter: [NAME=]FILE[:SCALE], where FILE may be hub:OWNER/REPO/FILE or tiny:STYLE; may be given again"
    add("--lora", action="append", type=adapter, default=[], metavar="ADAPTER", help=about)
    add(
        "--output-dir",
        type=path,
        default=Path(),
        help="where flux_N.png, or ID.png, is written (default: here)",
    )
    about = (
        "of --prompts: draw anew the images that are there but of another prompt, seed or option"
    )
    add("--overwrite", action="store_true", help=about)
    cache = _cache_folder()
    add(
        "--compilation-cache",
        type=path,
        default=cache,
        metavar="DIR",
        help="of compiled programs (default: %(default)s)",
    )
    about = "devices that share the work, as data=2,fsdp=4; one size may be -1, for those that are left (default: one)"
    add("--mesh", type=mesh_sizes, metavar="SIZES", help=about)
    about = "with the job's other processes, share the lines of --prompts, or draw on a mesh of all their devices"
    add("--distributed", action="store_true", help=about)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--keep-encoders",
        action="store_true",
        help="keep the text encoders in memory while denoising",
    )
    about = "keep those of --prompts in the host's memory, and fetch them for each batch"
    where.add_argument("--offload-encoders", action="store_true", help=about)
    about = "pass the weights of transformer and T5 through the device block by block, from the host's memory; on CPU, from files"
    add("--stream-blocks", action="store_true", help=about)
    add("--show-memory", action="store_true", help="print what lies in which memory, once loaded")


def _add_compare(commands: Any) -> None:
    """Add the command that puts samplers side by side."""
    about = "Draw a prompt through several samplers from the same noise: a labelled grid (PNG) and a table (CSV)."
    parser = commands.add_parser("compare", help="samplers side by side", description=about)
    parser.set_defaults(run=_compare)
    add = parser.add_argument
    add("prompt", type=any_text, help="what the image shows")
    add(
        "--model",
        default="tiny",
        help=f"{', '.join(ZOO)}, a diffusers folder, or a hub id (default: %(default)s)",
    )
    some = "with commas between"
    add(
        "--integrators",
        type=names(INTEGRATORS),
        default=["euler", "heun", "dpmpp_2m"],
        help=f"{some}: {', '.join(INTEGRATORS)}",
    )
    add("--timers", type=names(TIMERS), default=["model"], help=f"{some}: {', '.join(TIMERS)}")
    add("--steps", type=step_counts, default=[8, 20], help=f"{some} (default: 8,20)")
    add(
        "--reference-steps",
        type=whole_number(1, MOST_STEPS),
        default=200,
        help="of Heun's at the model's times (default: %(default)s)",
    )
    add("--guidance", type=finite_number(), help="distilled guidance scale (default: the model's)")
    add(
        "--height",
        type=pixels,
        help=f"in pixels, a multiple of 16 up to {MOST_PIXELS} (default: the model's)",
    )
    add("--width", type=pixels, help="the same")
    add("--seed", type=seed, default=0, help="of the noise, below 2^63 (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="of weights and activations (default: as for generate)")
    add(
        "--output-dir",
        type=path,
        default=Path(),
        help="where compare_N.png and .csv are written (default: here)",
    )
    add(
        "--compilation-cache",
        type=path,
        default=_cache_folder(),
        metavar="DIR",
        help="(default: %(default)s)",
    )


def _compare(options: argparse.Namespace) -> None:
    check_devices()
    folder = writable(options.output_dir)
    use_cache(options.compilation_cache)
    defaults = interruptible(load_defaults, options.model)
    dtype = DTYPES[options.dtype] if options.dtype else None
    height, width = options.height or defaults.height, options.width or defaults.width
    check_size("--height and --width", height, width)
    most = max(*options.steps, options.reference_steps)
    demand = Demand(1, height, width, most, defaults.max_length, dtype or activation_dtype())
    check_memory(demand, read_configs(options.model))
    models = interruptible(load_models, options.model, dtype=dtype)
    runs, images = _compared(options, models, dtype)
    picture = np.asarray(grid(runs, images), np.float32) / 127.5 - 1
    image, rows = write_comparison(
        folder, picture, table(runs), {"prompt": options.prompt, "model": encodable(options.model)}
    )
    print(table(runs), end="")
    print(f"{image}\n{rows}")


def _compared(
    options: argparse.Namespace, models: Models, dtype: DTypeLike | None
) -> tuple[list[Run], list[np.ndarray]]:
    """Draw with each sampler, in another thread, while a bar shows how many are done."""
    count = len(options.integrators) * len(options.timers) * len(options.steps)
    with tqdm(total=count, unit="run") as bar:
        return interruptible(
            compare,
            models,
            options.prompt,
            integrators=options.integrators,
            timers=options.timers,
            steps=options.steps,
            key=seed_key(options.seed),
            reference_steps=options.reference_steps,
            guidance=options.guidance,
            height=options.height,
            width=options.width,
            dtype=dtype,
            report=lambda run: bar.update(),
        )


def _add_lora(commands: Any) -> None:
    """Add the commands about adapters."""
    lora = commands.add_parser(
        "lora", help="adapters", description="Inspect, merge, convert and extract adapters."
    )
    actions = lora.add_subparsers(required=True, metavar="ACTION")
    inspect = actions.add_parser(
        "inspect", help="what an adapter holds", description="Tell what an adapter holds."
    )
    inspect.set_defaults(run=_inspect_lora)
    inspect.add_argument(
        "adapter", type=adapter, metavar="FILE", help="a safetensors file, or hub:OWNER/REPO/FILE"
    )
    about = "Write a checkpoint with adapters merged into it, tensor by tensor."
    merging = actions.add_parser(
        "merge", help="a checkpoint with adapters merged", description=about
    )
    merging.set_defaults(run=_convert, only=None, shard_size=None)
    add = merging.add_argument
    add(
        "source",
        metavar="BASE",
        help="a file or a folder of any layout, a model's name, or a hub id",
    )
    add(
        "lora",
        nargs="+",
        type=adapter,
        metavar="ADAPTER",
        help="FILE[:SCALE] or hub:OWNER/REPO/FILE[:SCALE]",
    )
    add(
        "-o",
        "--output",
        dest="destination",
        type=path,
        required=True,
        help="a new folder, or a new .safetensors file",
    )
    add("--to", choices=LAYOUTS, default="own", help="the layout (default: %(default)s)")
    add("--dtype", choices=FLOATS, help="of the weights (default: theirs)")
    _add_lora_files(actions)


def _add_lora_files(actions: Any) -> None:
    """Add the commands that write adapters."""
    about = "Write an adapter in another format; every difference stays what it is."
    convert = actions.add_parser("convert", help="an adapter in another format", description=about)
    convert.set_defaults(run=_convert_lora)
    convert.add_argument(
        "adapter", type=adapter, metavar="FILE", help="a safetensors file, or hub:OWNER/REPO/FILE"
    )
    convert.add_argument("destination", type=path, help="a new .safetensors file")
    convert.add_argument(
        "--to", choices=FORMATS, default="peft", help="the format (default: %(default)s)"
    )
    about = "Write the adapter that is nearest to what distinguishes a fine-tuned checkpoint from its base."
    extract = actions.add_parser(
        "extract", help="an adapter from two checkpoints", description=about
    )
    extract.set_defaults(run=_extract_lora)
    add = extract.add_argument
    add(
        "base", metavar="BASE", help="a file or a folder of any layout, a model's name, or a hub id"
    )
    add("tuned", metavar="TUNED", help="the same, fine-tuned")
    add(
        "-o",
        "--output",
        dest="destination",
        type=path,
        required=True,
        help="a new .safetensors file",
    )
    add("--rank", type=rank, required=True, help="of each weight's difference")
    add(
        "--only",
        choices=("flux", "t5", "clip"),
        default="flux",
        help="the network (default: %(default)s)",
    )
    add(
        "--to",
        choices=FORMATS,
        default="kohya",
        help="the format; peft's has no biases and norms (default: %(default)s)",
    )


def _convert_lora(options: argparse.Namespace) -> None:
    check_devices()
    write_lora(_new_file(options.destination), read_adapter(options.adapter), to=options.to)
    print(options.destination)


def _extract_lora(options: argparse.Namespace) -> None:
    check_devices()
    kind = KINDS[options.only]
    target = _new_file(options.destination)
    places = [interruptible(locate, name, kind.folder) for name in (options.base, options.tuned)]
    base, tuned = (open_source(place).part(kind).plan() for place in places)
    write_lora(
        target,
        interruptible(extract_lora, base, tuned, kind.name, rank=options.rank, to=options.to),
        to=options.to,
    )
    print(options.destination)


def _new_file(path: Path) -> Path:
    if path.exists():
        raise FileExistsError(
            f"There is something at {path} already. Remove it, or choose another destination."
        )
    return path


def _inspect_lora(options: argparse.Namespace) -> None:
    print(describe_lora(interruptible(adapter_file, options.adapter.place)))


FLOATS = DTYPES | {"float8_e4m3": jnp.float8_e4m3fn}


def _add_weights(commands: Any) -> None:
    """Add the commands that read and write weights."""
    about = "Write a checkpoint in another layout, tensor by tensor."
    convert = commands.add_parser("convert", help="weights to another layout", description=about)
    convert.set_defaults(run=_convert, lora=[])
    add = convert.add_argument
    add("source", help="a file or a folder of any layout, a model's name, or a hub id")
    add("destination", type=path, help="a new folder, or a new .safetensors file")
    add("--to", choices=LAYOUTS, default="own", help="the layout (default: %(default)s)")
    add(
        "--dtype",
        choices=FLOATS,
        help="of the weights; float8 is for the linear layers' matrices alone (default: theirs)",
    )
    add(
        "--only",
        action="append",
        choices=KINDS,
        help="one of the networks; may be given again (default: all)",
    )
    add(
        "--shard-size",
        type=byte_count,
        metavar="SIZE",
        help="the most bytes of a file, as 5GB (default: no limit)",
    )
    about = "Tell what a file or a folder holds, from its headers alone. Exit code 1 if it does not load."
    inspect = commands.add_parser(
        "inspect", help="what a file or a folder holds", description=about
    )
    inspect.set_defaults(run=_inspect)
    inspect.add_argument(
        "source",
        help="a file or a folder of any layout, or the name or hub id of a downloaded model",
    )
    about = "Download what fluxjax reads of a model into the hub's cache, and print where it lies."
    fetch = commands.add_parser("download", help="a model into the cache", description=about)
    fetch.set_defaults(run=_download)
    fetch.add_argument("name", help=f"{', '.join(ZOO)}, or a hub id")
    fetch.add_argument(
        "--only",
        action="append",
        choices=KINDS,
        help="one of the networks; may be given again (default: all)",
    )


def _convert(options: argparse.Namespace) -> None:
    check_devices()
    loras = [(read_adapter(one), one.scale) for one in options.lora]
    with ExitStack() as stack:
        bars = []  # begun when the size is known
        written = convert_weights(
            options.source,
            options.destination,
            to=options.to,
            dtype=FLOATS[options.dtype] if options.dtype else None,
            only=options.only,
            shard_size=options.shard_size,
            loras=loras,
            start=lambda total: bars.append(
                stack.enter_context(tqdm(total=total, unit="B", unit_scale=True))
            ),
            report=lambda count: bars[0].update(count),
        )
    for note in adapter_notes(options.source, [lora for lora, _ in loras]) if loras else ():
        complain(f"an adapter: {note}")
    print(written)


def _inspect(options: argparse.Namespace) -> None:
    report = inspect_weights(options.source)
    print(report)
    if not report.whole:
        raise SystemExit(1)


def _download(options: argparse.Namespace) -> None:
    parts = WHOLE if options.only is None else [KINDS[name].folder for name in options.only]
    print(interruptible(download, options.name, parts))


def _cache_folder() -> Path | None:
    """Return where compiled programs are kept, or None for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(named or Path.home() / ".cache") / "fluxjax" / "compiled"
    except RuntimeError:
        return None


if __name__ == "__main__":
    main()
