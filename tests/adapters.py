"""Adapter files for the tests, and the differences that they should make."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sample:
    """An adapter file, and what it should add: leaf name, index into it, and the difference given the base there.

    `values`: what it sets at any scale but 0.
    """

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    expected: list[tuple[str, tuple, Callable]] = field(default_factory=list)
    values: list[tuple[str, tuple, np.ndarray]] = field(default_factory=list)

    def expect(self, leaf: str, index: tuple, delta) -> None:
        self.expected.append((leaf, index, delta if callable(delta) else lambda base: delta))


class Draw:
    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)


def pair(
    sample: Sample,
    draw: Draw,
    module: str,
    ends: tuple[str, str],
    shape: tuple[int, int],
    rank: int,
    alpha=None,
):
    """Add a low-rank pair and return its difference in float64."""
    down, up = draw(rank, shape[1]), draw(shape[0], rank)
    sample.tensors[f"{module}.{ends[0]}"], sample.tensors[f"{module}.{ends[1]}"] = down, up
    if alpha is not None:
        sample.tensors[f"{module}.alpha"] = np.float32(alpha).reshape(())
    return (1 if alpha is None else alpha / rank) * up.astype(np.float64) @ down.astype(np.float64)


KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
