"""An adapter with which the tiny model draws in few steps what it draws in many.

    python tools/tiny/few_steps.py all steps
    python tools/tiny/few_steps.py score steps/adapter.safetensors

`all` writes images, encodes them, trains and scores in a new folder. The model's own scenes are the
data, so that nothing but the number of steps is learned. Scored are scenes whose combination of
objects, relation and background is in no training.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from evaluate_tiny import generate, held_out_scenes, score
from new_words import write_examples

import fluxjax
from fluxjax.cli.main import main as run

CONFIG = Path(__file__).with_suffix(".toml")
STEPS = 4


def score_adapter(path: str, count: int) -> None:
    """Print the percentages right without and with the adapter, in 4 steps, and in 20 without."""
    models = fluxjax.load_models("tiny", dtype="float32")
    adapted = models._replace(flux=fluxjax.merge(models.flux, [fluxjax.read_lora(path)]))
    pairs = held_out_scenes(count)
    scenes, prompts = [scene for scene, _ in pairs], [text for _, text in pairs]
    guidance = models.defaults.guidance
    for name, one, steps in (
        ("without", models, models.defaults.steps),
        ("without", models, STEPS),
        ("with", adapted, STEPS),
    ):
        found = score(generate(one, prompts, steps=steps, guidance=guidance), scenes)
        shown = {attribute: round(value, 1) for attribute, value in found.items()}
        print(f"{steps} steps {name} the adapter: {shown}", flush=True)


def run_all(folder: Path, images: int, count: int) -> None:
    """Write, encode, train and score, in a new folder."""
    start = time.perf_counter(), time.process_time()
    captions = write_examples(folder / "images", images, kinds=("old",))
    cache, adapter = str(folder / "encoded"), str(folder / "adapter.safetensors")
    run(["encode", str(CONFIG), "--sources", str(captions), "--cache", cache])
    run(["train", str(CONFIG), "--output", adapter, "--set", f"data.cache={cache}"])
    minutes = np.subtract((time.perf_counter(), time.process_time()), start) / 60
    print(f"{minutes[0]:.1f} minutes, {minutes[1]:.1f} of them of a CPU")
    score_adapter(adapter, count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("all", "score"))
    parser.add_argument("path", help="the new folder of `all`, or the adapter that is scored")
    parser.add_argument("--images", type=int, default=200, help="to train on")
    parser.add_argument("--prompts", type=int, default=100, help="to score")
    options = parser.parse_args()
    if options.action == "all":
        run_all(Path(options.path).absolute(), options.images, options.prompts)
    else:
        score_adapter(options.path, options.prompts)


if __name__ == "__main__":
    main()
