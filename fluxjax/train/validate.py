"""Validation: losses at fixed times and noise, and images of fixed prompts and seeds."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from fluxjax.devices.run import on_mesh
from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.generate.autoencode import decode
from fluxjax.generate.draw import denoise
from fluxjax.generate.image_batch import Recipe
from fluxjax.generate.latents import noise_batch, seed_key
from fluxjax.generate.prompt_batch import distilled_guidance, prompt_batch
from fluxjax.generate.samplers import model_times
from fluxjax.generate.text import TextStates
from fluxjax.generate.velocity import Guidance
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float, PRNGKeyArray
from fluxjax.train.batch import TrainBatch
from fluxjax.train.mesh_step import row_example
from fluxjax.train.named_leaves import WeightArrays
from fluxjax.train.objective import Draws, Evaluation, LossSettings, example_loss
from fluxjax.train.parts import TrainedPart
from fluxjax.train.place import SharedInputs, StepRows, place_batch
from fluxjax.zoo import Defaults


class Validator(eqx.Module):
    """Losses of fixed batches at fixed times, with noise that is the same each time.

    Captions are not dropped, and the distilled guidance scale is the lowest of the training's.

    `part`: what is trained. `times`: at which the loss is taken.
    """

    part: TrainedPart
    loss: LossSettings = eqx.field(static=True)
    evaluation: Evaluation = eqx.field(static=True)
    mesh: Mesh = eqx.field(static=True)
    times: tuple[float, ...] = eqx.field(static=True)

    def __call__(
        self,
        weights: WeightArrays,
        frozen: PyTree,
        batches: Sequence[TrainBatch],
        empty: TextStates,
        key: PRNGKeyArray,
    ) -> Mapping[str, float]:
        """Return the mean loss at each time, and over all times, by name."""
        sums = np.zeros(len(self.times))
        total = 0.0
        for batch in batches:
            rows, shared = place_batch(batch, empty, self.mesh)
            losses = _run_losses(self, weights, frozen, rows, shared, key)
            sums += np.asarray(jnp.sum(rows.weight[:, None] * losses, axis=0))
            total += float(jnp.sum(rows.weight))
        means = sums / max(total, 1e-30)
        found = {"validation_loss": float(means.mean())}
        for time, mean in zip(self.times, means, strict=True):
            found[f"validation_loss_at_{time:g}"] = float(mean)
        return found

    def losses(
        self,
        weights: WeightArrays,
        frozen: PyTree,
        rows: StepRows,
        shared: SharedInputs,
        key: PRNGKeyArray,
    ) -> Float[Array, "rows times"]:
        """Return the losses of rows at all times.

        **Arguments:** as for a call; `rows`, `shared`: from `place_batch`.
        """
        network = self.part.join(weights, frozen, self.mesh.shape["tensor"])
        times = jnp.asarray(self.times, jnp.float32)
        # A function of its own: `on_mesh` compiles by the function's identity outside of jit only.
        return on_mesh(self._row_losses, self.mesh, network, rows, (shared, key, times))

    def _row_losses(
        self,
        network: AbstractTransformer,
        rows: StepRows,
        rest: tuple[SharedInputs, PRNGKeyArray, Float[Array, " times"]],
    ) -> Float[Array, "rows times"]:
        """Return the loss of each row at each time.

        **Arguments:** `rest`: what the rows share, the key of their noise, and the times.
        """
        shared, key, times = rest
        placed: AbstractTransformer | TokenParallelFlux = network
        if self.mesh.shape["context"] > 1:
            placed = TokenParallelFlux(network)
        guidance = None if self.loss.guidance is None else jnp.float32(self.loss.guidance[0])

        def one(row: StepRows) -> Float[Array, " times"]:
            example = row_example(row, shared)
            noise_key = jax.random.fold_in(key, row.place)
            noise = jax.random.normal(noise_key, example.latents.shape)

            def at(t: Array) -> Array:
                draws = Draws(t, noise, guidance, jnp.bool_(False))
                return example_loss(placed, example, draws, self.loss, self.evaluation)

            return jax.lax.map(at, times)

        return jax.vmap(one)(rows)


@eqx.filter_jit
def _run_losses(
    validator: Validator,
    weights: WeightArrays,
    frozen: PyTree,
    rows: StepRows,
    shared: SharedInputs,
    key: PRNGKeyArray,
) -> Float[Array, "rows times"]:
    return validator.losses(weights, frozen, rows, shared, key)


class Prompts(NamedTuple):
    """What the images of a validation are drawn of: encoded once, before the training.

    - `text`: the states of the prompts.
    - `negative`: those of the empty prompt for each, for models that are guided by it; None for
      others.
    - `seed`: of the first image.
    - `steps`: None for the model's number.
    - `size`: height and width in pixels.
    """

    text: TextStates
    negative: TextStates | None
    seed: int
    steps: int | None
    size: tuple[int, int]


def draw_validation_images(
    network: AbstractTransformer,
    vae: Vae,
    prompts: Prompts,
    defaults: Defaults,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "images height width 3"]:
    """Draw an image of each prompt, of a seed of its own, as the model is meant to be sampled.

    **Arguments:** `network`, `vae`: on the mesh, if there is one.
    **Returns:** float32 in [-1, 1].
    """
    height, width = prompts.size
    images = len(prompts.text.txt)
    draw = partial(noise_batch, height=height, width=width, channels=vae.config.latent_channels)
    noise = []
    for number in range(images):
        noise.append(draw(seed_key(prompts.seed + number), [0]))
    batch = prompt_batch(
        prompts.text,
        prompts.negative,
        noise=jnp.concatenate(noise),
        keys=None,
        distilled=distilled_guidance(network, defaults, None),
    )
    steps = defaults.steps if prompts.steps is None else prompts.steps
    times = model_times(defaults, steps, height, width)
    recipe = Recipe(times, guidance=Guidance(scale=defaults.cfg))
    latents = denoise(network, batch, recipe, mesh=mesh)
    return decode(vae, latents, dtype=jnp.float32, mesh=mesh)
