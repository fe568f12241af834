"""Text to image through the public function, on the tiny model at small sizes."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import KEY, with_small_vae

import fluxjax
from fluxjax import DDIM, DrawSettings, Guidance, text_to_image
from fluxjax.flow import uniform_times
from fluxjax.generate import DrawHooks, FirstBlock, WeakNetwork, model_times, seed_key
from fluxjax.generate.prompt_batch import distilled_guidance
from fluxjax.generate.prompted import batches
from fluxjax.generate.samplers import INTEGRATORS, TIMERS, integrator, timer
from fluxjax.kernels import Nag, isolated_attention
from fluxjax.nets import DegradedBlocks

# XLA:CPU's sums depend on the batch: some 1e-6 for a network, carried through steps and decoder.
BATCH_BOUND = 1e-4
SETTINGS = {"steps": 2, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def tiny(tiny):
    """The tiny model with a smaller VAE, which is compiled for each size of batches."""
    return with_small_vae(tiny)


def draw(tiny, prompt="a red star on white", *, key=KEY, guidance=Guidance(), **options):
    texts = {}
    for name in ("prompt_2", "negative_prompt"):
        if name in options:
            texts[name] = options.pop(name)
    settings = DrawSettings(**SETTINGS | options)
    return np.asarray(
        text_to_image(tiny, prompt, key=key, settings=settings, guidance=guidance, **texts)
    )


@pytest.fixture(scope="module")
def base(tiny):
    return draw(tiny)


def test_images_have_the_size_and_range_that_the_settings_say(base):
    assert base.shape == (1, 32, 48, 3)
    assert base.dtype == np.float32
    assert np.abs(base).max() <= 1


def test_an_image_does_not_depend_on_how_many_are_drawn_or_on_the_batch(tiny, base):
    many = draw(tiny, images=5)
    for batch in (1, 2):
        np.testing.assert_allclose(draw(tiny, images=5, batch=batch), many, atol=BATCH_BOUND)
    np.testing.assert_allclose(base[0], many[0], atol=BATCH_BOUND)
    assert np.abs(many[0] - many[1]).max() > 0.01


def test_several_prompts_each_get_their_own_images(tiny):
    prompts = ["a red star on white", "a blue ring on black"]
    both = draw(tiny, prompts, images=2)
    assert both.shape[0] == 4
    repeated = draw(tiny, [prompts[1]] * 2, images=2)
    np.testing.assert_allclose(both[2:], repeated[2:], atol=BATCH_BOUND)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue ring on black"},
        {"key": jax.random.key(1)},
        {"distilled_guidance": 1.0},
        {"prompt_2": "a blue ring"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_prompt_seed_guidance_and_second_prompt_change_the_image(tiny, base, change):
    assert np.abs(draw(tiny, **change) - base).max() > 0.01


def test_another_prompt_seed_scale_or_time_compiles_nothing(tiny, base):
    """A listener counts the programs that XLA compiles."""
    guided = {"negative_prompt": "a blue ring", "guidance": Guidance(scale=2.0)}
    draw(tiny, **guided)
    draw(tiny, times=[1.0, 0.5, 0.0], steps=None)
    other_key = jax.random.key(5)  # a program of JAX's own
    compiled = []

    def listen(event, seconds, fun_name=None, **_):
        if "backend_compile" in event:
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    draw(tiny, "a small blue ring on black", key=other_key, distilled_guidance=2.0)
    draw(tiny, negative_prompt="a star", guidance=Guidance(scale=3.5))
    draw(tiny, times=[1.0, 0.4, 0.0], steps=None)
    assert not compiled
    draw(tiny, steps=3)
    assert compiled  # the listener hears what does compile


def test_bad_arguments_are_refused(tiny):
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 60x48"):
        draw(tiny, height=60)
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 0x48"):
        draw(tiny, height=0)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        draw(tiny, steps=0)
    with pytest.raises(ValueError, match="at least one prompt, image and batch"):
        draw(tiny, images=0)
    with pytest.raises(ValueError, match="1 prompts and 2 second prompts"):
        draw(tiny, prompt_2=["a", "b"])
    with pytest.raises(ValueError, match="one number, or one for each of the 1 images, got 2"):
        draw(tiny, distilled_guidance=[1.0, 2.0])
    with pytest.raises(ValueError, match="does nothing without guidance away from it"):
        draw(tiny, negative_prompt="a blue ring")


def test_a_mistake_shows_few_frames(tiny):
    """The user's own frame, the function, the checks: not the type checker's."""
    with pytest.raises(ValueError, match="key") as caught:
        text_to_image(tiny, "x", key=0)
    assert len(caught.traceback) <= 6


def test_a_guidance_that_the_model_does_not_take_is_refused(tiny):
    config = fluxjax.FluxConfig(**{**vars(tiny.flux.config), "guidance_embed": False})
    schnell = eqx.filter_eval_shape(fluxjax.Flux, config, key=KEY)
    assert distilled_guidance(schnell, tiny.defaults, None) is None
    with pytest.raises(ValueError, match="no guidance embedder"):
        distilled_guidance(schnell, tiny.defaults, 2.0)


def test_batches_have_one_size_and_hold_every_number():
    assert batches(5, 2) == [[0, 1], [2, 3], [4, 4]]
    assert batches(2, 4) == [[0, 1]]


def test_with_a_stochastic_step_an_image_does_not_depend_on_its_batch_either(tiny):
    many = draw(tiny, images=3, step=DDIM(1.0))
    alone = draw(tiny, images=3, batch=1, step=DDIM(1.0))
    np.testing.assert_allclose(alone, many, atol=BATCH_BOUND)


def test_guidance_leads_away_from_the_negative_prompt(tiny, base):
    guided = draw(tiny, negative_prompt="a blue ring on black", guidance=Guidance(scale=2.0))
    assert np.abs(guided - base).max() > 0.01
    # At a scale of 1 that is an array, only the prompt is evaluated.
    one = Guidance(scale=jnp.float32(1.0))
    unguided = draw(tiny, negative_prompt="a blue ring", guidance=one)
    np.testing.assert_allclose(unguided, base, atol=BATCH_BOUND)
    # Guidance away from the prompt itself changes nothing.
    same = draw(tiny, negative_prompt="a red star on white", guidance=Guidance(scale=3.0))
    np.testing.assert_allclose(same, base, atol=10 * BATCH_BOUND)


def test_scales_may_differ_from_image_to_image(tiny):
    scales = jnp.array([1.0, 2.0, 3.0])
    guided = draw(
        tiny, images=3, batch=2, negative_prompt="a ring", guidance=Guidance(scale=scales)
    )
    for number, scale in enumerate(scales):
        alone = draw(tiny, images=3, negative_prompt="a ring", guidance=Guidance(scale=scale))
        np.testing.assert_allclose(guided[number], alone[number], atol=BATCH_BOUND)


def test_images_of_seeds_are_those_that_each_seed_draws_alone(tiny):
    """Also with a guidance scale for each image, and with a step that draws noise."""
    settings = DrawSettings(**SETTINGS, step=DDIM(1.0))
    prompts, scales = ["a red star on white", "a blue ring on black"], [1.0, 2.0, 3.0, 4.0]
    together = text_to_image(
        tiny, prompts, settings=replace(settings, seeds=[7, 2**40], distilled_guidance=scales)
    )
    for number, scale in enumerate(scales):
        seed, prompt = (7, 2**40)[number % 2], prompts[number // 2]
        own = replace(settings, distilled_guidance=scale)
        alone = text_to_image(tiny, prompt, key=seed_key(seed), settings=own)
        np.testing.assert_allclose(together[number], alone[0], atol=BATCH_BOUND)
    for wrong in (
        {"key": KEY, "settings": DrawSettings(seeds=[1])},
        {"settings": DrawSettings(seeds=[1], images=2)},
        {"settings": DrawSettings(seeds=[])},
    ):
        with pytest.raises(ValueError, match="an image for each of DrawSettings"):
            text_to_image(tiny, "a star", **wrong)
    with pytest.raises(ValueError, match="needs a key=, or DrawSettings"):
        text_to_image(tiny, "a star")


def test_hooks_may_hear_of_every_step(tiny):
    class Steps(DrawHooks):
        steps_between = 2

        def __init__(self):
            self.done = []

        def progress(self, progress):
            self.done.append(progress.done)

    hooks = Steps()
    settings = DrawSettings(**{**SETTINGS, "steps": 5})
    text_to_image(tiny, "a red star on white", key=KEY, settings=settings, hooks=hooks)
    assert {2, 4, 5} <= set(hooks.done)


def test_nag_and_degraded_blocks_guide_the_image(tiny, base):
    nothing = draw(tiny, negative_prompt="a blue ring", guidance=Guidance(nag=Nag(1.0)))
    np.testing.assert_allclose(nothing, base, atol=BATCH_BOUND)
    blocks = DegradedBlocks(tiny.flux.config, double=[1], attention=isolated_attention)
    none = draw(tiny, guidance=Guidance(weak=WeakNetwork(blocks, 0.0)))
    np.testing.assert_allclose(none, base, atol=BATCH_BOUND)
    skipped = DegradedBlocks(tiny.flux.config, single=[0])
    for guidance in (
        Guidance(nag=Nag(4.0)),
        Guidance(weak=WeakNetwork(blocks, 1.0)),
        Guidance(weak=WeakNetwork(skipped, 1.0)),
    ):
        assert np.abs(draw(tiny, guidance=guidance) - base).max() > 0.01
    with pytest.raises(ValueError, match="takes one custom attention"):
        draw(tiny, guidance=Guidance(nag=Nag(4.0), weak=WeakNetwork(blocks, 1.0)))


def test_a_cache_at_threshold_0_changes_nothing(tiny):
    plain = draw(tiny, images=3, steps=6)
    cached = draw(tiny, images=3, steps=6, guidance=Guidance(cache=FirstBlock(0.0)))
    np.testing.assert_array_equal(cached, plain)
    # With so large a threshold the blocks run once.
    once = draw(tiny, images=3, steps=6, guidance=Guidance(cache=FirstBlock(100.0)))
    assert np.abs(once - plain).max() > 0.01


def test_times_and_steps_are_one_or_the_other(tiny, base):
    times = model_times(tiny.defaults, 2, 32, 48)
    np.testing.assert_array_equal(draw(tiny, steps=None, times=times), base)
    with pytest.raises(ValueError, match="not both"):
        draw(tiny, times=uniform_times(3))


@pytest.mark.parametrize("name", INTEGRATORS)
def test_every_integrator_by_name_draws_with_a_timer(tiny, name):
    """Each of them on latents, so that the decoder is compiled once for all."""
    kind = TIMERS[list(INTEGRATORS).index(name) % len(TIMERS)]
    times = timer(kind, 2, tiny.defaults, 32, 48)
    image = draw(tiny, steps=None, times=times, step=integrator(name))
    assert np.isfinite(image).all()


@pytest.mark.parametrize(
    ("network", "stage"),
    [("t5", "the text encoders"), ("flux", "denoising"), ("vae", "decoding")],
)
def test_an_image_that_is_not_finite_is_refused_with_its_stage(tiny, network, stage):
    whole = getattr(tiny, network)
    weights = eqx.filter(whole, eqx.is_inexact_array)
    broken = jax.tree.map(lambda x: x * jnp.float32("nan"), weights)
    models = tiny._replace(**{network: eqx.combine(broken, whole)})
    with pytest.raises(ValueError, match=f"NaN or infinity after {stage}"):
        draw(models)


def test_gradients_pass_through_drawing(tiny):
    """The gradient of a scale beside a central difference, through sampler and decoder."""
    settings = DrawSettings(**SETTINGS)  # of which the program without gradients is compiled

    def brightness(scale):
        guidance = Guidance(scale=scale)
        options = {"key": KEY, "settings": settings, "guidance": guidance}
        return text_to_image(tiny, "a red star", negative_prompt="a ring", **options).mean()

    gradient = jax.grad(brightness)(jnp.float32(2.0))
    step = jnp.float32(0.02)
    difference = (brightness(2 + step) - brightness(2 - step)) / (2 * step)
    # The truncation error is of second order in the step; the rest is float32's.
    np.testing.assert_allclose(gradient, difference, rtol=0.02)
