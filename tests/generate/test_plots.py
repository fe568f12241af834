"""Plots show the numbers that they are given."""

import numpy as np
import pytest

from fluxjax.flow import static_times, uniform_times
from fluxjax.generate import plot_errors, plot_times
from fluxjax.generate.compare import Run


def test_timers_are_shown_by_their_nodes_and_step_sizes():
    timers = {"uniform": uniform_times(4), "shifted": static_times(3, shift=3.0)}
    nodes, sizes = plot_times(timers).axes
    for line, (name, times) in zip(nodes.lines, timers.items(), strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_ydata(), times)
    for line, times in zip(sizes.lines, timers.values(), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), times[:-1])
        np.testing.assert_allclose(line.get_ydata().sum(), 1, rtol=1e-6)


def run(integrator, evaluations, distance, timer="model"):
    return Run(timer, integrator, evaluations, evaluations, 0.1, distance, 30.0)


def test_errors_are_geometric_means_by_evaluations():
    runs = [run("euler", 8, 0.1), run("euler", 8, 0.4), run("euler", 16, 0.1), run("heun", 8, 0.3)]
    euler, heun = plot_errors(runs).axes[0].lines
    np.testing.assert_allclose(euler.get_ydata(), [0.2, 0.1])
    assert (euler.get_label(), heun.get_label(), list(euler.get_xdata())) == (
        "euler",
        "heun",
        [8, 16],
    )
    both = plot_errors([*runs, run("euler", 8, 0.2, "uniform")]).axes[0].lines
    assert [line.get_label() for line in both] == ["euler, model", "heun, model", "euler, uniform"]


def test_nothing_to_plot_is_an_error():
    with pytest.raises(ValueError, match="at least one timer"):
        plot_times({})
    with pytest.raises(ValueError, match="needs runs"):
        plot_errors([])
