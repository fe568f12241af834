"""Measure the figures of docs/sampling.md on the tiny model: guidance, step caches, integrators."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fluxjax
from fluxjax import DrawSettings, Guidance, ImageBatch, Recipe, denoise, text_to_image
from fluxjax.flow import Euler, Projected, ZeroStar
from fluxjax.flow.step import Step
from fluxjax.generate import FirstBlock, TeaCache, WeakNetwork, prompt_batch
from fluxjax.generate.compare import Run
from fluxjax.generate.latents import noise_batch
from fluxjax.generate.plots import plot_errors
from fluxjax.generate.prompt_batch import distilled_guidance
from fluxjax.generate.samplers import INTEGRATORS, integrator, timer
from fluxjax.generate.text import encode_text, prompt_ids
from fluxjax.kernels import Nag, isolated_attention
from fluxjax.nets import DegradedBlocks

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny"))
from evaluate_tiny import held_out_scenes, score  # found by the line above

DOCS = Path(__file__).resolve().parents[2] / "docs"
STOCHASTIC = {"ddim", "ancestral", "sde", "dpmpp_2m_sde", "er_sde", "renoise"}
"""Integrators that draw noise, or whose limit is not the deterministic one."""
COUNTS = (4, 8, 16, 32, 64)
"""Evaluations of the network for which the integrators' errors are measured."""
REFERENCE_STEPS = 200
BATCH = 50


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


class GuidanceChoice(NamedTuple):
    """One row of the table of guidance: the distilled scale, and what is added to it."""

    distilled: float
    guidance: Guidance = Guidance()


def guidance_choices(models: fluxjax.Models) -> dict[str, GuidanceChoice]:
    """Return each kind and scale of guidance that is compared, by its name in the table."""
    config = models.flux.config
    choices = {"none (distilled 1)": GuidanceChoice(1.0)}
    for scale in (2.0, 3.5, 6.0):
        choices[f"distilled {scale:g}"] = GuidanceChoice(scale)

    def add(name: str, guidance: Guidance) -> None:
        choices[name] = GuidanceChoice(1.0, guidance)

    for scale in (1.5, 2.0, 3.0):
        add(f"classifier-free {scale:g}", Guidance(scale))
    for scale in (1.5, 2.0, 3.0):
        add(f"CFG-Zero* {scale:g}", Guidance(scale, ZeroStar()))
    for scale in (1.5, 2.0, 3.0):
        add(f"APG {scale:g}", Guidance(scale, Projected()))
    for scale in (2.0, 3.0):
        add(f"APG {scale:g}, momentum -0.5", Guidance(scale, Projected(momentum=-0.5)))
    skipped = DegradedBlocks(config, single=[2])
    isolated = DegradedBlocks(config, double=[1], single=[2], attention=isolated_attention)
    for name, blocks in (("skip-layer", skipped), ("PAG", isolated)):
        for strength in (0.25, 0.5, 1.0):
            add(f"{name} {strength:g}", Guidance(weak=WeakNetwork(blocks, strength)))
    for scale in (2.0, 4.0, 8.0):
        add(f"NAG {scale:g}", Guidance(nag=Nag(scale)))
    return choices


def measure_guidance(options: argparse.Namespace) -> None:
    """Print how many held-out prompts each kind and scale of guidance gets right."""
    models = fluxjax.load_models("tiny")
    pairs = held_out_scenes(options.prompts)
    attributes = ("shape", "color", "relation", "all")
    rows = []
    for name, choice in guidance_choices(models).items():
        settings = DrawSettings(steps=options.steps, distilled_guidance=choice.distilled)
        images = []
        for start in range(0, len(pairs), BATCH):
            prompts = [prompt for _, prompt in pairs[start : start + BATCH]]
            key = jax.random.fold_in(jax.random.key(0), start)
            drawn = text_to_image(
                models, prompts, key=key, settings=settings, guidance=choice.guidance
            )
            images.append(np.asarray(drawn))
        scores = score(np.concatenate(images), [scene for scene, _ in pairs])
        rows.append([name, *(f"{scores[attribute]:.1f}" for attribute in attributes)])
        print(rows[-1], flush=True)
    print(markdown(["guidance", *attributes], rows))


class Setting(NamedTuple):
    """The tiny model, and a batch of held-out prompts with their noise."""

    models: fluxjax.Models
    batch: ImageBatch

    @classmethod
    def of(cls, count: int) -> "Setting":
        """Encode `count` held-out prompts and draw their noise."""
        models = fluxjax.load_models("tiny")
        prompts = [prompt for _, prompt in held_out_scenes(count)]
        ids = prompt_ids(models.tokenizers, prompts, max_length=models.defaults.max_length)
        states = encode_text(models.clip, models.t5, ids, dtype=jnp.float32)
        size = models.defaults.height
        noise = noise_batch(jax.random.key(0), range(count), size, size, channels=16)
        distilled = distilled_guidance(models.flux, models.defaults, None)
        batch = prompt_batch(states, None, noise=noise, keys=None, distilled=distilled)
        return cls(models, batch)

    def times(self, name: str, steps: int) -> jax.Array:
        """Return the times of a timer for the model's own image size."""
        defaults = self.models.defaults
        return timer(name, steps, defaults, defaults.height, defaults.width)

    def latents(
        self, times: jax.Array, step: Step = Euler(), guidance: Guidance = Guidance()
    ) -> jax.Array:
        """Return the latents of all prompts."""
        return denoise(self.models.flux, self.batch, Recipe(times, step, guidance))


def distances(latents: jax.Array, reference: jax.Array) -> np.ndarray:
    """Return each image's distance from its reference, relative to the reference's norm."""
    error = jnp.linalg.norm((latents - reference).reshape(len(latents), -1), axis=1)
    norm = jnp.linalg.norm(reference.reshape(len(latents), -1), axis=1)
    return np.asarray(error) / np.asarray(norm)


def time_ratio(slow: Callable[[], jax.Array], fast: Callable[[], jax.Array], repeats: int) -> float:
    """Return the median ratio of the time of one call to another's.

    Both are compiled first, and called in turns, so that other load on the machine affects both.
    """
    jax.block_until_ready((slow(), fast()))
    ratios = []
    for _ in range(repeats):
        seconds = []
        for call in (slow, fast):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return float(np.median(ratios))


def measure_cache(options: argparse.Namespace) -> None:
    """Print how much faster sampling is with each step cache, and how far its images are off."""
    setting = Setting.of(options.prompts)
    times = setting.times("model", options.steps)
    reference = setting.latents(times)
    thresholds_of = {
        FirstBlock: (0.0, 0.05, 0.1, 0.2, 0.3),
        TeaCache: (0.0, 0.25, 0.4, 0.6, 0.8),
    }
    rows = []
    for kind, thresholds in thresholds_of.items():
        for threshold in thresholds:
            guidance = Guidance(cache=kind(jnp.float32(threshold)))

            def cached(guidance: Guidance = guidance) -> jax.Array:
                return setting.latents(times, guidance=guidance)

            ratio = time_ratio(lambda: setting.latents(times), cached, 7)
            error = float(np.mean(distances(cached(), reference)))
            rows.append([kind.__name__, f"{threshold:g}", f"{ratio:.2f}", f"{error:.2g}"])
            print(rows[-1], flush=True)
    print(markdown(["cache", "threshold", "times as fast", "distance"], rows))


def integrator_runs(setting: Setting, spacing: str, reference: jax.Array) -> list[Run]:
    """Return a run of each deterministic integrator, number of evaluations and image."""
    runs = []
    for name in INTEGRATORS:
        if name in STOCHASTIC:
            continue
        step = integrator(name)
        for count in COUNTS:
            steps = count // step.evaluations
            latents = setting.latents(setting.times(spacing, steps), step)
            for distance in distances(latents, reference):
                runs.append(Run(spacing, name, steps, count, 0.0, float(distance), 0.0))
    return runs


def measure_integrators(options: argparse.Namespace) -> None:
    """Plot and print the integrators' errors by evaluations, for each of two timers."""
    setting = Setting.of(options.prompts)
    reference = setting.latents(setting.times("model", REFERENCE_STEPS), integrator("heun"))
    for spacing in ("model", "uniform"):
        runs = integrator_runs(setting, spacing, reference)
        plot_errors(runs).savefig(DOCS / f"errors_{spacing}.png", dpi=80)
        rows = []
        for name in dict.fromkeys(run.integrator for run in runs):
            row = [name]
            for count in COUNTS:
                errors = []
                for run in runs:
                    if (run.integrator, run.evaluations) == (name, count):
                        errors.append(run.distance)
                geometric_mean = np.exp(np.mean(np.log(errors)))
                row.append(f"{geometric_mean:.2g}")
            rows.append(row)
        header = [f"integrator, {spacing} times", *map(str, COUNTS)]
        print(markdown(header, rows), flush=True)


MEASUREMENTS = {
    "guidance": measure_guidance,
    "cache": measure_cache,
    "integrators": measure_integrators,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=MEASUREMENTS)
    parser.add_argument(
        "--prompts", type=int, default=200, help="held-out prompts (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    options = parser.parse_args()
    MEASUREMENTS[options.what](options)


if __name__ == "__main__":
    main()
