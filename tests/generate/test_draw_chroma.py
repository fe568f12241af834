"""Chroma from prompts to images: T5 alone, its padding left out, true guidance by default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chroma import chroma_models
from drawing import recipe_of

from fluxjax import DrawSettings, Guidance, load_models, text_to_image
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.family import family_of_source
from fluxjax.generate import FirstBlock, save_models
from fluxjax.generate.draw import denoise
from fluxjax.generate.latents import noise_batch
from fluxjax.generate.prompt_batch import prompt_batch
from fluxjax.generate.text import encode_text, prompt_ids
from fluxjax.zoo import CHROMA, ZOO

PROMPT, KEY = "a red star", jax.random.key(0)


@pytest.fixture(scope="module")
def models(tiny):
    return chroma_models(tiny)


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    return save_models(models, tmp_path_factory.mktemp("chroma") / "model", to="diffusers")


def states(models, texts, length=16):
    ids = prompt_ids(models.tokenizers, texts, max_length=length, visible_padding=1)
    return encode_text(None, models.t5, ids, dtype=jnp.float32)


def batch_of(models, length=16):
    noise = noise_batch(KEY, [0, 1], 32, 48, channels=16)
    texts = states(models, [PROMPT, "two blue rings above a large green heart"], length)
    negative = states(models, ["", "a red circle"], length)
    return prompt_batch(texts, negative, noise=noise, keys=None, distilled=None)


def test_more_padding_draws_the_same_image(models):
    """Neither T5 nor the transformer attends to it, but for one token of it."""
    first, second = (
        denoise(models.flux, batch_of(models, length), recipe_of(scale=4.0)) for length in (16, 19)
    )
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_lengths_count_the_prompt_the_end_and_one_token_of_padding(models):
    words = len(models.tokenizers.t5.encode(PROMPT))
    found = prompt_ids(models.tokenizers, [PROMPT, ""], max_length=16, visible_padding=1)
    assert found.clip is None
    assert found.t5_length.tolist() == [words + 1, 1]
    assert found.txt_length.tolist() == [words + 2, 2]
    cut = prompt_ids(models.tokenizers, [PROMPT], max_length=3, visible_padding=1)
    assert (cut.t5_length.tolist(), cut.txt_length.tolist()) == ([3], [3])
    assert prompt_ids(models.tokenizers, [PROMPT], max_length=16).t5_length is None


def test_a_cache_that_never_skips_changes_nothing(models):
    batch = batch_of(models)
    plain = denoise(models.flux, batch, recipe_of(scale=4.0))
    cached = denoise(models.flux, batch, recipe_of(scale=4.0, cache=FirstBlock(0.0)))
    np.testing.assert_allclose(cached, plain, atol=1e-5)


def test_its_own_guidance_is_the_default(models):
    default = text_to_image(models, PROMPT, key=KEY)
    assert default.shape == (1, 32, 48, 3)
    same = text_to_image(models, PROMPT, key=KEY, guidance=Guidance(scale=4.0))
    np.testing.assert_array_equal(default, same)
    unguided = text_to_image(models, PROMPT, key=KEY, guidance=Guidance())
    assert float(jnp.abs(unguided - default).max()) > 1e-3
    with pytest.raises(ValueError, match="has no guidance embedder"):
        text_to_image(models, PROMPT, key=KEY, settings=DrawSettings(distilled_guidance=3.5))


def test_a_folder_of_diffusers_layout_loads_as_it_was(models, folder):
    assert family_of_source(folder) is CHROMA
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*CHROMA.folders, "fluxjax.json", "model_index.json"]
    )
    loaded = load_models(folder)
    assert loaded.clip is None
    assert loaded.defaults == models.defaults
    assert "Chroma" in repr(loaded)
    assert "Clip" not in repr(loaded)
    (folder / "fluxjax.json").rename(folder / "other.json")
    published = ZOO["chroma"].defaults
    assert load_defaults(folder) == published
    (folder / "other.json").rename(folder / "fluxjax.json")
    assert load_defaults("chroma") == load_defaults("lodestones/Chroma1-HD") == published
