"""Chroma against diffusers: the network with and without padding, T5's mask, the whole pipeline."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32_BOUND, normal, perturbed, relative_error, to_torch

from fluxjax.generate.draw import denoise
from fluxjax.generate.image_batch import Recipe
from fluxjax.generate.latents import image_ids, initial_noise, pack_latents
from fluxjax.generate.load import load_chroma, load_t5
from fluxjax.generate.prompt_batch import prompt_batch
from fluxjax.generate.samplers import model_times
from fluxjax.generate.text import TextStates
from fluxjax.generate.velocity import Guidance
from fluxjax.zoo import ZOO

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "odd depths": dict(
        num_layers=3,
        num_single_layers=5,
        num_attention_heads=3,
        attention_head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=40,
        in_channels=64,
        approximator_num_channels=64,
        approximator_hidden_dim=48,
        approximator_layers=5,
    ),
    "one of each, other channels out": dict(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=24,
        in_channels=32,
        out_channels=16,
        approximator_num_channels=32,
        approximator_hidden_dim=32,
        approximator_layers=1,
    ),
}
HEIGHT, WIDTH, TXT_TOKENS, VISIBLE = 48, 80, 9, 4
TOKENS = (HEIGHT // 16) * (WIDTH // 16)


@pytest.fixture(params=CONFIGS, scope="module")
def pair(request, tmp_path_factory):
    """A reference network, ours of the same weights, and inputs."""
    config = CONFIGS[request.param]
    torch.manual_seed(0)
    theirs = perturbed(diffusers.ChromaTransformer2DModel(**config))
    for norm in theirs.distilled_guidance_layer.norms:
        norm.eps = 1e-6  # by default that of the dtype, 1.2e-7 in float32
    folder = tmp_path_factory.mktemp("chroma")
    theirs.save_pretrained(folder)
    inputs = dict(
        x=normal(2, TOKENS, config["in_channels"], seed=1),
        txt=normal(2, TXT_TOKENS, config["joint_attention_dim"], seed=2),
        t=np.float32([0.5, 0.125]),
    )
    return theirs, load_chroma(folder), inputs


def run_theirs(network, x, txt, t, mask=None):
    with torch.no_grad():
        return network(
            hidden_states=to_torch(x),
            encoder_hidden_states=to_torch(txt),
            timestep=to_torch(t),
            img_ids=to_torch(image_ids(HEIGHT, WIDTH)),
            txt_ids=torch.zeros(txt.shape[1], 3),
            attention_mask=mask,
            return_dict=False,
        )[0]


@eqx.filter_jit
def run_ours(network, x, txt, t, lengths=None):
    ids = image_ids(HEIGHT, WIDTH)

    def one(x, txt, t, length):
        return network(x, t, txt=txt, txt_length=length, img_ids=ids)

    return jax.vmap(one)(x, txt, t, lengths)


def test_a_batch_of_velocities_equals_diffusers(pair):
    theirs, ours, inputs = pair
    assert relative_error(run_ours(ours, **inputs), run_theirs(theirs, **inputs)) <= FLOAT32_BOUND


def test_padding_that_is_left_out_equals_a_boolean_mask_and_trimmed_tokens(pair):
    theirs, ours, inputs = pair
    lengths = jnp.int32([VISIBLE, TXT_TOKENS - 1])
    found = run_ours(ours, **inputs, lengths=lengths)
    keys = np.arange(TXT_TOKENS)[None] < np.asarray(lengths)[:, None]
    keys = np.concatenate([keys, np.ones((2, TOKENS), bool)], axis=1)
    # Its pipeline makes the mask a float, so that 1 is added to the logits of what is seen.
    masked = run_theirs(theirs, **inputs, mask=torch.from_numpy(keys))
    assert relative_error(found, masked) <= FLOAT32_BOUND
    for row, length in enumerate(lengths.tolist()):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        trimmed = run_theirs(theirs, **{**one, "txt": one["txt"][:, :length]})
        assert relative_error(found[row : row + 1], trimmed) <= FLOAT32_BOUND


def test_t5_with_its_padding_left_out_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=64,
        d_model=48,
        d_kv=16,
        num_heads=3,
        num_layers=2,
        d_ff=64,
        feed_forward_proj="gated-gelu",
    )
    torch.manual_seed(0)
    theirs = perturbed(transformers.T5EncoderModel(config))
    theirs.save_pretrained(tmp_path)
    ours = load_t5(tmp_path)
    ids = np.random.default_rng(0).integers(2, 64, (2, 12)).astype(np.int32)
    lengths = np.int32([5, 12])
    mask = np.arange(12)[None] < lengths[:, None]
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state
    found = jax.vmap(lambda ids, length: ours(ids, length=length))(ids, lengths)
    assert relative_error(found, expected) <= FLOAT32_BOUND


STEPS, SCALE, SIDE = 3, 4.0, 32
# diffusers' times go to 1000 t and back, in float32: the phase of a sinusoid moves by up to 6e-5.
TIMES_BOUND = 5e-5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """diffusers' pipeline around a random network, and ours of the same weights."""
    config = dict(CONFIGS["one of each, other channels out"], in_channels=64, out_channels=64)
    torch.manual_seed(0)
    network = perturbed(diffusers.ChromaTransformer2DModel(**config))
    for norm in network.distilled_guidance_layer.norms:
        norm.eps = 1e-6
    folder = tmp_path_factory.mktemp("chroma")
    network.save_pretrained(folder)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[4] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=16,
        norm_num_groups=2,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    theirs = diffusers.ChromaPipeline(scheduler, vae, None, None, network)
    theirs.set_progress_bar_config(disable=True)
    return theirs, load_chroma(folder)


def draw_theirs(pipeline, noise, texts, lengths):
    masks = [
        torch.from_numpy((np.arange(TXT_TOKENS) < length)[None].astype(np.float32))
        for length in lengths
    ]
    return pipeline(
        prompt_embeds=to_torch(texts[:1]),
        negative_prompt_embeds=to_torch(texts[1:]),
        prompt_attention_mask=masks[0],
        negative_prompt_attention_mask=masks[1],
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=to_torch(pack_latents(noise))[None],
        output_type="latent",
    ).images


def draw_ours(network, noise, texts, lengths):
    states = [
        TextStates(jnp.asarray(text)[None], None, jnp.int32([length]))
        for text, length in zip(texts, lengths, strict=True)
    ]
    batch = prompt_batch(*states, noise=noise[None], keys=None, distilled=None)
    times = model_times(ZOO["chroma"].defaults, STEPS, SIDE, SIDE)
    latents = denoise(network, batch, Recipe(times, guidance=Guidance(scale=SCALE)))
    return pack_latents(latents[0])[None]


@pytest.mark.parametrize("lengths", [(TXT_TOKENS, TXT_TOKENS), (4, 2)])
def test_the_pipeline_draws_the_same_latent(pipeline, monkeypatch, lengths):
    theirs, ours = pipeline
    noise = initial_noise(jax.random.key(3), SIDE, SIDE)
    texts = normal(2, TXT_TOKENS, 24, seed=4)
    if lengths[0] < TXT_TOKENS:
        # A mask of floats is added to the logits, so that nothing is masked: made boolean here.
        prepare = theirs._prepare_attention_mask
        monkeypatch.setattr(
            theirs,
            "_prepare_attention_mask",
            lambda *arguments, **options: prepare(*arguments, **options).bool(),
        )
    expected = draw_theirs(theirs, noise, texts, lengths)
    assert relative_error(draw_ours(ours, noise, texts, lengths), expected) <= TIMES_BOUND
