"""Adapters that diffusers and PEFT fuse into the same weights: the output is the same."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapters import KOHYA, PEFT, XLABS, Draw, Sample, pair
from diffusers import FluxPipeline, FluxTransformer2DModel
from layouts import write
from reference import FLOAT32_BOUND, normal, perturbed, relative_error, to_torch

from fluxjax import image_ids, load_flux, merge, read_lora, write_lora
from fluxjax.checkpoint.shipped import shipped_lora, tiny_folder

CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}


@pytest.fixture
def theirs(tmp_path):
    model = perturbed(FluxTransformer2DModel.from_config(CONFIG))
    model.save_pretrained(tmp_path / "model")
    return model


def kohya() -> Sample:
    s, draw = Sample(), Draw(40)
    pair(s, draw, "lora_unet_double_blocks_1_img_attn_qkv", KOHYA, (96, 32), 4, 2.0)
    pair(s, draw, "lora_unet_double_blocks_0_txt_mlp_0", KOHYA, (128, 32), 3, 1.5)
    pair(s, draw, "lora_unet_double_blocks_0_img_mod_lin", KOHYA, (192, 32), 3, 1.5)
    pair(s, draw, "lora_unet_single_blocks_1_linear2", KOHYA, (32, 160), 4, 8.0)
    return s


def peft() -> Sample:
    s, draw = Sample(), Draw(41)
    pair(s, draw, "transformer.transformer_blocks.0.attn.to_k", PEFT, (32, 32), 4)
    pair(s, draw, "transformer.transformer_blocks.1.attn.add_v_proj", PEFT, (32, 32), 4)
    pair(s, draw, "transformer.transformer_blocks.1.ff.net.2", PEFT, (32, 128), 4)
    pair(s, draw, "transformer.single_transformer_blocks.0.proj_mlp", PEFT, (128, 32), 4)
    pair(s, draw, "transformer.single_transformer_blocks.1.attn.to_q", PEFT, (32, 32), 4)
    pair(s, draw, "transformer.norm_out.linear", PEFT, (64, 32), 4)
    pair(s, draw, "transformer.x_embedder", PEFT, (32, 64), 4)
    return s


def xlabs() -> Sample:
    s, draw, ends = Sample(), Draw(42), XLABS
    pair(s, draw, "double_blocks.0.processor.qkv_lora1", ends, (96, 32), 4)
    pair(s, draw, "double_blocks.1.processor.proj_lora2", ends, (32, 32), 4)
    return s


def outputs(theirs, ours):
    """Return the output of our transformer and of theirs, for the same inputs."""
    config = ours.config
    x, ids = normal(6, 64, seed=1), image_ids(32, 48)
    txt, vec = normal(5, config.context, seed=2), normal(config.pooled, seed=3)
    with torch.no_grad():
        reference = theirs(
            hidden_states=to_torch(x)[None],
            encoder_hidden_states=to_torch(txt)[None],
            pooled_projections=to_torch(vec)[None],
            timestep=torch.tensor([0.6]),
            guidance=torch.tensor([3.5]),
            img_ids=to_torch(ids),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0][0]
    found = ours(
        jnp.asarray(x), 0.6, txt=jnp.asarray(txt), vec=jnp.asarray(vec), img_ids=ids, guidance=3.5
    )
    return found, reference


def fused(theirs, path, scale):
    """Return diffusers' transformer with an adapter fused into its weights."""
    pipeline = FluxPipeline(None, None, None, None, None, None, theirs)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora(lora_scale=scale)
    return pipeline.transformer


@pytest.mark.parametrize("sample", [kohya, peft, xlabs], ids=lambda sample: sample.__name__)
def test_a_merged_adapter_gives_what_diffusers_fused_one_gives(theirs, tmp_path, sample):
    path = tmp_path / "lora.safetensors"
    write(path, sample().tensors)
    base = load_flux(tmp_path / "model")
    ours, reference = outputs(fused(theirs, path, 0.1), merge(base, [read_lora(path)], [0.1]))
    plain, _ = outputs(theirs, base)
    assert relative_error(plain, reference) > 1e-3  # the adapter matters
    assert relative_error(ours, reference) <= FLOAT32_BOUND


def test_diffusers_loads_what_is_written(theirs, tmp_path):
    write(tmp_path / "kohya.safetensors", kohya().tensors)
    lora = read_lora(tmp_path / "kohya.safetensors")
    write_lora(tmp_path / "peft.safetensors", lora, to="peft")
    base = load_flux(tmp_path / "model")
    ours, reference = outputs(
        fused(theirs, tmp_path / "peft.safetensors", 0.1), merge(base, [lora], [0.1])
    )
    assert relative_error(ours, reference) <= FLOAT32_BOUND
    assert np.isfinite(np.asarray(ours)).all()


@pytest.mark.parametrize("style", ["kraft", "chalk"])
def test_diffusers_loads_what_was_trained_and_ships(style):
    theirs = FluxTransformer2DModel.from_pretrained(
        tiny_folder() / "transformer", torch_dtype=torch.float32
    )
    path, base = shipped_lora(style), load_flux("tiny", dtype="float32")
    plain, _ = outputs(theirs, base)
    ours, reference = outputs(fused(theirs, path, 0.8), merge(base, [read_lora(path)], [0.8]))
    assert relative_error(plain, reference) > 1e-2
    assert relative_error(ours, reference) <= FLOAT32_BOUND
