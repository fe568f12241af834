"""Run commands of `fluxjax` on this device and on the CPU, and compare their images.

Each command draws with the tiny model, by JAX's default device in bfloat16 and by the CPU in
float32. A row has the PSNR between both, in dB (images of 8 bits: 255 is the largest value), or how
the command failed. Below some 20 dB an image shows something else. Runs are parallel, so their
seconds tell little.

    python tools/measure/measure_commands.py --jobs 8 --output commands.jsonl

With `--folder` the CPU's images are kept, and not drawn again the next time, on another machine
too.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PICTURE = "a large red star above a small blue ring on a beige background"
SOURCE = f"--source-prompt '{PICTURE}'"
GENERATE = f"generate '{PICTURE}'"
COMMANDS = {
    "defaults": GENERATE,
    "int8": f"{GENERATE} --quantize int8",
    "fp8": f"{GENERATE} --quantize fp8",
    "int8-128": f"{GENERATE} --quantize int8-128",
    "int4": f"{GENERATE} --quantize int4",
    "nf4": f"{GENERATE} --quantize nf4",
    "GGUF": f"{GENERATE} --flux tiny.gguf",
    "unrolled": f"{GENERATE} --unroll",
    "streamed": f"{GENERATE} --stream-blocks",
    "streamed GGUF": f"{GENERATE} --flux tiny.gguf --stream-blocks",
    "xla": f"{GENERATE} --attention xla",
    "xla_chunked": f"{GENERATE} --attention xla_chunked",
    "odd size": f"{GENERATE} --height 112 --width 144",
    "batch": f"{GENERATE} --images 3 --batch 2",
    "guidance": f"{GENERATE} --cfg 2 --negative-prompt 'a green cross'",
    "NAG": f"{GENERATE} --nag 3 --negative-prompt 'a green cross'",
    "cache": f"{GENERATE} --cache 0.05",
    "dpmpp_2m": f"{GENERATE} --integrator dpmpp_2m --steps 8",
    "ancestral": f"{GENERATE} --integrator ancestral",
    "LoRA": f"{GENERATE} --lora tiny:kraft",
    "LoRA, int8": f"{GENERATE} --lora tiny:kraft --quantize int8",
    "strips": f"{GENERATE} --vae-memory 2MB",
    "preview": f"{GENERATE} --preview preview.png",
    "regions": "generate 'a red star left of a green heart on a white background' "
    "--region '0,0,0.5,1=a red star on a white background' "
    "--region '0.5,0,1,1=a green heart on a white background'",
    "mixed regions": "generate 'a red star left of a green heart on a white background' "
    "--region-rule mix --region '0,0,0.5,1=a red star on a white background' "
    "--region '0.5,0,1,1=a green heart on a white background'",
    "image to image": "generate 'a large blue star on a beige background' "
    "--init-image picture.png --strength 0.8",
    "ControlNet": f"{GENERATE} --controlnet tiny --controlnet-image picture.png",
    "Redux": "generate '' --redux tiny --image-prompt picture.png",
    "prompts": "generate --prompts prompts.jsonl --offload-encoders",
    "Kontext": "edit picture.png 'make the red star green' --method kontext",
    "FlowEdit": f"edit picture.png '{PICTURE.replace('star', 'heart')}' {SOURCE}",
    "RF inversion": f"edit picture.png '{PICTURE.replace('star', 'heart')}' {SOURCE} "
    "--method rf-inversion",
    "fill": f"fill picture.png --mask mask.png '{PICTURE.replace('star', 'heart')}'",
    "outpaint": f"outpaint picture.png '{PICTURE}' --left 16 --right 16",
    "decoupled": f"restore small.png '{PICTURE}' --operator downsample:4 --steps 10",
    "pigdm": f"restore small.png '{PICTURE}' --operator downsample:4 --steps 10 --method pigdm",
    "tmpd": f"restore small.png '{PICTURE}' --operator downsample:4 --steps 4 --method tmpd",
    "dps": f"restore small.png '{PICTURE}' --operator downsample:4 --steps 10 --method dps",
}
"""Commands by name. They read files that `prepare` makes."""


def run(words: Sequence[str], folder: Path, device: str | None) -> str | None:
    """Run a command in a folder; return how it failed, if it did.

    **Arguments:** `device`: JAX's platform; None for the default.
    """
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    if device is not None:
        environment["JAX_PLATFORMS"] = device
    command = [sys.executable, "-m", "fluxjax", *words]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return "out of time"
    lines = done.stderr.replace("\r", "\n").strip().split("\n")
    return " ".join(lines[-3:]) if done.returncode else None


def prepare(folder: Path) -> None:
    """Make the files that commands read: a picture, a small one, a mask, prompts, a GGUF file."""
    if (folder / "prompts.jsonl").exists():  # the last of them
        return
    for words in (
        f"{GENERATE} --dtype float32",
        "convert tiny tiny.gguf --to gguf --only flux --dtype Q8_0",
    ):
        problem = run(shlex.split(words), folder, "cpu")
        if problem is not None:
            sys.exit(f"fluxjax {words}: {problem}")
    (folder / "flux_0.png").rename(folder / "picture.png")
    picture = Image.open(folder / "picture.png")
    picture.resize((picture.width // 4, picture.height // 4), Image.Resampling.BOX).save(
        folder / "small.png"
    )
    mask = np.zeros((picture.height, picture.width), np.uint8)
    mask[: picture.height // 2] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    lines = [{"prompt": "a red star", "id": "star"}, {"prompt": "a blue ring", "id": "ring"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def images_of(folder: Path) -> list[np.ndarray]:
    """Return the images of a folder in the order of their names."""
    return [np.asarray(Image.open(path), np.float64) for path in sorted(folder.glob("*.png"))]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two images in dB."""
    error = np.mean((a - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Run a command on both devices, and compare what they draw."""
    row: dict[str, Any] = {"bench": "commands", "name": name, "command": COMMANDS[name]}
    drawn = []
    for device, words in ((None, []), ("cpu", ["--dtype", "float32"])):
        output = folder / f"{name}-{device or 'here'}".replace(" ", "-")
        if device is None:
            shutil.rmtree(output, ignore_errors=True)
        if not images_of(output):
            where = device or "this device"
            words = [*shlex.split(COMMANDS[name]), "--output-dir", str(output), *words]
            start = time.perf_counter()
            problem = run(words, folder, device)
            row[f"seconds on {where}"] = round(time.perf_counter() - start, 1)
            if problem is not None:
                return {**row, "error": f"on {where}: {problem}"}
        drawn.append(images_of(output))
    ours, reference = drawn
    if not ours or len(ours) != len(reference):
        return {**row, "error": f"{len(ours)} images here, {len(reference)} by the CPU"}
    row["PSNR"] = round(min(map(psnr, ours, reference)), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="default: all")
    add("--jobs", type=int, default=1, help="commands that run at once (default: 1)")
    add("--minutes", type=float, default=30, help="no command starts after these (default: 30)")
    add("--folder", type=Path, help="for all images (default: a temporary one)")
    add("--output", type=Path, help="append the rows as JSON lines to this file")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as threads:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)

        def measure(name: str) -> None:
            if time.monotonic() > end:
                row = {"bench": "commands", "name": name, "error": "left out: the time is spent"}
            else:
                row = compare(name, folder)
            print(row, flush=True)
            if options.output is not None:
                with open(options.output, "a") as file:
                    file.write(json.dumps(row) + "\n")

        list(threads.map(measure, options.commands))


if __name__ == "__main__":
    main()
