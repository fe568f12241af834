"""Measure what docs/sampling.md tells of the tiny model: adherence by guidance, caches, and integrators' errors."""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fluxjax
from fluxjax import Nag, text_to_image
from fluxjax.flow import Projected, ZeroStar
from fluxjax.generate import FirstBlock, TeaCache
from fluxjax.generate.compare import Run
from fluxjax.generate.draw import denoise, guidance_scale
from fluxjax.generate.latents import noise_batch
from fluxjax.generate.plots import plot_errors
from fluxjax.generate.samplers import INTEGRATORS, integrator, timer
from fluxjax.generate.text import Text, encode_text, prompt_ids
from fluxjax.kernels import isolated_attention
from fluxjax.nets import DegradedBlocks

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny"))
from evaluate_tiny import held_out_scenes, score  # noqa: E402 (found by the line above)

DOCS = Path(__file__).resolve().parents[2] / "docs"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    lines = [" | ".join(row) for row in (header, ["---"] * len(list(header)), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def ways(models: fluxjax.Models) -> dict[str, dict[str, Any]]:
    """Return each kind of guidance with its options of `text_to_image`."""
    config, plain = models.flux.config, {"guidance": 1.0}
    kinds: dict[str, dict[str, Any]] = {"none (distilled 1)": plain}
    kinds |= {f"distilled {scale:g}": {"guidance": scale} for scale in (2.0, 3.5, 6.0)}
    kinds |= {f"classifier-free {scale:g}": {**plain, "cfg": scale} for scale in (1.5, 2.0, 3.0)}
    kinds |= {
        f"CFG-Zero* {scale:g}": {**plain, "cfg": scale, "rule": ZeroStar()}
        for scale in (1.5, 2.0, 3.0)
    }
    kinds |= {
        f"APG {scale:g}": {**plain, "cfg": scale, "rule": Projected()} for scale in (1.5, 2.0, 3.0)
    }
    kinds |= {
        f"APG {scale:g}, momentum -0.5": {**plain, "cfg": scale, "rule": Projected(momentum=-0.5)}
        for scale in (2.0, 3.0)
    }
    skipped, isolated = (
        DegradedBlocks(config, single=[2]),
        DegradedBlocks(config, double=[1], single=[2], attention=isolated_attention),
    )
    kinds |= {
        f"skip-layer {s:g}": {**plain, "weaken": skipped, "strength": s} for s in (0.25, 0.5, 1.0)
    }
    kinds |= {f"PAG {s:g}": {**plain, "weaken": isolated, "strength": s} for s in (0.25, 0.5, 1.0)}
    kinds |= {f"NAG {scale:g}": {**plain, "nag": Nag(scale)} for scale in (2.0, 4.0, 8.0)}
    return kinds


def guidance(options: argparse.Namespace) -> None:
    """Adherence by kind and scale."""
    models = fluxjax.load_models("tiny")
    scenes = held_out_scenes(options.prompts)
    rows = []
    for name, way in ways(models).items():
        images = []
        for start in range(0, len(scenes), 50):
            prompts = [prompt for _, prompt in scenes[start : start + 50]]
            key = jax.random.fold_in(jax.random.key(0), start)
            images.append(
                np.asarray(text_to_image(models, prompts, key=key, steps=options.steps, **way))
            )
        scores = score(np.concatenate(images), [scene for scene, _ in scenes])
        rows.append(
            [name, *(f"{scores[kind]:.1f}" for kind in ("shape", "color", "relation", "all"))]
        )
        print(rows[-1], flush=True)
    print(markdown(["guidance", "shape", "color", "relation", "all"], rows))


class Setting(NamedTuple):
    """The tiny model with encoded prompts and noise."""

    models: fluxjax.Models
    text: Text
    noise: Any

    @classmethod
    def of(cls, count: int) -> "Setting":
        models = fluxjax.load_models("tiny")
        ids = prompt_ids(
            models.tokenizers,
            [prompt for _, prompt in held_out_scenes(count)],
            max_length=models.defaults.max_length,
        )
        size = models.defaults.height
        noise = noise_batch(jax.random.key(0), range(count), size, size, channels=16)
        return cls(models, encode_text(models.clip, models.t5, ids, dtype=jnp.float32), noise)

    def times(self, name: str, steps: int) -> Any:
        return timer(
            name,
            steps,
            self.models.defaults,
            self.models.defaults.height,
            self.models.defaults.width,
        )

    def run(self, times: Any, **options: Any) -> Any:
        scale = guidance_scale(self.models.flux, self.models.defaults, None)
        return denoise(self.models.flux, self.text, self.noise, times, scale, **options)


def distances(end: Any, truth: Any) -> np.ndarray:
    """Return each image's distance from the truth, relative to its norm."""
    return np.asarray(jnp.linalg.norm((end - truth).reshape(len(end), -1), axis=1)) / np.asarray(
        jnp.linalg.norm(truth.reshape(len(end), -1), axis=1)
    )


def seconds(run: Callable[[], Any], others: Callable[[], Any], repeats: int) -> float:
    """Return the median ratio of one's time to the other's, taken in turns, after each has been compiled."""
    jax.block_until_ready((run(), others()))
    ratios = []
    for _ in range(repeats):
        times = []
        for call in (run, others):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return float(np.median(ratios))


def cache(options: argparse.Namespace) -> None:
    """Speed and distance by threshold."""
    setting, rows = Setting.of(options.prompts), []
    times = setting.times("model", options.steps)
    plain = setting.run(times)
    for kind, thresholds in (
        (FirstBlock, (0.0, 0.05, 0.1, 0.2, 0.3)),
        (TeaCache, (0.0, 0.25, 0.4, 0.6, 0.8)),
    ):
        for threshold in thresholds:
            reuse = kind(jnp.float32(threshold))
            ratio = seconds(
                lambda: setting.run(times), lambda reuse=reuse: setting.run(times, reuse=reuse), 7
            )
            error = float(np.mean(distances(setting.run(times, reuse=reuse), plain)))
            rows.append([kind.__name__, f"{threshold:g}", f"{ratio:.2f}", f"{error:.2g}"])
            print(rows[-1], flush=True)
    print(markdown(["cache", "threshold", "times as fast", "distance"], rows))


def integrators(options: argparse.Namespace) -> None:
    """Errors of the deterministic integrators by evaluations, as a plot and a table for each of two timers."""
    setting = Setting.of(options.prompts)
    names = [name for name in INTEGRATORS if name not in STOCHASTIC]
    counts = (4, 8, 16, 32, 64)
    truth = setting.run(setting.times("model", 200), step=integrator("heun"))
    for spacing in ("model", "uniform"):
        runs = []
        for name, count in product(names, counts):
            step = integrator(name)
            steps = count // step.evaluations
            end = setting.run(setting.times(spacing, steps), step=step)
            runs += [
                Run(spacing, name, steps, count, 0.0, float(d), 0.0) for d in distances(end, truth)
            ]
        plot_errors(runs).savefig(DOCS / f"errors_{spacing}.png", dpi=80)
        means = defaultdict(dict)
        for name, count in product(names, counts):
            mine = [
                run.distance for run in runs if (run.integrator, run.evaluations) == (name, count)
            ]
            means[name][count] = float(np.exp(np.mean(np.log(mine))))
        rows = [[name, *(f"{means[name][count]:.2g}" for count in counts)] for name in names]
        print(markdown([f"integrator, {spacing} times", *map(str, counts)], rows), flush=True)


STOCHASTIC = {"ddim", "ancestral", "sde", "dpmpp_2m_sde", "er_sde", "renoise"}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["guidance", "cache", "integrators"])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()
    {"guidance": guidance, "cache": cache, "integrators": integrators}[chosen.what](chosen)
