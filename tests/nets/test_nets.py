import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax import T5, Clip, ClipConfig, Flux, FluxConfig, T5Config, Vae, VaeConfig, image_ids
from fluxjax.nets.layers import Rotation, rope, rotate, sinusoid

KEY = jax.random.key(0)
SMALL = FluxConfig(
    width=32, heads=2, double_depth=2, single_depth=3, mlp_width=64, context=24, pooled=8, in_channels=16, out_channels=16,
    rope_axes=(4, 6, 6),
)  # fmt: skip


def randomized(network):
    """Give every weight a random value, those that start at zero too."""
    leaves, structure = jax.tree.flatten(network)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure,
        [0.2 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)],
    )


@pytest.fixture(scope="module")
def flux():
    return randomized(Flux(SMALL, key=KEY))


def inputs(height=32, width=48, txt_tokens=5):
    keys = jax.random.split(jax.random.key(2), 3)
    tokens = (height // 16) * (width // 16)
    return dict(
        x=jax.random.normal(keys[0], (tokens, 16)),
        t=0.3,
        txt=jax.random.normal(keys[1], (txt_tokens, 24)),
        vec=jax.random.normal(keys[2], (8,)),
        img_ids=image_ids(height, width),
        guidance=3.5,
    )


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


def test_time_sinusoid_is_cosines_then_sines_in_float32_even_at_a_thousand():
    wave = np.asarray(sinusoid(jnp.float32(987.0), 256))
    angles = 987.0 * 10_000.0 ** (-np.arange(128) / 128)
    # An angle near 1000 carries float32's 6e-5.
    np.testing.assert_allclose(wave, np.concatenate([np.cos(angles), np.sin(angles)]), atol=2e-4)


def test_rope_makes_scores_depend_on_the_difference_of_positions_alone():
    q, k = jax.random.normal(KEY, (2, 1, 1, 16))
    axes = (4, 6, 6)

    def score(a, b):
        turned = [rotate(x, rope(jnp.float32([p]), axes, 10_000.0)) for x, p in ((q, a), (k, b))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score((0, 3, 5), (0, 1, 9)) == pytest.approx(score((7, 10, 6), (7, 8, 10)), abs=1e-5)
    assert score((0, 3, 5), (0, 1, 9)) != pytest.approx(score((0, 3, 5), (0, 2, 9)), abs=1e-3)


def test_rope_turns_adjacent_pairs_by_the_angle():
    x = jnp.float32([[[1.0, 0.0, 0.0, 1.0]]])
    angles = jnp.float32([[0.3, 0.5]])
    expected = [math.cos(0.3), math.sin(0.3), -math.sin(0.5), math.cos(0.5)]
    np.testing.assert_allclose(
        rotate(x, Rotation(jnp.cos(angles), jnp.sin(angles)))[0, 0], expected, atol=1e-6
    )


def test_text_tokens_are_a_set_without_ids(flux):
    given = inputs()
    shuffled = given | {"txt": given["txt"][::-1]}
    np.testing.assert_allclose(flux(**shuffled), flux(**given), atol=1e-5)


def test_image_tokens_move_with_their_ids(flux):
    given = inputs()
    order = jnp.array([3, 1, 5, 0, 2, 4])
    moved = given | {"x": given["x"][order], "img_ids": given["img_ids"][order]}
    np.testing.assert_allclose(flux(**moved), flux(**given)[order], atol=1e-5)


@pytest.mark.parametrize("change", [{"t": 0.31}, {"guidance": 3.6}])
def test_time_and_guidance_matter(flux, change):
    given = inputs()
    assert float(jnp.abs(flux(**(given | change)) - flux(**given)).max()) > 1e-5


@pytest.mark.parametrize("name", ["x", "txt", "vec", "img_ids"])
def test_every_input_matters(flux, name):
    given = inputs()
    changed = given | {name: given[name].at[1].add(1.0)}
    assert float(jnp.abs(flux(**changed) - flux(**given)).max()) > 1e-4


def test_a_new_flux_is_silent_as_adaln_zero_has_it():
    np.testing.assert_array_equal(Flux(SMALL, key=KEY)(**inputs()), jnp.zeros((6, 16)))


def test_activations_follow_txt_and_the_result_follows_x(flux):
    given = inputs()
    half = flux(**(given | {"txt": given["txt"].astype(jnp.bfloat16)}))
    assert half.dtype == jnp.float32
    exact = flux(**given)
    assert 1e-4 < float(jnp.linalg.norm(half - exact) / jnp.linalg.norm(exact)) < 0.05


def test_guidance_must_be_given_exactly_where_it_is_taken(flux):
    with pytest.raises(ValueError, match=r"needs `guidance=`. Pass guidance=3.5"):
        flux(**(inputs() | {"guidance": None}))
    schnell = Flux(FluxConfig(**{**vars(SMALL), "guidance_embed": False}), key=KEY)
    with pytest.raises(ValueError, match=r"no guidance embedder.*Pass guidance=None"):
        schnell(**inputs())


def test_what_is_prepared_for_some_times_is_what_each_evaluation_computes(flux):
    given = inputs()
    x, times = given.pop("x"), jnp.float32([0.9, 0.3, 0.6])
    prepared = flux.prepare(times, **{name: value for name, value in given.items() if name != "t"})
    for t in times:
        np.testing.assert_allclose(
            flux.velocity(x, t, prepared), flux(x, **(given | {"t": t})), rtol=2e-5, atol=1e-5
        )
    assert np.isnan(flux.velocity(x, 0.5, prepared)).all()  # and never another time's


def test_inputs_that_do_not_fit_are_named_all_together(flux):
    given = inputs()
    with pytest.raises(ValueError, match="x has 15 features, not 16; txt has 23 features, not 24"):
        flux(**(given | {"x": given["x"][:, :15], "txt": given["txt"][:, :23]}))


def test_configs_that_make_no_network_are_refused():
    with pytest.raises(ValueError, match="sum times heads is width"):
        FluxConfig(rope_axes=(16, 16, 16))
    with pytest.raises(ValueError, match="multiples of groups"):
        VaeConfig(channels=(30, 64))
    with pytest.raises(ValueError, match="heads divide"):
        ClipConfig(heads=7)
    with pytest.raises(ValueError, match="Choose one of quick_gelu"):
        ClipConfig(activation="relu")


def test_clip_sees_no_token_after_the_end():
    clip = randomized(
        Clip(
            ClipConfig(
                vocabulary=20, positions=9, width=16, heads=2, depth=2, mlp_width=32, eos_token=19
            ),
            key=KEY,
        )
    )
    ids = jnp.array([1, 5, 6, 19, 19, 19, 19, 19, 19])
    np.testing.assert_allclose(clip(ids.at[5].set(7)), clip(ids), atol=1e-6)
    assert float(jnp.abs(clip(ids.at[2].set(7)) - clip(ids)).max()) > 1e-3
    with pytest.raises(ValueError, match="at most 9 tokens, got 10"):
        clip(jnp.zeros(10, jnp.int32))


@pytest.fixture(scope="module")
def vae():
    return randomized(Vae(VaeConfig(channels=(8, 8, 16, 16), groups=4, resnets=1), key=KEY))


def test_encoding_shrinks_eight_times_and_decoding_grows_back(vae):
    image = jax.random.uniform(KEY, (48, 64, 3), minval=-1, maxval=1)
    latent = vae.encode(image)
    assert latent.shape == (16, 6, 8)
    assert vae.decode(latent).shape == image.shape


def test_sampled_latents_have_the_posteriors_mean_and_deviation(vae):
    image = jax.random.uniform(KEY, (16, 16, 3), minval=-1, maxval=1)
    draws = jax.vmap(lambda key: vae.encode(image, key=key))(jax.random.split(KEY, 4000))
    deviation = jnp.exp(0.5 * vae.moments(image)[1]) * vae.config.scale
    # Of 4,000 draws, means lie within 5 and deviations within 5 / sqrt(2) standard errors.
    np.testing.assert_allclose(
        (draws.mean(0) - vae.encode(image)) / deviation, 0, atol=5 / 4000**0.5
    )
    np.testing.assert_allclose(draws.std(0) / deviation, 1, atol=5 / 8000**0.5)


def test_the_vae_refuses_sizes_it_would_crop(vae):
    with pytest.raises(ValueError, match="multiples of 8, got 20x16"):
        vae.encode(jnp.zeros((20, 16, 3)))


def test_a_bfloat16_vae_has_gradients(vae):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vae)
    image = jnp.ones((16, 16, 3), jnp.bfloat16)
    exact = jax.grad(lambda v: v.encode(image.astype(jnp.float32)).sum())(
        vae
    ).encoder.conv_in.weight
    rough = jax.grad(lambda v: v.encode(image).astype(jnp.float32).sum())(
        half
    ).encoder.conv_in.weight
    assert float(jnp.linalg.norm(rough.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) < 0.1
