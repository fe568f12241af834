"""Gradients of the whole network are torch's, with each attention, rematerialized and not."""

from functools import partial
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_parts import pretended
from reference import normal, perturbed, to_torch

from fluxjax.checkpoint.chroma_names import TRANSFORMER_DIFFUSERS
from fluxjax.checkpoint.fused import fused_parts
from fluxjax.checkpoint.weights import parameters_of
from fluxjax.generate.latents import image_ids
from fluxjax.generate.load import load_flux
from fluxjax.kernels import flash_tpu
from fluxjax.train.loss import flow_matching_loss

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIG = dict(
    num_layers=2,
    num_single_layers=3,
    num_attention_heads=3,
    attention_head_dim=32,
    axes_dims_rope=(8, 12, 12),
    joint_attention_dim=40,
    pooled_projection_dim=24,
    guidance_embeds=True,
    in_channels=64,
)
HEIGHT, WIDTH, TXT_TOKENS = 48, 80, 7
# Sums in another order, through five blocks and back.
BOUND = 1e-4


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A reference network and ours of the same weights, and the reference's gradients by name."""
    torch.manual_seed(0)
    theirs = perturbed(diffusers.FluxTransformer2DModel(**CONFIG))
    folder = tmp_path_factory.mktemp("flux")
    theirs.save_pretrained(folder)
    tokens = (HEIGHT // 16) * (WIDTH // 16)
    x0, noise = normal(tokens, 64, seed=1), normal(tokens, 64, seed=2)
    txt, vec, t = normal(TXT_TOKENS, 40, seed=3), normal(24, seed=4), np.float32(0.625)
    predicted = theirs(
        hidden_states=to_torch((1 - t) * x0 + t * noise)[None],
        encoder_hidden_states=to_torch(txt)[None],
        pooled_projections=to_torch(vec)[None],
        timestep=to_torch([t]),
        img_ids=to_torch(image_ids(HEIGHT, WIDTH)),
        txt_ids=torch.zeros(TXT_TOKENS, 3),
        guidance=to_torch([3.0]),
        return_dict=False,
    )[0][0]
    loss = torch.mean((predicted - to_torch(noise - x0)) ** 2)
    loss.backward()
    gradients = {name: one.grad.numpy() for name, one in theirs.named_parameters()}
    return load_flux(folder), (x0, noise, txt, vec, t), float(loss.detach()), gradients


@eqx.filter_jit
def loss_and_gradients(flux, x0, noise, txt, vec, t, attention, remat):
    def loss(flux):
        velocity = eqx.Partial(
            flux,
            txt=txt,
            vec=vec,
            guidance=jnp.float32(3.0),
            img_ids=image_ids(HEIGHT, WIDTH),
            attention=attention,
            remat=remat,
        )
        return flow_matching_loss(velocity, x0, t, noise)

    return jax.value_and_grad(loss)(flux)


@pytest.fixture
def interpreted(monkeypatch):
    """Let a TPU be the device that attention is chosen for, and interpret its kernels."""
    kernel = mock.Mock(side_effect=partial(flash_tpu.flash_attention_tpu, interpret=True))
    monkeypatch.setattr(flash_tpu, "flash_attention_tpu", kernel)
    tpu = mock.Mock(spec=jax.Device, platform="tpu", device_kind="TPU v4")
    with pretended(tpu, ("kernels.attention",)):
        yield kernel


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("attention", ["xla", "flash_tpu"])
def test_gradients_of_every_weight_are_torchs(pair, attention, remat, interpreted):
    flux, inputs, expected_loss, expected = pair
    value, gradients = loss_and_gradients(flux, *map(jnp.asarray, inputs), attention, remat)
    assert interpreted.called == (attention == "flash_tpu")
    assert float(value) == pytest.approx(expected_loss, rel=1e-5)
    leaves = jax.tree.leaves(gradients)
    parts = fused_parts(flux.config)
    compared = 0
    total = np.sqrt(sum(float(np.sum(np.square(one))) for one in expected.values()))
    for name, slot in parameters_of(flux).items():
        leaf = np.asarray(leaves[slot.leaf])
        found = leaf if slot.block is None else leaf[slot.block]
        for key, row in TRANSFORMER_DIFFUSERS.keys(name):
            part = found if row.part is None else found[parts[row.part]]
            if row.layout == "swap":
                part = np.roll(part, len(part) // 2, axis=0)
            theirs = expected[key]
            # Of a gradient that vanishes, as of a key's bias, only rounding is left.
            assert np.linalg.norm(part - theirs) <= BOUND * max(
                np.linalg.norm(theirs), 1e-3 * total
            ), key
            compared += 1
    assert compared == len(expected)
