"""Print where a GPU's time goes, from the traces that `tools/bench gpu --profile DIR` writes.

    python tools/bench/read_profile.py DIR [--output FILE]

There is a row for each trace. A kernel belongs to the first group whose pattern its name has; XLA
names its own kernels after the operations that it fused.
"""

import argparse
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GROUPS = {
    "attention": r"sdpa|fmha|flash_(forward|dq|dkv)",
    "convolutions": r"fprop|dgrad|wgrad",
    "products": r"^nvjet|gemm|cutlass|cublas",
    "copies": r"^memcpy|^Memcpy|^Memset",
    "elementwise": r"",
}


def kernels(trace: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield the module, the name and the microseconds of each kernel call on a GPU."""
    events = trace["traceEvents"]
    names = [
        event for event in events if event.get("ph") == "M" and event["name"] == "process_name"
    ]
    gpus = {event["pid"] for event in names if "GPU" in event["args"]["name"]}
    for event in events:
        if event.get("ph") == "X" and event["pid"] in gpus:
            yield event.get("args", {}).get("hlo_module", ""), event["name"], event["dur"]


def summarize(path: Path, top_kernels: int) -> dict[str, Any]:
    """Return a trace's milliseconds by group, and its longest kernels with their calls."""
    with gzip.open(path) as file:
        trace = json.load(file)
    spent, calls = defaultdict[str, float](float), defaultdict[str, int](int)
    groups, modules = dict.fromkeys(GROUPS, 0.0), defaultdict[str, float](float)
    for module, name, microseconds in kernels(trace):
        spent[name] += microseconds / 1e3
        calls[name] += 1
        modules[module] += microseconds
        groups[next(group for group, pattern in GROUPS.items() if re.search(pattern, name))] += (
            microseconds / 1e3
        )
    first = sorted(spent, key=spent.__getitem__, reverse=True)[:top_kernels]
    return {
        "bench": "gpu profile",
        "trace": path.parent.name,
        "module": max(modules, key=modules.__getitem__, default=""),
        "milliseconds": round(sum(spent.values()), 1),
        "groups": {group: round(value, 1) for group, value in groups.items() if value},
        "kernels": [
            {"name": name, "milliseconds": round(spent[name], 2), "calls": calls[name]}
            for name in first
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--most", type=int, default=12, help="kernels listed for each trace (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
    options = parser.parse_args()
    rows = [
        summarize(path, options.most) for path in sorted(options.folder.rglob("*.trace.json.gz"))
    ]
    for row in rows:
        print(row["trace"], row["module"], row["milliseconds"], "ms:", row["groups"])
        for kernel in row["kernels"]:
            times = f"{kernel['milliseconds']:9.2f} ms  {kernel['calls']:6d} calls"
            print(f"    {times}  {kernel['name'][:100]}")
    if options.output:
        with options.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
