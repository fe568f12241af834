"""Print what a step of FLUX.1-dev at 1024x1024 costs a device on meshes of each axis, from formulas, as docs/scaling.md has it.

A step is one evaluation of the network. `tools/bench.py tpu-aot` sets them beside what compiled programs do.
"""

from collections.abc import Callable
from typing import NamedTuple

from fluxjax import FluxConfig

CHIPS = (1, 4, 8, 64, 256)
BFLOAT16, FLOAT32 = 2, 4


class Work(NamedTuple):
    """A network, and the tokens of one image."""

    config: FluxConfig
    img_tokens: int
    txt_tokens: int


class Cost(NamedTuple):
    """Of a device and a step: floating-point operations, bytes of weights read, and bytes sent to others."""

    flop: float
    read: float
    sent: float


def attention_flop(config: FluxConfig, img_tokens: int, txt_tokens: int) -> float:
    """Return the floating-point operations of one forward pass's attention: two a product, of queries and keys and of weights
    and values."""
    tokens = img_tokens + txt_tokens
    return 4 * tokens * tokens * config.width * (config.double_depth + config.single_depth)


def forward_flop(config: FluxConfig, img_tokens: int, txt_tokens: int) -> float:
    """Return the floating-point operations of one forward pass: two a weight and token it multiplies, and attention's.

    What is outside of the blocks, and the modulation, are 0.03 % of dev's at 1024x1024, and left out.
    """
    tokens, width, hidden = img_tokens + txt_tokens, config.width, config.mlp_width
    double = 4 * width * width + 2 * width * hidden
    single = width * (3 * width + hidden) + (width + hidden) * width
    linear = 2 * tokens * (config.double_depth * double + config.single_depth * single)
    return linear + attention_flop(config, img_tokens, txt_tokens)


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


def data(work: Work, chips: int) -> Cost:
    """An image a device."""
    return Cost(forward_flop(*work), weight_bytes(work.config), 0)


def fsdp(work: Work, chips: int) -> Cost:
    """An image a device; every matrix comes from all others, a part each, and the last turn of each loop over blocks fetches
    the first one's again."""
    double, single, _ = matrices(work.config)
    gathered = weight_bytes(work.config) + BFLOAT16 * (double + single)
    return data(work, chips)._replace(sent=gathered * (chips - 1) / chips)


def tensor(work: Work, chips: int) -> Cost | None:
    """One image; a sum of float32 tokens after attention and after the MLP (one in a single block), as a ring sends it, and the
    modulation's float32 features."""
    config = work.config
    if config.heads % chips:
        return None
    one, tokens = data(work, chips), work.img_tokens + work.txt_tokens
    sums = (2 * config.double_depth + config.single_depth) * tokens
    joined = 2 * 6 * config.double_depth + 3 * config.single_depth
    sent = FLOAT32 * config.width * (2 * sums + joined) * (chips - 1) / chips
    return Cost(one.flop / chips, one.read / chips, sent)


def context(work: Work, chips: int) -> Cost:
    """One image; queries, keys and values leave for their heads' device, and mixed values come back; or, where the devices do
    not divide the heads, keys and values go round. Parts of tokens are whole."""
    config, others = work.config, chips - 1
    img_tokens, txt_tokens = -(-work.img_tokens // chips), -(-work.txt_tokens // chips)
    tokens, blocks = img_tokens + txt_tokens, config.double_depth + config.single_depth
    exchanged = config.heads % chips == 0
    sent = blocks * others * BFLOAT16 * config.width * tokens * (4 / chips if exchanged else 2)
    sent += others * img_tokens * FLOAT32 * config.out_channels
    share = tokens / (work.img_tokens + work.txt_tokens)
    return Cost(forward_flop(*work) * share, weight_bytes(config), sent)


AXES: dict[str, Callable[[Work, int], Cost | None]] = {
    "data": data,
    "fsdp": fsdp,
    "tensor": tensor,
    "context": context,
}


def main() -> None:
    work = Work(FluxConfig.dev(), 4096, 512)
    print("| axis | chips | images | TFLOP | GB of weights held | GB of weights read | GB sent |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, cost in AXES.items():
        for chips in CHIPS:
            if (found := cost(work, chips)) is None:
                continue
            held = weight_bytes(work.config) / (chips if name in ("fsdp", "tensor") else 1)
            images = chips if name in ("data", "fsdp") else 1
            row = (found.flop / 1e12, held / 1e9, found.read / 1e9, found.sent / 1e9)
            print(f"| {name} | {chips} | {images} | " + " | ".join(f"{value:.3g}" for value in row) + " |")


if __name__ == "__main__":
    main()
