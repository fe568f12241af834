"""The drawing loop: in segments or at once, on a batch, with what its hooks hear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import batch_of, recipe_of, with_small_vae

from fluxjax import DDIM, UniPC2, denoise, draw_batch
from fluxjax.flow import Heun
from fluxjax.generate import DrawHooks, FirstBlock
from fluxjax.generate.conditioning import split_images


class Listener(DrawHooks):
    """Hooks that note what is run, and the progress."""

    def __init__(self):
        self.stages, self.progresses, self.compiled = [], [], {}

    def run(self, stage, function, *inputs, **options):
        self.stages.append(stage)
        if function not in self.compiled:
            self.compiled[function] = function.lower(*inputs, **options).compile()
        return self.compiled[function](*inputs, **options)

    def progress(self, progress):
        self.progresses.append(progress)


@pytest.fixture(scope="module")
def tiny(tiny):
    """The tiny model with a smaller VAE: each test compiles its decoder."""
    return with_small_vae(tiny)


def drawn(tiny, batch, recipe, hooks=None):
    return draw_batch(tiny.flux, tiny.vae, batch, recipe, dtype=jnp.float32, hooks=hooks)


@pytest.mark.parametrize(
    "step", [Heun(), UniPC2(), DDIM(1.0)], ids=lambda step: type(step).__name__
)
def test_segments_give_what_one_program_gives(tiny, step):
    batch, recipe = batch_of(tiny, 2, height=32, width=48, step=step), recipe_of(5, step)
    listener = Listener()
    found = drawn(tiny, batch, recipe, listener)
    np.testing.assert_allclose(found.latents, denoise(tiny.flux, batch, recipe), atol=2e-5)
    done = [progress.done for progress in listener.progresses]
    assert done[0] == 1
    assert done[-1] == 5
    assert done == sorted(set(done))
    assert listener.stages.count("decode") == 1
    # One program for the preparation, one for every segment, one for the decoder.
    assert len(listener.compiled) == 3
    np.testing.assert_array_equal(found.finite_steps, [5, 5])


def test_the_last_estimate_is_the_image(tiny):
    listener = Listener()
    batch = batch_of(tiny, 1, height=32, width=48)
    found = drawn(tiny, batch, recipe_of(3), listener)
    last = listener.progresses[-1].estimate
    # At t = 0 the line through both ends of the last step meets the end itself.
    np.testing.assert_allclose(np.sort(last.ravel()), np.sort(found.latents.ravel()), atol=1e-5)


def test_it_counts_what_a_cache_skips_and_where_numbers_stop_being_finite(tiny):
    batch = batch_of(tiny, 2, height=32, width=48)
    cached = drawn(tiny, batch, recipe_of(4, cache=FirstBlock(jnp.float32(100.0))), Listener())
    assert int(cached.reused) == 3
    broken = jax.tree.map(lambda x: x, batch)
    broken = type(batch)(batch.noise.at[1].set(jnp.inf), batch.positive)
    np.testing.assert_array_equal(drawn(tiny, broken, recipe_of(4)).finite_steps, [4, 0])


def test_programs_of_drawing_hold_no_callbacks(tiny):
    """JAX keeps no compiled program in its cache that calls the host."""
    batch, recipe = batch_of(tiny, 1, height=32, width=48), recipe_of(2)
    listener = Listener()
    drawn(tiny, batch, recipe, listener)
    for compiled in listener.compiled.values():
        assert "python_cpu_callback" not in compiled.compiled.as_text()


def test_a_batch_is_split_into_what_images_have_and_what_they_share(tiny):
    batch = batch_of(tiny, 2, height=32, width=48)
    rows, shared = split_images(batch.positive)
    assert rows.txt.shape[0] == 2
    assert rows.img_ids is None
    assert shared.txt is None
    assert shared.img_ids.shape == (6, 3)
