"""The command line: `fluxjax generate`, `compare`, `convert`, `inspect`, `download` and `lora`."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import fluxjax
from fluxjax.compare import compare, grid, table
from fluxjax.convert.layouts import LAYOUTS
from fluxjax.convert.source import KINDS, open_source
from fluxjax.draw import DTYPES, generate, use_cache, writable
from fluxjax.generate import (
    load_models,
)
from fluxjax.image import write_numbered
from fluxjax.kernels.attention import IMPLEMENTATIONS
from fluxjax.kernels.blocks import PRESETS, BlockSizes
from fluxjax.lora.read import describe_lora, read_lora
from fluxjax.lora.write import FORMATS, extract_lora, write_lora
from fluxjax.named import INTEGRATORS, RULES, TIMERS
from fluxjax.nets.quantized import EIGHT_BITS
from fluxjax.shard import AXES
from fluxjax.weights import convert_weights, inspect_weights
from fluxjax.zoo import (
    WHOLE,
    ZOO,
    download,
    download_file,
    locate,
    shipped_lora,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake of the user's is one line on standard error and exit code 2."""
    options = _parser().parse_args(arguments)
    # A polite end unwinds as an interrupt does, so that no half-written file stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"fluxjax: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fluxjax", description="FLUX for JAX.")
    parser.add_argument("--version", action="version", version=f"fluxjax {fluxjax.__version__}")
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
    asked.add_argument("prompt", nargs="?", help="what the image shows")
    about = "in its place, a JSON object a line: prompt, and, if wanted, prompt_2, negative_prompt, id, and seed"
    asked.add_argument("--prompts", type=Path, metavar="FILE", help=about)
    add("--prompt-2", help="a text for T5 alone; CLIP keeps the prompt")
    add("--model", default="tiny", help=f"{', '.join(ZOO)}, a diffusers folder, or a hub id (default: %(default)s)")
    add("--steps", type=int, help="of the integrator (default: the model's)")
    add("--guidance", type=float, help="distilled guidance scale (default: the model's)")
    add("--negative-prompt", help="what true classifier-free guidance leads away from (default: the empty prompt)")
    add("--cfg", type=float, default=1.0, help="scale of true classifier-free guidance, twice the work (default: 1, none)")
    add("--rule", choices=RULES, default="cfg", help="of --cfg (default: %(default)s)")
    add("--nag", type=float, metavar="SCALE", help="normalized attention guidance, away from the negative prompt")
    add("--cache", metavar="[KIND:]THRESHOLD", help="skip blocks that change little: 0.1, or teacache:0.4 (default: never)")
    about = "implementation of the attention (default: the best that suits; docs/performance.md says which)"
    add("--attention", choices=IMPLEMENTATIONS, help=about)
    blocked = "flash_tpu, flash_gpu or xla_chunked"
    about = f"tokens a block of --attention {blocked}: a number, two (queries,keys), or {', '.join(PRESETS)}"
    add("--flash-block-sizes", type=_block_sizes, metavar="SIZES", help=about)
    add("--timer", choices=TIMERS, default="model", help="how the times are spaced (default: as the model's)")
    add("--shift", type=float, help="factor of flux_static's shift (default: 3)")
    add("--integrator", choices=INTEGRATORS, default="euler", help="(default: %(default)s)")
    add("--eta", type=float, help="noise of ddim, sde and dpmpp_2m_sde, in [0, 1] (default: 0 of ddim, 1 of the others)")
    add("--height", type=int, help="in pixels, a multiple of 16 (default: the model's)")
    add("--width", type=int, help="in pixels, a multiple of 16 (default: the model's)")
    add("--images", type=int, default=1, help="how many (default: %(default)s)")
    add("--seed", type=int, help="of the noise (default: 0; of --prompts, a line's number)")
    add("--max-sequence-length", type=int, help="T5 tokens (default: the model's)")
    add(
        "--dtype",
        choices=DTYPES,
        help="of weights and activations (default: the files' and, for activations, bfloat16, on CPU float32)",
    )
    add("--unroll", action="store_true", help="compile each block by itself: slower to start, fewer bytes moved on GPUs")
    add("--quantize", choices=EIGHT_BITS, help="multiply the matrices of transformer and T5 in 8 bits (default: never)")
    add("--batch", type=int, help="images a forward pass (default: all; of --prompts, one)")
    about = "merge an adapter: [NAME=]FILE[:SCALE], where FILE may be hub:OWNER/REPO/FILE or tiny:STYLE; may be given again"
    add("--lora", action="append", type=_adapter, default=[], metavar="ADAPTER", help=about)
    add("--output-dir", type=Path, default=Path(), help="where flux_N.png, or ID.png, is written (default: here)")
    cache = _cache_folder()
    add("--compilation-cache", type=Path, default=cache, metavar="DIR", help="of compiled programs (default: %(default)s)")
    about = "devices that share the work, as data=2,fsdp=4; one size may be -1, for those that are left (default: one)"
    add("--mesh", type=_mesh, metavar="SIZES", help=about)
    about = "with the job's other processes, share the lines of --prompts, or draw on a mesh of all their devices"
    add("--distributed", action="store_true", help=about)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--keep-encoders", action="store_true", help="keep the text encoders in memory while denoising")
    about = "keep those of --prompts in the host's memory, and fetch them for each batch"
    where.add_argument("--offload-encoders", action="store_true", help=about)
    about = (
        "pass the weights of transformer and T5 through the device block by block, from the host's memory; on CPU, from files"
    )
    add("--stream-blocks", action="store_true", help=about)
    add("--show-memory", action="store_true", help="print what lies in which memory, once loaded")


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a reader of names with commas between, each one of those known."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; choose of {', '.join(known)}")
        return names

    return read


def _block_sizes(text: str) -> BlockSizes:
    """Read block sizes: queries, and keys if they are others, or a preset's name."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        q, *kv = (int(size) for size in text.split(","))
        return BlockSizes(q=q, kv=None if not kv else kv[0])
    except ValueError:
        known = ", ".join(PRESETS)
        raise argparse.ArgumentTypeError(f"{text!r} are no block sizes; write 1536, or 1536,512, or one of {known}") from None


def _mesh(text: str) -> dict[str, int]:
    """Read a mesh: axes and their sizes, with commas between."""
    try:
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no mesh; write it as data=2,fsdp=4") from None
    unknown = sizes.keys() - set(AXES)
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no axis {unknown.pop()!r}; choose of {', '.join(AXES)}")
    return sizes


def _counts(text: str) -> list[int]:
    """Read whole numbers with commas between."""
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; write it as 8,20") from None


def _add_compare(commands: Any) -> None:
    """Add the command that puts samplers side by side."""
    about = "Draw a prompt through several samplers from the same noise: a labelled grid (PNG) and a table (CSV)."
    parser = commands.add_parser("compare", help="samplers side by side", description=about)
    parser.set_defaults(run=_compare)
    add = parser.add_argument
    add("prompt", help="what the image shows")
    add("--model", default="tiny", help=f"{', '.join(ZOO)}, a diffusers folder, or a hub id (default: %(default)s)")
    some = "with commas between"
    add(
        "--integrators",
        type=_names(INTEGRATORS),
        default=["euler", "heun", "dpmpp_2m"],
        help=f"{some}: {', '.join(INTEGRATORS)}",
    )
    add("--timers", type=_names(TIMERS), default=["model"], help=f"{some}: {', '.join(TIMERS)}")
    add("--steps", type=_counts, default=[8, 20], help=f"{some} (default: 8,20)")
    add("--reference-steps", type=int, default=200, help="of Heun's at the model's times (default: %(default)s)")
    add("--guidance", type=float, help="distilled guidance scale (default: the model's)")
    add("--height", type=int, help="in pixels, a multiple of 16 (default: the model's)")
    add("--width", type=int, help="in pixels, a multiple of 16 (default: the model's)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="of weights and activations (default: as for generate)")
    add("--output-dir", type=Path, default=Path(), help="where compare_N.png and .csv are written (default: here)")
    add("--compilation-cache", type=Path, default=_cache_folder(), metavar="DIR", help="(default: %(default)s)")


def _compare(options: argparse.Namespace) -> None:
    folder = writable(options.output_dir)
    use_cache(options.compilation_cache)
    dtype = DTYPES[options.dtype] if options.dtype else None
    models = load_models(options.model, dtype=dtype)
    count = len(options.integrators) * len(options.timers) * len(options.steps)
    with tqdm(total=count, unit="run") as bar:
        runs, images = compare(
            models,
            options.prompt,
            integrators=options.integrators,
            timers=options.timers,
            steps=options.steps,
            key=jax.random.key(options.seed),
            reference_steps=options.reference_steps,
            guidance=options.guidance,
            height=options.height,
            width=options.width,
            dtype=dtype,
            report=lambda run: bar.update(),
        )
    picture = np.asarray(grid(runs, images), np.float32) / 127.5 - 1
    image = write_numbered(picture, folder, {"prompt": options.prompt, "model": options.model}, stem="compare")
    rows = image.with_suffix(".csv")
    with open(rows, "x") as file:
        file.write(table(runs))
    print(table(runs), end="")
    print(f"{image}\n{rows}")


class _Adapter(NamedTuple):
    """An adapter as the command line names it."""

    name: str
    place: str
    scale: float

    def file(self) -> Path:
        """Return its file, downloaded if need be."""
        kind, _, rest = self.place.partition(":")
        if kind == "tiny":
            return shipped_lora(rest)
        if kind != "hub":
            return Path(self.place)
        owner, repository, file = rest.split("/", 2)
        return download_file(f"{owner}/{repository}", file)


def _adapter(text: str) -> _Adapter:
    """Read [NAME=]FILE[:SCALE]; in place of the file also hub:OWNER/REPO/FILE, and tiny:STYLE for what is shipped."""
    name, equals, place = text.partition("=")
    if not equals or "/" in name:
        name, place = "", text
    head, colon, last = place.rpartition(":")
    try:
        scale = float(last) if colon else 1.0
        place = head if colon else place
    except ValueError:
        scale = 1.0  # a colon of the path's
    if not place or (place.startswith("hub:") and place.count("/") < 2):
        raise argparse.ArgumentTypeError(f"{text!r} names no adapter; write FILE:SCALE or hub:OWNER/REPO/FILE:SCALE")
    return _Adapter(name or Path(place).stem.removeprefix("tiny:"), place, scale)


def _add_lora(commands: Any) -> None:
    """Add the commands about adapters."""
    lora = commands.add_parser("lora", help="adapters", description="Inspect, merge, convert and extract adapters.")
    actions = lora.add_subparsers(required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", help="what an adapter holds", description="Tell what an adapter holds.")
    inspect.set_defaults(run=_inspect_lora)
    inspect.add_argument("adapter", type=_adapter, metavar="FILE", help="a safetensors file, or hub:OWNER/REPO/FILE")
    about = "Write a checkpoint with adapters merged into it, tensor by tensor."
    merging = actions.add_parser("merge", help="a checkpoint with adapters merged", description=about)
    merging.set_defaults(run=_convert, only=None, shard_size=None)
    add = merging.add_argument
    add("source", metavar="BASE", help="a file or a folder of any layout, a model's name, or a hub id")
    add("lora", nargs="+", type=_adapter, metavar="ADAPTER", help="FILE[:SCALE] or hub:OWNER/REPO/FILE[:SCALE]")
    add("-o", "--output", dest="destination", type=Path, required=True, help="a new folder, or a new .safetensors file")
    add("--to", choices=LAYOUTS, default="own", help="the layout (default: %(default)s)")
    add("--dtype", choices=FLOATS, help="of the weights (default: theirs)")
    _add_lora_files(actions)


def _add_lora_files(actions: Any) -> None:
    """Add the commands that write adapters."""
    about = "Write an adapter in another format; every difference stays what it is."
    convert = actions.add_parser("convert", help="an adapter in another format", description=about)
    convert.set_defaults(run=_convert_lora)
    convert.add_argument("adapter", type=_adapter, metavar="FILE", help="a safetensors file, or hub:OWNER/REPO/FILE")
    convert.add_argument("destination", type=Path, help="a new .safetensors file")
    convert.add_argument("--to", choices=FORMATS, default="peft", help="the format (default: %(default)s)")
    about = "Write the adapter that is nearest to what distinguishes a fine-tuned checkpoint from its base."
    extract = actions.add_parser("extract", help="an adapter from two checkpoints", description=about)
    extract.set_defaults(run=_extract_lora)
    add = extract.add_argument
    add("base", metavar="BASE", help="a file or a folder of any layout, a model's name, or a hub id")
    add("tuned", metavar="TUNED", help="the same, fine-tuned")
    add("-o", "--output", dest="destination", type=Path, required=True, help="a new .safetensors file")
    add("--rank", type=int, required=True, help="of each weight's difference")
    add("--only", choices=("flux", "t5", "clip"), default="flux", help="the network (default: %(default)s)")
    add("--to", choices=FORMATS, default="kohya", help="the format; peft's has no biases and norms (default: %(default)s)")


def _convert_lora(options: argparse.Namespace) -> None:
    write_lora(_new_file(options.destination), read_lora(options.adapter.file()), to=options.to)
    print(options.destination)


def _extract_lora(options: argparse.Namespace) -> None:
    kind = KINDS[options.only]
    base, tuned = (open_source(locate(name, kind.folder)).part(kind).plan() for name in (options.base, options.tuned))
    write_lora(
        _new_file(options.destination), extract_lora(base, tuned, kind.name, rank=options.rank, to=options.to), to=options.to
    )
    print(options.destination)


def _new_file(path: Path) -> Path:
    if path.exists():
        raise FileExistsError(f"There is something at {path} already. Remove it, or choose another destination.")
    return path


def _inspect_lora(options: argparse.Namespace) -> None:
    print(describe_lora(options.adapter.file()))


FLOATS = DTYPES | {"float8_e4m3": jnp.float8_e4m3fn}


def _add_weights(commands: Any) -> None:
    """Add the commands that read and write weights."""
    about = "Write a checkpoint in another layout, tensor by tensor."
    convert = commands.add_parser("convert", help="weights to another layout", description=about)
    convert.set_defaults(run=_convert, lora=[])
    add = convert.add_argument
    add("source", help="a file or a folder of any layout, a model's name, or a hub id")
    add("destination", type=Path, help="a new folder, or a new .safetensors file")
    add("--to", choices=LAYOUTS, default="own", help="the layout (default: %(default)s)")
    add("--dtype", choices=FLOATS, help="of the weights; float8 is for the linear layers' matrices alone (default: theirs)")
    add("--only", action="append", choices=KINDS, help="one of the networks; may be given again (default: all)")
    add("--shard-size", type=_bytes, metavar="SIZE", help="the most bytes of a file, as 5GB (default: no limit)")
    about = "Tell what a file or a folder holds, from its headers alone. Exit code 1 if it does not load."
    inspect = commands.add_parser("inspect", help="what a file or a folder holds", description=about)
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("source", help="a file or a folder of any layout, or the name or hub id of a downloaded model")
    about = "Download what fluxjax reads of a model into the hub's cache, and print where it lies."
    fetch = commands.add_parser("download", help="a model into the cache", description=about)
    fetch.set_defaults(run=_download)
    fetch.add_argument("name", help=f"{', '.join(ZOO)}, or a hub id")
    fetch.add_argument("--only", action="append", choices=KINDS, help="one of the networks; may be given again (default: all)")


def _bytes(text: str) -> int:
    """Read a size: a number, and kB, MB, GB or nothing after it."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1, "": 1}
    number = text.upper().rstrip("KMGB")
    try:
        return int(float(number) * units[text.upper()[len(number) :].strip()])
    except (KeyError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write one as 5GB or 500MB") from None


def _convert(options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        bars = []  # begun when the size is known
        written = convert_weights(
            options.source,
            options.destination,
            to=options.to,
            dtype=FLOATS[options.dtype] if options.dtype else None,
            only=options.only,
            shard_size=options.shard_size,
            loras=[(read_lora(one.file()), one.scale) for one in options.lora],
            start=lambda total: bars.append(stack.enter_context(tqdm(total=total, unit="B", unit_scale=True))),
            report=lambda count: bars[0].update(count),
        )
    print(written)


def _inspect(options: argparse.Namespace) -> None:
    report = inspect_weights(options.source)
    print(report)
    if not report.whole:
        raise SystemExit(1)


def _download(options: argparse.Namespace) -> None:
    parts = WHOLE if options.only is None else [KINDS[name].folder for name in options.only]
    print(download(options.name, parts))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fluxjax" / "compiled"


if __name__ == "__main__":
    main()
