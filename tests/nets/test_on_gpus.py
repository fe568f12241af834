"""What is traced where the default device is a GPU; nothing is compiled for one."""

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from fluxjax import Vae, attention
from fluxjax.nets import VaeConfig
from fluxjax.nets.quantized import EIGHT_BITS, QuantizedWeight, round_rows
from fluxjax.nets.weight import Dense

VAE = VaeConfig(channels=(8, 16), groups=4, resnets=1)


@pytest.fixture
def h200(monkeypatch):
    """Let all modules that ask for the default device see an H200."""
    gpu = mock.Mock(spec=jax.Device, platform="gpu", compute_capability="9.0")
    modules = ["kernels.attention", "kernels.xla_attention", "nets.activations", "nets.weight"]
    for name in (*modules, "nets.scan", "nets.conv", "nets.quantized"):
        monkeypatch.setattr(sys.modules[f"fluxjax.{name}"], "default_device", lambda: gpu)
    return gpu


def test_the_vae_has_forward_mode_gradients_on_gpus(h200):
    vae = jax.tree.map(lambda x: x.astype(jnp.bfloat16), Vae(VAE, key=jax.random.key(0)))
    latent = jnp.zeros((VAE.latent_channels, 4, 4), jnp.bfloat16)
    value, change = jax.eval_shape(lambda z: jax.jvp(vae.decode, (z,), (z,)), latent)
    assert change.shape == value.shape == (8, 8, 3)
    # By default its attention would be cuDNN's, which has none, and is not installed here.
    heads = jnp.zeros((16, 1, 16), jnp.bfloat16)
    with pytest.raises(RuntimeError, match="cuDNN"):
        jax.eval_shape(attention, heads, heads, heads)


def test_large_products_of_bfloat16_are_apart_from_their_bias_on_gpus(h200):
    weight = Dense(jnp.ones((8, 16), jnp.bfloat16))

    def has_barrier(rows, dtype):
        x = jnp.ones((rows, 16), dtype)
        return "optimization_barrier" in str(jax.make_jaxpr(lambda x: weight.matmul(x))(x))

    assert has_barrier(128, jnp.bfloat16)
    assert not has_barrier(127, jnp.bfloat16)
    assert not has_barrier(128, jnp.float32)
    h200.platform = "cpu"
    assert not has_barrier(128, jnp.bfloat16)


@pytest.mark.parametrize("rows", [1, 3])
def test_float8_is_multiplied_as_float8_on_gpus(h200, rows):
    weight = QuantizedWeight(*round_rows(jnp.ones((8, 16)), EIGHT_BITS["fp8"]))
    traced = jax.jit(lambda x: weight.matmul(x)).trace(jnp.ones((rows, 16)))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    (product,) = [line for line in program.splitlines() if "dot_general" in line]
    assert product.count("xf8E4M3FN>") == 2
    assert product.endswith(f"tensor<{rows}x8xf32>")
