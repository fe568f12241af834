"""One call from a prompt to its conditioning, and from tokens to an image; images side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import KEY, with_small_vae

import fluxjax
from fluxjax.generate import decode_tokens, prompt_conditioning, prompt_ids, show_images
from fluxjax.generate.image import to_bytes
from fluxjax.generate.image_grid import tile_images

PROMPTS = ["a red star on white", "a blue ring on black"]


@pytest.fixture(scope="module")
def tiny(tiny):
    return with_small_vae(tiny)


def test_a_conditioning_is_that_of_its_parts(tiny):
    ids = prompt_ids(tiny.tokenizers, PROMPTS, max_length=13)
    states = fluxjax.encode_text(tiny.clip, tiny.t5, ids, dtype=jnp.float32)
    both = prompt_conditioning(
        tiny, PROMPTS, height=32, width=48, guidance=2.5, max_length=13, dtype="float32"
    )
    np.testing.assert_array_equal(both.txt, states.txt)
    np.testing.assert_array_equal(both.vec, states.vec)
    np.testing.assert_array_equal(both.img_ids, fluxjax.image_ids(32, 48))
    assert both.guidance == 2.5
    one = prompt_conditioning(tiny, PROMPTS[1], max_length=13)
    assert one.txt.shape == states.txt.shape[1:]
    assert one.guidance == tiny.defaults.guidance
    assert len(one.img_ids) == tiny.defaults.height * tiny.defaults.width // 256
    # XLA:CPU's sums depend on the batch.
    np.testing.assert_allclose(one.txt, states.txt[1], atol=1e-5)
    with pytest.raises(ValueError, match="needs a prompt, got none"):
        prompt_conditioning(tiny, [])
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 40x128"):
        prompt_conditioning(tiny, "a", height=40)


def test_tokens_are_decoded_as_their_latents_are(tiny):
    latents = jax.random.normal(KEY, (2, 16, 4, 6))
    packed = jax.vmap(fluxjax.pack_latents)(latents)
    images = fluxjax.decode(tiny.vae, latents, dtype=jnp.float32)
    np.testing.assert_array_equal(decode_tokens(tiny.vae, packed, 32, 48), images)
    np.testing.assert_allclose(decode_tokens(tiny.vae, packed[1], 32, 48), images[1], atol=1e-6)
    with pytest.raises(ValueError, match="needs 16 tokens, got 6"):
        decode_tokens(tiny.vae, packed, 64, 64)


def test_images_are_tiled_row_by_row():
    images = np.arange(5, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 3, 3)) / 10
    grid = tile_images(images)
    assert grid.shape == (4, 9, 3)
    expected = [[0, 0.1, 0.2], [0.3, 0.4, 1]]
    np.testing.assert_allclose(grid[::2, ::3, 0], expected, atol=1e-6)
    assert tile_images(images, columns=9).shape == (2, 15, 3)
    shown = show_images(images, columns=1)
    np.testing.assert_array_equal(np.asarray(shown), to_bytes(tile_images(images, 1)))
    assert show_images(images[0])._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="needs at least one image"):
        show_images(images[:0])


def test_a_notebook_shows_models_as_a_table(tiny):
    text = tiny._repr_html_()
    for word in ("<table>", "Flux", "float32", "<td>vae</td>", f"{tiny.defaults.steps}"):
        assert word in text


def test_models_are_loaded_as_the_command_line_loads_them(tmp_path, tiny):
    for wrong, reason in (
        ({"stream": True, "quantize": "int8"}, "Leave out quantize= and mesh="),
        ({"files": {"siglip": "x"}}, "got 'siglip'. Name one of these"),
    ):
        with pytest.raises(ValueError, match=reason):
            fluxjax.load_models("tiny", **wrong)
    file = fluxjax.save(tiny.vae, tmp_path / "vae.safetensors")
    rounded = fluxjax.load_models("tiny", quantize="int8", files={"vae": file})
    assert rounded.vae.config == tiny.vae.config
    whole = fluxjax.quantize(fluxjax.load_flux("tiny"), "int8")
    for own, other in zip(jax.tree.leaves(rounded.flux), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(own, other)
    streamed = fluxjax.load_models("tiny", stream=True)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(m.flux)) for m in (streamed, tiny)]
    assert sizes[0] < sizes[1] / 2
