"""What `bench cpu` does to the machine while it measures."""

import os
import time
from pathlib import Path

import pytest
from bench_cpu import awake_cores


def children():
    """Return the ids of the processes that this one has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may have spaces. After it come the state and the parent.
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended
        if int(parent) == os.getpid() and state != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the cores are kept awake on Linux only")
def test_each_core_has_a_process_of_the_lowest_priority_until_the_end():
    before = set(children())
    with awake_cores():
        started = set(children()) - before
        deadline = time.monotonic() + 30
        while any(os.sched_getscheduler(process) != os.SCHED_IDLE for process in started):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        cores = [os.sched_getaffinity(process) for process in started]
        assert sorted(map(sorted, cores)) == [[core] for core in sorted(os.sched_getaffinity(0))]
    assert not set(children()) - before
