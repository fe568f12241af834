"""The probe of a GPU: its decisions, from hand-written rows."""

import re

import pytest
from probe import (
    SECTIONS,
    decide_attention,
    decide_barrier,
    decide_forms,
    decide_pool,
    decide_streaming,
    pool_environment,
    weight_copies,
)


def attention(name, tokens, speed, error=2e-3, equal=20):
    return {
        "implementation": name,
        "tokens": tokens,
        "key_length": None,
        "pass": "forward",
        "relative error": {"forward": error},
        "bitwise equal": {"forward": equal, "of": 20},
        "TFLOP/s": speed,
    }


def rows(speed, **about):
    found = [attention("cudnn", tokens, 500.0) for tokens in (4608, 4133)]
    return found + [attention("flash_gpu", tokens, speed, **about) for tokens in (4608, 4133)]


@pytest.mark.parametrize(
    ("measured", "decided"),
    [
        (rows(530.0), "make flash_gpu the default"),
        (rows(510.0), "cudnn stays the default, flash_gpu opt-in"),
        (rows(530.0, equal=19), "cudnn stays the default"),
        (rows(440.0), "delete flash_gpu"),
        (rows(600.0, error=1e-2), "delete flash_gpu"),
        (rows(600.0, error=float("nan")), "delete flash_gpu .error nan"),
        (rows(530.0)[:3], "undecided"),
        ([*rows(530.0), {"implementation": "flash_gpu", "error": "hangs"}], r"fails \(hangs\)"),
    ],
)
def test_attention_is_decided_by_errors_and_speeds(measured, decided):
    assert re.search(decided, decide_attention(measured))


def test_forms_and_the_barrier_are_decided_by_their_ratios():
    def form(weights, blocks, seconds):
        about = {"section": "forms", "weights": weights, "blocks": blocks}
        return {**about, "seconds": seconds}

    found = decide_forms(
        [
            form("bfloat16", "stacked", 1.3),
            form("fp8", "stacked", 1.0),
            form("bfloat16", "apart", 1.29),
        ]
    )
    assert found[0].startswith("fp8: advise it (1.300 x")
    assert found[1].startswith("unrolled blocks: keep stacked blocks (1.008 x")
    assert decide_forms([])[0] == "fp8: undecided (not measured)"

    def barrier(is_apart, batch, seconds):
        about = {"section": "barrier", "barrier": is_apart, "batch": batch, "weight copies": 0}
        return {**about, "seconds": seconds}

    measured = [barrier(True, 1, 1.0), barrier(False, 1, 1.02), barrier(True, 4, 2.0)]
    measured.append(barrier(False, 4, 2.0))
    expected = "barrier: keep it (1.020 x, needed 1.01 x, 1.000 x at batch 4, 0 weight copies)"
    assert decide_barrier(measured) == expected
    assert decide_barrier([]).startswith("barrier: undecided")


def test_copies_of_weights_are_counted():
    text = """HloModule jit_f

%fused_slice (p: bf16[4,2048,2048]) -> bf16[2048,2048] {
  %p = bf16[4,2048,2048]{2,1,0} parameter(0)
  ROOT %dynamic-slice.2 = bf16[2048,2048]{1,0} bitcast(%p)
}

ENTRY %main (a: bf16[4,2048,2048]) -> bf16[2048,2048] {
  %a = bf16[4,2048,2048]{2,1,0} parameter(0)
  %dynamic-slice_small = bf16[16,16]{1,0} bitcast(%a)
  ROOT %loop_dynamic_slice_fusion = bf16[2048,2048]{1,0} fusion(%a), kind=kLoop, calls=%fused_slice
}
"""
    assert weight_copies(text) == 1


def test_a_pool_of_the_size_of_a_smaller_card():
    assert pool_environment(80e9)["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.250"
    assert pool_environment(12e9)["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.950"


def test_all_sections_fit_into_25_minutes():
    assert sum(section.minutes for section in SECTIONS.values()) <= 25
    assert decide_streaming([]).endswith("(not measured)")
    assert "not measured" in decide_pool([])
