"""Plots of timers and of samplers' errors, by matplotlib (extra `plot`)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fluxjax.generate.compare import Run
from fluxjax.shapes import Times

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osv^DPX*"


def plot_times(timers: Mapping[str, Times]) -> "Figure":
    """Plot the nodes of named timers, and the size of each step at the time where it begins.

    **Returns:** a matplotlib figure.
    **Raises:** `ValueError` for no timers; `ImportError` without matplotlib.
    """
    if not timers:
        raise ValueError(
            "`plot_times` needs at least one timer. Pass {'uniform': uniform_times(20)}."
        )
    figure = _new_figure(columns=2)
    nodes, sizes = figure.subplots(1, 2)
    for name, times in timers.items():
        values = np.asarray(times)
        nodes.plot(values, marker=".", label=name)
        sizes.plot(values[:-1], -np.diff(values), marker=".", label=name)
    nodes.set(xlabel="node", ylabel="t (1 is noise)")
    sizes.set(xlabel="t", ylabel="step size")
    sizes.invert_xaxis()
    nodes.legend(fontsize="small")
    return figure


def plot_errors(runs: Sequence[Run]) -> "Figure":
    """Plot runs of `compare`: distance to the reference against evaluations of the network.

    There is one line for each timer and integrator; a point is the geometric mean over the runs
    with its number of evaluations.
    **Returns:** a matplotlib figure.
    **Raises:** `ValueError` for no runs; `ImportError` without matplotlib.
    """
    if not runs:
        raise ValueError("`plot_errors` needs runs. Make them with `fluxjax.generate.compare`.")
    figure = _new_figure(columns=1)
    axes = figure.subplots()
    for number, (label, points) in enumerate(_distances(runs).items()):
        counts = sorted(points)
        means = [_geometric_mean(points[count]) for count in counts]
        axes.loglog(counts, means, marker=_MARKERS[number % len(_MARKERS)], label=label)
    axes.set(xlabel="evaluations", ylabel="distance to the reference")
    ticks = sorted({run.evaluations for run in runs})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.legend(fontsize="small", ncols=2)
    return figure


def _distances(runs: Sequence[Run]) -> dict[str, dict[int, list[float]]]:
    """Return the distances of runs by label and by number of evaluations."""
    several_timers = len({run.timer for run in runs}) > 1
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        label = run.integrator
        if several_timers:
            label = f"{run.integrator}, {run.timer}"
        lines[label][run.evaluations].append(run.distance)
    return lines


def _geometric_mean(values: Sequence[float]) -> float:
    # A run may be exact; its logarithm is bounded.
    return float(np.exp(np.mean(np.log(np.maximum(values, 1e-12)))))


def _new_figure(*, columns: int) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib. Install it with `pip install 'fluxjax[plot]'`."
        ) from error
    # Not pyplot's figure, which would stay open; a notebook shows this one after
    # `%matplotlib inline`.
    return Figure(figsize=(5.0 * columns + 1, 4.2), layout="constrained")
