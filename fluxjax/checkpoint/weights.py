"""A network's weights, one parameter at a time, wherever they lie."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.kinds import Network
from fluxjax.checkpoint.own_configs import NetworkConfig
from fluxjax.nets.stack import block_name, is_stacked, leaf_names
from fluxjax.printable import printable

Module = TypeVar("Module", bound=eqx.Module)
LOADED_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
"""The dtypes that weights are loaded and written in."""


@dataclass(frozen=True)
class Parameter:
    """Where a parameter is in a network: a leaf, or one block of a leaf that is stacked.

    `leaf`: the number of the leaf. `block`: of the block; None for a leaf that is not stacked.
    `shape`: of the parameter, without the axis of blocks.
    """

    leaf: int
    block: int | None
    shape: tuple[int, ...]


def parameter_names(leaf: str, shape: Sequence[int]) -> list[str]:
    """Return the names of the parameters in a leaf: one per block where it is stacked."""
    if not is_stacked(leaf):
        return [leaf]
    names = []
    for block in range(shape[0]):
        names.append(block_name(leaf, block))
    return names


def parameters_of(network: eqx.Module) -> dict[str, Parameter]:
    """Return every parameter of a network by its name, the blocks of one leaf in a row."""
    parameters: dict[str, Parameter] = {}
    names = leaf_names(network)
    leaves = jax.tree.leaves(network)
    for number, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if not is_stacked(name):
            parameters[name] = Parameter(number, None, leaf.shape)
            continue
        depth, *shape = leaf.shape
        for block in range(depth):
            parameters[block_name(name, block)] = Parameter(number, block, tuple(shape))
    return parameters


class Weights(ABC):
    """The weights of a network, which may lie in memory or in files, or be computed when read.

    `network`: its structure; the leaves have at least a shape.
    """

    network: Network

    @property
    def config(self) -> NetworkConfig:
        """The config of the network."""
        return self.network.config

    @abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a parameter's values before any cast.

        **Arguments:** `name`: of the parameter, as in `parameters_of`.
        """

    @abstractmethod
    def read(self, name: str, rows: slice, dtype: np.dtype) -> np.ndarray:
        """Return rows of a parameter, cast to a dtype; the array may share its memory.

        **Arguments:** `name`: of the parameter. `rows`: of its first axis. `dtype`: of the result.
        **Raises:** `WeightsError` for a value that does not fit in the dtype.
        """


@dataclass(frozen=True)
class InMemoryWeights(Weights):
    """The weights of a network whose leaves are arrays."""

    network: Network

    @cached_property
    def _parameters(self) -> dict[str, Parameter]:
        return parameters_of(self.network)

    @cached_property
    def _leaves(self) -> list[jax.Array | np.ndarray]:
        return jax.tree.leaves(self.network)

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of the leaf that a parameter is in."""
        return np.dtype(self._leaves[self._parameters[name].leaf].dtype)

    def read(self, name: str, rows: slice, dtype: np.dtype) -> np.ndarray:
        """Return rows of a parameter, copied from its device if it is not the host."""
        parameter = self._parameters[name]
        values = self._leaves[parameter.leaf]
        if parameter.block is not None:
            values = values[parameter.block]
        return cast(np.asarray(values)[rows], dtype, name)


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return a dtype that holds values of all the dtypes: the one, or what NumPy promotes to.

    8-bit floats beside other dtypes count as bfloat16.
    """
    different = set(dtypes)
    if len(different) == 1:
        return different.pop()
    promotable = []
    for dtype in different:
        # JAX promotes 8-bit floats to nothing, so that they would be an error.
        promotable.append(jnp.bfloat16 if dtype.itemsize == 1 else dtype)
    # Programs and tests may run with strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(reduce(jnp.promote_types, promotable))


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return values in a dtype.

    **Raises:** `WeightsError` if a value does not fit in the dtype; `name` is the parameter's.
    """
    if values.dtype == dtype:
        return values
    out = np.empty(values.shape, dtype)
    cast_into(out, values, name)
    return out


def cast_into(out: np.ndarray, values: np.ndarray, name: str) -> None:
    """Write values into an array of another dtype, without an array in between.

    **Raises:** `WeightsError` if a value does not fit in the dtype; `name` is the parameter's.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values
    # Looking for infinity takes as long as the cast, so it is done only where one can arise.
    most = float(jnp.finfo(out.dtype).max)
    narrower = most < float(jnp.finfo(values.dtype).max)
    if narrower and not np.isfinite(out).all() and np.isfinite(values).all():
        largest = float(np.abs(values.astype(np.float32)).max())
        raise WeightsError(
            f"{name} holds {largest:.4g}, which {out.dtype} can't (at most {most:g}). Use bfloat16."
        )


def abstract(make: Callable[..., Module], config: object) -> Module:
    """Return a network whose leaves are shapes; no array is made.

    **Arguments:** `make`: the network's class. `config`: its config.
    **Raises:** `WeightsError` for a config that the class can't be made with.
    """
    try:
        key = jax.eval_shape(lambda: jax.random.key(0))
        return eqx.filter_eval_shape(make, config, key=key)
    except Exception as error:  # a config from a damaged file can fail anywhere
        title = getattr(make, "__name__", "network")
        shown_config, reason = printable(str(config), 1000), printable(str(error))
        raise WeightsError(f"{shown_config} makes no {title}: {reason}") from error
