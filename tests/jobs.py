"""Jobs of several processes."""

import os
import socket
import subprocess
import sys


def start(arguments, **environment):
    """Start the command line in a process of its own."""
    program = [
        sys.executable,
        "-c",
        "from fluxjax.cli.main import main; main()",
        *map(str, arguments),
    ]
    return subprocess.Popen(
        program,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_job(arguments, count, *, devices=1):
    """Start the processes of one job, of so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    return [
        start([*arguments, "--distributed"], **shared, JAX_PROCESS_ID=str(number))
        for number in range(count)
    ]
