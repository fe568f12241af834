"""The embedder of FLUX.1 Redux: the states of an image to tokens that join those of a prompt."""

from dataclasses import dataclass

import equinox as eqx
import jax
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.nets.activations import silu
from fluxjax.nets.layers import Linear
from fluxjax.nets.summary import describe_network
from fluxjax.shapes import Array, Float, PRNGKeyArray


@dataclass(frozen=True, kw_only=True)
class ReduxConfig:
    """The sizes of a Redux embedder; the defaults are those of FLUX.1 Redux.

    `features`: of SigLIP's states. `hidden`: features between the layers. `context`: features of a
    text token.
    """

    features: int = 1152
    hidden: int = 12288
    context: int = 4096

    @classmethod
    def dev(cls) -> "ReduxConfig":
        """FLUX.1 Redux."""
        return cls()


class Redux(eqx.Module):
    """down(silu(up(states))) of every token: one text token for each patch of an image.

    **Source:** Black Forest Labs 2024, FLUX.1 Redux.
    """

    config: ReduxConfig = eqx.field(static=True)
    up: Linear
    down: Linear

    def __init__(self, config: ReduxConfig, *, key: PRNGKeyArray):
        up, down = jax.random.split(key)
        self.config = config
        self.up = Linear(config.features, config.hidden, key=up)
        self.down = Linear(config.hidden, config.context, key=down)

    def __repr__(self) -> str:
        # Equinox's own has a line for each array.
        return describe_network(self)

    @convert_arguments
    def __call__(
        self,
        states: Float[Array, "tokens features"],
        *,
        dtype: DTypeLike | None = None,
    ) -> Float[Array, "tokens context"]:
        """Return the tokens of an image.

        **Arguments:** `states`: of SigLIP, after its final norm. `dtype`: of the activations, by
        default that of the states.
        """
        x = states if dtype is None else states.astype(dtype)
        return self.down(silu(self.up(x)))
