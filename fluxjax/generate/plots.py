"""Plots of timers and of samplers' errors, by matplotlib (extra `plot`)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fluxjax.generate.compare import Run
from fluxjax.shapes import Times


def plot_times(timers: Mapping[str, Times]) -> Any:
    """Return a figure of named timers: their nodes on the left, the size of each step at the time it begins on the right.

    **Raises:** `ValueError` for no timers; `ImportError` without matplotlib.
    """
    if not timers:
        raise ValueError(
            "`plot_times` needs at least one timer. Pass {'uniform': uniform_times(20)}."
        )
    figure, (nodes, sizes) = _figure(2)
    for name, times in timers.items():
        values = np.asarray(times)
        nodes.plot(values, marker=".", label=name)
        sizes.plot(values[:-1], -np.diff(values), marker=".", label=name)
    nodes.set(xlabel="node", ylabel="t (1 is noise)")
    sizes.set(xlabel="t", ylabel="step size")
    sizes.invert_xaxis()
    nodes.legend(fontsize="small")
    return figure


def plot_errors(runs: Sequence[Run]) -> Any:
    """Return a figure of runs of `compare`: distance to the reference against evaluations, a line a timer and integrator, each
    point the geometric mean of the runs of its number of evaluations.

    **Raises:** `ValueError` for no runs; `ImportError` without matplotlib.
    """
    if not runs:
        raise ValueError("`plot_errors` needs runs. Make them with `fluxjax.compare.compare`.")
    several = len({run.timer for run in runs}) > 1
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        label = f"{run.integrator}, {run.timer}" if several else run.integrator
        lines[label][run.evaluations].append(run.distance)
    figure, (axes,) = _figure(1)
    for number, (label, points) in enumerate(lines.items()):
        counts = sorted(points)
        means = [np.exp(np.mean(np.log(np.maximum(points[count], 1e-12)))) for count in counts]
        axes.loglog(counts, means, marker="osv^DPX*"[number % 8], label=label)
    axes.set(xlabel="evaluations", ylabel="distance to the reference")
    axes.set_xticks(
        ticks := sorted({run.evaluations for run in runs}), [str(tick) for tick in ticks]
    )
    axes.xaxis.minorticks_off()
    axes.legend(fontsize="small", ncols=2)
    return figure


def _figure(columns: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib. Install it with `pip install 'fluxjax[plot]'`."
        ) from error
    # Not pyplot's, so that nothing stays open; a notebook shows it after `%matplotlib inline`.
    figure = Figure(figsize=(5.0 * columns + 1, 4.2), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns))
