"""Sampling by diffrax's solvers of ordinary differential equations. Needs the extra `ode`."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.sample import Sample, check_times, fitting_velocity
from fluxjax.flow.step import time_dtype
from fluxjax.flow.velocity import Velocity, initial_memory
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, Scalar


@convert_arguments
def sample_ode(
    velocity: Velocity,
    x: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    solver: Any,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 4096,
    history: bool = False,
) -> Sample:
    """Integrate dx/dt = velocity(x, t) from the first time to the last by a solver of diffrax's.

    **Arguments:** as for `sample`. `solver`: as `diffrax.Dopri5()`. `rtol`, `atol`: tolerances of steps that adapt; without,
    the steps are from node to node. `max_steps`: of those that adapt; more are an error as it runs.
    **Returns:** as `sample`; `evaluations` is an array, a Runge-Kutta solver's stages times its steps, rejected ones too.
    **Raises:** `ValueError` for fewer than two times, one tolerance without the other, or a velocity that remembers;
    `ImportError` without diffrax.
    """
    diffrax = _diffrax()
    check_times("sample_ode", times)
    check_finite("sample_ode", rtol=rtol, atol=atol)
    if (rtol is None) != (atol is None):
        raise ValueError(
            "`sample_ode` adapts its steps to both `rtol` and `atol`. Pass both, or neither."
        )
    if initial_memory(velocity, x) is not None:
        raise ValueError(
            "`sample_ode` may take steps back, and this velocity remembers. Use `sample`, or one without memory."
        )
    times, dtype = times.astype(time_dtype(x)), x.dtype
    x = x.astype(times.dtype)
    fixed = rtol is None
    arrays, static = eqx.partition(velocity, eqx.is_array)

    def field(t: Scalar, x: Array, arrays: Any) -> Array:
        return fitting_velocity(
            "sample_ode", eqx.combine(arrays, static)(x, jnp.asarray(t, times.dtype)), x
        )

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=x,
        args=arrays,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.StepTo(ts=times)
        if fixed
        else diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=len(times) if fixed else max_steps,
    )
    steps = solution.stats["num_steps"]
    path = solution.ys.astype(dtype)
    return Sample(path[-1], path if history else None, _stages(solver) * steps, None)


def _stages(solver: Any) -> int:
    """Return a solver's evaluations a step; one of each that is the next step's first counts once."""
    tableau = getattr(solver, "tableau", None)
    if tableau is None:
        return 1
    return tableau.num_stages - int(tableau.fsal)


def _diffrax() -> Any:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            "`sample_ode` needs diffrax. Install it with `pip install 'fluxjax[ode]'`."
        ) from error
    return diffrax
