"""Print what a step of FLUX.1-dev at 1024x1024 costs a device on meshes of each axis, from formulas, as docs/scaling.md has it.

A step is one evaluation of the network, of 28; what is computed once for all is shared among them. `tools/bench tpu-aot`
sets them beside what compiled programs do.
"""

from collections.abc import Callable
from typing import NamedTuple

from fluxjax import FluxConfig

CHIPS = (1, 4, 8, 64, 256)
BFLOAT16, FLOAT32 = 2, 4


class Work(NamedTuple):
    """A network, the tokens of one image, and the steps that it takes."""

    config: FluxConfig
    img_tokens: int
    txt_tokens: int
    steps: int = 28


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


class Matrices(NamedTuple):
    """Weights in matrices: of what a double block and a single one do to tokens, of their modulations, of what else a step
    uses, and of the embedders of text and time with the last layer's modulation, which are used once."""

    double: float
    single: float
    double_modulation: float
    single_modulation: float
    ends: float
    embedders: float


def matrices(config: FluxConfig) -> Matrices:
    width, hidden = config.width, config.mlp_width
    inputs = config.context + config.pooled + config.time_width * (1 + config.guidance_embed)
    return Matrices(
        double=2 * (4 * width**2 + 2 * width * hidden),
        single=width * (3 * width + hidden) + (width + hidden) * width,
        double_modulation=12 * width**2,
        single_modulation=3 * width**2,
        ends=width * (config.in_channels + config.out_channels),
        embedders=width * inputs + (2 + config.guidance_embed) * width**2 + 2 * width**2,
    )


def step_bytes(config: FluxConfig, again: int = 0) -> float:
    """Return the bytes, in bfloat16, of the matrices that every step uses, `again` so many blocks of each kind."""
    each = matrices(config)
    blocks = (config.double_depth + again) * each.double + (
        config.single_depth + again
    ) * each.single
    return BFLOAT16 * (blocks + each.ends)


def once_bytes(config: FluxConfig, again: int = 0) -> float:
    """Return the bytes of those that are used once for all steps."""
    each = matrices(config)
    doubles, singles = config.double_depth + again, config.single_depth + again
    return BFLOAT16 * (
        doubles * each.double_modulation + singles * each.single_modulation + each.embedders
    )


def weight_bytes(config: FluxConfig) -> float:
    """Return the bytes of all matrices."""
    return step_bytes(config) + once_bytes(config)


def data(work: Work, chips: int) -> Cost:
    """An image a device."""
    read = step_bytes(work.config) + once_bytes(work.config) / work.steps
    return Cost(forward_flop(*work[:3]), read, 0)


def fsdp(work: Work, chips: int) -> Cost:
    """An image a device; every matrix comes from all others, a part each, and the last turn of each loop over blocks fetches
    the first one's again."""
    gathered = step_bytes(work.config, again=1) + once_bytes(work.config, again=1) / work.steps
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
    one, share = data(work, chips), tokens / (work.img_tokens + work.txt_tokens)
    return one._replace(flop=one.flop * share, sent=sent)


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
            print(
                f"| {name} | {chips} | {images} | "
                + " | ".join(f"{value:.3g}" for value in row)
                + " |"
            )


if __name__ == "__main__":
    main()
