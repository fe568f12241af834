"""Where the weights lie changes nothing of what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_shard import drawn, mesh_of

import fluxjax
from fluxjax import fetch, offload, shard, stream_blocks
from fluxjax.devices import residency
from fluxjax.devices.streamed import FileWeight, HostWeight
from fluxjax.generate.draw import denoise
from fluxjax.generate.text import encode_text, prompt_ids


def kinds(network):
    return {
        leaf.sharding.memory_kind
        for leaf in jax.tree.leaves(network)
        if isinstance(leaf, jax.Array)
    }


@pytest.fixture(scope="module")
def streamed():
    return {
        "host": lambda load: stream_blocks(offload(load("tiny", dtype="float32"))),
        "file": lambda load: load("tiny", dtype="float32", stream=True),
    }


def test_offloaded_and_fetched_back_a_network_is_the_same(tiny):
    for network in (tiny.t5, shard(tiny.clip, mesh_of(fsdp=4))):
        there = offload(network)
        back = fetch(there)
        assert (kinds(there), kinds(back)) == ({"pinned_host"}, {"device"})
        jax.tree.map(np.testing.assert_array_equal, back, network)
        assert all(
            one is other
            for one, other in zip(jax.tree.leaves(fetch(back)), jax.tree.leaves(back), strict=True)
        )


@pytest.mark.parametrize("where", ["host", "file"])
def test_streamed_networks_are_the_same(tiny, streamed, where):
    """Bit by bit: the same products of the same numbers. A guided program is one that XLA may fuse in another way."""
    flux, t5 = streamed[where](fluxjax.load_flux), streamed[where](fluxjax.load_t5)
    for network in (flux, t5):
        found = jax.tree.leaves(
            network, is_leaf=lambda node: isinstance(node, HostWeight | FileWeight)
        )
        assert sum(isinstance(node, HostWeight | FileWeight) for node in found) >= 7
        assert kinds(fetch(network)) == kinds(network)
        held = sum(leaf.size for leaf in found if isinstance(leaf, jax.Array))
        assert held < 0.3 * sum(
            leaf.size for leaf in jax.tree.leaves(tiny.flux if network is flux else tiny.t5)
        )
    ids = prompt_ids(tiny.tokenizers, ["a red star"], max_length=12)
    np.testing.assert_array_equal(
        encode_text(tiny.clip, t5, ids, dtype=jnp.float32).txt,
        encode_text(tiny.clip, tiny.t5, ids, dtype=jnp.float32).txt,
    )
    # Guided, with an adapter beside the weights: what else there is goes through the same seam.
    inputs, lora = (
        drawn(tiny, 2),
        fluxjax.read_lora(fluxjax.checkpoint.shipped.shipped_lora("kraft")),
    )
    way = dict(negative=inputs[0], cfg=jnp.float32(2.0))
    plain, there = fluxjax.attach(tiny.flux, [lora]), fluxjax.attach(flux, [lora])
    np.testing.assert_array_equal(denoise(there, *inputs), denoise(plain, *inputs))
    np.testing.assert_allclose(
        denoise(there, *inputs, **way), denoise(plain, *inputs, **way), atol=2e-5
    )


def test_blocks_are_read_whole_from_any_layout_and_once_each(tiny, tmp_path, monkeypatch):
    fluxjax.convert_weights(fluxjax.zoo.tiny_folder() / "transformer", tmp_path / "bfl", to="bfl")
    (path,) = (tmp_path / "bfl").glob("*.safetensors")
    flux = fluxjax.load_flux(path, config=tiny.flux.config, stream=True)
    assert (
        flux.double.img.qkv.weight.reader.dtype
        == fluxjax.load_flux(path, config=tiny.flux.config).img_in.bias.dtype
    )
    reader = flux.single.linear1.weight.reader
    whole = fluxjax.load_flux("tiny").single.linear1.weight.value
    for number in (0, 1, 3, 2, len(whole) - 1, 0):  # ahead or not
        np.testing.assert_array_equal(reader(number), whole[number])
    read = []
    monkeypatch.setattr(
        type(reader), "read", lambda self, number: read.append(number) or np.array(whole[number])
    )
    reader.ahead = None
    for number in range(len(whole)):
        reader(number)
    reader.ahead[1].result()
    assert sorted(read) == sorted([*range(len(whole)), 0])


def test_what_is_where_is_told(tiny, streamed):
    sharded = shard(tiny.t5, mesh_of(fsdp=4))
    told = residency(
        {"flux": streamed["file"](fluxjax.load_flux), "t5": offload(sharded), "clip": None}
    ).splitlines()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(sharded))
    part = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(sharded))
    assert part < size / 3
    assert told[1:] == [
        f"t5: {part / 1e9:.3f} GB in host memory for each of 4 devices",
        "clip: not in memory",
    ]
    assert " GB in device memory, 0.0" in told[0]
    assert told[0].endswith("in files")


def test_a_streamed_network_lies_on_one_device(tiny, streamed):
    with pytest.raises(ValueError, match="Pass one of sharding="):
        fluxjax.load_flux(
            "tiny", stream=True, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
    mesh = mesh_of(fsdp=2)
    with pytest.raises(ValueError, match="has no form on a mesh"):
        denoise(shard(streamed["host"](fluxjax.load_flux), mesh), *drawn(tiny, 2), mesh=mesh)


def test_a_network_without_stacked_blocks_is_not_streamed(tiny):
    with pytest.raises(
        ValueError, match="takes a Flux, T5 or Clip, whose blocks are stacked, got a Vae"
    ):
        stream_blocks(tiny.vae)
