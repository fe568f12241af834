"""Commands in other processes, and jobs of several of them."""

import os
import socket
import subprocess
import sys


def start(arguments, **environment):
    """Start the command line in another process, with additional environment variables."""
    return subprocess.Popen(
        [sys.executable, "-m", "fluxjax.cli", *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_job(arguments, count, *, devices=1, **environment):
    """Start the processes of one job. `devices`: of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    return [
        start([*arguments, "--distributed"], **environment, **shared, JAX_PROCESS_ID=str(number))
        for number in range(count)
    ]
