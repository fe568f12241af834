"""Block sizes: those chosen for a chip, and those that it has no memory for."""

import itertools
from functools import partial

import jax.numpy as jnp
import pytest

from fluxjax.kernels.block_sizes import PRESETS, balanced_block_size, least_padded_block_size
from fluxjax.kernels.chips import TPU_CHIPS
from fluxjax.kernels.flash_mosaic_blocks import SMEM_BYTES, mosaic_block_sizes, smem_bytes
from fluxjax.kernels.flash_tpu_blocks import tpu_block_sizes


def test_blocks_that_a_chip_cannot_hold_are_refused_with_their_bytes():
    sizes_of_dev = partial(
        tpu_block_sizes, 4608, 4608, 128, jnp.bfloat16, block_sizes=PRESETS["trillium-dev"]
    )
    assert set(sizes_of_dev("v6e").values()) == {(1536, 1536)}
    with pytest.raises(
        ValueError,
        match=r"1536 queries and 1536 keys takes 2\d,\d+,\d+ bytes of VMEM \(forward\), "
        "of 16,777,216",
    ):
        sizes_of_dev("v4")


def test_blocks_that_hopper_cannot_hold_are_refused_with_their_bytes():
    expected = {"forward": (128, 128), "dq": (128, 128), "dkv": (64, 128)}
    assert mosaic_block_sizes(4608, 77, 128) == expected
    for dim in (64, 128):
        for kernel, block in mosaic_block_sizes(4608, 4608, dim).items():
            assert smem_bytes(kernel, block, dim) <= SMEM_BYTES
    with pytest.raises(
        ValueError, match=r"512 queries and 512 keys takes 660,480 bytes .*\(forward\), of 232,448"
    ):
        mosaic_block_sizes(4608, 4608, 128, PRESETS["trillium"])


def test_default_blocks_fit_every_chip_and_waste_little():
    dtypes = (jnp.bfloat16, jnp.float32)
    for chip, dim, dtype in itertools.product(TPU_CHIPS, (64, 128, 512), dtypes):
        for tokens in (77, 1536, 4133, 4352, 4608):
            for size, _ in tpu_block_sizes(tokens, tokens, dim, dtype, chip).values():
                assert size % 128 == 0
                assert size <= TPU_CHIPS[chip].largest_block
                # From 1 to 1.14 times the tokens; of a single block, at most 128 are padding.
                padded = -(-tokens // size) * size
                assert padded < max(1.14 * tokens, tokens + 128)


def test_default_blocks_of_v6e_are_the_published_ones():
    for tokens, size in ((4608, 1536), (4352, 2176)):
        sizes = tpu_block_sizes(tokens, tokens, 128, jnp.bfloat16, "v6e")
        assert set(sizes.values()) == {(size, size)}
    assert tpu_block_sizes(4608, 77, 128, jnp.bfloat16, "v5e")["forward"] == (768, 128)


def test_block_sizes_are_balanced_or_least_padded():
    assert balanced_block_size(10, 4) == 4
    assert balanced_block_size(4, 4) == 4
    assert least_padded_block_size(300, 100, 50) == 100
