"""Packed weights on meshes of devices, which split them between their blocks."""

import jax
import numpy as np
import pytest
from meshes import flux_inputs, mesh_of, relative, velocities

import fluxjax
from fluxjax import quantize, shard
from fluxjax.checkpoint.shipped import shipped_lora
from fluxjax.devices import shardings
from fluxjax.generate.load_network import LoadOptions, load_network
from fluxjax.nets import GroupedWeight, PackedWeight


@pytest.fixture(scope="module")
def packed(tiny):
    """The tiny transformer in int4, of which one matrix's blocks lie in two stacks."""
    flux = quantize(tiny.flux, "int4")
    linear1 = flux.single.linear1.weight
    stacks = [PackedWeight(linear1.value[start::2], "int4") for start in (0, 1)]
    grouped = GroupedWeight.of_stacks([0, 1, 0, 1], stacks)
    object.__setattr__(flux.single.linear1, "weight", grouped)
    return flux


@pytest.fixture(scope="module")
def rows(tiny):
    return flux_inputs(tiny.flux.config, 4)


@pytest.fixture(scope="module")
def expected(packed, rows):
    return velocities(packed, rows)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"tensor": 3}, {"fsdp": 2, "tensor": 3}], ids=str)
def test_velocities_on_a_mesh_are_those_on_one_device(packed, rows, expected, sizes):
    mesh = mesh_of(**sizes)
    placed = shard(packed, mesh)
    down = placed.double.img.mlp.down.weight.value
    # 768 inputs are 12 blocks of 34 bytes; fsdp takes the outputs of this layer.
    assert down.sharding.shard_shape(down.shape) == (
        2,
        192 // mesh.shape["fsdp"],
        12 // mesh.shape["tensor"] * 34,
    )
    # Sums in another order.
    assert relative(velocities(placed, rows, mesh), expected) <= 1e-5


def test_a_mesh_that_would_split_a_block_is_refused(packed):
    with pytest.raises(ValueError, match=r"tensor=2 does not split 192 inputs of out between the"):
        shard(packed, mesh_of(tensor=2))


def test_a_file_is_read_slice_by_slice_and_adapters_are_attached(tiny, rows, tmp_path):
    path = fluxjax.convert_weights(
        "tiny", tmp_path / "t.gguf", to="gguf", dtype="Q4_0", only="flux"
    )
    mesh = mesh_of(fsdp=4)
    flux = fluxjax.load_flux(path, sharding=lambda network: shardings(network, mesh))
    whole = fluxjax.load_flux(path)
    found = flux.single.linear2.weight.value
    assert found.sharding.shard_shape(found.shape) == (4, 192 // 4, 960 // 32 * 18)
    np.testing.assert_array_equal(found, whole.single.linear2.weight.value)
    kraft = fluxjax.read_lora(shipped_lora("kraft"))
    options = LoadOptions(files={"flux": path}, adapters=((kraft, 1.0),))
    attached = load_network("flux", "tiny", options)
    expected = velocities(fluxjax.attach(whole, [kraft]), rows)
    np.testing.assert_array_equal(velocities(attached, rows), expected)
    assert jax.tree.leaves(whole.single.linear2)[0].dtype == np.uint8
    assert isinstance(attached.single.linear2.weight.base, PackedWeight)
