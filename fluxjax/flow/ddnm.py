"""DDNM: a step for measurements without noise."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.corrections import NullSpace
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.step import StochasticStep, X, start_time_only
from fluxjax.flow.stochastic import ddim_noise
from fluxjax.flow.velocity import Velocity
from fluxjax.numeric import check_finite, is_concrete_number
from fluxjax.shapes import Scalar, ScalarLike


@convert_arguments
class DDNM(StochasticStep):
    """`DDIM` whose estimate of x0 is corrected by `NullSpace`; the estimate of the noise is kept.

    For a mask without noise it converges to the posterior with more steps. It takes the prior's
    velocity, and needs 1 evaluation per step and no derivative.

    **Arguments:** `measurement`: of x0; its std is ignored. `eta`: the share of fresh noise, in
    [0, 1]. `iterations`: as for `NullSpace`.
    **Raises:** `ValueError` for an eta outside [0, 1], and for a y that has not the shape of what
    is measured of x.
    **Source:** Wang et al. 2022 (DDNM), algorithm 1, with the noise of Song et al. 2021 (DDIM),
    eq. 16. The noise of DDNM's own eq. 15 converges to another covariance.
    """

    order = 1
    evaluations = 1
    measurement: Measurement
    eta: ScalarLike = 0.85
    iterations: int = eqx.field(default=5, static=True)

    evaluation_times = start_time_only

    def __check_init__(self):
        check_finite("DDNM", eta=self.eta)
        eta = np.asarray(self.eta) if is_concrete_number(self.eta) else np.zeros(())
        if not np.all((eta >= 0) & (eta <= 1)):
            raise ValueError(
                f"`DDNM(eta)` needs a share of noise in [0, 1], got {self.eta}. 0.85 is usual."
            )

    def init(self, x: X) -> None:
        self.measurement.check(x)

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: None
    ) -> tuple[X, Scalar, None]:
        correction = NullSpace(self.iterations)
        v, estimate = correction(lambda x: velocity(x, t), x, t, self.measurement)
        noise = x + (1 - t) * v
        noise_share, deviation = ddim_noise(t, u, jnp.asarray(self.eta, u.dtype))
        return (1 - u) * estimate + noise_share * noise, deviation, None
