"""Benchmarks of fluxjax: `python tools/bench NAME`, with NAME one of

gpu: full-size sampling with random weights on a GPU, compared with diffusers.
attention: errors, repeatability and speed of the attention implementations on this device.
cpu: the networks on a CPU, compared with diffusers and transformers on torch.
compile: the time of tracing, compiling and importing.
load, load-full: loading and converting weights; the peak memory of converting dev.
lora: merging an adapter.
stream: dev from its file, one block at a time, in little memory.
tpu-aot, flash-aot, gpu-aot: programs compiled for TPUs and GPUs on a machine without them: their
memory, operations and communication, and the attention kernels' VMEM.
blocks: the bytes that the kernels of one block of dev move, compiled the same way.
train-aot: training steps of dev, compiled for both in the same way.
train: training steps of a LoRA on full-size dev on this device, compared with diffusers and peft.
cards: the command line with full-size dev in as much memory as smaller cards have.

Each bench prints its rows. With --output it also appends them as JSON lines, with the versions and
the machine.
"""

import argparse
import json
import platform
import subprocess
from importlib.metadata import distributions

import bench_attention
import bench_blocks
import bench_cards
import bench_compile
import bench_cpu
import bench_flash
import bench_gpu
import bench_gpu_aot
import bench_load
import bench_lora
import bench_memory
import bench_stream
import bench_tpu
import bench_train
import bench_train_step
import jax

import fluxjax

BENCHES = (
    bench_gpu,
    bench_attention,
    bench_cpu,
    bench_compile,
    bench_load,
    bench_lora,
    bench_tpu,
    bench_stream,
    bench_flash,
    bench_gpu_aot,
    bench_memory,
    bench_blocks,
    bench_cards,
    bench_train,
    bench_train_step,
)


def machine() -> dict[str, str]:
    """Return the device and the versions that a measurement depends on."""
    device = jax.devices()[0]
    row = {
        "device": device.device_kind,
        "platform": device.platform,
        "host": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "fluxjax": fluxjax.__version__,
    }
    if device.platform == "gpu":
        row |= gpu_versions(device)
    return row


def gpu_versions(device: jax.Device) -> dict[str, str]:
    """Return the versions of the CUDA runtime, cuDNN's package and the driver, if known."""
    versions = {"runtime": " ".join(device.client.platform_version.split())}
    for package in distributions():
        name = package.metadata["Name"]
        if name.startswith("nvidia-cudnn"):
            versions[name] = package.version
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return versions
    versions["driver"] = printed.split("\n")[0].strip()
    return versions


def show(rows: list[dict]) -> None:
    """Print one line for each row."""
    for row in rows:
        cells = []
        for key, value in row.items():
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            cells.append(f"{key} {text}")
        print("  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for bench in BENCHES:
        bench.add_commands(commands)
    options = parser.parse_args()
    rows = options.run(options)
    here = machine()
    rows = [{**row, **here} for row in rows]
    show(rows)
    if options.output:
        with open(options.output, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
