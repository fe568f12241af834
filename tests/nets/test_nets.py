"""Laws of the four networks: what their outputs depend on, their sizes, and their errors."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import randomized

from fluxjax import T5, Clip, Flux, FluxConfig, Vae, image_ids
from fluxjax.nets import ClipConfig, T5Config, VaeConfig, leaf_names
from fluxjax.nets.layers import Rotation, rope, rotate, sinusoid

KEY = jax.random.key(0)
SMALL = FluxConfig(
    width=32,
    heads=2,
    double_depth=2,
    single_depth=3,
    mlp_width=64,
    context=24,
    pooled=8,
    in_channels=16,
    out_channels=16,
    rope_axes=(4, 6, 6),
)
VAE = VaeConfig(channels=(8, 8, 16, 16), groups=4, resnets=1)


@pytest.fixture(scope="module")
def flux():
    return randomized(Flux, SMALL)


def inputs(height=32, width=48, txt_tokens=5):
    rng = np.random.default_rng(2)
    tokens = (height // 16) * (width // 16)
    return dict(
        x=jnp.asarray(rng.normal(size=(tokens, 16)).astype(np.float32), jnp.float32),
        t=jnp.float32(0.3),
        txt=jnp.asarray(rng.normal(size=(txt_tokens, 24)).astype(np.float32), jnp.float32),
        vec=jnp.asarray(rng.normal(size=8).astype(np.float32), jnp.float32),
        img_ids=image_ids(height, width),
        guidance=jnp.float32(3.5),
    )


@eqx.filter_jit
def call(network, arguments):
    """Run a network; compiled once for all tests with the same shapes."""
    return network(**arguments)


@pytest.mark.parametrize(
    ("network", "config", "parameters"),
    [
        (Flux, FluxConfig.dev(), 11_901_408_320),
        (Flux, FluxConfig.schnell(), 11_891_178_560),
        (T5, T5Config.xxl(), 4_762_310_656),
        (Clip, ClipConfig.large(), 123_060_480),
        (Vae, VaeConfig.flux(), 83_819_683),
    ],
)
def test_full_size_networks_have_the_published_number_of_parameters(network, config, parameters):
    abstract = eqx.filter_eval_shape(network, config, key=KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == parameters


def test_names_of_weights_and_kernels_are_those_of_files():
    """Files of fluxjax's own layout have them: they must not follow the storage's fields."""
    names = leaf_names(eqx.filter_eval_shape(Vae, VAE, key=KEY))
    assert {"decoder.conv_in.weight", "encoder.down.0.resnets.0.conv1.bias"} <= set(names)
    assert "decoder.middle.attention.q.weight" in names
    assert "double.img.mlp.up.weight" in leaf_names(eqx.filter_eval_shape(Flux, SMALL, key=KEY))


def test_time_sinusoid_is_cosines_then_sines_in_float32_even_at_a_thousand():
    wave = np.asarray(sinusoid(jnp.float32(987.0), 256))
    angles = 987.0 * 10_000.0 ** (-np.arange(128) / 128)
    # An angle near 1000 has float32's spacing of 6e-5.
    np.testing.assert_allclose(wave, np.concatenate([np.cos(angles), np.sin(angles)]), atol=2e-4)


def test_rope_makes_scores_depend_only_on_the_difference_of_positions():
    q, k = jax.random.normal(KEY, (2, 1, 1, 16))

    @jax.jit
    def score(q_position, k_position):
        rotated = []
        for x, position in ((q, q_position), (k, k_position)):
            rotated.append(rotate(x, rope(position[None], (4, 6, 6), 10_000.0)))
        return jnp.sum(rotated[0] * rotated[1])

    first = score(jnp.float32([0, 3, 5]), jnp.float32([0, 1, 9]))
    shifted = score(jnp.float32([7, 10, 6]), jnp.float32([7, 8, 10]))
    other = score(jnp.float32([0, 3, 5]), jnp.float32([0, 2, 9]))
    assert float(first) == pytest.approx(float(shifted), abs=1e-5)
    assert float(first) != pytest.approx(float(other), abs=1e-3)


def test_rope_rotates_adjacent_pairs_by_the_angle():
    x = jnp.float32([[[1.0, 0.0, 0.0, 1.0]]])
    angles = jnp.float32([[0.3, 0.5]])
    rotated = rotate(x, Rotation(jnp.cos(angles), jnp.sin(angles)))
    expected = [math.cos(0.3), math.sin(0.3), -math.sin(0.5), math.cos(0.5)]
    np.testing.assert_allclose(rotated[0, 0], expected, atol=1e-6)


def test_without_ids_the_order_of_text_tokens_does_not_matter(flux):
    given = inputs()
    reversed_text = given | {"txt": given["txt"][::-1]}
    np.testing.assert_allclose(call(flux, reversed_text), call(flux, given), atol=1e-5)


def test_image_tokens_move_with_their_ids(flux):
    given = inputs()
    order = np.array([3, 1, 5, 0, 2, 4])
    moved = given | {"x": given["x"][order], "img_ids": given["img_ids"][order]}
    np.testing.assert_allclose(call(flux, moved), call(flux, given)[order], atol=1e-5)


@pytest.mark.parametrize("change", [{"t": 0.31}, {"guidance": 3.6}])
def test_time_and_guidance_matter(flux, change):
    given = inputs()
    changed = given | {name: jnp.float32(value) for name, value in change.items()}
    assert np.abs(call(flux, changed) - call(flux, given)).max() > 1e-5


@pytest.mark.parametrize("name", ["x", "txt", "vec", "img_ids"])
def test_every_input_matters(flux, name):
    given = inputs()
    value = np.array(given[name])
    value[1] += 1
    changed = given | {name: jnp.asarray(value)}
    assert np.abs(call(flux, changed) - call(flux, given)).max() > 1e-4


def test_a_new_flux_returns_zeros_as_adaln_zero_does():
    new = eqx.filter_jit(Flux)(SMALL, key=KEY)
    np.testing.assert_array_equal(call(new, inputs()), np.zeros((6, 16)))


def test_activations_follow_txt_and_the_result_follows_x(flux):
    given = inputs()
    half = call(flux, given | {"txt": given["txt"].astype(jnp.bfloat16)})
    assert half.dtype == jnp.float32
    exact = call(flux, given)
    assert 1e-4 < np.linalg.norm(half - exact) / np.linalg.norm(exact) < 0.05


def test_guidance_is_needed_exactly_where_the_network_takes_it(flux):
    with pytest.raises(ValueError, match=r"needs `guidance=`. Pass guidance=3.5"):
        flux(**(inputs() | {"guidance": None}))
    config = FluxConfig(**{**vars(SMALL), "guidance_embed": False})
    schnell = eqx.filter_eval_shape(Flux, config, key=KEY)
    with pytest.raises(ValueError, match=r"no guidance embedder.*Pass guidance=None"):
        schnell(**inputs())


def test_prepared_for_several_times_a_network_computes_the_same_at_each(flux):
    given = inputs()
    x, _ = given.pop("x"), given.pop("t")
    times = jnp.float32([0.9, 0.3, 0.6])

    @eqx.filter_jit
    def velocity(flux, x, t, prepared):
        return flux.velocity(x, t, prepared)

    prepared = eqx.filter_jit(lambda flux, given: flux.prepare(times, **given))(flux, given)
    for t in times:
        expected = call(flux, given | {"x": x, "t": t})
        found = velocity(flux, x, t, prepared)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)
    # At any other time NaN, and not the velocity of the nearest one.
    assert np.isnan(velocity(flux, x, jnp.float32(0.5), prepared)).all()


def test_all_inputs_of_a_wrong_width_are_named_together(flux):
    given = inputs()
    wrong = given | {"x": given["x"][:, :15], "txt": given["txt"][:, :23]}
    with pytest.raises(ValueError, match="x has 15 features, not 16; txt has 23 features, not 24"):
        flux(**wrong)


def test_configs_of_impossible_networks_are_refused():
    with pytest.raises(ValueError, match="sum times heads is width"):
        FluxConfig(rope_axes=(16, 16, 16))
    with pytest.raises(ValueError, match="multiples of groups"):
        VaeConfig(channels=(30, 64))
    with pytest.raises(ValueError, match="heads divide"):
        ClipConfig(heads=7)
    with pytest.raises(ValueError, match="Choose one of quick_gelu"):
        ClipConfig(activation="relu")
    with pytest.raises(ValueError, match="1 or more"):
        ClipConfig(depth=0)


def test_the_pooled_state_of_clip_depends_on_no_token_after_the_end():
    config = ClipConfig(
        vocabulary=20, positions=9, width=16, heads=2, depth=2, mlp_width=32, eos_token=19
    )
    clip = randomized(Clip, config)
    pooled = eqx.filter_jit(lambda clip, ids: clip(ids))
    ids = jnp.array([1, 5, 6, 19, 19, 19, 19, 19, 19])
    expected = pooled(clip, ids)
    np.testing.assert_allclose(pooled(clip, ids.at[5].set(7)), expected, atol=1e-6)
    assert np.abs(pooled(clip, ids.at[2].set(7)) - expected).max() > 1e-3
    with pytest.raises(ValueError, match="at most 9 tokens, got 10"):
        clip(jnp.zeros(10, jnp.int32))


@pytest.fixture(scope="module")
def vae():
    return randomized(Vae, VAE)


def test_encoding_shrinks_eight_times_and_decoding_grows_back(vae):
    image = jax.ShapeDtypeStruct((48, 64, 3), jnp.float32)
    latent = eqx.filter_eval_shape(vae.encode, image)
    assert latent.shape == (16, 6, 8)
    assert eqx.filter_eval_shape(vae.decode, latent).shape == image.shape


def test_sampled_latents_have_the_posteriors_mean_and_deviation(vae):
    image = jax.random.uniform(KEY, (16, 16, 3), minval=-1, maxval=1)

    @eqx.filter_jit
    def draw(vae, keys):
        sampled = jax.vmap(lambda key: vae.encode(image, key=key))(keys)
        return sampled, vae.encode(image), vae.moments(image)[1]

    draws, mean, log_variance = map(np.asarray, draw(vae, jax.random.split(KEY, 4000)))
    deviation = np.exp(0.5 * log_variance) * vae.config.scale
    # Of 4,000 draws, means lie within 5 and deviations within 5 / sqrt(2) standard errors.
    np.testing.assert_allclose((draws.mean(0) - mean) / deviation, 0, atol=5 / 4000**0.5)
    np.testing.assert_allclose(draws.std(0) / deviation, 1, atol=5 / 8000**0.5)


def test_the_vae_refuses_sizes_that_it_would_crop(vae):
    with pytest.raises(ValueError, match="multiples of 8, got 20x16"):
        vae.encode(jnp.zeros((20, 16, 3)))


def test_a_bfloat16_vae_has_gradients(vae):
    """A convolution that accumulates in float32 has no gradient of its own in JAX."""

    @eqx.filter_jit
    def gradient(vae, image):
        def total(vae):
            return vae.encode(image).astype(jnp.float32).sum()

        return jax.grad(total)(vae).encoder.conv_in.weight.value.astype(jnp.float32)

    exact = gradient(vae, jnp.ones((16, 16, 3)))
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), vae)
    rough = gradient(half, jnp.ones((16, 16, 3), jnp.bfloat16))
    assert np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 0.1
