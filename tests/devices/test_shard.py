"""On a mesh everything is what it is on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxjax
from fluxjax import DDIM, Attention, BlockSizes, Nag, attention, make_mesh, shard
from fluxjax.devices.context import RingAttention, UlyssesAttention
from fluxjax.devices.weights import ConcatenatedWeight, GatheredWeight, SummedWeight
from fluxjax.generate import FirstBlock
from fluxjax.generate.draw import denoise
from fluxjax.generate.latents import noise_batch, step_keys
from fluxjax.generate.text import encode_text, prompt_ids
from fluxjax.kernels import isolated_attention
from fluxjax.nets import DegradedBlocks
from fluxjax.nets.weight import Dense

HEIGHT, WIDTH = 48, 80  # 15 tokens, and 13 of text, which neither 2 nor 4 divide
PROMPTS = ["a red star on white", "a blue ring on black", "a green cross left of a white heart"]
# Sums in another order, through two steps of six blocks.
BOUND = 1e-5


def ids_of(tiny, images):
    return prompt_ids(tiny.tokenizers, [PROMPTS[i % 3] for i in range(images)], max_length=13)


def drawn(tiny, images, steps=2):
    text = encode_text(tiny.clip, tiny.t5, ids_of(tiny, images), dtype=jnp.float32)
    noise = noise_batch(jax.random.key(0), range(images), HEIGHT, WIDTH, channels=16)
    return text, noise, fluxjax.flow_times(steps), jnp.float32(3.5)


def some(count):
    return jax.devices()[:count]


MESHES = {
    "data": (dict(data=8), 1e-6),
    "fsdp": (dict(fsdp=8), BOUND),
    "tensor": (dict(tensor=2), BOUND),
    "context, exchanged": (dict(context=2), BOUND),
    "context, round": (dict(context=4), BOUND),
    "data and fsdp": (dict(data=2, fsdp=4), BOUND),
    "fsdp and tensor": (dict(fsdp=4, tensor=2), BOUND),
    "data and context": (dict(data=2, context=4), BOUND),
    "tensor and context": (dict(tensor=2, context=3), BOUND),
}


def mesh_of(**sizes):
    return make_mesh(**sizes, devices=some(int(np.prod(list(sizes.values())))))


def relative(found, expected):
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("name", MESHES)
def test_sampling_on_a_mesh_is_sampling_on_one_device(tiny, name):
    sizes, bound = MESHES[name]
    mesh = mesh_of(**sizes)
    images = mesh.shape["data"] * mesh.shape["fsdp"] + 3  # which they divide only if they are 1
    inputs = drawn(tiny, images)
    expected = denoise(tiny.flux, *inputs)
    assert relative(denoise(shard(tiny.flux, mesh), *inputs, mesh=mesh), expected) <= bound


@pytest.mark.parametrize("name", MESHES)
def test_the_encoders_on_a_mesh_are_those_on_one_device(tiny, name):
    sizes, bound = MESHES[name]
    mesh, ids = mesh_of(**sizes), ids_of(tiny, 3)
    expected = encode_text(tiny.clip, tiny.t5, ids, dtype=jnp.float32)
    found = encode_text(
        shard(tiny.clip, mesh), shard(tiny.t5, mesh), ids, dtype=jnp.float32, mesh=mesh
    )
    assert relative(found.txt, expected.txt) <= bound
    assert relative(found.vec, expected.vec) <= bound


@pytest.mark.parametrize("name", MESHES)
def test_merged_on_a_mesh_a_network_has_the_same_weights(tiny, name):
    mesh, lora = (
        mesh_of(**MESHES[name][0]),
        fluxjax.read_lora(fluxjax.checkpoint.shipped.shipped_lora("kraft")),
    )
    merged = fluxjax.merge(jax.device_put(tiny.flux, fluxjax.shardings(tiny.flux, mesh)), [lora])
    expected = fluxjax.merge(tiny.flux, [lora])
    for found, one, before in zip(
        *map(jax.tree.leaves, (merged, expected, tiny.flux)), strict=True
    ):
        # To a few roundings of the largest, and where it lay.
        np.testing.assert_allclose(np.asarray(found), one, atol=1e-6 * float(jnp.abs(one).max()))
        assert found.shape == before.shape
    assert [leaf.sharding for leaf in jax.tree.leaves(merged)] == jax.tree.leaves(
        fluxjax.shardings(tiny.flux, mesh)
    )


COLLECTIVES = {
    GatheredWeight: "fsdp",
    SummedWeight: "tensor",
    ConcatenatedWeight: "tensor",
    UlyssesAttention: "context",
    RingAttention: "context",
}


@pytest.mark.parametrize("kind", COLLECTIVES, ids=lambda kind: kind.__name__)
def test_without_its_collective_a_mesh_is_wrong(tiny, monkeypatch, kind):
    """Each is replaced by what one device would do alone."""

    def alone(weight, x):
        if kind is GatheredWeight:
            repeats = [1, 1]
            repeats[weight.axis] = 2
            return Dense(jnp.tile(weight.part.value, repeats)).matmul(x)
        part = weight.base.matmul(x)
        return part if kind is SummedWeight else jnp.concatenate([part, part], -1)

    if kind in (UlyssesAttention, RingAttention):
        monkeypatch.setattr(kind, "__call__", lambda self, q, k, v, txt_tokens: attention(q, k, v))
    else:
        monkeypatch.setattr(kind, "matmul", alone)
    mesh, inputs = mesh_of(**{COLLECTIVES[kind]: 4 if kind is RingAttention else 2}), drawn(tiny, 2)
    found = denoise.__wrapped__(shard(tiny.flux, mesh), *inputs, mesh=mesh)
    assert not relative(found, denoise(tiny.flux, *inputs)) <= 100 * BOUND


def test_what_guides_and_draws_runs_on_a_mesh_too(tiny):
    mesh, inputs = mesh_of(data=2, tensor=2), drawn(tiny, 2)
    flux, placed = tiny.flux, shard(tiny.flux, mesh)
    negative = jax.tree.map(lambda x: x[::-1], inputs[0])
    ways = {
        "guided": dict(
            negative=negative,
            cfg=jnp.float32(2.0),
            nag=Nag(jnp.float32(3.0)),
            attention=Attention("xla_chunked", BlockSizes(q=9)),
        ),
        "weakened": dict(
            weaken=DegradedBlocks(flux.config, double=[1], attention=isolated_attention),
            strength=jnp.float32(0.5),
        ),
        "drawn": dict(step=DDIM(1.0), keys=step_keys(jax.random.key(1), [0, 1], DDIM(1.0))),
    }
    for name, way in ways.items():
        expected = denoise(
            flux, *inputs, **{key: value for key, value in way.items() if key != "attention"}
        )
        assert relative(denoise(placed, *inputs, mesh=mesh, **way), expected) <= 5 * BOUND, name


def test_a_cache_decides_for_all_devices(tiny):
    mesh, inputs = mesh_of(data=2, fsdp=2), drawn(tiny, 4, steps=6)
    for threshold in (0.3, 100.0):
        reuse = FirstBlock(jnp.float32(threshold))
        expected = denoise(tiny.flux, *inputs, reuse=reuse)
        assert (
            relative(denoise(shard(tiny.flux, mesh), *inputs, reuse=reuse, mesh=mesh), expected)
            <= BOUND
        )


def test_a_model_loaded_onto_a_mesh_draws_the_same_images(tiny):
    options = dict(key=jax.random.key(0), steps=2, height=HEIGHT, width=WIDTH, images=2)
    expected = fluxjax.text_to_image(tiny, "a red star", **options)
    for sizes in (dict(data=2, tensor=2), dict(fsdp=2, context=2)):
        away = "fsdp" in sizes
        models = fluxjax.load_models(
            "tiny", dtype="float32", mesh=mesh_of(**sizes), offload_encoders=away
        )
        kinds = [
            next(iter(jax.tree.leaves(one))).sharding.memory_kind
            for one in (models.clip, models.t5, models.flux)
        ]
        assert kinds == (["pinned_host"] * 2 if away else ["device"] * 2) + ["device"]
        np.testing.assert_allclose(
            fluxjax.text_to_image(models, "a red star", **options), expected, atol=1e-4
        )
        weight = models.t5.blocks.up.weight.value
        assert weight.addressable_shards[0].data.size == weight.size // 2


def test_a_mesh_splits_every_large_matrix(tiny):
    mesh = mesh_of(fsdp=4, tensor=2)
    for network, blocks in ((tiny.flux, "single"), (tiny.flux, "double"), (tiny.t5, "blocks")):
        whole = sum(leaf.size for leaf in jax.tree.leaves(getattr(network, blocks)))
        placed = jax.tree.leaves(getattr(shard(network, mesh), blocks))
        assert sum(leaf.addressable_shards[0].data.size for leaf in placed) < 1.1 * whole / 8


def test_attached_adapters_are_split_as_their_weights(tiny):
    mesh, inputs = mesh_of(fsdp=2, tensor=2), drawn(tiny, 2)
    lora = fluxjax.read_lora(fluxjax.checkpoint.shipped.shipped_lora("kraft"))
    adapted = fluxjax.attach(tiny.flux, [lora])
    expected = denoise(adapted, *inputs)
    assert relative(expected, denoise(tiny.flux, *inputs)) > 0.01
    assert relative(denoise(shard(adapted, mesh), *inputs, mesh=mesh), expected) <= BOUND
    # Merged on a mesh before it is regrouped.
    split = mesh_of(fsdp=4)
    placed = jax.device_put(tiny.flux, fluxjax.shardings(tiny.flux, split))
    merged = shard(fluxjax.merge(placed, [lora]), split)
    assert (
        relative(denoise(merged, *drawn(tiny, 4), mesh=split), denoise(adapted, *drawn(tiny, 4)))
        <= BOUND
    )


def test_sizes_that_do_not_fit_are_told():
    assert dict(make_mesh(data=2, fsdp=-1, devices=some(8)).shape) == {
        "data": 2,
        "fsdp": 4,
        "tensor": 1,
        "context": 1,
    }
    for wrong in (dict(data=3), dict(data=-1, fsdp=-1), dict(data=3, fsdp=-1), dict(data=0)):
        with pytest.raises(ValueError, match="does not use 8 devices"):
            make_mesh(**wrong, devices=some(8))


def test_what_a_mesh_can_not_do_is_told(tiny):
    inputs = drawn(tiny, 2)
    with pytest.raises(ValueError, match="tensor=4 does not divide the 6 heads of Flux"):
        shard(tiny.flux, mesh_of(tensor=4))
    wide = mesh_of(data=4)
    with pytest.raises(
        ValueError, match="A batch of 2 leaves some of data x fsdp = 4 devices idle"
    ):
        denoise(shard(tiny.flux, wide), *inputs, mesh=wide)
    long = mesh_of(context=2)
    placed = shard(tiny.flux, long)
    with pytest.raises(ValueError, match="Use a mesh of context=1"):
        denoise(placed, *inputs, mesh=long, reuse=FirstBlock(0.1))
    with pytest.raises(ValueError, match="Pass attention= by name"):
        denoise(tiny.flux, *inputs, negative=inputs[0], nag=Nag(3.0), attention=isolated_attention)
    ring = mesh_of(context=4)
    with pytest.raises(ValueError, match="6 heads are not divided by context=4"):
        denoise(shard(tiny.flux, ring), *inputs, mesh=ring, attention="xla")
    weaken = DegradedBlocks(tiny.flux.config, double=[1], attention=isolated_attention)
    with pytest.raises(ValueError, match="would see a part of the tokens"):
        denoise(placed, *inputs, mesh=long, weaken=weaken, strength=jnp.float32(0.5))


@pytest.mark.parametrize(
    "sizes", [dict(context=2), dict(context=4), dict(tensor=2, context=3)], ids=str
)
def test_nag_where_tokens_are_split_is_nag_on_one_device(tiny, sizes):
    mesh, inputs = mesh_of(**sizes), drawn(tiny, 2)
    way = dict(negative=jax.tree.map(lambda x: x[::-1], inputs[0]), nag=Nag(jnp.float32(3.0)))
    expected = denoise(tiny.flux, *inputs, **way)
    assert relative(denoise(shard(tiny.flux, mesh), *inputs, mesh=mesh, **way), expected) <= BOUND
