"""`traffic` counts the bytes that the kernels of compiled programs read and write."""

import pytest
from traffic import loops, traffic

HEAD = "HloModule run, is_scheduled=true, num_partitions=1\n"

FUSED = """
%third (p: bf16[64,96], q: bf16[96], n: s32[]) -> (bf16[64,32], bf16[64,32]) {
  %p = bf16[64,96]{1,0} parameter(0)
  %q = bf16[96]{0} parameter(1)
  %n = s32[] parameter(2)
  %wide = bf16[64,96]{1,0} broadcast(%q), dimensions={1}
  %sum = bf16[64,96]{1,0} add(%p, %wide)
  %one = bf16[64,32]{1,0} slice(%sum), slice={[0:64], [0:32]}
  %same = bf16[64,32]{1,0} slice(%sum), slice={[0:64], [0:32]}
  %double = bf16[64,32]{1,0} add(%one, %same)
  %zero = s32[] constant(0)
  %other = bf16[64,32]{1,0} dynamic-slice(%sum, %zero, %n), dynamic_slice_sizes={64,32}
  ROOT %both = (bf16[64,32]{1,0}, bf16[64,32]{1,0}) tuple(%double, %other)
}

%product (w: bf16[4,32,32], i: s32[], x: bf16[64,32]) -> (bf16[64,32], s8[1000]) {
  %w = bf16[4,32,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[64,32]{1,0} parameter(2)
  %zero.1 = s32[] constant(0)
  %slice = bf16[1,32,32]{2,1,0} dynamic-slice(%w, %i, %zero.1, %zero.1), \
dynamic_slice_sizes={1,32,32}
  %matrix = bf16[32,32]{1,0} bitcast(%slice)
  ROOT %call = (bf16[64,32]{1,0}, s8[1000]{0}) custom-call(%x, %matrix), \
custom_call_target="__cublas$lt$matmul"
}

%update (old: bf16[4,64,32], new: bf16[64,32], at: s32[]) -> bf16[4,64,32] {
  %old = bf16[4,64,32]{2,1,0} parameter(0)
  %new = bf16[64,32]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %row = bf16[1,64,32]{2,1,0} bitcast(%new)
  ROOT %put = bf16[4,64,32]{2,1,0} dynamic-update-slice(%old, %row, %at, %zero.2, %zero.2)
}
"""

BODY = """
%body (state: (s32[], bf16[64,96], bf16[96], bf16[4,32,32], bf16[4,64,32])) -> (s32[], \
bf16[64,96], bf16[96], bf16[4,32,32], bf16[4,64,32]) {
  %state = (s32[], bf16[64,96]{1,0}, bf16[96]{0}, bf16[4,32,32]{2,1,0}, bf16[4,64,32]{2,1,0}) \
parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[64,96]{1,0} get-tuple-element(%state), index=1
  %bias = bf16[96]{0} get-tuple-element(%state), index=2
  %weights = bf16[4,32,32]{2,1,0} get-tuple-element(%state), index=3
  %all = bf16[4,64,32]{2,1,0} get-tuple-element(%state), index=4
  %two = (bf16[64,32]{1,0}, bf16[64,32]{1,0}) fusion(%x, %bias, %i), kind=kLoop, calls=%third
  %left = bf16[64,32]{1,0} get-tuple-element(%two), index=0
  %made = (bf16[64,32]{1,0}, s8[1000]{0}) fusion(%weights, %i, %left), kind=kCustom, \
calls=%product
  %result = bf16[64,32]{1,0} get-tuple-element(%made), index=0
  %put.1 = bf16[4,64,32]{2,1,0} fusion(%all, %result, %i), kind=kLoop, calls=%update
  ROOT %next = (s32[], bf16[64,96]{1,0}, bf16[96]{0}, bf16[4,32,32]{2,1,0}, \
bf16[4,64,32]{2,1,0}) tuple(%i, %x, %bias, %weights, %put.1)
}

%condition (state.1: (s32[], bf16[64,96], bf16[96], bf16[4,32,32], bf16[4,64,32])) -> pred[] {
  %state.1 = (s32[], bf16[64,96]{1,0}, bf16[96]{0}, bf16[4,32,32]{2,1,0}, bf16[4,64,32]{2,1,0}) \
parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (given: (s32[], bf16[64,96], bf16[96], bf16[4,32,32], bf16[4,64,32])) -> bf16[64,96] {
  %given = (s32[], bf16[64,96]{1,0}, bf16[96]{0}, bf16[4,32,32]{2,1,0}, bf16[4,64,32]{2,1,0}) \
parameter(0)
  %loop = (s32[], bf16[64,96]{1,0}, bf16[96]{0}, bf16[4,32,32]{2,1,0}, bf16[4,64,32]{2,1,0}) \
while(%given), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %found = bf16[64,96]{1,0} get-tuple-element(%loop), index=1
  %fast = bf16[64,96]{1,0:S(1)} copy(%found)
  ROOT %again = bf16[64,96]{0,1} copy(%found)
}
"""


def test_kernels_read_what_their_results_need_and_each_slice_once():
    part, bias, matrix = 64 * 32 * 2, 32 * 2, 32 * 32 * 2
    of_loop = loops(HEAD + FUSED + BODY)
    (one,) = of_loop
    # Two thirds of x and of its bias, and a number; a matrix of the stack, and not what cuBLAS
    # works in; a row of what is changed in place.
    read = 2 * (part + bias) + 4 + (matrix + 4 + part) + (part + 4)
    assert one.read == pytest.approx(read)
    assert one.written == 2 * part + part + part
    assert one.kernels == 3
    assert one.kinds["__cublas$lt$matmul"] == matrix + 4 + 2 * part


def test_kernels_count_in_each_iteration_and_fast_memory_does_not():
    (one,) = loops(HEAD + FUSED + BODY)
    whole = traffic(HEAD + FUSED + BODY)
    copied = 64 * 96 * 2
    assert whole.moved == pytest.approx(4 * one.moved + copied + 2 * copied)
    assert whole.kernels == 4 * one.kernels + 2
    assert whole.kinds["copy"] == 3 * copied


def test_an_asynchronous_copy_counts_once():
    text = f"""{HEAD}
ENTRY %main (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %start = (f32[8,8]{{1,0}}, f32[8,8]{{1,0}}, u32[]) copy-start(%x)
  ROOT %done = f32[8,8]{{1,0}} copy-done(%start)
}}
"""
    assert traffic(text).moved == 2 * 8 * 8 * 4
