"""Print the costs of a step of FLUX.1-dev at 1024x1024 on meshes of each axis, from formulas.

They are the table of docs/scaling.md. A step is one of 28 evaluations of the network; what is
computed once for an image is shared among the steps. `tools/bench tpu-aot` compares the formulas
with compiled programs.
"""

from collections.abc import Callable
from typing import NamedTuple

from fluxjax import FluxConfig

CHIPS = (1, 4, 8, 64, 256)
BFLOAT16, FLOAT32 = 2, 4


class Work(NamedTuple):
    """A network, the tokens of one image, and the sampling steps."""

    config: FluxConfig
    img_tokens: int
    txt_tokens: int
    steps: int = 28


class Cost(NamedTuple):
    """The cost of a step on one device.

    `flop`: floating-point operations. `read`: bytes of weights that are read. `sent`: bytes that
    are sent to other devices.
    """

    flop: float
    read: float
    sent: float


def attention_flop(config: FluxConfig, img_tokens: int, txt_tokens: int) -> float:
    """Return the floating-point operations of attention in one forward pass.

    There are two for each multiplication, in the products of queries with keys and of weights with
    values.
    """
    tokens = img_tokens + txt_tokens
    return 4 * tokens * tokens * config.width * (config.double_depth + config.single_depth)


def forward_flop(config: FluxConfig, img_tokens: int, txt_tokens: int) -> float:
    """Return the floating-point operations of one forward pass.

    There are two for each weight and token that it multiplies, and those of attention. What is
    outside of the blocks, and the modulation, is left out: 0.03 % for dev at 1024x1024.
    """
    tokens, width, hidden = img_tokens + txt_tokens, config.width, config.mlp_width
    double = 4 * width * width + 2 * width * hidden
    single = width * (3 * width + hidden) + (width + hidden) * width
    linear = 2 * tokens * (config.double_depth * double + config.single_depth * single)
    return linear + attention_flop(config, img_tokens, txt_tokens)


class Matrices(NamedTuple):
    """Numbers of weights in matrices.

    `double`, `single`: of a block of each kind, that multiply tokens. `double_modulation`,
    `single_modulation`: of a block's modulation. `ends`: the input and output projections, used in
    every step. `embedders`: of text and time, and the last layer's modulation, used once for an
    image.
    """

    double: float
    single: float
    double_modulation: float
    single_modulation: float
    ends: float
    embedders: float


def matrices(config: FluxConfig) -> Matrices:
    """Return the numbers of weights of a network."""
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
    """Return the bytes, in bfloat16, of the matrices that every step uses.

    **Arguments:** `again`: how many blocks of each kind are counted a second time.
    """
    each = matrices(config)
    blocks = (config.double_depth + again) * each.double + (
        config.single_depth + again
    ) * each.single
    return BFLOAT16 * (blocks + each.ends)


def once_bytes(config: FluxConfig, again: int = 0) -> float:
    """Return the bytes of the matrices that are used once for all steps; `again` as above."""
    each = matrices(config)
    doubles, singles = config.double_depth + again, config.single_depth + again
    return BFLOAT16 * (
        doubles * each.double_modulation + singles * each.single_modulation + each.embedders
    )


def weight_bytes(config: FluxConfig) -> float:
    """Return the bytes of all matrices."""
    return step_bytes(config) + once_bytes(config)


def data(work: Work, chips: int) -> Cost:
    """Data parallelism: each device draws its own image."""
    read = step_bytes(work.config) + once_bytes(work.config) / work.steps
    return Cost(forward_flop(*work[:3]), read, 0)


def fsdp(work: Work, chips: int) -> Cost:
    """Fully sharded data parallelism: each device draws its own image, and weights are gathered.

    Every device has a part of each matrix. The last iteration of each loop over blocks prefetches
    the first block once more.
    """
    gathered = step_bytes(work.config, again=1) + once_bytes(work.config, again=1) / work.steps
    return data(work, chips)._replace(sent=gathered * (chips - 1) / chips)


def tensor(work: Work, chips: int) -> Cost | None:
    """Tensor parallelism: one image, with heads and hidden features split over the devices.

    A ring all-reduce sums float32 tokens after attention and after the MLP (once in a single
    block); the modulation's float32 features are gathered.
    """
    config = work.config
    if config.heads % chips:
        return None
    one, tokens = data(work, chips), work.img_tokens + work.txt_tokens
    sums = (2 * config.double_depth + config.single_depth) * tokens
    joined = 2 * 6 * config.double_depth + 3 * config.single_depth
    sent = FLOAT32 * config.width * (2 * sums + joined) * (chips - 1) / chips
    return Cost(one.flop / chips, one.read / chips, sent)


def context(work: Work, chips: int) -> Cost:
    """Context parallelism: one image, with its tokens split over the devices.

    If the heads divide evenly, queries, keys and values are exchanged for heads, and the results
    exchanged back (Ulysses); otherwise keys and values pass around a ring. Each device has a whole
    number of tokens.
    """
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
