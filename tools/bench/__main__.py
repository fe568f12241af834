"""Measure fluxjax. `gpu`: full-size sampling at random weights, beside diffusers. `attention`: its
implementations on this device, their errors and speed. `cpu`: the networks beside torch's. `load`,
`load-full`: loading and converting. `lora`: merging an adapter. `tpu-aot`: what TPUs would hold and
move, compiled without one; `flash-aot`: the attention kernels' VMEM, so too. `gpu-aot`: what GPUs
would, so too. `stream`: dev a block at a time from its file, in little memory. `compile`: tracing,
compiling, importing.

Each run prints a table and appends its rows, with versions and machine, as JSON lines.
"""

import argparse
import json
import platform
import subprocess
from importlib.metadata import distributions

import bench_attention
import bench_compile
import bench_cpu
import bench_flash
import bench_gpu
import bench_gpu_aot
import bench_load
import bench_lora
import bench_stream
import bench_tpu
import jax

import fluxjax


def machine() -> dict:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "host": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "fluxjax": fluxjax.__version__,
        **(gpu_versions(device) if device.platform == "gpu" else {}),
    }


def gpu_versions(device: jax.Device) -> dict[str, str]:
    """Return the versions of CUDA's runtime, of cuDNN's package and of the driver, where they are known."""
    found = {"runtime": " ".join(device.client.platform_version.split())}
    packages = {one.metadata["Name"]: one.version for one in distributions()}
    found |= {name: packages[name] for name in packages if name.startswith("nvidia-cudnn")}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return found
    return found | {"driver": said.split("\n")[0].strip()}


def show(rows: list[dict]) -> None:
    for row in rows:
        cells = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
        ]
        print("  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="BENCH")
    bench_gpu.add_commands(commands)
    bench_attention.add_commands(commands)
    bench_cpu.add_commands(commands)
    bench_compile.add_commands(commands)
    bench_load.add_commands(commands)
    bench_lora.add_commands(commands)
    bench_tpu.add_commands(commands)
    bench_stream.add_commands(commands)
    bench_flash.add_commands(commands)
    bench_gpu_aot.add_commands(commands)
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
