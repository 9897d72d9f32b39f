"""Costs read from compiled programs, against programs whose cost is known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from krl.base.sharding import make_mesh
from krl.plan.hlo import read_cost

# As XLA prints programs for TPUs: products are convolutions, a batch is a window, S(1) lies on the chip, a loop counts by twos.
TPU = """HloModule step, is_scheduled=true

%fused (param_0: bf16[4,6,16], param_1: bf16[4,9,16]) -> f32[4,6,9] {
  %param_0 = bf16[4,6,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[4,9,16]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = f32[4,6,9]{2,1,0:T(8,128)} convolution(%param_0, %param_1), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
}

%condition (index: (u32[], bf16[4,6,16], bf16[4,9,16])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(8)
  %index = (u32[]{:T(128)}, bf16[4,6,16]{2,1,0}, bf16[4,9,16]{2,1,0:S(1)}) parameter(0)
  %get-tuple-element.1 = u32[]{:T(128)} get-tuple-element(%index), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

%body (state: (u32[], bf16[4,6,16], bf16[4,9,16])) -> (u32[], bf16[4,6,16], bf16[4,9,16]) {
  %state = (u32[]{:T(128)}, bf16[4,6,16]{2,1,0}, bf16[4,9,16]{2,1,0:S(1)}) parameter(0)
  %constant.2 = u32[]{:T(128)S(6)} constant(2)
  %get-tuple-element.2 = u32[]{:T(128)} get-tuple-element(%state), index=0
  %copy.1 = u32[]{:T(128)S(6)} copy(%get-tuple-element.2)
  %add.1 = u32[]{:T(128)S(6)} add(%copy.1, %constant.2)
  %get-tuple-element.3 = bf16[4,6,16]{2,1,0} get-tuple-element(%state), index=1
  %get-tuple-element.4 = bf16[4,9,16]{2,1,0:S(1)} get-tuple-element(%state), index=2
  %fusion.1 = f32[4,6,9]{2,1,0:T(8,128)S(1)} fusion(%get-tuple-element.3, %get-tuple-element.4), kind=kOutput, calls=%fused
  %all-gather-start.1 = (bf16[4,6,16]{2,1,0}, bf16[8,6,16]{2,1,0}) all-gather-start(%get-tuple-element.3), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}
  %all-gather-done.1 = bf16[8,6,16]{2,1,0} all-gather-done(%all-gather-start.1)
  ROOT %tuple.1 = (u32[]{:T(128)}, bf16[4,6,16]{2,1,0}, bf16[4,9,16]{2,1,0:S(1)}) tuple(%add.1, /*index=1*/%get-tuple-element.3, %get-tuple-element.4)
}

ENTRY %main (argument: bf16[4,6,16], other: bf16[4,9,16]) -> (u32[], bf16[4,6,16], bf16[4,9,16]) {
  %constant.3 = u32[]{:T(128)} constant(0)
  %argument = bf16[4,6,16]{2,1,0} parameter(0)
  %other = bf16[4,9,16]{2,1,0:S(1)} parameter(1)
  %tuple.2 = (u32[]{:T(128)}, bf16[4,6,16]{2,1,0}, bf16[4,9,16]{2,1,0:S(1)}) tuple(%constant.3, %argument, %other)
  ROOT %while.1 = (u32[]{:T(128)}, bf16[4,6,16]{2,1,0}, bf16[4,9,16]{2,1,0:S(1)}) while(%tuple.2), condition=%condition, body=%body
}
"""


def text_of(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def layers(x, weights):
    return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]


def test_a_scanned_layer_counts_every_time():
    compiled = jax.jit(layers).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 64), (5, 64, 64)))).compile()
    once = 2 * 32 * 64 * 64
    assert read_cost(compiled.as_text()).flops == 5 * once
    assert compiled.cost_analysis()["flops"] < 2 * once  # what is to be made up for


def test_bytes_are_those_of_the_slices_that_a_loop_reads():
    turns = 40
    cost = read_cost(text_of(layers, (32, 64), (turns, 64, 64)))
    weights, x = turns * 64 * 64 * 4, turns * 32 * 64 * 4  # all layers in every turn would be 40 times the weights
    assert weights + 4 * x <= cost.bytes <= 3 * weights + 6 * x  # a slice may be written apart and read again


def test_bytes_without_loops_are_xlas():
    compiled = jax.jit(lambda a, b: a @ b + 1).lower(*[jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2).compile()
    assert read_cost(compiled.as_text()).bytes == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.35)


def test_a_loop_that_ends_by_data_takes_its_number_from_the_caller():
    def until(x, limit):
        def outer(carry):
            x, n = carry
            return jax.lax.while_loop(lambda c: c[1] < limit[0], lambda c: (c[0] @ c[0], c[1] + 1), (x, 0.0))[0], n + 1

        return jax.lax.while_loop(lambda carry: carry[1] < limit[1], outer, (x, 0.0))[0]

    text = text_of(until, (16, 16), (2,))
    assert read_cost(text, (3, 7)).flops == 3 * 7 * 2 * 16**3
    with pytest.raises(ValueError, match="nothing says how often"):
        read_cost(text, (3,))


@pytest.mark.parametrize(
    ("kind", "function", "size", "sent"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "data"), 4096, 2 * 4096 * 7 / 8),
        ("all-gather", lambda x: jax.lax.all_gather(x, "data").sum(axis=0), 8 * 4096, 4096 * 7),
        ("reduce-scatter", lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), 8), 4096, 4096 * 7 / 8),
        ("all-to-all", lambda x: jax.lax.all_to_all(x.reshape(8, -1), "data", 0, 0).reshape(-1), 4096, 4096 * 7 / 8),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), 4096, 4096),
    ],
)
def test_collectives(kind, function, size, sent):
    mesh = make_mesh((8,), ("data",))

    def three_times(x):
        return jax.lax.scan(lambda x, _: (function(x) * 0.5, None), x, length=3)[0]

    rows = PartitionSpec("data")
    text = text_of(jax.shard_map(three_times, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False), (8 * 1024,))
    found = [one for one in read_cost(text).collectives if one.kind == kind]
    assert sum(one.times for one in found) == 3
    assert {one.size for one in found} == {size}
    assert sum(one.sent for one in found) == pytest.approx(3 * sent)


def test_the_text_of_a_tpu():
    cost = read_cost(TPU)
    assert cost.flops == 4 * (2 * 4 * 6 * 9 * 16)  # four turns to count to eight by twos, four products a turn
    (gathered,) = cost.collectives
    assert gathered == ("all-gather", 8 * 6 * 16 * 2, 2, 4)
    query, index = 4 * 6 * 16 * 2, 4
    assert cost.bytes == 4 * (
        query + 3 * query + index
    )  # keys lie on the chip; what is gathered is one read, two written


def test_convolutions_count_what_is_not_padding():
    text = text_of(lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "SAME"), (1, 2, 10), (3, 2, 5))
    taps = 10 * 5 - 2 * (2 + 1)  # two places at either end lack two taps and one
    assert read_cost(text).flops == 2 * 3 * 2 * taps
