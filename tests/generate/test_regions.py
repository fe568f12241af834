"""Regional prompts: which tokens and cells a region has, and what the transformer makes of it."""

from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, draw, small_controlnet, small_flux

from fluxjax import Conditioning, Guidance, flux_velocity
from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.flow import Mixed
from fluxjax.generate import (
    Control,
    FirstBlock,
    ReferenceTokens,
    Region,
    WeakNetwork,
    image_ids,
    region_labels,
    region_weights,
    regional_condition,
)
from fluxjax.generate.conditioning import bind_control
from fluxjax.generate.text import TextStates
from fluxjax.kernels import Nag, isolated_attention
from fluxjax.nets import DegradedBlocks

HEIGHT, WIDTH = 32, 64  # two rows of four tokens
TOKENS, TEXT = 8, 3
LEFT, RIGHT = Region(box=(0, 0, 0.5, 1)), Region(box=(0.5, 0, 1, 1))
HALVES = np.arange(TOKENS) % 4 < 2  # whether a token lies in the left half
STATES = TextStates(draw(2, TEXT, 12, seed=7), draw(2, 6, seed=8))
POSITIVE = Conditioning(
    draw(TEXT, 12, seed=3), draw(6, seed=4), image_ids(HEIGHT, WIDTH), jnp.float32(2.0)
)
NOISE, T = draw(TOKENS, 64, seed=5), jnp.float32(0.6)
# The same sums in programs that are compiled apart.
BOUND = 2e-5


@pytest.fixture(scope="module")
def flux():
    # Tokens of 64 features, as the weights of mixed velocities have them.
    return small_flux(replace(CONFIG, in_channels=64, out_channels=64))


@eqx.filter_jit
def evaluate(flux, positive, negative=None, guidance=Guidance(), times=None, t=T):
    return flux_velocity(flux, positive, negative, guidance=guidance, times=times)(NOISE, t)


def plain(flux, row):
    """The velocity of a region's prompt as that of the whole image, with the base's pooled text."""
    return evaluate(flux, replace(POSITIVE, txt=STATES.txt[row]))


def condition(regions, states=STATES, **options):
    return regional_condition(states, regions, height=HEIGHT, width=WIDTH, **options)


def test_tokens_belong_to_the_regions_that_cover_half_of_them():
    mask = np.zeros((2, 4))
    mask[1, 1:3] = 1
    regions = [Region(box=(0, 0, 0.4, 1)), Region(box=(0.25, 0.5, 1, 1)), Region(mask=mask)]
    # 0.4 of four columns: the second one by 0.6. What no region covers has the bit after theirs.
    expected = [[1, 1, 8, 8], [1, 7, 6, 2]]
    np.testing.assert_array_equal(region_labels(regions, HEIGHT, WIDTH), np.ravel(expected))
    background = region_labels([Region(), LEFT], HEIGHT, WIDTH)
    np.testing.assert_array_equal(background, np.where(HALVES, 2, 1))


def test_weights_are_shares_of_cells_and_the_rest_is_the_backgrounds():
    narrow = Region(box=(0, 0, 0.1875, 1))  # 12 of 64 pixels: a cell and a half
    base, left = np.asarray(region_weights([narrow], HEIGHT, WIDTH, base=0.2))
    share = np.array([1, 0.5, 0, 0])  # of the first four columns of cells
    cells = np.concatenate([share, np.zeros(4)])
    # A token has two columns of cells: the last index of its features, (channel, row, column).
    tokens = np.tile(cells.reshape(4, 1, 2), (2, 32, 1)).reshape(TOKENS, 64)
    np.testing.assert_allclose(left, 0.8 * tokens, atol=1e-6)
    np.testing.assert_allclose(base, 0.2 + 0.8 * (1 - tokens), atol=1e-6)
    base, left, rest = np.asarray(region_weights([narrow, Region()], HEIGHT, WIDTH))
    np.testing.assert_array_equal(base, 0)
    np.testing.assert_allclose(left + rest, 1, atol=1e-6)


def test_one_region_of_the_whole_image_is_its_prompt(flux):
    whole = condition([Region(box=(0, 0, 1, 1))], STATES.rows([0]), base=0, until=1)
    found = evaluate(flux, whole.add(POSITIVE))
    np.testing.assert_allclose(found, plain(flux, 0), atol=BOUND)
    background = condition([Region()], STATES.rows([0]), base=0, until=1)
    np.testing.assert_allclose(evaluate(flux, background.add(POSITIVE)), found, atol=BOUND)


def test_at_base_1_and_after_their_share_of_the_steps_regions_do_nothing(flux):
    base = evaluate(flux, POSITIVE)
    found = evaluate(flux, condition([LEFT, RIGHT], base=1).add(POSITIVE))
    np.testing.assert_allclose(found, base, atol=1e-6)
    times = jnp.linspace(1, 0, 11)
    regional = condition([LEFT, RIGHT], until=0.4).for_times(times).add(POSITIVE)
    # Of ten steps the first four: those that begin at 1, 0.9, 0.8 and 0.7.
    for t, is_on in ((0.7, True), (0.6, False)):
        found = evaluate(flux, regional, times=times, t=jnp.float32(t))
        difference = np.abs(found - evaluate(flux, POSITIVE, t=jnp.float32(t))).max()
        assert (difference > 1e-3) == is_on
    with pytest.raises(ValueError, match=r"that is none of 2\. Choose 0.5 or more"):
        condition([LEFT, RIGHT]).for_times(jnp.linspace(1, 0, 3))


def test_a_region_does_not_depend_on_the_prompt_of_another(flux):
    prompts = condition([LEFT, RIGHT], base=0, until=1).add(POSITIVE)
    other = STATES._replace(txt=STATES.txt.at[1].multiply(-1))
    changed = condition([LEFT, RIGHT], other, base=0, until=1).add(POSITIVE)
    difference = np.abs(evaluate(flux, prompts) - evaluate(flux, changed)).max(-1)
    np.testing.assert_array_equal(difference > 1e-5, ~HALVES)


def test_reference_tokens_see_all_regions_and_are_seen(flux):
    reference = ReferenceTokens(draw(1, 64, seed=9), jnp.ones((1, 3)))
    whole = condition([Region(box=(0, 0, 1, 1))], STATES.rows([0]), base=0, until=1)
    with_reference = replace(POSITIVE, reference=reference)
    found = evaluate(flux, whole.add(with_reference))
    expected = evaluate(flux, replace(with_reference, txt=STATES.txt[0]))
    np.testing.assert_allclose(found, expected, atol=BOUND)
    halves = condition([LEFT, RIGHT], base=0, until=1)
    assert np.abs(evaluate(flux, halves.add(with_reference)) - found).max() > 1e-3


def test_mixing_takes_the_velocity_of_each_region(flux):
    mixed = condition([LEFT, RIGHT], rule="mix").add(POSITIVE)
    each = []
    for row in range(2):
        each.append(evaluate(flux, replace(POSITIVE, txt=STATES.txt[row], vec=STATES.vec[row])))
    expected = np.where(HALVES[:, None], *each)
    np.testing.assert_allclose(evaluate(flux, mixed), expected, atol=BOUND)
    base = evaluate(flux, POSITIVE)
    shared = evaluate(flux, condition([LEFT, RIGHT], rule="mix", base=0.25).add(POSITIVE))
    np.testing.assert_allclose(shared, 0.25 * base + 0.75 * expected, atol=BOUND)
    # The same by hand, as a program of one's own does it.
    weights = region_weights([LEFT, RIGHT], HEIGHT, WIDTH)
    parts = [lambda x, t, one=one: one for one in (base, *each)]
    by_hand = Mixed(parts, list(weights))(NOISE, T)
    np.testing.assert_allclose(by_hand, expected, atol=1e-6)


def test_a_negative_prompt_is_one_of_the_whole_image(flux):
    negative = replace(POSITIVE, txt=draw(TEXT, 12, seed=9))
    for rule in ("attention", "mix"):
        assert condition([LEFT, RIGHT], rule=rule).add_to_negative(negative) is negative
    positive = condition([LEFT, RIGHT]).add(POSITIVE)
    guided = evaluate(flux, positive, negative, Guidance(scale=jnp.float32(2)))
    expected = 2 * evaluate(flux, positive) - evaluate(flux, negative)
    np.testing.assert_allclose(guided, expected, atol=2 * BOUND)


def test_controlnets_read_the_base_prompt_and_serve_all_that_are_mixed(flux):
    net = small_controlnet(in_channels=64, double_depth=1, single_depth=0)
    control = Control(net, draw(TOKENS, 64, seed=6))
    regional = condition([LEFT, RIGHT]).add(POSITIVE)
    (bound,) = bind_control(replace(regional, control=(control,)))
    np.testing.assert_array_equal(bound.txt, POSITIVE.txt)
    # The same prompt in both regions is that of the whole image.
    same = TextStates(jnp.stack([POSITIVE.txt] * 2), jnp.stack([POSITIVE.vec] * 2))
    controlled = replace(POSITIVE, control=(control,))
    mixed = condition([LEFT, RIGHT], same, rule="mix").add(controlled)
    found, expected = evaluate(flux, mixed), evaluate(flux, controlled)
    np.testing.assert_allclose(found, expected, atol=BOUND)
    assert np.abs(expected - evaluate(flux, POSITIVE)).max() > 1e-3


def test_a_cache_that_never_skips_changes_nothing(flux):
    regional = condition([LEFT, RIGHT]).add(POSITIVE)
    cached = evaluate(flux, regional, None, Guidance(cache=FirstBlock(0.0)))
    np.testing.assert_allclose(cached, evaluate(flux, regional), atol=BOUND)


@pytest.mark.parametrize("rule", ["attention", "mix"])
def test_other_boxes_prompts_and_shares_compile_nothing(flux, rule):
    traced = []

    @eqx.filter_jit
    def velocity(flux, positive):
        traced.append(None)
        return flux_velocity(flux, positive)(NOISE, T)

    velocity(flux, condition([LEFT, RIGHT], rule=rule).add(POSITIVE))
    mask = np.eye(4)
    other = TextStates(STATES.txt + 1, STATES.vec)
    changed = condition([Region(mask=mask), Region()], other, rule=rule, base=0.5)
    velocity(flux, changed.add(POSITIVE))
    assert len(traced) == 1


def test_what_does_not_go_with_regions_is_refused(flux):
    regional = condition([LEFT, RIGHT]).add(POSITIVE)
    mixed = condition([LEFT, RIGHT], rule="mix").add(POSITIVE)
    blocks = DegradedBlocks(flux.config, double=[0], attention=isolated_attention)
    custom = "are a custom attention"
    cases = [
        (flux, regional, {"guidance": Guidance(nag=Nag())}, custom),
        (flux, regional, {"guidance": Guidance(weak=WeakNetwork(blocks, 1.0))}, custom),
        (flux, regional, {"attention": isolated_attention}, custom),
        (flux, mixed, {"guidance": Guidance(nag=Nag())}, "texts of their own"),
        (flux, mixed, {"guidance": Guidance(cache=FirstBlock(0.1))}, "a cache remembers one"),
        (TokenParallelFlux(flux), regional, {}, "split over devices"),
        (TokenParallelFlux(flux), mixed, {}, "split over devices"),
    ]
    for network, positive, options, reason in cases:
        with pytest.raises(ValueError, match=reason):
            flux_velocity(network, positive, POSITIVE, **options)


def test_what_is_no_region_is_refused():
    with pytest.raises(ValueError, match="a box or a mask, got both"):
        Region(box=(0, 0, 1, 1), mask=np.ones((2, 2)))
    for box in [(0.5, 0, 0.5, 1), (0, 0, 1, 1.5), (0, 0, np.nan, 1), (0, 0, 1)]:
        with pytest.raises(ValueError, match="shares of the image"):
            Region(box=box)
    with pytest.raises(ValueError, match="values in"):
        Region(mask=2 * np.ones((2, 2)))
    cases = [
        ([LEFT], {}, "2 encoded prompts and 1 regions"),
        ([LEFT, Region(box=(0, 0, 0.1, 0.1))], {}, "Region 2 of 2 covers half of no token"),
        ([Region(), Region()], {}, "one background at most"),
        ([LEFT, RIGHT], {"rule": "sum"}, "takes one of attention, mix"),
        ([LEFT, RIGHT], {"rule": "mix", "until": 0.5}, "for the rule attention"),
        ([LEFT, RIGHT], {"until": 0}, "is above 0"),
        ([LEFT, RIGHT], {"base": 1.5}, "is a share"),
        ([LEFT, RIGHT], {"rule": "mix", "base": -1}, "is a share"),
    ]
    for regions, options, reason in cases:
        with pytest.raises(ValueError, match=reason):
            condition(regions, **options)
    with pytest.raises(ValueError, match="need 1 to 30 regions, got 0"):
        region_labels([], HEIGHT, WIDTH)
    regional = condition([LEFT, RIGHT])
    with pytest.raises(ValueError, match="has regions already"):
        regional.add(regional.add(POSITIVE))
    with pytest.raises(ValueError, match="8 image tokens and text of 12 features"):
        regional.add(replace(POSITIVE, img_ids=image_ids(32, 32)))
