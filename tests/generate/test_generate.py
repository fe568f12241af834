import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxjax
from fluxjax import DDIM, Nag, text_to_image
from fluxjax.flow import DPMpp2S, Midpoint, uniform_times
from fluxjax.generate import FirstBlock
from fluxjax.generate.draw import batches, denoise, guidance_scale, model_times, noise_batch
from fluxjax.generate.samplers import INTEGRATORS, TIMERS, integrator, timer
from fluxjax.generate.text import Text
from fluxjax.kernels import isolated_attention
from fluxjax.nets import DegradedBlocks

KEY = jax.random.key(0)
# XLA:CPU's sums depend on the batch: some 1e-6 a network, carried through the steps and the decoder.
BATCH_BOUND = 1e-4


def draw(tiny, prompt="a red star on white", **options):
    return np.asarray(
        text_to_image(tiny, prompt, **{"key": KEY, "steps": 2, "height": 64, "width": 96} | options)
    )


def test_images_have_the_asked_size_and_range(tiny):
    image = draw(tiny)
    assert image.shape == (1, 64, 96, 3)
    assert image.dtype == np.float32
    assert np.abs(image).max() <= 1


def test_an_image_does_not_depend_on_how_many_are_drawn_or_on_the_batch(tiny):
    many = draw(tiny, images=5)
    for batch in (1, 2, 5):
        np.testing.assert_allclose(draw(tiny, images=5, batch=batch), many, atol=BATCH_BOUND)
    np.testing.assert_allclose(draw(tiny, images=1)[0], many[0], atol=BATCH_BOUND)
    assert np.abs(many[0] - many[1]).max() > 0.01


def test_several_prompts_each_get_their_own_images(tiny):
    prompts = ["a red star on white", "a blue ring on black"]
    both = draw(tiny, prompts, images=2)
    assert both.shape[0] == 4
    repeated = draw(tiny, [prompts[1]] * 2, images=2)
    np.testing.assert_allclose(both[2:], repeated[2:], atol=BATCH_BOUND)


def test_prompt_seed_guidance_and_second_prompt_change_the_image(tiny):
    base = draw(tiny)
    changes = [
        {"prompt": "a blue ring on black"},
        {"key": jax.random.key(1)},
        {"guidance": 1.0},
        {"prompt_2": "a blue ring"},
    ]
    for change in changes:
        assert np.abs(draw(tiny, **change) - base).max() > 0.01, change


def test_a_second_prompt_seed_or_guidance_compiles_nothing(tiny):
    draw(tiny)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    draw(tiny, "a small blue ring on black", key=jax.random.key(5), guidance=2.0)
    assert not compiled
    draw(tiny, steps=3)
    assert compiled  # the listener hears what does compile


def test_bad_arguments_are_refused(tiny):
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 60x96"):
        draw(tiny, height=60)
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 0x96"):
        draw(tiny, height=0)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        draw(tiny, steps=0)
    with pytest.raises(ValueError, match="at least one prompt, image and batch"):
        draw(tiny, images=0)
    with pytest.raises(ValueError, match="1 prompts and 2 second prompts"):
        draw(tiny, prompt_2=["a", "b"])


def test_guidance_for_a_model_without_it_is_refused(tiny):
    config = fluxjax.FluxConfig(**{**vars(tiny.flux.config), "guidance_embed": False})
    schnell = eqx.filter_eval_shape(fluxjax.Flux, config, key=KEY)
    assert guidance_scale(schnell, tiny.defaults, None) is None
    with pytest.raises(ValueError, match="no guidance embedder"):
        guidance_scale(schnell, tiny.defaults, 2.0)


def test_batches_have_one_size_and_hold_every_number():
    assert batches(5, 2) == [[0, 1], [2, 3], [4, 4]]
    assert batches(2, 4) == [[0, 1, 1, 1]]


def test_with_a_stochastic_step_an_image_does_not_depend_on_its_batch_either(tiny):
    many = draw(tiny, images=3, step=DDIM(1.0))
    np.testing.assert_allclose(
        draw(tiny, images=3, batch=1, step=DDIM(1.0)), many, atol=BATCH_BOUND
    )
    assert np.abs(draw(tiny, images=3) - many).max() > 0.01


def test_guidance_leads_away_from_the_negative_prompt(tiny):
    base = draw(tiny)
    away = draw(tiny, negative_prompt="a blue ring on black", cfg=2.0)
    assert np.abs(away - base).max() > 0.01
    # At a scale of 1 given as an array, the prompt alone is evaluated.
    np.testing.assert_allclose(
        draw(tiny, negative_prompt="a blue ring", cfg=jax.numpy.float32(1.0)),
        base,
        atol=BATCH_BOUND,
    )
    # Away from the prompt itself is nowhere.
    np.testing.assert_allclose(
        draw(tiny, negative_prompt="a red star on white", cfg=3.0), base, atol=10 * BATCH_BOUND
    )


def test_a_cache_decides_for_the_batch_and_at_threshold_0_is_nothing(tiny):
    plain = draw(tiny, images=3, steps=6)
    np.testing.assert_array_equal(draw(tiny, images=3, steps=6, reuse=FirstBlock(0.0)), plain)
    # So large a threshold runs the blocks once.
    assert np.abs(draw(tiny, images=3, steps=6, reuse=FirstBlock(100.0)) - plain).max() > 0.01


def test_nag_and_weakened_blocks_guide_the_image(tiny):
    base, config = draw(tiny), tiny.flux.config
    np.testing.assert_allclose(
        draw(tiny, nag=Nag(1.0), negative_prompt="a blue ring"), base, atol=BATCH_BOUND
    )
    weaken = DegradedBlocks(config, double=[1], attention=isolated_attention)
    np.testing.assert_allclose(draw(tiny, weaken=weaken), base, atol=BATCH_BOUND)
    for way in (
        {"nag": Nag(4.0)},
        {"weaken": weaken, "strength": 1.0},
        {"weaken": DegradedBlocks(config, single=[0]), "strength": 1.0},
    ):
        assert np.abs(draw(tiny, **way) - base).max() > 0.01
    with pytest.raises(ValueError, match="one attention of its own"):
        draw(tiny, nag=Nag(4.0), weaken=weaken)
    with pytest.raises(ValueError, match="without blocks to weaken"):
        draw(tiny, strength=1.0)


def test_times_and_steps_are_one_or_the_other(tiny):
    np.testing.assert_array_equal(
        draw(tiny, steps=None, times=model_times(tiny.defaults, 2, 64, 96)), draw(tiny)
    )
    with pytest.raises(ValueError, match="not both"):
        draw(tiny, times=uniform_times(3))
    with pytest.raises(ValueError, match="does nothing at cfg = 1"):
        draw(tiny, negative_prompt="a blue ring")


class Untold(Midpoint):
    """Midpoint, which does not tell at which times it asks."""

    def evaluation_times(self, t, u):
        return None


@pytest.mark.parametrize(
    "step", [Midpoint(), Untold(), DPMpp2S()], ids=lambda step: type(step).__name__
)
def test_denoising_is_sampling_of_the_network(tiny, step):
    """Whatever is computed before the loop."""
    flux, key, times = tiny.flux, jax.random.key(3), fluxjax.flow_times(3)
    text = Text(
        0.3 * jax.random.normal(key, (1, 8, flux.config.context)),
        jax.random.normal(key, (1, flux.config.pooled)),
    )
    noise, scale = fluxjax.initial_noise(key, 64, 64)[None], jnp.float32(3.5)
    velocity = eqx.Partial(
        flux, txt=text.txt[0], vec=text.vec[0], img_ids=fluxjax.image_ids(64, 64), guidance=scale
    )
    end = eqx.filter_jit(fluxjax.sample)(
        velocity, fluxjax.pack_latents(noise[0]), times, step=step
    ).x
    found = denoise(flux, text, noise, times, scale, step=step)[0]
    np.testing.assert_allclose(found, fluxjax.unpack_latents(end, 64, 64), atol=1e-4)


@pytest.mark.parametrize("name", INTEGRATORS)
def test_every_integrator_by_name_draws_with_every_timer(tiny, name):
    times = timer(TIMERS[list(INTEGRATORS).index(name) % len(TIMERS)], 2, tiny.defaults, 32, 32)
    image = text_to_image(
        tiny, "a red star", key=KEY, height=32, width=32, times=times, step=integrator(name)
    )
    assert np.isfinite(image).all()


@pytest.mark.parametrize(
    ("network", "stage"),
    [("t5", "the text encoders"), ("flux", "denoising"), ("vae", "decoding")],
    ids=lambda x: x,
)
def test_an_image_that_is_not_finite_is_refused_with_its_stage(tiny, network, stage):
    spoilt = jax.tree.map(
        lambda x: x * jnp.float32("nan"), eqx.filter(getattr(tiny, network), eqx.is_inexact_array)
    )
    whole = eqx.combine(spoilt, getattr(tiny, network))
    with pytest.raises(ValueError, match=f"NaN or infinity after {stage}"):
        draw(tiny._replace(**{network: whole}), steps=1, height=32, width=32)


def test_a_batch_has_no_more_rows_than_images(tiny, monkeypatch):
    rows = []
    monkeypatch.setattr(
        "fluxjax.generate.noise_batch",
        lambda *a, **o: rows.append(len(a[1])) or noise_batch(*a, **o),
    )
    draw(tiny, images=2, batch=64, steps=1)
    assert rows == [2]
