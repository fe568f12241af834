"""One block of dev moves no more bytes than the committed budget says.

Programs are compiled for devices that need not be here. Without a GPU's plugin or libtpu, only
those for a CPU are.
"""

import jax
import pytest
from bench_blocks import (
    TARGETS,
    BlockCase,
    block_traffic,
    budget_of,
    cases_of,
    compiled_block,
    measure,
    missing_for,
)

from fluxjax.nets import heads, layers, quantized

GROWTH = 1.03
CASES = [case for target in TARGETS for case in cases_of(target)]
HEADS = 4608 * 3072 * 2
"""Bytes of the queries of all tokens, in bfloat16."""


@pytest.fixture(autouse=True)
def _optimized():
    """Compile as users do; the other tests leave most optimizations out."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def skip_without(target):
    reason = missing_for(target)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("case", CASES, ids=lambda one: f"{one.target}-{one.block}-{one.weights}")
def test_a_block_moves_no_more_than_its_budget(case):
    skip_without(case.target)
    budget = budget_of(case)
    if budget is None:
        pytest.skip(
            f"there is no budget for JAX {jax.__version__}: `python tools/bench blocks --write`"
        )
    found = measure(case)
    for name in ("MB moved", "temporaries MB", "kernels"):
        assert found[name] <= GROWTH * budget[name], (name, found, budget)


def moved(case):
    jax.clear_caches()
    return block_traffic(compiled_block(case)[1])


@pytest.mark.parametrize("block", ["double", "single"])
def test_on_gpus_q_and_k_are_normed_and_rotated_in_one_kernel(monkeypatch, block):
    skip_without("h200")
    case = BlockCase(target="h200", block=block)
    together = moved(case)
    monkeypatch.setattr(heads, "rotate_by_matrices", layers.rotate)
    apart = moved(case)
    # Neither is written between the two, nor read again.
    assert apart.moved - together.moved == pytest.approx(4 * HEADS, rel=0.02)
    assert apart.kernels >= together.kernels + 2


def test_on_gpus_gelu_is_written_once_and_in_fp8(monkeypatch):
    skip_without("h200")
    case = BlockCase(target="h200", block="single", weights="fp8")
    once = moved(case)

    def without_largest(self, x, maxima=None):
        return quantized._quantized_matmul(x, None, self.value, self.scale)

    monkeypatch.setattr(quantized.QuantizedWeight, "matmul", without_largest)
    twice = moved(case)
    # In bfloat16 it would be written, and read for the scales and for the product.
    assert twice.moved - once.moved == pytest.approx(2 * 4 * HEADS, rel=0.02)


def test_on_gpus_no_weights_are_copied_out_of_their_stack():
    skip_without("h200")
    if jax.__version_info__ < (0, 11):
        pytest.skip("XLA reads slices of stacks in place from JAX 0.11 on")
    _, text = compiled_block(BlockCase(target="h200", block="single"))
    copied = block_traffic(text)
    elementwise = copied.kinds["fusion"]
    # Norm, q and k, v, GELU and what it is joined with, residual: 21 times the tokens' bytes. The
    # weights would be 16 times more.
    assert elementwise / HEADS == pytest.approx(21.2, rel=0.03)
