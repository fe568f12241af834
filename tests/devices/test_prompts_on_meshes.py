"""Image prompts on a mesh are those on one device: heads are split, and tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from drawing import batch_of, recipe_of
from jax.sharding import PartitionSpec
from layouts import random_network
from meshes import mesh_of, relative
from small import draw

from fluxjax import image_ids, shard
from fluxjax.devices.specs import specs
from fluxjax.generate import ImageBatch, ReferenceTokens
from fluxjax.generate.draw import denoise
from fluxjax.nets import (
    ClipVision,
    ClipVisionConfig,
    IpAdapter,
    IpAdapterConfig,
    Siglip,
    SiglipConfig,
)

# Sums in another order, through six blocks.
BOUND = 1e-5


def prompted(tiny, joins: bool) -> ImageBatch:
    """Return a batch of two images with a prompt, and a reference that it does nothing to."""
    sizes = tiny.flux.config
    config = IpAdapterConfig(
        features=5,
        hidden=6 if joins else None,
        tokens=3,
        context=7,
        width=sizes.width,
        head_dim=sizes.head_dim,
        double_depth=sizes.double_depth,
        single_depth=sizes.single_depth if joins else 0,
        joins_attention=joins,
    )
    prompt = random_network(IpAdapter, config, scale=0.3)(draw(5))
    batch = batch_of(tiny, 2, height=32, width=48)
    reference = ReferenceTokens(draw(3, 64), image_ids(16, 48))
    positive = replace(batch.positive, image_prompts=(prompt,), reference=reference)
    return replace(batch, positive=positive)


@pytest.mark.parametrize("joins", [False, True], ids=["xlabs", "instantx"])
def test_drawing_with_a_prompt_on_a_mesh_is_that_on_one_device(tiny, joins):
    batch = prompted(tiny, joins)
    expected = denoise(tiny.flux, batch, recipe_of(1))
    assert jnp.isfinite(expected).all()
    mesh = mesh_of(data=2, tensor=2, context=2)
    found = denoise(shard(tiny.flux, mesh), batch, recipe_of(1), mesh=mesh)
    assert relative(found, expected) <= BOUND


def test_the_networks_of_image_prompts_are_not_split_over_heads():
    sizes = dict(image_size=8, patch=4, width=6, heads=3, depth=1, mlp_width=5)
    adapter = IpAdapterConfig(features=5, tokens=3, context=7, width=8, head_dim=8, double_depth=1)
    for make, config in (
        (Siglip, SiglipConfig(**sizes)),
        (ClipVision, ClipVisionConfig(**sizes)),
        (IpAdapter, adapter),
    ):
        placed = specs(random_network(make, config), mesh_of(fsdp=2, tensor=2))
        leaves = jax.tree.leaves(placed, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        assert any("fsdp" in leaf for leaf in leaves)
        assert not any("tensor" in leaf for leaf in leaves)
