"""`read` counts the operations of compiled programs, and the bytes that they send."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from program import Moved, read
from scaling import AXES, Work, forward_flop

from fluxjax import FluxConfig


def cost_of(function, *shapes):
    """Return the cost of a compiled function of float32 arrays."""
    return read(
        jax.jit(function)
        .lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
        .compile()
        .as_text()
    )


def cost_on(devices, function, *shapes):
    """Return the cost of a function whose arrays are split over devices along their first axis."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
    spec = PartitionSpec("x")
    return cost_of(
        jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), *shapes
    )


def test_a_dot_in_nested_loops_counts_in_each_iteration():
    def turn(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def run(x, weights):
        return jax.lax.fori_loop(2, 5, lambda _, x: turn(x, weights), x)

    assert cost_of(run, (16, 32), (7, 32, 32)).flop == 3 * 7 * 2 * 16 * 32 * 32


def test_a_dot_counts_all_contracted_axes_for_each_row_of_a_batch():
    assert (
        cost_of(lambda a, b: jnp.einsum("bhij,bhkj->bhik", a, b), (2, 3, 5, 7), (2, 3, 11, 7)).flop
        == 2 * 2 * 3 * 5 * 11 * 7
    )


def test_a_convolution_does_not_count_its_padding():
    def run(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # Of three taps over n places, two reach beyond an end.
    assert cost_of(run, (2, 8, 10, 3), (3, 3, 3, 4)).flop == 2 * 2 * 3 * 4 * (3 * 8 - 2) * (
        3 * 10 - 2
    )


def test_the_most_expensive_branch_counts():
    def run(x):
        return jax.lax.switch(
            x[0, 0].astype(int), [lambda x: x, lambda x: x @ x, lambda x: x @ x @ (x + 1)], x
        )

    assert cost_of(run, (32, 32)).flop == 2 * 2 * 32**3


def test_a_loop_of_unknown_length_is_an_error():
    def run(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="does not know how often"):
        cost_of(run, (4, 4))


@pytest.mark.parametrize("devices", [4, 8])
def test_collectives_count_in_each_iteration_and_send_what_a_ring_sends(devices):
    def turn(x, _):
        whole = jax.lax.all_gather(jnp.sin(x), "x", tiled=True)
        part = jax.lax.psum_scatter(jnp.sin(whole), "x", tiled=True)
        summed = jax.lax.psum(jnp.sin(part), "x")
        moved = jax.lax.ppermute(
            jnp.sin(summed), "x", [(i, (i + 1) % devices) for i in range(devices)]
        )
        return jax.lax.all_to_all(jnp.sin(moved), "x", 0, 0, tiled=True), None

    cost = cost_on(devices, lambda x: jax.lax.scan(turn, x, None, length=5)[0], (16 * devices, 8))
    part, others = 16 * 8 * 4, devices - 1
    assert cost.moved == {
        "all-gather": Moved(5, 5 * part * devices, 5 * part * others),
        "reduce-scatter": Moved(5, 5 * part, 5 * part * others),
        "all-reduce": Moved(5, 5 * part, 5 * part * 2 * others / devices),
        "collective-permute": Moved(5, 5 * part, 5 * part),
        "all-to-all": Moved(5, 5 * part, 5 * part * others / devices),
    }
    assert cost.sent == sum(kind.sent for kind in cost.moved.values())


PROGRAM = """HloModule run, is_scheduled=true, num_partitions=8

%kernel (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %scattered = f32[2,128]{1,0:T(8,128)} reduce-scatter(%a), replica_groups=[2,4]<=[8], \
dimensions={0}, to_apply=%add
  ROOT %call = f32[8,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config": {"body": "", "cost_estimate": {"flops": 1000, \
"bytes_accessed": 7}}}
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%state), index=1
  %step = s32[] constant(2)
  %next = s32[] add(%i, %step)
  %gather-start = (f32[8,128]{1,0}, f32[32,128]{1,0}) all-gather-start(%x), \
replica_groups=[2,4]<=[8], dimensions={0}
  %gather-done = f32[32,128]{1,0} all-gather-done(%gather-start)
  %sum-start = f32[8,128]{1,0} all-reduce-start(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, \
to_apply=%add
  %sum-done = f32[8,128]{1,0} all-reduce-done(%sum-start)
  %async = ((f32[8,128]{1,0}), f32[8,128]{1,0}, s32[]{:S(2)}) async-start(%sum-done), calls=%kernel
  %y = f32[8,128]{1,0} async-done(%async)
  ROOT %tuple = (s32[], f32[8,128]{1,0}) tuple(%next, %y)
}

%condition (state: (s32[], f32[8,128])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[8,128]{1,0}) parameter(0)
  %end = s32[]{:T(128)} constant(10)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[8,128], q: bf16[6,4608,128], k: bf16[6,512,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %q = bf16[6,4608,128]{2,1,0} parameter(1)
  %k = bf16[6,512,128]{2,1,0} parameter(2)
  %rows = f32[6,4608,512]{2,1,0} convolution(%q, %k), window={size=6 stride=5 lhs_dilate=6}, \
dim_labels=0bf_0oi->0bf
  %shuffled = u16[8,128]{1,0} convolution(%x, %x), dim_labels=bf_oi->bf
  %three = s32[]{:T(128)} constant(3)
  %start = s32[]{:T(128)} copy(%three)
  %tuple = (s32[], f32[8,128]{1,0}) tuple(%start, %x)
  %while = (s32[], f32[8,128]{1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %y = f32[8,128]{1,0} get-tuple-element(%while), index=1
}
"""


def test_a_program_for_tpus_is_read():
    cost = read(PROGRAM)
    iterations, part = 4, 8 * 128 * 4  # from 3 by 2 to below 10
    assert (
        cost.flop == 2 * 6 * 4608 * 512 * 128
    )  # a batch of products, as a convolution that is mostly holes
    assert cost.declared == iterations * 1000
    assert cost.moved == {
        "all-gather": Moved(iterations, iterations * 4 * part, iterations * 3 * part, iterations),
        "all-reduce": Moved(iterations, iterations * part, iterations * part, iterations),
        "reduce-scatter": Moved(
            iterations, iterations * part / 4, iterations * part * 3 / 4, iterations
        ),
    }


def test_groups_may_be_axes_of_a_mesh():
    """Of 8 devices, groups of 4 as an axis, as two axes, and as a part of one."""
    listed = read(PROGRAM)
    for groups in (
        "mesh['a'=2,'b'=4] {'b'}",
        "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}",
        "mesh['a'=2,'b'=2,'c'=2] {'b','c'}",
        "mesh['a'=8] {'a':(2)4}",
    ):
        assert read(PROGRAM.replace("[2,4]<=[8]", groups)) == listed


def test_what_cannot_be_counted_is_an_error():
    with pytest.raises(ValueError, match="gemm"):
        read(PROGRAM.replace("tpu_custom_call", "__cublas$gemm").replace("cost_estimate", "cost"))
    with pytest.raises(ValueError, match="replica_groups"):
        read(PROGRAM.replace("[2,4]<=[8]", "mesh"))
    with pytest.raises(ValueError, match="ragged"):
        read(PROGRAM.replace("all-reduce-start", "ragged-all-to-all"))


def test_an_axis_of_one_device_costs_what_one_device_does():
    work = Work(FluxConfig.dev(), 4096, 512)
    for cost in AXES.values():
        assert cost(work, 1).flop == pytest.approx(forward_flop(*work[:3]))
        assert cost(work, 1).sent == 0


def test_8_bit_matmuls_are_counted_separately():
    text = """HloModule products, num_partitions=1

ENTRY %main (a: s8[4,8], b: s8[6,8], c: s32[4,6], d: s32[6,5]) -> s32[4,5] {
  %a = s8[4,8]{1,0} parameter(0)
  %b = s8[6,8]{1,0} parameter(1)
  %d = s32[6,5]{1,0} parameter(2)
  %rows = s32[4,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %shuffled = s32[4,5]{1,0} dot(%rows, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    found = read(text)
    assert (found.flop, found.eight) == (0, 2 * 4 * 6 * 8)


PLACING = """HloModule placing

%fused (p: bf16[8,16]) -> bf16[16,8] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %t = bf16[16,8]{1,0} transpose(%p), dimensions={1,0}
}

%ahead (q: bf16[8,16]) -> bf16[4,16] {
  %q = bf16[8,16]{1,0} parameter(0)
  ROOT %half = bf16[4,16]{1,0} slice(%q), slice={[0:4], [0:16]}
}

%body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%state), index=1
  %start = ((bf16[8,16]{1,0}), bf16[4,16]{1,0}, s32[]) async-start(%x), calls=%ahead
  %done = bf16[4,16]{1,0} async-done(%start)
  %turned = bf16[16,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %wide = bf16[8,16]{0,1} copy(%x)
  ROOT %next = (s32[], bf16[8,16]{1,0}) tuple(%i, %x)
}

%condition (state.1: (s32[], bf16[8,16])) -> pred[] {
  %state.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (given: (s32[], bf16[8,16])) -> f32[4,4] {
  %given = (s32[], bf16[8,16]{1,0}) parameter(0)
  %loop = (s32[], bf16[8,16]{1,0}) while(%given), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %small = f32[4,4]{1,0} constant(0)
  ROOT %again = f32[4,4]{0,1} copy(%small)
}
"""


def test_copies_count_in_each_iteration_but_not_in_fusions_or_asynchronously():
    assert read(PLACING).copied == 5 * 8 * 16 * 2 + 4 * 4 * 4
