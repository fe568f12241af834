"""Which implementation is taken, and what each of them refuses."""

import sys
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from implementations import flash_mosaic, flash_tpu, flash_triton

from fluxjax import attention
from fluxjax.kernels import Attention, select_attention
from fluxjax.kernels.block_sizes import BlockSizes
from fluxjax.kernels.flash_gpu import flash_attention_gpu


def test_the_default_is_the_best_that_supports_the_arguments():
    def selected(tokens, dim, platform, dtype=jnp.bfloat16, **options):
        x = jax.ShapeDtypeStruct((tokens, 24, dim), dtype)
        return select_attention(x, x, platform=platform, **options)

    assert selected(4608, 128, "tpu") == "flash_tpu"
    assert selected(4608, 128, "tpu", causal=True) == "xla_chunked"
    assert selected(4608, 128, "tpu", jnp.float32) == "xla_chunked"
    assert selected(256, 128, "tpu") == "xla"
    assert selected(4608, 128, "gpu") == "cudnn"
    # T4 and V100, and GPUs of AMD, have no flash attention of cuDNN's.
    for capability, name in ((8.0, "cudnn"), (12.0, "cudnn"), (7.5, "xla_chunked"), (0.0, "xla")):
        tokens = 4608 if capability else 256
        assert selected(tokens, 128, "gpu", capability=capability) == name
    assert selected(4608, 192, "gpu") == "xla_chunked"
    assert selected(4608, 128, "gpu", jnp.float32) == "xla_chunked"
    assert selected(1024, 128, "cpu") == "xla"
    assert selected(4608, 128, "cpu") == "xla_chunked"
    assert select_attention(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1))) == "xla"


X = jnp.zeros((256, 1, 128))
REFUSED = {
    "unknown name": (
        lambda: attention(X, X, X, implementation="best"),
        r"'best'.*is unknown. Choose one of xla, xla_chunked, cudnn",
    ),
    "cudnn without a GPU": (
        lambda: attention(X, X, X, implementation="cudnn"),
        r"needs an NVIDIA GPU.*float32",
    ),
    "flash_tpu without a TPU": (
        lambda: attention(X, X, X, implementation="flash_tpu"),
        r"'flash_tpu'.* needs a TPU, .*got cpu, float32",
    ),
    "flash_gpu without a GPU": (
        lambda: attention(X, X, X, implementation="flash_gpu"),
        r"'flash_gpu'.* needs an NVIDIA GPU .*got cpu, float32, 128",
    ),
    "more keys than there are": (
        lambda: attention(X, X, X, key_length=257),
        r"key_length=257.*1 to 256",
    ),
    "block sizes of xla": (
        lambda: attention(X, X, X, implementation=Attention("xla", BlockSizes(q=128))),
        r"is for flash_tpu, flash_gpu and xla_chunked, got implementation='xla'",
    ),
    "keys in a chunk": (
        lambda: attention(
            X, X, X, implementation=Attention("xla_chunked", BlockSizes(q=128, kv=128))
        ),
        r"takes only `BlockSizes\(q=…\)`",
    ),
    "unknown preset": (
        lambda: attention(X, X, X, implementation=Attention("xla_chunked", "best")),
        r"no block sizes 'best'. Choose one of trillium, ",
    ),
    "empty blocks": (lambda: BlockSizes(q=0), "at least one token"),
    "blocks that are no multiple of the lanes": (
        lambda: flash_tpu(X, X, X, block_sizes=BlockSizes(q=128, kv_dq=100)),
        r"multiples of 128 tokens, got \(128, 100\) for dq",
    ),
    "float16 on a TPU": (
        lambda: flash_tpu(*[X.astype(jnp.float16)] * 3),
        "bfloat16 or float32, got float16",
    ),
    "float32 on a GPU": (
        lambda: flash_attention_gpu(X, X, X, scale=1.0),
        "bfloat16 or float16, got float32",
    ),
    "large heads on a GPU": (
        lambda: flash_mosaic(*[jnp.zeros((256, 1, 192))] * 3),
        "head_dim of at most 128, got 192",
    ),
    "a block that two warpgroups cannot share": (
        lambda: flash_mosaic(X, X, X, block_sizes=BlockSizes(q=64)),
        r"multiples of 128 and 64 for forward, got \(64, 64\)",
    ),
    "keys that two warpgroups cannot share": (
        lambda: flash_mosaic(X, X, X, block_sizes=BlockSizes(q=128, kv=64)),
        r"multiples of 64 and 128 for dkv, got \(128, 64\)",
    ),
    "blocks that are no powers of two": (
        lambda: flash_triton(X, X, X, block_sizes=BlockSizes(q=192)),
        r"powers of two on this GPU, at least 16, got \(192, 192\) for forward",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_flash_gpu_is_mosaic_on_hopper_and_triton_elsewhere(monkeypatch):
    # By name, since the package has a function `attention` too.
    module, x = sys.modules["fluxjax.kernels.attention"], jnp.zeros((256, 1, 128), jnp.bfloat16)
    gpu = mock.Mock(spec=jax.Device, platform="gpu", compute_capability="7.5")
    monkeypatch.setattr(module, "default_device", lambda: gpu)
    attend = partial(attention, implementation=Attention("flash_gpu", BlockSizes(q=128)))
    with pytest.raises(
        ValueError,
        match=r"'flash_gpu'.* needs an NVIDIA GPU of compute capability 8.0.*got gpu 7.5, bfloat16",
    ):
        attend(x, x, x)
    for gpu.compute_capability, is_mosaic in (("8.0", False), ("9.0", True), ("12.0", False)):
        # A new function for each GPU: the jaxpr of the same one would come from JAX's cache.
        program = jax.make_jaxpr(lambda *inputs: attend(*inputs))(x, x, x)
        assert ("barrier" in str(program)) == is_mosaic
    with pytest.raises(ValueError, match="without bias that is not causal, got causal=True"):
        attend(x, x, x, causal=True)
    gpu.compute_capability = "gfx942"
    with pytest.raises(ValueError, match="got gpu gfx942"):
        attend(x, x, x)
