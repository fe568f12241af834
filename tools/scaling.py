"""Print what a step of FLUX.1-dev at 1024x1024 costs a device on meshes of each axis, from formulas, as docs/scaling.md has it.

A step is one evaluation of the network. `tools/bench.py tpu-aot` confirms the bytes gathered under "fsdp".
"""

from collections.abc import Callable
from typing import NamedTuple

from bench import forward_flop

from fluxjax import FluxConfig

CHIPS = (1, 4, 8, 64, 256)
IMG_TOKENS, TXT_TOKENS = 4096, 512
BFLOAT16, FLOAT32 = 2, 4


class Cost(NamedTuple):
    """Of a device and a step: floating-point operations, bytes of weights read, and bytes sent to others."""

    flop: float
    read: float
    sent: float


def matrices(config: FluxConfig) -> tuple[float, float, float]:
    """Return the weights of a double block, a single block, and of everything else, in matrices."""
    width, hidden = config.width, config.mlp_width
    double = 2 * (6 * width**2 + 4 * width**2 + 2 * width * hidden)
    single = 3 * width**2 + width * (3 * width + hidden) + (width + hidden) * width
    inputs = config.in_channels + config.context + config.pooled + config.time_width * (1 + config.guidance_embed)
    embedders = (2 + config.guidance_embed) * width**2
    return double, single, width * (inputs + config.out_channels) + embedders + 2 * width**2


def weight_bytes(config: FluxConfig) -> float:
    """Return the bytes of all matrices, in bfloat16."""
    double, single, rest = matrices(config)
    return BFLOAT16 * (config.double_depth * double + config.single_depth * single + rest)


def gathered_once(config: FluxConfig) -> float:
    """Return the bytes that the gathers of a compiled program make, each counted once, whatever its loop."""
    return BFLOAT16 * sum(matrices(config))


def data(config: FluxConfig, chips: int) -> Cost:
    """An image a device."""
    return Cost(forward_flop(config, IMG_TOKENS, TXT_TOKENS), weight_bytes(config), 0)


def fsdp(config: FluxConfig, chips: int) -> Cost:
    """An image a device; every matrix comes from all others, a part each."""
    one = data(config, chips)
    return one._replace(sent=weight_bytes(config) * (chips - 1) / chips)


def tensor(config: FluxConfig, chips: int) -> Cost | None:
    """One image; a sum of float32 tokens after attention and after the MLP (one in a single block), as a ring sends it."""
    if config.heads % chips:
        return None
    one, tokens = data(config, chips), IMG_TOKENS + TXT_TOKENS
    sums = 2 * config.double_depth + config.single_depth
    sent = sums * FLOAT32 * tokens * config.width * 2 * (chips - 1) / chips
    return Cost(one.flop / chips, one.read / chips, sent)


def context(config: FluxConfig, chips: int) -> Cost:
    """One image; queries, keys and values leave for their heads' device and mixed values come back, or, where the devices do
    not divide the heads, keys and values go round. Each device has all of the text."""
    tokens = IMG_TOKENS / chips
    flop = forward_flop(config, IMG_TOKENS, TXT_TOKENS)
    attention = 4 * (IMG_TOKENS + TXT_TOKENS) ** 2 * config.width * (config.double_depth + config.single_depth)
    share = (tokens + TXT_TOKENS) / (IMG_TOKENS + TXT_TOKENS)
    blocks = config.double_depth + config.single_depth
    exchanged = config.heads % chips == 0
    part = BFLOAT16 * tokens * config.width
    sent = blocks * (4 * part * (chips - 1) / chips if exchanged else 2 * part * (chips - 1))
    mixed = attention / chips if exchanged else attention * share
    return Cost((flop - attention) * share + mixed, weight_bytes(config), sent)


AXES: dict[str, Callable[[FluxConfig, int], Cost | None]] = {
    "data": data,
    "fsdp": fsdp,
    "tensor": tensor,
    "context": context,
}


def main() -> None:
    config = FluxConfig.dev()
    print("| axis | chips | images | TFLOP | GB of weights held | GB of weights read | GB sent |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, cost in AXES.items():
        for chips in CHIPS:
            if (found := cost(config, chips)) is None:
                continue
            held = weight_bytes(config) / (chips if name in ("fsdp", "tensor") else 1)
            images = chips if name in ("data", "fsdp") else 1
            row = (found.flop / 1e12, held / 1e9, found.read / 1e9, found.sent / 1e9)
            print(f"| {name} | {chips} | {images} | " + " | ".join(f"{value:.3g}" for value in row) + " |")
    print(f"\nGathered once a block of each kind, and the rest: {gathered_once(config) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
