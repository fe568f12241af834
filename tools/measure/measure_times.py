"""Measure learned times on the tiny model: their error, beside the model's own and uniform times.

Times are planned and fitted on some prompts, and measured on held-out ones: the root mean square
distance of the latents to those of 200 steps of Heun. Fits begin at the planned and at uniform
times, and that with the smaller distance on the prompts learned from is kept. Prints a Markdown
table; --output appends its rows as JSON lines to a file, and --write keeps the fitted times in JSON
files, which `fluxjax generate --timer` reads.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp

import fluxjax
from fluxjax import DPMpp2M, Euler, flow, generate
from fluxjax.flow import AB2, Step

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny"))
from evaluate_tiny import held_out_scenes  # found by the line above

SIZE = 128
REFERENCE_STEPS = 200
STEPS = (4, 8, 16)
INTEGRATORS = {"euler": Euler(), "ab2": AB2(), "dpmpp_2m": DPMpp2M()}
COLUMNS = ("model's times", "uniform", "planned", "fitted")


class PromptVelocity(eqx.Module):
    """The velocity of one of several prompts, which the state carries in its last entry.

    `plan_times` and `fit_times` take one velocity for all draws; here each draw has its own prompt.
    """

    flux: fluxjax.Flux
    conditions: fluxjax.Conditioning

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        number = x[-1, 0].astype(jnp.int32)
        axes = jax.tree.map(lambda leaf: leaf[number], self.conditions)
        velocity = fluxjax.flux_velocity(self.flux, axes)
        return jnp.concatenate([velocity(x[:-1], t), jnp.zeros_like(x[-1:])])


def prompts_as_draws(
    models: fluxjax.Models, prompts: Sequence[str], seed: int
) -> tuple[PromptVelocity, jax.Array]:
    """Return the velocity of prompts, and the noise of each, which ends with its number."""
    ids = generate.prompt_ids(models.tokenizers, prompts, max_length=models.defaults.max_length)
    text = fluxjax.encode_text(models.clip, models.t5, ids, dtype=jnp.float32)
    count = len(prompts)
    positions = jnp.broadcast_to(fluxjax.image_ids(SIZE, SIZE), (count, (SIZE // 16) ** 2, 3))
    guidance = jnp.full(count, 3.5)
    conditions = fluxjax.Conditioning(text.txt, text.vec, positions, guidance)
    noise = generate.latents.noise_batch(
        jax.random.key(seed), range(count), SIZE, SIZE, channels=16
    )
    packed = jax.vmap(fluxjax.pack_latents)(noise)
    numbers = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None], (count, 1, 64))
    return PromptVelocity(models.flux, conditions), jnp.concatenate([packed, numbers], 1)


@eqx.filter_jit
def ends(velocity: PromptVelocity, noise: jax.Array, times: jax.Array, step: Step) -> jax.Array:
    """Return the latents of all draws at the last time, [draws, tokens, channels]."""
    return jax.vmap(lambda x: fluxjax.sample(velocity, x, times, step=step).x[:-1])(noise)


class TimesFit(eqx.Module):
    """A fit of times: to the ends of draws of a velocity, for one integrator."""

    velocity: PromptVelocity
    noise: jax.Array
    target: jax.Array
    step: Step
    iterations: int = eqx.field(static=True)

    def best_of(self, starts: Sequence[jax.Array]) -> jax.Array:
        """Fit from each of several times; return the result that ends nearest to the target."""
        best, least = starts[0], float("inf")
        for start in starts:
            times = self.fit_from(start)
            distance = ends(self.velocity, self.noise, times, self.step) - self.target[:, :-1]
            error = float(jnp.mean(distance**2))
            if error < least:
                best, least = times, error
        return best

    @eqx.filter_jit
    def fit_from(self, start: jax.Array) -> jax.Array:
        """Return the times fitted from one beginning, in one compiled program."""
        options = {"step": self.step, "iterations": self.iterations}
        return flow.fit_times(self.velocity, self.noise, self.target, start, **options)


def errors_of(
    options: argparse.Namespace, models: fluxjax.Models
) -> Iterator[tuple[dict[str, object], jax.Array]]:
    """Yield the errors of each integrator and number of steps, with its fitted times."""
    prompts = [caption for _, caption in held_out_scenes(options.draws + options.held_out)]
    train, noise = prompts_as_draws(models, prompts[: options.draws], 0)
    test, test_noise = prompts_as_draws(models, prompts[options.draws :], 1)
    many = generate.model_times(models.defaults, REFERENCE_STEPS, SIZE, SIZE)
    target, exact = ends(train, noise, many, flow.Heun()), ends(test, test_noise, many, flow.Heun())
    whole_target = jnp.concatenate([target, noise[:, -1:]], 1)
    for steps in options.steps:
        planned = flow.plan_times(train, noise, steps)
        uniform = flow.uniform_times(steps)
        own = generate.model_times(models.defaults, steps, SIZE, SIZE)
        for name, step in INTEGRATORS.items():
            times_fit = TimesFit(train, noise, whole_target, step, options.iterations)
            fitted = times_fit.best_of((planned, uniform))
            row: dict[str, object] = {"steps": steps, "integrator": name}
            every = (own, uniform, planned, fitted)
            for column, times in zip(COLUMNS, every, strict=True):
                distance = ends(test, test_noise, times, step) - exact
                row[column] = round(float(jnp.sqrt(jnp.mean(distance**2))), 4)
            yield row, fitted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=16, help="to learn from")
    parser.add_argument("--held-out", type=int, default=32, help="draws to measure on")
    parser.add_argument("--iterations", type=int, default=40, help="of the fit")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
    parser.add_argument("--write", type=Path, help="folder for the fitted times")
    options = parser.parse_args()
    models = fluxjax.load_models("tiny", dtype="float32")
    counts = {name: getattr(options, name) for name in ("draws", "held_out", "iterations")}
    print(f"| steps | integrator | {' | '.join(COLUMNS)} |")
    print("| --- " * (2 + len(COLUMNS)) + "|")
    for row, fitted in errors_of(options, models):
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
        if options.output is not None:
            with options.output.open("a") as file:
                file.write(json.dumps(row | counts) + "\n")
        if options.write is not None:
            about = {"model": "tiny", "integrator": row["integrator"], "size": f"{SIZE}x{SIZE}"}
            path = options.write / f"{row['integrator']}_{row['steps']}.json"
            generate.write_times(path, fitted, about)


if __name__ == "__main__":
    main()
