"""On a mesh everything is what it is on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxjax
from fluxjax.generate import denoise, encode_text, noise_batch, prompt_ids
from fluxjax.shard import make_mesh, shard

HEIGHT, WIDTH = 48, 80  # 15 tokens, which neither 2 nor 4 divide
PROMPTS = ["a red star on white", "a blue ring on black", "a green cross left of a white heart"]
# Sums in another order, through two steps of six blocks.
BOUND = 1e-5


def inputs(tiny, images):
    ids = prompt_ids(tiny.tokenizers, [PROMPTS[i % 3] for i in range(images)], max_length=12)
    text = encode_text(tiny.clip, tiny.t5, ids, dtype=jnp.float32)
    noise = noise_batch(jax.random.key(0), range(images), HEIGHT, WIDTH, channels=16)
    return text, noise, fluxjax.flow_times(2), jnp.float32(3.5)


def some(count):
    return jax.devices()[:count]


MESHES = {
    "data": (dict(data=8), 1e-6),
    "fsdp": (dict(fsdp=8), BOUND),
    "tensor": (dict(tensor=2), BOUND),
    "context, exchanged": (dict(context=2), BOUND),
    "context, round": (dict(context=4), BOUND),
    "data and fsdp": (dict(data=2, fsdp=4), BOUND),
    "fsdp and tensor": (dict(fsdp=4, tensor=2), BOUND),
    "data and context": (dict(data=2, context=4), BOUND),
    "tensor and context": (dict(tensor=2, context=3), BOUND),
}


@pytest.mark.parametrize("name", MESHES)
def test_sampling_on_a_mesh_is_sampling_on_one_device(tiny, name):
    sizes, bound = MESHES[name]
    mesh = make_mesh(**sizes, devices=some(int(np.prod(list(sizes.values())))))
    images = mesh.shape["data"] * mesh.shape["fsdp"] + 3  # not divided by any of them but 1 and 3
    text, noise, times, scale = inputs(tiny, images)
    expected = denoise(tiny.flux, text, noise, times, scale)
    found = denoise(shard(tiny.flux, mesh), text, noise, times, scale, mesh=mesh)
    error = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    assert error <= bound
    print(name, error)
