"""Adapters added as files are read give what merging the loaded network gives, bit by bit."""

import jax
import numpy as np
import pytest

import fluxjax
from fluxjax.checkpoint.kinds import FLUX
from fluxjax.checkpoint.load import load
from fluxjax.checkpoint.plan import Plan
from fluxjax.checkpoint.shipped import shipped_lora, tiny_folder
from fluxjax.generate.load import plan_of_source
from fluxjax.generate.load_network import LoadOptions, load_network
from fluxjax.lora.merged_plan import merged_plan


@pytest.fixture(scope="module")
def loras():
    return [fluxjax.read_lora(shipped_lora(name)) for name in ("kraft", "chalk")]


def check_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("layout", ["own", "diffusers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_follows_merging(loras, tmp_path, layout, dtype):
    source = "tiny"
    if layout == "diffusers":
        source = fluxjax.convert_weights(tiny_folder() / "transformer", tmp_path / "d", to=layout)
    options = LoadOptions(
        dtype=dtype, adapters=((loras[0], 0.7), (loras[1], -0.2)), quantize="int8"
    )
    found = load_network("flux", source, options)
    merged = fluxjax.merge(fluxjax.load_flux(source, dtype=dtype), loras, [0.7, -0.2])
    check_same(found, fluxjax.quantize(merged, "int8"))


def test_only_one_block_is_read_with_adapters_at_a_time(loras, monkeypatch):
    sizes = []

    def record(self, name, shape, dtype, index):
        values = plain(self, name, shape, dtype, index)
        if len(shape) == 3:
            sizes.append(len(values))
        return values

    plan = merged_plan(plan_of_source(FLUX, "tiny"), loras, [1.0, 1.0])
    plain = type(plan).leaf
    monkeypatch.setattr(type(plan), "leaf", record)
    fluxjax.checkpoint.load.load_quantized(plan, "int8")
    assert set(sizes) == {1}


def test_whole_leaves_and_widened_inputs_are_merged_too():
    base = plan_of_source(FLUX, "tiny")
    features = 64
    flux = fluxjax.load_flux("tiny")
    config = flux.config
    targets = [*fluxjax.lora.BLOCKS, "img_in"]
    key = jax.random.key(0)
    lora = fluxjax.lora.init_lora(flux, rank=2, targets=targets, extra_features=features, key=key)
    plan = merged_plan(base, [lora], [1.0])
    assert isinstance(plan, Plan)
    assert plan.network.config.in_channels == config.in_channels + features
    check_same(load(plan), fluxjax.merge(flux, [lora]))
