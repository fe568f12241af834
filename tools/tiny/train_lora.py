"""Train a LoRA on a folder of images with captions, by `fluxjax train` without a configuration.

The folder holds images, each with its caption in a text file of the same name. What `fluxjax train`
can do beyond this is on the page docs/training.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxjax.cli.console import run_command
from fluxjax.cli.train import run_training
from fluxjax.train.config import TrainConfig, train_config

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("peft", "kohya")
WARM_UP = 20


def config_of(options: argparse.Namespace) -> TrainConfig:
    """Return the configuration that the options stand for.

    **Raises:** `ValueError` for values that do not go together.
    """
    loss: dict[str, Any] = {"caption_dropout": options.caption_dropout}
    if options.guidance is not None:
        loss["guidance"] = options.guidance
    train: dict[str, Any] = {"method": "lora", "rank": options.rank}
    if options.alpha is not None:
        train["alpha"] = options.alpha
    if options.target:
        train["targets"] = options.target
    data: dict[str, Any] = {"sources": str(options.images.absolute()), "seed": options.seed}
    for name in ("size", "max_length"):
        value = getattr(options, name)
        if value is not None:
            data[name] = value
    values = {
        "model": options.model,
        "output": str(options.output),
        "format": options.to,
        "output_dtype": options.save_dtype,
        "steps": options.steps,
        "batch": options.batch * options.accumulate,
        "accumulate": options.accumulate,
        "seed": options.seed,
        "remat": options.remat,
        "ema": options.ema,
        "train": train,
        "optimizer": {"learning_rate": options.learning_rate, "warm_up": WARM_UP},
        "loss": loss,
        "checkpoints": {"every": options.save_every},
        "data": data,
    }
    if options.dtype is not None:
        values["dtype"] = options.dtype
    if options.state is not None:
        values["checkpoints"]["folder"] = str(options.state)
    return train_config(values)


def _number(kind: type, least: float, below: float = float("inf")) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {below})")
        return value

    return read


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = made.add_argument
    add("--images", type=Path, required=True, help="folder of images: a.png with a.txt")
    add("--output", type=Path, required=True, help="a new .safetensors file")
    add("--model", default="tiny", help="a zoo name, a diffusers folder, or a hub id")
    add("--rank", type=_number(int, 1), default=16, help="of the low-rank change of each weight")
    add("--alpha", type=_number(float, 0), help="times the product of the factors, over rank")
    add("--target", action="append", help="regular expression for names of weights")
    add("--steps", type=_number(int, 1), default=1000, help="updates by the optimizer in total")
    add("--batch", type=_number(int, 1), default=4, help="images in a forward pass")
    add("--accumulate", type=_number(int, 1), default=1, help="forward passes for each update")
    add("--remat", action="store_true", help="recompute blocks in the backward pass")
    add("--learning-rate", type=_number(float, 0), default=1e-3, help="after a warm-up of 20 steps")
    add("--ema", type=_number(float, 0, 1), default=0.98, help="decay of the written average")
    add("--caption-dropout", type=_number(float, 0, 1), default=0.1, help="share of captions")
    add("--guidance", type=float, help="distilled guidance during training (None: 1)")
    add("--size", type=_number(int, 16), help="images have about SIZE * SIZE pixels")
    add("--max-sequence-length", dest="max_length", type=_number(int, 1), help="T5 tokens")
    add("--seed", type=int, default=0, help="for the adapter, the batches and the noise")
    add("--dtype", choices=DTYPES, help="of the frozen weights and the activations")
    add("--to", choices=FORMATS, default="peft", help="format of the written file")
    add("--save-dtype", choices=DTYPES, default="float32", help="of the written file")
    add("--save-every", type=_number(int, 1), default=100, help="steps between two checkpoints")
    add("--state", type=Path, help="folder of the checkpoints")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the path of the adapter."""
    options = parser().parse_args(arguments)
    run_command(lambda: run_training(config_of(options)), program=arguments is None)


if __name__ == "__main__":
    main()
