"""ControlNets as part of a conditioning: beside the networks called by hand."""

from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of, relative
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_controlnet, small_flux

from fluxjax import (
    Conditioning,
    Guidance,
    ImageBatch,
    Recipe,
    denoise,
    flow_times,
    flux_velocity,
    pack_latents,
    shard,
)
from fluxjax.generate import (
    Control,
    ControlSettings,
    FirstBlock,
    ReferenceTokens,
    TeaCache,
    WeakNetwork,
    control_times,
    controlnet_condition,
)
from fluxjax.kernels import Nag, isolated_attention
from fluxjax.nets import DegradedBlocks

NOISE, TIMES, T = draw(IMAGE, 8), flow_times(4), jnp.float32(0.6)
POSITIVE = Conditioning(draw(TEXT, 12, seed=3), draw(6, seed=4), IDS, jnp.float32(2.0))
NEGATIVE = Conditioning(draw(TEXT, 12, seed=9), draw(6, seed=10), IDS, jnp.float32(2.0))
LATENT, OTHER = draw(IMAGE, 8, seed=7), draw(IMAGE, 8, seed=8)
# Two programs of the same sums: what is prepared is compiled apart from the rest.
BOUND = 2e-5


@pytest.fixture(scope="module")
def flux():
    return small_flux()


@pytest.fixture(scope="module")
def net():
    return small_controlnet(modes=3)


def control_of(net, condition=LATENT, *, scale=0.8, mode=1, low=-1.0, high=1.0, **fields):
    numbers = {"scale": jnp.float32(scale), "low": jnp.float32(low), "high": jnp.float32(high)}
    mode = None if mode is None else jnp.int32(mode)
    return Control(net, condition, mode, **numbers, **fields)


def with_control(conditioning, *control):
    return replace(conditioning, control=control)


prepare = eqx.filter_jit(flux_velocity)


@eqx.filter_jit
def evaluate(velocity, x=NOISE, t=T):
    return velocity(x, t)


@eqx.filter_jit
def guided(flux, positive, negative=None, guidance=Guidance(), times=None):
    """Evaluate the velocity in the program that also prepares it."""
    return flux_velocity(flux, positive, negative, guidance=guidance, times=times)(NOISE, T)


@eqx.filter_jit
def residuals_by_hand(net, condition, text, scale=0.8, mode=1):
    inputs = {"txt": text.txt, "vec": text.vec, "img_ids": IDS, "guidance": text.guidance}
    residuals = net(NOISE, T, condition=condition, mode=jnp.int32(mode), **inputs)
    return residuals * jnp.float32(scale)


@eqx.filter_jit
def by_hand(flux, text, control=(), x=NOISE, **options):
    ids = jnp.concatenate([IDS, IDS + 1])[: len(x)]
    inputs = {"txt": text.txt, "vec": text.vec, "img_ids": ids, "guidance": text.guidance}
    return flux(x, T, **inputs, control=control, **options)


def test_it_is_the_network_with_scaled_residuals_also_prepared(flux, net):
    positive = with_control(POSITIVE, control_of(net))
    expected = by_hand(flux, POSITIVE, (residuals_by_hand(net, LATENT, POSITIVE),))
    for times in (None, jnp.float32([0.9, 0.6])):
        found = evaluate(prepare(flux, positive, times=times))
        np.testing.assert_allclose(found, expected, atol=BOUND)
    assert np.abs(expected - by_hand(flux, POSITIVE)).max() > 1e-2


def test_several_are_added_up(flux, net):
    """Two of one network, and one of another with other blocks."""
    third = small_controlnet(double_depth=1, modes=3)
    controls = (
        control_of(net),
        control_of(net, OTHER, scale=0.3, mode=2),
        control_of(third, scale=0.5),
    )
    residuals = (
        residuals_by_hand(net, LATENT, POSITIVE),
        residuals_by_hand(net, OTHER, POSITIVE, 0.3, 2),
        residuals_by_hand(third, LATENT, POSITIVE, 0.5),
    )
    found = guided(flux, with_control(POSITIVE, *controls))
    np.testing.assert_allclose(found, by_hand(flux, POSITIVE, residuals), atol=BOUND)


def test_off_it_is_bitwise_without(flux, net):
    base = guided(flux, POSITIVE)
    for off in (control_of(net, scale=0.0), control_of(net, low=0.6), control_of(net, high=0.5)):
        found = guided(flux, with_control(POSITIVE, off))
        np.testing.assert_array_equal(found, base)


def test_the_window_is_the_references_rule():
    """diffusers: step i of N is on if i / N >= start and (i + 1) / N <= end."""
    for steps in (1, 4, 10, 28):
        times = flow_times(steps, mu=1.15)
        for start, end in [(0, 1), (0.2, 0.8), (0, 0.8), (0.5, 0.5), (0.3, 0.35), (0, 0.65)]:
            low, high = map(np.asarray, control_times(times, start=start, end=end))
            on = (np.asarray(times) > low) & (np.asarray(times) <= high)
            expected = [i / steps >= start and (i + 1) / steps <= end for i in range(steps)]
            assert on[:-1].tolist() == expected, (steps, start, end)
    assert control_times(flow_times(4))[0] < 0


def test_a_negative_condition_shares_the_residuals_or_has_its_own(flux, net):
    scale = Guidance(scale=jnp.float32(3.0))
    shared = residuals_by_hand(net, LATENT, POSITIVE)
    own = residuals_by_hand(net, LATENT, NEGATIVE)
    positive = np.asarray(by_hand(flux, POSITIVE, (shared,)))
    apart = control_of(net, shared=False)
    cases = [
        (control_of(net), (), (shared,)),
        (apart, (apart,), (own,)),
        (apart, (), ()),
    ]
    for of_positive, of_negative, residuals in cases:
        conditions = with_control(POSITIVE, of_positive), with_control(NEGATIVE, *of_negative)
        found = guided(flux, *conditions, scale, T[None])
        negative = np.asarray(by_hand(flux, NEGATIVE, residuals))
        expected = negative + 3 * (positive - negative)
        np.testing.assert_allclose(found, expected, atol=5 * BOUND)


def test_beside_nag_and_a_weak_network_it_reads_its_own_text(flux, net):
    residuals = (residuals_by_hand(net, LATENT, POSITIVE),)
    positive = with_control(POSITIVE, control_of(net))
    found = guided(flux, positive, NEGATIVE, Guidance(nag=Nag(3.0)))
    both = eqx.tree_at(lambda c: c.txt, POSITIVE, jnp.concatenate([NEGATIVE.txt, POSITIVE.txt]))
    expected = by_hand(flux, both, residuals, attention=Nag(3.0))
    np.testing.assert_allclose(found, expected, atol=BOUND)
    blocks = DegradedBlocks(CONFIG, double=[1], attention=isolated_attention)
    found = guided(flux, positive, None, Guidance(weak=WeakNetwork(blocks, 1.5)))
    strong = np.asarray(by_hand(flux, POSITIVE, residuals))
    degraded = np.asarray(by_hand(flux, POSITIVE, residuals, degraded=blocks))
    expected = strong + 1.5 * (strong - degraded)
    np.testing.assert_allclose(found, expected, atol=2 * BOUND)


def test_reference_tokens_get_no_residuals(flux, net):
    reference = ReferenceTokens(draw(3, 8, seed=30), IDS[:3] + 1)
    positive = replace(with_control(POSITIVE, control_of(net)), reference=reference)
    x = jnp.concatenate([NOISE, reference.tokens])
    residuals = (residuals_by_hand(net, LATENT, POSITIVE),)
    expected = by_hand(flux, POSITIVE, residuals, x)[:IMAGE]
    np.testing.assert_allclose(guided(flux, positive), expected, atol=BOUND)


@pytest.mark.parametrize(("kind", "shared"), [(FirstBlock, True), (TeaCache, False)])
def test_a_step_cache_skips_it_with_the_blocks(flux, net, kind, shared):
    positive = with_control(POSITIVE, control_of(net, shared=shared))

    @eqx.filter_jit
    def run(threshold):
        cache = kind(threshold)
        velocity = flux_velocity(flux, positive, guidance=Guidance(cache=cache))
        first, memory = velocity(NOISE, T, memory=velocity.init(NOISE))
        again, memory = velocity(NOISE, T, memory=memory)
        return first, again, memory.positive.reused

    first, again, reused = run(jnp.float32(1e6))
    expected = by_hand(flux, POSITIVE, (residuals_by_hand(net, LATENT, POSITIVE),))
    np.testing.assert_allclose(first, expected, atol=BOUND)
    np.testing.assert_allclose(again, expected, atol=2 * BOUND)
    assert int(reused) == 1


# Batches of images of 16x80 pixels, which are 5 tokens of 2x2 cells of 2 channels.


def batch_of(count, *control):
    txt = jnp.stack([POSITIVE.txt + 0.1 * number for number in range(count)])
    vec = jnp.stack([POSITIVE.vec] * count)
    conditioning = Conditioning(txt, vec, IDS, jnp.float32(2.0), control=control)
    return ImageBatch(draw(count, 2, 2, 10, seed=11), conditioning)


RECIPE = Recipe(TIMES)


def test_images_of_a_batch_may_have_their_own_conditions_scales_and_modes(flux, net):
    scales = jnp.float32([0.8, 0.3])
    control = Control(net, jnp.stack([LATENT, OTHER]), jnp.int32([1, 2]), scales)
    found = denoise(flux, batch_of(2, control), RECIPE)
    for number, condition in enumerate((LATENT, OTHER)):
        own = control_of(net, condition, scale=scales[number], mode=1 + number)
        expected = denoise(flux, batch_of(2, own), RECIPE)[number]
        np.testing.assert_allclose(found[number], expected, atol=BOUND)


def test_nothing_compiles_for_another_image_scale_mode_or_window(flux, net, monkeypatch):
    traces = []
    # It is called while the program is traced.
    monkeypatch.setattr("fluxjax.generate.draw.check_batch", lambda *inputs: traces.append(1))
    results = []
    for number in range(3):
        settings = {"scale": 0.2 * number, "mode": number, "low": 0.1 * number}
        control = control_of(net, draw(IMAGE, 8, seed=number), **settings)
        results.append(denoise(flux, batch_of(1, control), RECIPE))
    assert len(traces) == 1
    assert np.abs(results[1] - results[2]).max() > 1e-3
    np.testing.assert_array_equal(results[0], denoise(flux, batch_of(1), RECIPE))


def test_a_share_of_the_steps_is_drawn_with_it(flux, net):
    """Four of Euler's steps by hand, of which the second and the third have it."""
    low, high = control_times(TIMES, start=0.25, end=0.75)
    batch = batch_of(1, control_of(net, low=low, high=high))
    without = flux_velocity(flux, POSITIVE)
    with_it = flux_velocity(flux, with_control(POSITIVE, control_of(net)))
    x = pack_latents(batch.noise[0])
    for number, velocity in enumerate((without, with_it, with_it, without)):
        x = x + (TIMES[number + 1] - TIMES[number]) * evaluate(velocity, x, TIMES[number])
    found = denoise(flux, batch, RECIPE)
    np.testing.assert_allclose(pack_latents(found[0]), x, atol=2 * BOUND)


def test_on_a_mesh_it_is_the_same_and_off_bitwise_the_base(flux, net):
    mesh = mesh_of(fsdp=2, tensor=2)
    there, net_there = shard(flux, mesh), shard(net, mesh)
    expected = denoise(flux, batch_of(2, control_of(net)), RECIPE)
    found = denoise(there, batch_of(2, control_of(net_there)), RECIPE, mesh=mesh)
    assert relative(found, expected) <= BOUND
    off = denoise(there, batch_of(2, control_of(net_there, scale=0.0)), RECIPE, mesh=mesh)
    np.testing.assert_array_equal(off, denoise(there, batch_of(2), RECIPE, mesh=mesh))


def test_a_condition_adds_itself_to_both_prompts_or_to_the_positive_one(net):
    image = jnp.tanh(draw(16, 80, 3, seed=9))
    hint = small_controlnet(single_depth=0, hint_image=True)
    for shared in (True, False):
        settings = ControlSettings(scale=0.5, start=0.25, end=0.75, shared=shared)
        condition = controlnet_condition(hint, None, image, settings, dtype=jnp.float32)
        (control,) = condition.for_times(TIMES).add(POSITIVE).control
        assert (control.low, control.high) == (TIMES[3], TIMES[1])
        assert float(control.scale) == 0.5
        assert len(condition.add_to_negative(NEGATIVE).control) == (not shared)
    wide = replace(POSITIVE, img_ids=jnp.concatenate([IDS, IDS]))
    with pytest.raises(ValueError, match="of 5 tokens, and the images that are drawn have 10"):
        condition.add(wide)


def test_what_can_not_be_is_an_error(flux, net):
    image = jnp.zeros((16, 80, 3))
    with pytest.raises(ValueError, match=r"\(vae\)` is needed"):
        controlnet_condition(net, None, image, ControlSettings(mode="tile"), dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"modes 0 to 2\. Choose"):
        controlnet_condition(net, None, image, ControlSettings(mode="pose"), dtype=jnp.float32)
    plain = small_controlnet()
    with pytest.raises(ValueError, match="has no modes"):
        controlnet_condition(plain, None, image, ControlSettings(mode=0), dtype=jnp.float32)
    with pytest.raises(ValueError, match="multiples of 16"):
        controlnet_condition(net, None, image[:9], ControlSettings(mode=0), dtype=jnp.float32)
    for settings in ({"mode": "edges"}, {"start": 0.5, "end": 0.2}, {"scale": float("nan")}):
        with pytest.raises(ValueError, match="ControlSettings"):
            ControlSettings(**settings)
    narrow = small_controlnet(width=16, heads=1)
    with pytest.raises(ValueError, match="width 16, and the transformer has 32"):
        flux_velocity(flux, with_control(POSITIVE, control_of(narrow, mode=None)))
    apart = control_of(net, shared=False)
    positive, negative = with_control(POSITIVE, apart), with_control(NEGATIVE, apart, apart)
    with pytest.raises(ValueError, match="one control for each"):
        flux_velocity(flux, positive, negative)
    mesh = mesh_of(context=2)
    with pytest.raises(ValueError, match="context=1"):
        denoise(shard(flux, mesh), batch_of(1, control_of(net)), RECIPE, mesh=mesh)
