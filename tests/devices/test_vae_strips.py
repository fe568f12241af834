"""A VAE that is run in strips computes what the whole one does, in less memory."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import relative

from fluxjax.devices import VaeStrips, choose_strips, limit_vae_memory, strip_segments, strip_vae
from fluxjax.devices.vae_memory import VAE_MEMORY, strips_bytes, whole_bytes
from fluxjax.nets.vae import Vae, VaeConfig

# The norms' sums are taken in another order.
BOUND = 2e-6
LATENT = (16, 19, 13)
"""Rows and columns that no strips and tiles divide."""
STRIPS = {
    "all features stored": VaeStrips(rows=8, columns=13, stored=2),
    "those of the latent's resolution stored": VaeStrips(rows=7, columns=5, stored=1),
    "one strip, of tiles": VaeStrips(rows=30, columns=6, stored=1),
}


@pytest.fixture(scope="module")
def vae():
    network = jax.eval_shape(
        lambda key: Vae(VaeConfig(channels=(8, 16), resnets=1, groups=4), key=key),
        jax.random.key(0),
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.2), leaf.dtype), network
    )


@pytest.fixture(scope="module")
def inputs():
    """Two latents, and an image."""
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.normal(size=(2, *LATENT)), jnp.float32)
    return latents, jnp.asarray(rng.uniform(-1, 1, size=(38, 26, 3)), jnp.float32)


decode = jax.jit(lambda vae, latent: vae.decode(latent))
encode = jax.jit(lambda vae, image: vae.encode(image))


@pytest.fixture(scope="module")
def expected(vae, inputs):
    latents, image = inputs
    return [decode(vae, latent) for latent in latents], encode(vae, image)


@pytest.mark.parametrize("name", STRIPS)
def test_in_strips_it_decodes_what_the_whole_one_does(vae, inputs, expected, name):
    in_strips = strip_vae(vae, STRIPS[name])
    programs = decode._cache_size()
    for latent, wanted in zip(inputs[0], expected[0], strict=True):
        assert relative(decode(in_strips, latent), wanted) <= BOUND
    assert decode._cache_size() == programs + 1  # the second latent compiled nothing


@pytest.mark.parametrize("name", list(STRIPS)[:2])
def test_in_strips_it_encodes_what_the_whole_one_does(vae, inputs, expected, name):
    found = encode(strip_vae(vae, STRIPS[name]), inputs[1])
    assert relative(found, expected[1]) <= BOUND


def test_a_halo_that_is_short_by_one_gives_another_image(vae, inputs, expected, monkeypatch):
    reach_of = strip_segments.reach_of
    monkeypatch.setattr(strip_segments, "reach_of", lambda segment: max(reach_of(segment) - 1, 0))
    strips = STRIPS["those of the latent's resolution stored"]
    found = jax.jit(lambda vae, latent: vae.decode(latent))(strip_vae(vae, strips), inputs[0][0])
    assert relative(found, expected[0][0]) > 100 * BOUND


def test_strips_that_are_shorter_than_what_layers_read_are_refused(vae, inputs):
    strips = VaeStrips(rows=2, columns=13, stored=1)
    with pytest.raises(ValueError, match="needs strips of at least 4 rows"):
        jax.eval_shape(strip_vae(vae, strips).decode, inputs[0][0])
    with pytest.raises(ValueError, match="numbers of at least 1"):
        VaeStrips(rows=0, columns=1, stored=1)


def test_in_strips_it_has_no_gradient_and_says_so(vae, inputs):
    def loss(latent):
        return jnp.sum(strip_vae(vae, STRIPS["all features stored"]).decode(latent))

    with pytest.raises(ValueError, match="A VAE in strips has no gradient"):
        jax.eval_shape(jax.grad(loss), inputs[0][0])


def temporaries(vae, shape):
    compiled = jax.jit(lambda vae, x: vae.decode(x)).lower(vae, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_compiled_program_needs_less_memory_than_the_whole_one():
    config = VaeConfig(channels=(8, 16), resnets=1, groups=4)
    network = jax.eval_shape(lambda key: Vae(config, key=key), jax.random.key(0))
    shape = jax.ShapeDtypeStruct((16, 1024, 1024), jnp.float32)
    whole = temporaries(network, shape)
    tiles = VaeStrips(rows=16, columns=32, stored=1)
    found = temporaries(strip_vae(network, tiles), shape)
    features = 4 * 16 * prod(shape.shape[1:])
    # Features, keys and values of the latent's resolution, logits of 64 MiB and their exponentials.
    assert found <= 4 * features + 2.5 * 64 * 2**20 < whole


def test_strips_are_chosen_where_the_whole_needs_too_much():
    config = VaeConfig.flux()
    assert choose_strips(config, 1024, 1024, dtype=jnp.bfloat16) is None
    for side, memory in [(1024, 1e9), (2048, VAE_MEMORY), (4096, 1.5e9), (4096, 6e9)]:
        rows = side // 8
        strips = choose_strips(config, side, side, dtype=jnp.bfloat16, memory=memory)
        assert strips_bytes(config, rows, rows, 2, strips) <= memory
        assert memory < whole_bytes(config, rows, rows, 2)
    # With more memory more is stored, so that less is computed again.
    stored = [
        choose_strips(config, 4096, 4096, dtype=jnp.bfloat16, memory=memory).stored
        for memory in (1.5e9, 3e9, 6e9)
    ]
    assert stored == [2, 3, 4]


def test_where_nothing_fits_the_least_is_chosen():
    config = VaeConfig.flux()
    found = choose_strips(config, 8192, 8192, dtype=jnp.float32, memory=1.0)
    assert found.stored == 1
    with pytest.raises(ValueError, match="needs a positive number"):
        choose_strips(config, 64, 64, dtype=jnp.float32, memory=0)


def test_a_limit_takes_strips_only_for_images_that_exceed_it(vae, inputs, expected, monkeypatch):
    image = inputs[1]
    limit = whole_bytes(vae.config, *LATENT[1:], 4)
    jaxprs = []
    for memory in (limit, limit - 1):
        limited = limit_vae_memory(vae, memory)
        jaxprs.append(str(jax.make_jaxpr(limited.encode)(image)))
        jaxprs.append(str(jax.make_jaxpr(limited.decode)(inputs[0][0])))
    loops = ["while" in jaxpr or "scan" in jaxpr for jaxpr in jaxprs]
    assert loops == [False, False, True, True]
    assert relative(encode(limit_vae_memory(vae, limit), image), expected[1]) <= BOUND
    gradient = jax.grad(lambda latent: jnp.sum(limit_vae_memory(vae, limit).decode(latent)))
    assert jnp.all(jnp.isfinite(gradient(inputs[0][0])))
