"""A tiny random transformer, batches of random examples, and training steps on them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from meshes import mesh_of

from fluxjax import Flux, FluxConfig
from fluxjax.generate.conditioning import ReferenceTokens
from fluxjax.generate.text import TextStates
from fluxjax.train.batch import AbstractBatches, TrainBatch
from fluxjax.train.config import MethodSettings
from fluxjax.train.loop import jit_step
from fluxjax.train.mesh_step import StepSettings, TrainStep
from fluxjax.train.objective import Evaluation, LossSettings
from fluxjax.train.place import create_state, place_batch
from fluxjax.train.setup import divide, place_frozen, weight_specs

CONFIG = FluxConfig(
    width=32,
    heads=2,
    double_depth=2,
    single_depth=1,
    mlp_width=64,
    context=24,
    pooled=8,
    in_channels=64,
    out_channels=64,
    rope_axes=(4, 6, 6),
    time_width=16,
)
KEY = jax.random.key(7)
LOSS = LossSettings(guidance=(1.0, 4.0), caption_dropout=0.4)
FULL = MethodSettings(method="full")
ADAM = optax.adamw(1e-3)
AVERAGED = StepSettings(ema_decay=0.9)


@functools.cache
def random_flux(seed: int = 0, config: FluxConfig = CONFIG) -> Flux:
    """Return a transformer all of whose numbers are random, biases and norms too."""
    network = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(network)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        structure, [jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    )


def batch_of(count, *, seed=0, size=(32, 48), features=0, reference=False, mask=False):
    """Return a batch of random examples, of which the first stay the same for any count."""
    columns = []
    tokens = size[0] * size[1] // 256
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        normal = lambda *shape, rng=rng: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        columns.append(
            (
                normal(tokens, 64),
                normal(5, 24),
                normal(8),
                np.float32(rng.uniform(0.5, 2)),
                normal(tokens, features),
                normal(3, 64),
                rng.uniform(size=tokens).astype(np.float32),
            )
        )
    latents, txt, vec, weight, concat, tokens, masks = (
        np.stack(column) for column in zip(*columns, strict=True)
    )
    ids = np.stack([np.ones(3), np.zeros(3), np.arange(3)], -1).astype(np.float32)
    return TrainBatch(
        jnp.asarray(latents),
        TextStates(jnp.asarray(txt), jnp.asarray(vec)),
        jnp.asarray(weight),
        jnp.arange(count),
        jnp.asarray(concat) if features else None,
        ReferenceTokens(jnp.asarray(tokens), jnp.asarray(ids)) if reference else None,
        jnp.asarray(masks) if mask else None,
        size=size,
    )


EMPTY = TextStates(jnp.full((1, 5, 24), 0.3), jnp.full((1, 8), -0.2))


class Training:
    """A training whose steps are compiled once for each shape of a batch."""

    empty = EMPTY

    def __init__(
        self,
        mesh=None,
        *,
        method=FULL,
        optimizer=ADAM,
        loss=LOSS,
        settings=AVERAGED,
        remat=False,
        network=None,
    ):
        self.mesh = mesh_of() if mesh is None else mesh
        network = random_flux() if network is None else network
        part, division = divide(network, method, jax.random.key(3))
        self.placed = weight_specs(part, division, self.mesh)
        self.frozen = place_frozen(division.frozen, self.mesh)
        evaluation = Evaluation(dtype=jnp.float32, remat=remat)
        self.step = TrainStep(part, optimizer, loss, evaluation, settings, self.mesh)
        self.weights, self.settings = division.weights, settings
        with jax.numpy_dtype_promotion("standard"):
            self.state = create_state(
                division.weights,
                optimizer,
                self.mesh,
                self.placed,
                has_ema=settings.ema_decay is not None,
            )

    def take(self, batch, key=KEY):
        rows, shared = place_batch(batch, EMPTY, self.mesh, accumulate=self.settings.accumulate)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            self.state, metrics = jit_step(self.step, self.state, self.frozen, rows, shared, key)
        return metrics

    def gradients(self, batch, key=KEY):
        """Return the gradients of a step, which is half of the program of `take`."""
        rows, shared = place_batch(batch, EMPTY, self.mesh, accumulate=self.settings.accumulate)
        return jit_gradients(self.step, self.state.model, self.frozen, rows, shared, key)


@functools.partial(jax.jit, static_argnums=0)
def jit_gradients(step, *inputs):
    *arrays, key = inputs
    draw_key, _ = jax.random.split(jax.random.fold_in(key, 0))  # as in a first step
    return step.gradients(*arrays, draw_key)[1]


class ListedBatches(AbstractBatches):
    """Batches of a list, over and over."""

    def __init__(self, batches):
        self.batches, self.place = batches, 0

    def __next__(self):
        self.place += 1
        return self.batches[(self.place - 1) % len(self.batches)]

    def state(self):
        return {"place": self.place}

    def restore(self, state):
        self.place = state["place"]

    def names(self, numbers):
        return [f"example {number}" for number in numbers]

    def empty_text(self):
        return EMPTY

    def broken(self):
        return ()

    def close(self):
        pass
