"""Where the weights are changes nothing of what a network computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import encoded
from meshes import flux_inputs, mesh_of, velocities
from small import CONFIG, small_flux

import fluxjax
from fluxjax import offload, shard, stream_blocks
from fluxjax.checkpoint.shipped import shipped_lora, tiny_folder
from fluxjax.devices import fetch, residency
from fluxjax.devices.streamed import BlockReader, FileWeight, HostWeight


def memory_kinds(network):
    leaves = jax.tree.leaves(network)
    return {leaf.sharding.memory_kind for leaf in leaves if isinstance(leaf, jax.Array)}


STREAMED = {
    "host": lambda load: stream_blocks(offload(load("tiny", dtype="float32"))),
    "file": lambda load: load("tiny", dtype="float32", stream=True),
}


def test_fetched_back_an_offloaded_network_is_the_same(tiny):
    for network in (tiny.t5, shard(tiny.clip, mesh_of(fsdp=4))):
        offloaded = offload(network)
        back = fetch(offloaded)
        assert memory_kinds(offloaded) == {"pinned_host"}
        assert memory_kinds(back) == {"device"}
        jax.tree.map(np.testing.assert_array_equal, back, network)
        # What is on the device already is not copied.
        again = jax.tree.leaves(fetch(back))
        assert all(one is other for one, other in zip(again, jax.tree.leaves(back), strict=True))


def check_is_streamed(network, plain):
    nodes = jax.tree.leaves(network, is_leaf=lambda node: isinstance(node, HostWeight | FileWeight))
    assert sum(isinstance(node, HostWeight | FileWeight) for node in nodes) >= 7
    assert memory_kinds(fetch(network)) == memory_kinds(network)
    on_device = sum(node.size for node in nodes if isinstance(node, jax.Array))
    assert on_device < 0.3 * sum(leaf.size for leaf in jax.tree.leaves(plain))


@pytest.mark.parametrize("where", STREAMED)
def test_streamed_networks_compute_the_same_bit_by_bit(tiny, where):
    """The same products of the same numbers."""
    flux, t5 = STREAMED[where](fluxjax.load_flux), STREAMED[where](fluxjax.load_t5)
    check_is_streamed(flux, tiny.flux)
    check_is_streamed(t5, tiny.t5)
    found = encoded(tiny._replace(t5=t5), ["a red star"]).txt
    np.testing.assert_array_equal(found, encoded(tiny, ["a red star"]).txt)
    # With an adapter beside the weights, which wraps them.
    lora = fluxjax.read_lora(shipped_lora("kraft"))
    rows = flux_inputs(tiny.flux.config, 2)
    found = velocities(fluxjax.attach(flux, [lora]), rows)
    expected = velocities(fluxjax.attach(tiny.flux, [lora]), rows)
    np.testing.assert_array_equal(found, expected)


def test_blocks_are_read_whole_from_any_layout_and_once_each(tiny, tmp_path, monkeypatch):
    fluxjax.convert_weights(tiny_folder() / "transformer", tmp_path / "bfl", to="bfl")
    (path,) = (tmp_path / "bfl").glob("*.safetensors")
    flux = fluxjax.load_flux(path, config=tiny.flux.config, stream=True)
    whole = fluxjax.load_flux("tiny").single.linear1.weight.value
    reader = flux.single.linear1.weight.reader
    assert reader.struct.dtype == whole.dtype
    last = len(whole) - 1
    for number in (0, 1, 3, 2, last, 0):  # prefetched or not
        np.testing.assert_array_equal(reader(number), whole[number])
    read = []

    def record(self, number):
        read.append(number)
        return np.array(whole[number])

    monkeypatch.setattr(BlockReader, "read", record)
    reader.prefetched = None
    for number in range(len(whole)):
        reader(number)
    reader.prefetched[1].result()
    assert sorted(read) == sorted([*range(len(whole)), 0])


def test_residency_reports_bytes_by_place(tiny):
    sharded = shard(tiny.t5, mesh_of(fsdp=4))
    networks = {
        "flux": STREAMED["file"](fluxjax.load_flux),
        "t5": offload(sharded),
        "clip": None,
    }
    lines = residency(networks).splitlines()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(sharded))
    part = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(sharded))
    assert part < size / 3
    assert lines[1:] == [
        f"t5: {part / 1e9:.3f} GB in host memory for each of 4 devices",
        "clip: not in memory",
    ]
    assert " GB in device memory, 0.0" in lines[0]
    assert lines[0].endswith("in files")


def test_a_streamed_network_is_for_one_device(tiny):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="Pass one of sharding="):
        fluxjax.load_flux("tiny", stream=True, sharding=device)
    mesh = mesh_of(fsdp=2)
    placed = shard(STREAMED["host"](fluxjax.load_flux), mesh)
    with pytest.raises(ValueError, match="has no form on a mesh"):
        velocities(placed, flux_inputs(tiny.flux.config, 2), mesh)


def test_a_network_without_stacked_blocks_is_not_streamed(tiny):
    with pytest.raises(
        ValueError, match=r"takes a network of stacked blocks \(a Flux, .* or Clip\), got a Vae"
    ):
        stream_blocks(tiny.vae)


def test_a_streamed_network_has_gradients_of_its_inputs():
    """With remat, host weights are fetched inside of each block, when it runs again too."""
    flux = small_flux()
    x, txt, vec = (row[0] for row in flux_inputs(CONFIG, 1))
    given = dict(txt=txt, img_ids=jnp.zeros((len(x), 3)), guidance=jnp.float32(2))

    @jax.jit
    def slope(flux):
        def loss(vec):
            return jnp.sum(flux(x, jnp.float32(0.5), vec=vec, remat=True, **given) ** 2)

        return jax.grad(loss)(vec)

    np.testing.assert_array_equal(slope(stream_blocks(flux)), slope(flux))
