"""On a mesh every network computes what it computes on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import batch_of, encoded, recipe_of
from meshes import flux_inputs, mesh_of, relative, velocities

import fluxjax
from fluxjax import attention, make_mesh, shard
from fluxjax.checkpoint.shipped import shipped_lora
from fluxjax.devices.ring import RingAttention
from fluxjax.devices.ulysses import UlyssesAttention
from fluxjax.devices.weights import ConcatenatedWeight, GatheredWeight, SummedWeight
from fluxjax.flow import DDIM
from fluxjax.generate import FirstBlock, WeakNetwork
from fluxjax.generate.draw import denoise
from fluxjax.kernels import Attention, BlockSizes, Nag, isolated_attention
from fluxjax.nets import DegradedBlocks
from fluxjax.nets.weight import Dense

# Sums in another order, through six blocks.
BOUND = 1e-5
MESHES = {
    "data": dict(data=8),
    "fsdp": dict(fsdp=8),
    "tensor": dict(tensor=2),
    "context, heads exchanged": dict(context=2),
    "context, ring": dict(context=4),
    "data and fsdp": dict(data=2, fsdp=4),
    "fsdp and tensor": dict(fsdp=4, tensor=2),
    "data and context": dict(data=2, context=4),
    "tensor and context": dict(tensor=2, context=3),
}
MOST_IMAGES, MOST_SAMPLED = 11, 9


@pytest.fixture(scope="module")
def placed(tiny):
    """Return the transformer on the mesh of these sizes; each is placed once."""
    return functools.cache(lambda **sizes: shard(tiny.flux, mesh_of(**sizes)))


@pytest.fixture(scope="module")
def rows(tiny):
    return flux_inputs(tiny.flux.config, MOST_IMAGES)


@pytest.fixture(scope="module")
def expected(tiny, rows):
    return velocities(tiny.flux, rows)


@pytest.fixture(scope="module")
def sampled(tiny):
    """The latents of a batch on one device; each image is that of a smaller batch, too."""
    return denoise(tiny.flux, batch_of(tiny, MOST_SAMPLED), recipe_of())


@pytest.fixture(scope="module")
def lora():
    return fluxjax.read_lora(shipped_lora("kraft"))


@pytest.fixture(scope="module")
def merged(tiny, lora):
    return jax.tree.leaves(fluxjax.merge(tiny.flux, [lora]))


def first(rows, count):
    return jax.tree.map(lambda x: x[:count], rows)


@pytest.mark.parametrize("name", MESHES)
def test_velocities_on_a_mesh_are_those_on_one_device(placed, rows, expected, name):
    mesh = mesh_of(**MESHES[name])
    # A number that the devices do not divide, unless they are one.
    images = mesh.shape["data"] * mesh.shape["fsdp"] + 3
    found = velocities(placed(**MESHES[name]), first(rows, images), mesh)
    bound = 1e-6 if name == "data" else BOUND
    assert relative(found, expected[:images]) <= bound


@pytest.mark.parametrize("name", ["data and fsdp", "context, ring", "tensor and context"])
def test_sampling_on_a_mesh_is_sampling_on_one_device(tiny, placed, sampled, name):
    mesh = mesh_of(**MESHES[name])
    images = mesh.shape["data"] * mesh.shape["fsdp"] + 1
    found = denoise(placed(**MESHES[name]), batch_of(tiny, images), recipe_of(), mesh=mesh)
    assert relative(found, sampled[:images]) <= BOUND


# Tokens of prompts are not split.
@pytest.mark.parametrize("name", ["data", "fsdp", "tensor", "context, ring", "fsdp and tensor"])
def test_the_encoders_on_a_mesh_are_those_on_one_device(tiny, name):
    mesh, texts = mesh_of(**MESHES[name]), ["a red star", "a blue ring on black", "a cross"]
    expected = encoded(tiny, texts)
    placed = tiny._replace(clip=shard(tiny.clip, mesh), t5=shard(tiny.t5, mesh))
    found = encoded(placed, texts, mesh=mesh)
    assert relative(found.txt, expected.txt) <= BOUND
    assert relative(found.vec, expected.vec) <= BOUND


# Tokens that are split change nothing of where weights are.
@pytest.mark.parametrize("name", ["data", "fsdp", "tensor", "fsdp and tensor"])
def test_merged_on_a_mesh_a_network_has_the_same_weights(tiny, lora, merged, name):
    shardings = fluxjax.devices.shardings(tiny.flux, mesh_of(**MESHES[name]))
    on_mesh = jax.tree.leaves(fluxjax.merge(jax.device_put(tiny.flux, shardings), [lora]))
    for found, wanted in zip(on_mesh, merged, strict=True):
        # To a few roundings of the largest.
        bound = 1e-6 * float(np.abs(wanted).max())
        np.testing.assert_allclose(np.asarray(found), wanted, atol=bound)
    assert [leaf.sharding for leaf in on_mesh] == jax.tree.leaves(shardings)


COLLECTIVES = {
    GatheredWeight: "fsdp",
    SummedWeight: "tensor",
    ConcatenatedWeight: "tensor",
    UlyssesAttention: "context",
    RingAttention: "context",
}


@pytest.mark.parametrize("kind", COLLECTIVES, ids=lambda kind: kind.__name__)
def test_without_its_collective_a_mesh_is_wrong(placed, rows, expected, monkeypatch, kind):
    """Each is replaced by what one device would do without the others."""

    def matmul(weight, x, maxima=None):
        if kind is GatheredWeight:
            repeats = [1, 1]
            repeats[weight.axis] = 2
            return Dense(jnp.tile(weight.part.value, repeats)).matmul(x)
        part = weight.base.matmul(x)
        return part if kind is SummedWeight else jnp.concatenate([part, part], -1)

    def mix(self, q, k, v, txt_tokens):
        return attention(q, k, v)

    if kind in (UlyssesAttention, RingAttention):
        monkeypatch.setattr(kind, "__call__", mix)
    else:
        monkeypatch.setattr(kind, "matmul", matmul)
    sizes = {COLLECTIVES[kind]: 4 if kind is RingAttention else 2}
    found = velocities(placed(**sizes), first(rows, 2), mesh_of(**sizes))
    assert not relative(found, expected[:2]) <= 100 * BOUND


GUIDED = {
    "negative prompt and NAG": (
        dict(scale=jnp.float32(2.0), nag=Nag(jnp.float32(3.0))),
        dict(attention=Attention("xla_chunked", BlockSizes(q=9))),
    ),
    "degraded": (dict(weak=None), {}),
    "a step that draws noise": ({}, dict(step=DDIM(1.0))),
}


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_and_random_steps_work_on_a_mesh(tiny, placed, name):
    guidance, options = GUIDED[name]
    if name == "degraded":
        blocks = DegradedBlocks(tiny.flux.config, double=[1], attention=isolated_attention)
        guidance = dict(weak=WeakNetwork(blocks, jnp.float32(0.5)))
    steps = {key: value for key, value in options.items() if key == "step"}
    batch = batch_of(tiny, 2, negative="nag" in guidance, **steps)
    expected = denoise(tiny.flux, batch, recipe_of(**steps, **guidance))
    mesh = mesh_of(data=2, tensor=2)
    recipe = recipe_of(**options, **guidance)
    found = denoise(placed(data=2, tensor=2), batch, recipe, mesh=mesh)
    # Guidance multiplies the errors.
    assert relative(found, expected) <= 5 * BOUND


def test_a_cache_decides_for_all_devices(tiny):
    mesh, batch = mesh_of(data=2, fsdp=2), batch_of(tiny, 4)
    placed = shard(tiny.flux, mesh)
    for threshold in (0.3, 100.0):
        recipe = recipe_of(steps=6, cache=FirstBlock(jnp.float32(threshold)))
        expected = denoise(tiny.flux, batch, recipe)
        assert relative(denoise(placed, batch, recipe, mesh=mesh), expected) <= BOUND


def test_a_model_loaded_onto_a_mesh_draws_the_same_images(tiny):
    settings = fluxjax.DrawSettings(steps=1, height=48, width=48, images=2)
    options = dict(key=jax.random.key(0), settings=settings)
    expected = fluxjax.text_to_image(tiny, "a red star", **options)
    for sizes in (dict(data=2, tensor=2), dict(fsdp=2, context=2)):
        offloads = "fsdp" in sizes
        models = fluxjax.load_models(
            "tiny", dtype="float32", mesh=mesh_of(**sizes), offload_encoders=offloads
        )
        networks = (models.clip, models.t5, models.flux)
        kinds = [jax.tree.leaves(network)[0].sharding.memory_kind for network in networks]
        assert kinds == (["pinned_host"] * 2 if offloads else ["device"] * 2) + ["device"]
        found = fluxjax.text_to_image(models, "a red star", **options)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        weight = models.t5.blocks.up.weight.value
        assert weight.addressable_shards[0].data.size == weight.size // 2


def test_a_mesh_splits_every_large_matrix(tiny):
    mesh = mesh_of(fsdp=4, tensor=2)
    for network, blocks in ((tiny.flux, "single"), (tiny.flux, "double"), (tiny.t5, "blocks")):
        whole = sum(leaf.size for leaf in jax.tree.leaves(getattr(network, blocks)))
        placed = jax.tree.leaves(getattr(shard(network, mesh), blocks))
        assert sum(leaf.addressable_shards[0].data.size for leaf in placed) < 1.1 * whole / 8


def test_attached_adapters_are_split_as_their_weights(tiny, lora, rows, expected):
    adapted = fluxjax.attach(tiny.flux, [lora])
    wanted = velocities(adapted, first(rows, 4))
    assert relative(wanted, expected[:4]) > 0.01
    # The rows of fused layers are reordered, and with them the adapters', or the merged weights'.
    mesh = mesh_of(fsdp=2, tensor=2)
    placed = jax.device_put(tiny.flux, fluxjax.devices.shardings(tiny.flux, mesh))
    for network in (adapted, fluxjax.merge(placed, [lora])):
        found = velocities(shard(network, mesh), first(rows, 4), mesh)
        assert relative(found, wanted) <= BOUND


def test_meshes_of_another_number_of_devices_are_refused():
    devices = jax.devices()[:8]
    automatic = make_mesh(data=2, fsdp=-1, devices=devices)
    assert dict(automatic.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    for wrong in (dict(data=3), dict(data=-1, fsdp=-1), dict(data=3, fsdp=-1), dict(data=0)):
        with pytest.raises(ValueError, match="does not use 8 devices"):
            make_mesh(**wrong, devices=devices)


def test_what_a_mesh_can_not_do_is_refused(tiny):
    batch = batch_of(tiny, 2)
    with pytest.raises(ValueError, match="tensor=4 does not divide the 6 heads of Flux"):
        shard(tiny.flux, mesh_of(tensor=4))
    wide = mesh_of(data=4)
    with pytest.raises(ValueError, match="A batch of 2 leaves some of data x fsdp = 4 devices"):
        denoise(shard(tiny.flux, wide), batch, recipe_of(), mesh=wide)
    ring = mesh_of(context=4)
    with pytest.raises(ValueError, match="6 heads are not divided by context=4, so ring attention"):
        denoise(shard(tiny.flux, ring), batch, recipe_of(attention="xla"), mesh=ring)
    long = mesh_of(context=2)
    with pytest.raises(ValueError, match="Use a mesh of context=1"):
        denoise(shard(tiny.flux, long), batch, recipe_of(cache=FirstBlock(0.1)), mesh=long)


def test_what_split_tokens_can_not_do_is_refused(tiny, rows):
    mesh = mesh_of(context=2)
    placed = shard(tiny.flux, mesh)
    degraded = DegradedBlocks(tiny.flux.config, double=[1], attention=isolated_attention)
    for options in (dict(attention=isolated_attention), dict(degraded=degraded)):
        with pytest.raises(ValueError, match="would see a part of the tokens"):
            velocities(placed, first(rows, 1), mesh, **options)


@pytest.mark.parametrize(
    "sizes", [dict(context=2), dict(context=4), dict(tensor=2, context=3)], ids=str
)
def test_nag_where_tokens_are_split_is_nag_on_one_device(tiny, placed, sizes):
    mesh, recipe = mesh_of(**sizes), recipe_of(nag=Nag(jnp.float32(3.0)))
    batch = batch_of(tiny, 2, negative=True)
    expected = denoise(tiny.flux, batch, recipe)
    found = denoise(placed(**sizes), batch, recipe, mesh=mesh)
    assert relative(found, expected) <= BOUND
