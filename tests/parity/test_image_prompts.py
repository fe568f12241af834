"""Image prompts beside transformers' encoders and diffusers' Redux, on the same random weights."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from reference import FLOAT32_BOUND, normal, perturbed, relative_error, to_torch

from fluxjax import Conditioning
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.generate import (
    clip_pixels,
    load_clip_vision,
    load_redux,
    load_siglip,
    redux_condition,
    redux_tokens,
    siglip_pixels,
)
from fluxjax.nets import ClipVisionConfig, SiglipConfig

# An image of 30 pixels has four whole patches of 7 along a side, as 384 has 27 of 14.
SIGLIPS = {
    "pixels left over": dict(
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=30,
        patch_size=7,
    ),
    "official heads": dict(
        hidden_size=144,
        intermediate_size=269,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    ),
}
CONTEXT = 24


def saved(network: torch.nn.Module, folder, seed: int = 0) -> torch.nn.Module:
    """Return the network with random weights, which are in the folder too."""
    network = perturbed(network, seed)
    network.save_pretrained(folder)
    return network


def torch_pixels(pixels) -> torch.Tensor:
    """Return one image as torch takes it: a batch, channels first."""
    return to_torch(pixels).permute(2, 0, 1)[None]


@pytest.fixture(params=SIGLIPS, scope="module")
def siglips(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    config = transformers.SiglipVisionConfig(**SIGLIPS[request.param])
    theirs = saved(transformers.SiglipVisionModel(config), folder)
    return theirs, load_siglip(folder)


def test_siglip_equals_transformers_in_every_state_and_pooled(siglips):
    theirs, ours = siglips
    pixels = normal(ours.config.image_size, ours.config.image_size, 3)
    with torch.no_grad():
        expected = theirs(torch_pixels(pixels))
    states = ours(pixels)
    assert relative_error(states, expected.last_hidden_state[0]) <= FLOAT32_BOUND
    assert relative_error(ours.pool(states), expected.pooler_output[0]) <= FLOAT32_BOUND


def test_the_redux_that_ships_is_read_by_transformers_and_diffusers():
    folder = tiny_folder()
    encoder = transformers.SiglipVisionModel.from_pretrained(
        folder / "image_encoder", dtype=torch.float32
    ).eval()
    embedder = ReduxImageEncoder.from_pretrained(
        folder / "image_embedder", torch_dtype=torch.float32
    ).eval()
    siglip, redux = load_siglip("tiny", dtype="float32"), load_redux("tiny", dtype="float32")
    pixels = np.tanh(normal(siglip.config.image_size, siglip.config.image_size, 3))
    with torch.no_grad():
        states = encoder(torch_pixels(pixels)).last_hidden_state
        expected = embedder(states).image_embeds[0]
    assert relative_error(redux(siglip(pixels)), expected) <= FLOAT32_BOUND


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_vision_equals_transformers_projected(tmp_path, activation):
    config = transformers.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=70,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=28,
        patch_size=7,
        projection_dim=20,
        hidden_act=activation,
    )
    theirs = saved(transformers.CLIPVisionModelWithProjection(config), tmp_path)
    pixels = normal(28, 28, 3)
    with torch.no_grad():
        expected = theirs(torch_pixels(pixels)).image_embeds[0]
    assert relative_error(load_clip_vision(tmp_path)(pixels), expected) <= FLOAT32_BOUND


@pytest.mark.parametrize("size", [(50, 37), (20, 64)], ids=["taller and larger", "wider"])
def test_pixels_are_those_of_transformers(size):
    levels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    image = levels / np.float32(127.5) - 1
    processor = transformers.SiglipImageProcessorPil(size={"height": 30, "width": 30})
    expected = processor(images=levels, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    # The resized bytes are the same; their float32 values may differ in the last place.
    np.testing.assert_allclose(
        siglip_pixels(image, SiglipConfig(image_size=30)), expected, atol=1e-6
    )
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    expected = processor(images=levels, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_allclose(
        clip_pixels(image, ClipVisionConfig(image_size=28)), expected, atol=1e-6
    )


@pytest.fixture(scope="module")
def redux(tmp_path_factory):
    """diffusers' pipeline with a prompt's encoder, and our networks of the same weights."""
    folder = tmp_path_factory.mktemp("redux")
    config = transformers.SiglipVisionConfig(**SIGLIPS["pixels left over"])
    encoder = saved(transformers.SiglipVisionModel(config), folder / "image_encoder")
    embedder = ReduxImageEncoder(redux_dim=32, txt_in_features=CONTEXT)
    embedder = saved(embedder, folder / "image_embedder", seed=1)
    text = transformers.CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    pipeline = diffusers.FluxPriorReduxPipeline(
        image_encoder=encoder,
        feature_extractor=transformers.SiglipImageProcessorPil(size={"height": 30, "width": 30}),
        image_embedder=embedder,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    return pipeline, load_siglip(folder), load_redux(folder)


def test_the_sum_of_weighted_images_equals_diffusers_prior(redux):
    pipeline, siglip, embedder = redux
    levels = np.random.default_rng(1).integers(0, 256, (2, 40, 33, 3)).astype(np.uint8)
    txt, vec = normal(5, CONTEXT), normal(6, seed=1)
    weights, pooled_weights = [0.3, 0.8], [0.5, 0.25]
    expected = pipeline(
        [transformers.image_transforms.to_pil_image(image) for image in levels],
        # Each image has a prompt of its own, here the same.
        prompt_embeds=to_torch(np.stack([txt, txt])),
        pooled_prompt_embeds=to_torch(np.stack([vec, vec])),
        prompt_embeds_scale=weights,
        pooled_prompt_embeds_scale=pooled_weights,
    )
    images = [jnp.asarray(image / np.float32(127.5) - 1) for image in levels]
    tokens = redux_tokens(siglip, embedder, images)
    condition = redux_condition(tokens, weights=weights, pooled_weights=pooled_weights, rule="sum")
    found = condition.add(Conditioning(txt, vec, np.zeros((4, 3), np.float32)))
    assert relative_error(found.txt, expected.prompt_embeds[0]) <= FLOAT32_BOUND
    assert relative_error(found.vec, expected.pooled_prompt_embeds[0]) <= FLOAT32_BOUND


def test_without_a_prompt_its_states_are_zeros_as_in_diffusers(redux):
    _, siglip, embedder = redux
    image = jnp.asarray(np.clip(normal(31, 20, 3), -1, 1))
    tokens = redux_tokens(siglip, embedder, [image])
    condition = redux_condition(tokens, text_weight=0.0)
    found = condition.add(Conditioning(normal(5, CONTEXT), normal(6), np.zeros((4, 3), np.float32)))
    np.testing.assert_array_equal(found.txt[:5], 0)
    np.testing.assert_array_equal(found.vec, 0)
    np.testing.assert_array_equal(found.txt[5:], tokens[0])


def test_siglip_in_bfloat16_is_as_close_to_float32_as_transformers(siglips):
    theirs, ours = siglips
    pixels = normal(ours.config.image_size, ours.config.image_size, 3)
    with torch.no_grad():
        exact = theirs(torch_pixels(pixels)).last_hidden_state[0]
        half = theirs.bfloat16()(torch_pixels(pixels).bfloat16()).last_hidden_state[0]
        theirs.float()
    network = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours)
    states = network(pixels)
    assert states.dtype == jnp.bfloat16
    assert relative_error(states, exact) <= 1.2 * relative_error(half, exact)
