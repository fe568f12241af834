"""IP-Adapters beside diffusers' attention processor (XLabs), and one written here (InstantX)."""

import diffusers
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from layouts import export, random_network, write
from reference import FLOAT32_BOUND, normal, perturbed, relative_error, to_torch

from fluxjax.checkpoint.image_prompt_names import IP_ADAPTER_INSTANTX, IP_ADAPTER_XLABS
from fluxjax.generate import image_ids, load_flux, load_ip_adapter
from fluxjax.nets import IpAdapter, IpAdapterConfig

HEIGHT, WIDTH, TXT_TOKENS = 48, 80, 7
TOKENS = (HEIGHT // 16) * (WIDTH // 16)
FEATURES, CONTEXT, WIDTH_OF_TOKENS, HEAD_DIM = 10, 40, 96, 32
DOUBLE, SINGLE = 3, 2
SIZES = dict(context=CONTEXT, width=WIDTH_OF_TOKENS, head_dim=HEAD_DIM, double_depth=DOUBLE)
SCALES = [0.7, 0.0, 1.3]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    theirs = perturbed(
        diffusers.FluxTransformer2DModel(
            num_layers=DOUBLE,
            num_single_layers=SINGLE,
            num_attention_heads=3,
            attention_head_dim=HEAD_DIM,
            axes_dims_rope=(8, 12, 12),
            joint_attention_dim=CONTEXT,
            pooled_projection_dim=24,
            guidance_embeds=True,
            in_channels=64,
        )
    )
    folder = tmp_path_factory.mktemp("flux")
    theirs.save_pretrained(folder)
    return theirs, load_flux(folder)


def run_theirs(network, **options) -> torch.Tensor:
    with torch.no_grad():
        return network(
            hidden_states=to_torch(normal(TOKENS, 64, seed=1))[None],
            encoder_hidden_states=to_torch(normal(TXT_TOKENS, CONTEXT, seed=2))[None],
            pooled_projections=to_torch(normal(24, seed=3))[None],
            timestep=torch.tensor([0.125]),
            img_ids=to_torch(image_ids(HEIGHT, WIDTH)),
            txt_ids=torch.zeros(TXT_TOKENS, 3),
            guidance=torch.tensor([1.0]),
            return_dict=False,
            **options,
        )[0][0]


@eqx.filter_jit
def run_ours(network, adapter, embedding, scale):
    return network(
        jnp.asarray(normal(TOKENS, 64, seed=1)),
        0.125,
        txt=normal(TXT_TOKENS, CONTEXT, seed=2),
        vec=normal(24, seed=3),
        guidance=1.0,
        img_ids=image_ids(HEIGHT, WIDTH),
        image_prompts=[adapter(embedding, scale=scale)],
    )


def loaded(tmp_path, config, dialect):
    """Return an adapter of random weights, read from its file, and the file's tensors for torch."""
    network = random_network(IpAdapter, config, scale=0.15)
    tensors = export(network, dialect)
    write(tmp_path / "adapter.safetensors", tensors)
    adapter = load_ip_adapter(tmp_path / "adapter.safetensors", config=config)
    return adapter, {key: to_torch(array) for key, array in tensors.items()}


def test_xlabs_equals_diffusers(tmp_path, networks):
    theirs, ours = networks
    config = IpAdapterConfig(features=FEATURES, tokens=4, **SIZES)
    adapter, tensors = loaded(tmp_path, config, IP_ADAPTER_XLABS)
    projection, layers = {}, {}
    for key, tensor in tensors.items():
        if key.startswith("ip_adapter_proj_model."):
            projection[key.removeprefix("ip_adapter_proj_model.")] = tensor
        else:
            # double_blocks.N.processor.ip_adapter_double_stream_k_proj.weight: N.to_k_ip.weight
            _, number, _, name, field = key.split(".")
            layers[f"{number}.to_{name.split('_')[-2]}_ip.{field}"] = tensor
    before = dict(theirs.attn_processors)
    theirs._load_ip_adapter_weights(
        {"image_proj": projection, "ip_adapter": layers}, low_cpu_mem_usage=False
    )
    for block, scale in zip(theirs.transformer_blocks, SCALES, strict=True):
        block.attn.processor.scale = [scale]
    embedding = normal(FEATURES, seed=5)
    image = {"ip_adapter_image_embeds": [to_torch(embedding)[None, None]]}
    expected = run_theirs(theirs, joint_attention_kwargs=image)
    theirs.set_attn_processor(before)
    found = run_ours(ours, adapter, embedding, jnp.float32(SCALES))
    assert relative_error(found, expected) <= FLOAT32_BOUND
    # The image is not without effect.
    assert relative_error(found, run_theirs(theirs)) > 0.1


class JoiningProcessor(FluxAttnProcessor):
    """Attention of all its queries to an image too, whose result joins its output."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, scale: float):
        super().__init__()
        self.k, self.v, self.scale = k, v, scale

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        plain = super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        q = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)))
        logits = torch.einsum("bqhd,khd->bhqk", q, self.k) / HEAD_DIM**0.5
        mixed = torch.einsum("bhqk,khd->bqhd", logits.softmax(-1), self.v).flatten(2)
        if encoder_hidden_states is None:
            return plain + self.scale * mixed
        image, text = plain
        # The output layer is linear: what joins its input may be added to its output.
        return image + self.scale * mixed @ attn.to_out[0].weight.T, text


def test_instantx_equals_a_processor_that_adds_before_the_output_layer(tmp_path, networks):
    theirs, ours = networks
    config = IpAdapterConfig(
        features=FEATURES, hidden=14, tokens=5, single_depth=SINGLE, joins_attention=True, **SIZES
    )
    adapter, tensors = loaded(tmp_path, config, IP_ADAPTER_INSTANTX)
    embedding = normal(FEATURES, seed=5)
    hidden = torch.nn.functional.linear(
        to_torch(embedding), tensors["image_proj.proj.0.weight"], tensors["image_proj.proj.0.bias"]
    )
    tokens = torch.nn.functional.linear(
        torch.nn.functional.gelu(hidden),
        tensors["image_proj.proj.2.weight"],
        tensors["image_proj.proj.2.bias"],
    ).reshape(5, CONTEXT)
    tokens = torch.nn.functional.layer_norm(
        tokens,
        (CONTEXT,),
        tensors["image_proj.norm.weight"],
        tensors["image_proj.norm.bias"],
        eps=1e-5,
    )
    before = dict(theirs.attn_processors)
    processors = {}
    for number, name in enumerate(before):
        key_value = []
        for letter in "kv":
            heads = tokens @ tensors[f"ip_adapter.{number}.to_{letter}_ip.weight"].T
            heads = heads.unflatten(-1, (3, HEAD_DIM))
            key_value.append(heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt())
        processors[name] = JoiningProcessor(*key_value, scale=0.8)
    # The double blocks come first.
    assert [name.split(".")[0] for name in before] == ["transformer_blocks"] * DOUBLE + [
        "single_transformer_blocks"
    ] * SINGLE
    theirs.set_attn_processor(processors)
    expected = run_theirs(theirs)
    theirs.set_attn_processor(before)
    found = run_ours(ours, adapter, embedding, jnp.float32(0.8))
    assert relative_error(found, expected) <= FLOAT32_BOUND
    assert relative_error(found, run_theirs(theirs)) > 0.1


def test_scale_0_is_bitwise_the_base(networks):
    _, ours = networks
    config = IpAdapterConfig(features=FEATURES, tokens=4, **SIZES)
    adapter = random_network(IpAdapter, config, scale=0.3)
    embedding = jnp.asarray(normal(FEATURES, seed=5))
    base = eqx.filter_jit(ours)(
        jnp.asarray(normal(TOKENS, 64, seed=1)),
        jnp.float32(0.125),
        txt=jnp.asarray(normal(TXT_TOKENS, CONTEXT, seed=2)),
        vec=jnp.asarray(normal(24, seed=3)),
        guidance=jnp.float32(1.0),
        img_ids=image_ids(HEIGHT, WIDTH),
    )
    np.testing.assert_array_equal(run_ours(ours, adapter, embedding, jnp.float32(0)), base)
