"""Step caching: bitwise nothing at threshold 0, one decision for a batch, outputs reused."""

import itertools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_flux

from fluxjax import Euler, Flux, Heun, attention, flow_times, stream
from fluxjax.flow import Guided, sample
from fluxjax.generate import CachedFlux, Conditioning, FirstBlock, TeaCache, step_cache
from fluxjax.generate.prompt_batch import as_arrays
from fluxjax.kernels import Nag

TXT, VEC, NOISE = draw(TEXT, 12, seed=3), draw(6, seed=4), draw(IMAGE, 8)
TIMES = flow_times(10)
PROMPT = Conditioning(TXT, VEC, IDS, jnp.float32(2.0))
# A change's own size, so that thresholds mean the same for both.
IDENTITY = (1.0, 0.0)


@pytest.fixture(scope="module")
def flux():
    return small_flux()


@eqx.filter_jit
def sampled(flux, reuse, noise, step, options):
    return sample(Guided(CachedFlux(flux, reuse, **options), PROMPT), noise, TIMES, step=step)


def run(flux, reuse, noise=NOISE, *, step=Heun(), **options):
    """Sample with thresholds and times as arrays, so that few programs are compiled."""
    return sampled(flux, as_arrays(reuse), noise, step, options)


@pytest.mark.parametrize("kind", [FirstBlock, TeaCache])
def test_threshold_0_is_bitwise_the_plain_result(flux, kind):
    velocity = eqx.Partial(flux, txt=TXT, vec=VEC, guidance=2.0, img_ids=IDS)
    cached = run(flux, kind(0.0) if kind is FirstBlock else TeaCache(0.0, polynomial=(-1.0, 0.0)))
    np.testing.assert_array_equal(
        cached.x, eqx.filter_jit(sample)(velocity, NOISE, TIMES, step=Heun()).x
    )
    assert int(cached.memory.positive.reused) == 0


class Stages(NamedTuple):
    """What the network's parts say at one evaluation."""

    entered: jax.Array
    after_first: jax.Array
    after_all: jax.Array
    steer: jax.Array
    final: jax.Array


@eqx.filter_jit
def stages(flux, x, t) -> Stages:
    hidden = flux.embed(x, t, flux.prepare(t[None], txt=TXT, vec=VEC, img_ids=IDS, guidance=2.0))
    steer = hidden.modulation
    return Stages(
        hidden.img, flux.first(hidden)[0], flux.blocks(hidden), steer.double.img[0], steer.final
    )


@pytest.mark.parametrize("kind", [FirstBlock, TeaCache])
def test_of_everything_but_the_first_evaluation_the_blocks_are_reused(flux, kind):
    result = run(flux, kind(float("inf")), step=Euler())
    assert int(result.memory.positive.reused) == len(TIMES) - 2
    # By hand: what the blocks added at the first time is added again after the embedding, or after
    # the first block.
    x, added = NOISE, None
    for t, u in itertools.pairwise(TIMES):
        now = stages(flux, x, t)
        img = now.after_first if kind is FirstBlock else now.entered
        added = now.after_all - img if added is None else added
        x = x + (u - t) * flux.final(img + added, now.final)
    np.testing.assert_allclose(result.x, x, atol=1e-5)


def relative(new, old):
    return float(np.abs(np.asarray(new) - old).mean() / np.abs(old).mean())


@pytest.mark.parametrize("kind", [FirstBlock, TeaCache])
def test_reuse_follows_the_gathered_change(flux, kind):
    """Every evaluation's choice, beside one made here from the network's own stages."""
    reuse = FirstBlock(0.6) if kind is FirstBlock else TeaCache(0.3, polynomial=IDENTITY)
    chosen, old, distance = [], None, 0.0
    x, added = NOISE, None
    for t, u in itertools.pairwise(TIMES):
        now = stages(flux, x, t)
        if kind is FirstBlock:
            signal, base = np.asarray(now.after_first - now.entered), now.after_first
        else:
            shift, scale = np.split(np.asarray(now.steer), 6)[:2]
            entered = np.asarray(now.entered)
            centred = entered - entered.mean(-1, keepdims=True)
            signal, base = (
                centred / centred.std(-1, keepdims=True) * (1 + scale) + shift,
                now.entered,
            )
        change = float("inf") if old is None else relative(signal, old)
        distance = change if kind is FirstBlock else distance + change
        chosen.append(distance < float(reuse.threshold))
        if not chosen[-1]:
            added, distance = now.after_all - base, 0.0
        old = signal if kind is TeaCache or not chosen[-1] else old
        x = x + (u - t) * flux.final(base + added, now.final)
    assert 0 < sum(chosen) < len(TIMES) - 2  # both happen
    result = run(flux, reuse, step=Euler())
    assert int(result.memory.positive.reused) == sum(chosen)
    np.testing.assert_allclose(result.x, x, atol=2e-5)


def test_outside_of_its_times_nothing_is_reused(flux):
    assert (
        int(run(flux, FirstBlock(float("inf"), low=0.5)).memory.positive.reused)
        == np.sum(evaluated() >= 0.5) - 1
    )
    assert int(run(flux, FirstBlock(float("inf"), high=0.5)).memory.positive.reused) == np.sum(
        evaluated() <= 0.5
    )


def evaluated():
    """The times at which Heun's steps evaluate."""
    return np.repeat(np.asarray(TIMES), 2)[1:-1]


def counted(calls):
    def attend(q, k, v, txt_tokens):
        jax.debug.callback(lambda: calls.append(1))
        return attention(q, k, v)

    return attend


def test_the_blocks_of_a_reused_step_are_not_run_in_a_batch_either(flux):
    calls = []
    noises = jnp.stack([NOISE, 1.1 * NOISE, NOISE - 0.2])

    @eqx.filter_jit
    def many(reuse):
        cached = CachedFlux(flux, reuse, attention=counted(calls), image_axes=("images",))
        velocity = Guided(cached, PROMPT)
        return jax.vmap(lambda noise: sample(velocity, noise, TIMES), axis_name="images")(noises)

    blocks, steps = CONFIG.double_depth + CONFIG.single_depth, len(TIMES) - 1
    for threshold, runs in ((float("inf"), 1), (0.0, steps)):
        calls.clear()
        result = many(FirstBlock(jnp.float32(threshold)))
        jax.block_until_ready(result.x)
        jax.effects_barrier()
        # The first block is always run. A callback of a batch that needs none of it is called once.
        assert len(calls) == steps + runs * (blocks - 1)
        np.testing.assert_array_equal(result.memory.positive.reused, [steps - runs] * 3)


def test_all_of_a_batch_reuse_when_the_one_that_changes_most_may(flux):
    noises = jnp.stack([NOISE, 4.0 * NOISE, draw(IMAGE, 8, seed=8)])

    @eqx.filter_jit
    def together(reuse):
        velocity = Guided(CachedFlux(flux, reuse, image_axes=("images",)), PROMPT)
        return jax.vmap(
            lambda noise: sample(velocity, noise, TIMES).memory.positive.reused, axis_name="images"
        )(noises)

    for threshold in (0.5, 0.6, 0.8):
        counts = together(FirstBlock(jnp.float32(threshold)))
        assert len(set(counts.tolist())) == 1
        alone = [
            int(run(flux, FirstBlock(threshold), noise, step=Euler()).memory.positive.reused)
            for noise in noises
        ]
        assert int(counts[0]) <= min(alone)


def test_with_two_conditions_each_has_a_memory_of_its_own(flux):
    negative = Conditioning(draw(TEXT, 12, seed=9), draw(6, seed=10), IDS, jnp.float32(2.0))

    def network(x, t, one):
        return flux(x, t, txt=one.txt, vec=one.vec, guidance=2.0, img_ids=IDS)

    @eqx.filter_jit
    def guided(velocity):
        return sample(Guided(velocity, PROMPT, negative, 3.0), NOISE, TIMES)

    cached = guided(CachedFlux(flux, FirstBlock(0.0)))
    # One batch of two, and one after the other: XLA:CPU's sums differ by some 1e-6.
    np.testing.assert_allclose(cached.x, guided(network).x, atol=1e-4)
    assert np.abs(cached.memory.positive.signal - cached.memory.negative.signal).max() > 1e-3


def test_with_an_attention_that_guides_and_step_by_step_it_is_the_same(flux):
    both = jnp.concatenate([draw(TEXT, 12, seed=9), TXT])

    def guided(threshold):
        return Guided(
            CachedFlux(flux, FirstBlock(jnp.float32(threshold)), attention=Nag(3.0)),
            Conditioning(both, VEC, IDS, jnp.float32(2.0)),
        )

    jitted = eqx.filter_jit(sample)
    scanned = jitted(guided(0.6), NOISE, TIMES)
    assert int(scanned.memory.positive.reused) > 0
    *_, last = stream(guided(0.6), NOISE, TIMES)
    np.testing.assert_allclose(last.x, scanned.x, atol=1e-6)
    velocity = eqx.Partial(flux, txt=both, vec=VEC, guidance=2.0, img_ids=IDS, attention=Nag(3.0))
    np.testing.assert_array_equal(
        jitted(guided(0.0), NOISE, TIMES).x, jitted(velocity, NOISE, TIMES).x
    )


def test_another_threshold_compiles_nothing(flux):
    traces = []

    @eqx.filter_jit
    def go(reuse):
        traces.append(1)
        return run(flux, reuse).x

    results = [go(FirstBlock(jnp.float32(threshold))) for threshold in (0.0, 0.6, 0.8)]
    assert len(traces) == 1
    assert np.abs(results[0] - results[2]).max() > 1e-6


def test_a_network_without_double_blocks_is_refused():
    config = type(CONFIG)(**{**vars(CONFIG), "double_depth": 0})
    with pytest.raises(ValueError, match="has none"):
        CachedFlux(eqx.filter_eval_shape(Flux, config, key=jax.random.key(0)), FirstBlock(0.1))


def test_caches_are_named_with_their_thresholds():
    assert (type(step_cache("0.1")), step_cache("0.1").threshold) == (FirstBlock, 0.1)
    assert (type(step_cache("teacache:0.4")), step_cache("teacache:0.4").threshold) == (
        TeaCache,
        0.4,
    )
    for wrong in ("teacache", "second_block:0.1", "-1", "nan", ""):
        with pytest.raises(ValueError, match="Write a threshold"):
            step_cache(wrong)
