"""Commands in other processes, and jobs of several of them."""

import os
import socket
import subprocess
import sys

COMMAND = ["-m", "fluxjax"]
_IMPATIENT = """
import jax

initialize = jax.distributed.initialize
quick = {"heartbeat_timeout_seconds": 6}
jax.distributed.initialize = lambda **options: initialize(**(options | quick))

from fluxjax.cli.main import main

main()
"""
IMPATIENT = ["-c", _IMPATIENT]
"""The same command, in which the processes of a job notice after 6 seconds that one has died."""


def start(arguments, *, program=COMMAND, **environment):
    """Start the command line in another process, with additional environment variables."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_job(arguments, count, *, devices=1, program=COMMAND, **environment):
    """Start the processes of one job. `devices`: of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    arguments = [*arguments, "--distributed"]
    processes = []
    for number in range(count):
        variables = environment | shared | {"JAX_PROCESS_ID": str(number)}
        processes.append(start(arguments, program=program, **variables))
    return processes
