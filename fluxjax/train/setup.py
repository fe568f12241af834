"""A training made of its configuration: the network divided and placed, and its step."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.family import family_of_source
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.devices.mesh import make_mesh
from fluxjax.devices.shard import shard
from fluxjax.devices.specs import shardings, specs
from fluxjax.generate.limits import known_flux_config
from fluxjax.generate.load import Storage, activation_dtype, load_kind
from fluxjax.lora.adapter import Lora
from fluxjax.lora.init import BLOCKS, init_dora, init_lokr, init_lora
from fluxjax.lora.read import read_lora
from fluxjax.nets.rounding import quantize
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.widen import widen_input
from fluxjax.shapes import PRNGKeyArray
from fluxjax.train.config import MethodSettings, TrainConfig
from fluxjax.train.mesh_step import TrainStep, named_specs
from fluxjax.train.objective import Evaluation
from fluxjax.train.optimizers import make_optimizer
from fluxjax.train.parts import Division, TrainedPart, divide_adapter, divide_layers
from fluxjax.train.place import create_state, state_shapes
from fluxjax.train.step import TrainState
from fluxjax.zoo import Defaults


class TrainingSetup(NamedTuple):
    """All of a training but its data.

    `step`: one step, to be jitted. `weights`: what is trained, before the first step. `frozen`: the
    rest, on the mesh. `placed`: how each of the weights is split. `network`: the shapes of the
    whole network, without adapters beside it. `defaults`: how the model is meant to be sampled.
    `key`: of the training. `has_ema`: whether the weights are averaged.
    """

    step: TrainStep
    weights: dict[str, Any]
    frozen: PyTree
    placed: Mapping[str, PartitionSpec]
    network: AbstractTransformer
    defaults: Defaults
    key: PRNGKeyArray
    has_ema: bool

    @property
    def mesh(self) -> Mesh:
        """The mesh of the step."""
        return self.step.mesh

    def first_state(self) -> TrainState:
        """Return the state before the first step, on the mesh."""
        optimizer = self.step.optimizer
        return create_state(self.weights, optimizer, self.mesh, self.placed, has_ema=self.has_ema)

    def state_shapes(self) -> TrainState:
        """Return shapes, dtypes and shardings of the state."""
        optimizer, placed = self.step.optimizer, self.placed
        return state_shapes(self.weights, optimizer, self.mesh, placed, has_ema=self.has_ema)


def set_up_training(
    config: TrainConfig, network: AbstractTransformer, mesh: Mesh, defaults: Defaults
) -> TrainingSetup:
    """Return a training of a network that is in memory.

    **Arguments:** `network`: in the order of files, on the mesh or on one device. `defaults`: of
    the model.
    **Raises:** `ValueError` for a method, targets or sizes that the network does not take.
    """
    key = jax.random.key(config.seed)
    network = _widened(network, config.train)
    part, division = divide(network, config.train, jax.random.fold_in(key, 0))
    setup = _described(config, part, division, network, mesh, defaults)
    return setup._replace(frozen=place_frozen(division.frozen, mesh))


def training_shapes(
    config: TrainConfig, network: AbstractTransformer, mesh: Mesh, defaults: Defaults
) -> TrainingSetup:
    """Return a training of shapes alone, to compile its step without its weights.

    **Arguments:** `network`: its shapes and dtypes. The others as for `set_up_training`.
    **Returns:** a training whose `weights` and `frozen` are shapes with shardings.
    """
    key = jax.random.key(config.seed)
    network = eqx.filter_eval_shape(_widened, network, config.train)
    part, division = eqx.filter_eval_shape(divide, network, config.train, key)
    setup = _described(config, part, division, network, mesh, defaults)
    weights = {}
    for name, leaf in division.weights.items():
        sharding = NamedSharding(mesh, setup.placed[name])
        weights[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return setup._replace(weights=weights, frozen=_frozen_shapes(division.frozen, mesh))


def _widened(network: AbstractTransformer, method: MethodSettings) -> AbstractTransformer:
    """Return a network that reads the added features, unless an adapter adds them."""
    if method.is_adapter or not method.extra_features:
        return network
    return widen_input(network, method.extra_features)  # type: ignore[arg-type]


def _described(
    config: TrainConfig,
    part: TrainedPart,
    division: Division,
    network: AbstractTransformer,
    mesh: Mesh,
    defaults: Defaults,
) -> TrainingSetup:
    """Return a training whose frozen part is not placed yet.

    **Arguments:** `part`, `division`: from `divide`. `network`: with a widened input, if it is.
    The others as for `set_up_training`.
    """
    dtype = activation_dtype() if config.dtype is None else config.dtype
    # Chroma takes no distilled scale.
    takes_guidance = getattr(network.config, "guidance_embed", False)
    step = TrainStep(
        part,
        make_optimizer(config.optimizer, config.steps),
        config.loss.for_model(defaults, takes_guidance=takes_guidance),
        Evaluation(dtype=jnp.dtype(dtype), remat=config.remat, attention=config.attention),
        config.step,
        mesh,
    )
    return TrainingSetup(
        step,
        division.weights,
        division.frozen,
        weight_specs(part, division, mesh),
        eqx.filter_eval_shape(lambda network: network, network),
        defaults,
        jax.random.fold_in(jax.random.key(config.seed), 1),
        config.step.ema_decay is not None,
    )


def _frozen_shapes(frozen: PyTree, mesh: Mesh) -> PyTree:
    """Return the shapes of what is not trained, with shardings on a mesh.

    **Arguments:** `frozen`: from `divide`: of layers a network, of an adapter a pair of a network
    and of what of the adapter is not trained.
    """

    def place(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def of_network(network: AbstractTransformer) -> PyTree:
        return jax.tree.map(place, network, specs(network, mesh))

    if isinstance(frozen, tuple):
        network, rest = frozen
        whole = PartitionSpec()
        placed = jax.tree.map(lambda leaf: place(leaf, whole), rest)
        return of_network(network), placed
    return of_network(frozen)


def load_training(config: TrainConfig, mesh: Mesh) -> TrainingSetup:
    """Return a training of the model that the configuration names.

    **Raises:** as `load_flux` and `set_up_training`.
    """
    family = family_of_source(config.model)
    storage = Storage(lambda network: shardings(network, mesh))
    if config.train.quantize is not None:
        if mesh.size > 1:
            raise ValueError(
                "train.quantize rounds weights as one device reads them. Use one device, or leave "
                "it out."
            )
        storage = Storage(quantize=config.train.quantize)
    dtype = activation_dtype() if config.dtype is None else config.dtype
    if not config.train.is_adapter:
        dtype = config.train.weights_dtype
    network = load_kind(KINDS[family.transformer], config.model, None, dtype, storage)
    return set_up_training(config, network, mesh, load_defaults(config.model))


def known_shapes(config: TrainConfig) -> AbstractTransformer:
    """Return the shapes of the model that the configuration names; nothing is downloaded.

    **Raises:** `ValueError` for a model that is neither on this machine nor a named one.
    """
    known = known_flux_config(config.model)
    if known is None:
        raise ValueError(
            f"The sizes of {config.model} are not known before it is downloaded. Download it, or "
            "name one of the same sizes, as dev."
        )
    network_kind = KINDS[family_of_source(config.model).transformer].network
    network = eqx.filter_eval_shape(network_kind, known, key=jax.random.key(0))
    dtype = activation_dtype() if config.dtype is None else config.dtype
    if not config.train.is_adapter:
        dtype = config.train.weights_dtype
    cast = eqx.filter_eval_shape(_cast, network, jnp.dtype(dtype))
    if config.train.quantize is None:
        return cast
    return eqx.filter_eval_shape(quantize, cast, config.train.quantize)


def _cast(network: AbstractTransformer, dtype: jnp.dtype) -> AbstractTransformer:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), network)


def training_mesh(config: TrainConfig) -> Mesh:
    """Return the mesh of a training, of the first devices if it needs fewer than there are.

    **Raises:** as `make_mesh`.
    """
    sizes = asdict(config.mesh)
    devices = jax.devices()
    if min(sizes.values()) > 0:
        devices = devices[: math.prod(sizes.values())]
    return make_mesh(**sizes, devices=devices)


def divide(
    network: AbstractTransformer, method: MethodSettings, key: PRNGKeyArray
) -> tuple[TrainedPart, Division]:
    """Return what a method trains of a network, and the rest.

    **Arguments:** `key`: for the first weights of an adapter.
    **Raises:** `ValueError` for targets or a rank that the network does not take.
    """
    if not method.is_adapter:
        targets = method.targets if method.method == "layers" else None
        return divide_layers(network, targets, dtype=jnp.dtype(method.weights_dtype))
    lora = first_adapter(network, method, key)
    return divide_adapter(network, lora, dtype=jnp.dtype(method.weights_dtype))


def first_adapter(network: AbstractTransformer, method: MethodSettings, key: PRNGKeyArray) -> Lora:
    """Return the adapter that a training begins with. Arguments as for `divide`."""
    if method.start is not None:
        return read_lora(method.start)
    targets = list(method.targets or BLOCKS)
    extra = method.extra_features
    if extra and not method.targets:
        targets.append("img_in")
    options: dict[str, Any] = {"alpha": method.alpha, "key": key}
    if method.method == "dora":
        if extra:
            raise ValueError(
                "train.extra_features widens the input, whose added columns have no norm for a "
                "DoRA. Choose 'lora'."
            )
        return init_dora(network, method.rank, targets, **options)
    options["extra_features"] = extra
    if method.method == "lokr":
        return init_lokr(network, method.rank, targets, divisor=method.divisor, **options)
    return init_lora(network, method.rank, targets, **options)


def weight_specs(part: TrainedPart, division: Division, mesh: Mesh) -> dict[str, PartitionSpec]:
    """Return how each trained weight is split over a mesh.

    Layers are split as their network is; the factors of adapters are on every device.
    """
    if isinstance(division.frozen, tuple):
        return dict.fromkeys(division.weights, PartitionSpec())
    network = eqx.filter_eval_shape(part.join, division.weights, division.frozen)
    named = named_specs(specs(network, mesh))
    return {name: named[name] for name in division.weights}


def place_frozen(frozen: PyTree, mesh: Mesh) -> PyTree:
    """Return what is not trained on a mesh, as `TrainedPart.join` takes it."""
    if isinstance(frozen, tuple):
        network, rest = frozen
        whole = NamedSharding(mesh, PartitionSpec())
        arrays, static = eqx.partition(rest, eqx.is_array)
        return shard(network, mesh), eqx.combine(jax.device_put(arrays, whole), static)
    return shard(frozen, mesh)


def identity_of(config: TrainConfig, setup: TrainingSetup) -> dict[str, Any]:
    """Return what checkpoints of a training must have in common to be continued.

    Learning rates, the number of steps and the mesh may change between two runs.
    """
    names = sorted(f"{name}{leaf.shape}{leaf.dtype}" for name, leaf in setup.weights.items())
    return {
        "model": config.model,
        "network": repr(setup.network.config),
        "method": config.train.method,
        "weights": hashlib.sha256("\n".join(names).encode()).hexdigest()[:16],
        "optimizer": config.optimizer.name,
        "moment_dtype": config.optimizer.moment_dtype,
        "averaged": setup.has_ema,
        "seed": config.seed,
    }
