"""A second run of `fluxjax generate` takes every compiled program from the cache."""

import json
import os
import subprocess
import sys

PROGRAM = """
import collections, json, sys
import jax
from fluxjax.cli.main import main

events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit("/")[-1]]))
main(json.loads(sys.argv[1]))
print(json.dumps(events))
"""


FAST = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""As in the process of the tests: other processes compile faster."""


def test_a_second_run_in_a_new_process_compiles_nothing(tmp_path):
    counts = []
    for prompt, seed in (("a red star", "1"), ("a small blue ring on black", "2")):
        arguments = ["generate", prompt, "--seed", seed, "--steps", "3"]
        arguments += ["--height", "32", "--width", "32", "--output-dir", str(tmp_path)]
        arguments += ["--compilation-cache", str(tmp_path / "cache")]
        command = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
        done = subprocess.run(command, env=FAST, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = counts
    assert first["cache_misses"] > 0
    assert second.get("cache_misses", 0) == 0
    # Every program that is looked for is found: none goes past the cache, as those with callbacks.
    assert second["cache_hits"] == second["compile_requests_use_cache"]
