"""Sampling by the ODE solvers of diffrax, which is in the optional dependencies `fluxjax[ode]`."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import cast_value, check_times
from fluxjax.flow.sample import Sample
from fluxjax.flow.step import time_dtype
from fluxjax.flow.velocity import Velocity, initial_memory
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, Scalar

Solver = Any
"""A `diffrax.AbstractSolver`; diffrax is imported only when it is used."""

if TYPE_CHECKING:
    from diffrax import AbstractStepSizeController


@convert_arguments
def sample_ode(
    velocity: Velocity,
    x: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    solver: Solver,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 4096,
    history: bool = False,
) -> Sample:
    """Integrate dx/dt = velocity(x, t) from the first time to the last by a solver of diffrax.

    **Arguments:**

    - `velocity`, `x`, `times`, `history`: as for `sample`.
    - `solver`: such as `diffrax.Dopri5()`.
    - `rtol`, `atol`: tolerances of adaptive steps. Without them there is one step per interval.
    - `max_steps`: limit of adaptive steps; a run that needs more is an error at run time.

    **Returns:** as `sample`. `evaluations` is an array: the stages of a Runge-Kutta solver times
    its steps, including rejected ones.
    **Raises:** `ValueError` for fewer than two times, one tolerance without the other, or a
    velocity with a memory. `ImportError` without diffrax.
    """
    diffrax = _import_diffrax()
    check_times("sample_ode", times)
    _check_tolerances(rtol, atol)
    if initial_memory(velocity, x) is not None:
        raise ValueError(
            "`sample_ode(velocity)` got a velocity with a memory, and a solver may repeat or "
            "reject steps. Use `sample`, or a velocity without memory."
        )
    times, dtype = times.astype(time_dtype(x)), x.dtype
    x = x.astype(times.dtype)
    arrays, static = eqx.partition(velocity, eqx.is_array)

    def field(t: Scalar, x: Array, arrays: object) -> Array:
        # The arrays are arguments: diffrax does not differentiate what a field closes over.
        value = eqx.combine(arrays, static)(x, jnp.asarray(t, times.dtype))
        return cast_value("sample_ode", value, x)

    controller: AbstractStepSizeController
    # Without tolerances, one step per interval; diffrax still wants a limit of steps.
    if rtol is None:
        controller, max_steps = diffrax.StepTo(ts=times), len(times)
    else:
        controller = diffrax.PIDController(rtol=rtol, atol=atol)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=x,
        args=arrays,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=controller,
        max_steps=max_steps,
    )
    evaluations = _stages(solver) * solution.stats["num_steps"]
    path = solution.ys.astype(dtype)
    return Sample(path[-1], path if history else None, evaluations, None)


def _check_tolerances(rtol: float | None, atol: float | None) -> None:
    check_finite("sample_ode", rtol=rtol, atol=atol)
    if (rtol is None) != (atol is None):
        raise ValueError(
            "`sample_ode(rtol, atol)` adapts its steps to both tolerances, and got only one. "
            "Pass both, or neither."
        )


def _stages(solver: Solver) -> int:
    """Return the evaluations of a solver per step.

    If the last stage of a step is the first of the next one, it counts once.
    """
    tableau = getattr(solver, "tableau", None)
    if tableau is None:  # not a Runge-Kutta solver
        return 1
    return tableau.num_stages - int(tableau.fsal)


def _import_diffrax() -> ModuleType:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            "`sample_ode` needs diffrax. Install it with `pip install 'fluxjax[ode]'`."
        ) from error
    return diffrax
