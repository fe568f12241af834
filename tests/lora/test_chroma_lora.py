"""Adapters of Chroma: FLUX's module names mean its blocks, and what it lacks is left out."""

import jax
import pytest
from adapters import (
    KOHYA,
    Draw,
    Sample,
    assert_close,
    changed_weights,
    effective_weights,
    kohya,
    pair,
    saved,
    weights,
)
from chroma import small_chroma

from fluxjax import WeightsError, attach, convert_weights, merge, read_lora
from fluxjax.generate import load_chroma, save
from fluxjax.lora import init_lora, merge_while_converting
from fluxjax.lora.merge import notes_of

LACKING = ("single.modulation.weight", "final.modulation.weight", "time_in.up.weight")
SCALE = 0.1


@pytest.fixture(scope="module")
def chroma():
    return small_chroma()


def style():
    """Return an adapter of FLUX.1-dev and of Chroma's approximator.

    Of what it changes, only the weights that Chroma has are expected.
    """
    sample = kohya()
    module = "lora_unet_distilled_guidance_layer_layers_1_in_layer"
    delta = pair(sample, Draw(7), module, KOHYA, (16, 16), 2, 2.0)
    sample.expect("approximator.mlp.up.weight", (1,), delta)
    sample.expected = [entry for entry in sample.expected if entry[0] not in LACKING]
    return sample


def test_an_adapter_of_flux_is_merged_and_attached_without_what_chroma_lacks(chroma, tmp_path):
    sample = style()
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    expected = changed_weights(chroma, sample, SCALE)
    merged = merge(chroma, [lora], [SCALE])
    assert_close(weights(merged), expected, 1e-6)
    assert_close(effective_weights(attach(chroma, [lora], [SCALE])), expected, 1e-6)
    (note,) = notes_of(chroma, lora)
    assert note.startswith("3 of its weights are left out, as final.modulation.weight")
    source = save(chroma, tmp_path / "plain")
    transform = merge_while_converting([lora], [SCALE])
    converted = convert_weights(source, tmp_path / "styled", to="bfl", transform=transform)
    assert_close(weights(load_chroma(converted)), weights(merged), 1e-6)


def test_an_adapter_that_adds_input_features_is_refused(chroma, tmp_path):
    sample = Sample()
    pair(sample, Draw(8), "lora_unet_img_in", KOHYA, (32, 128), 2)
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match="an adapter of 128 can't widen"):
        merge(chroma, [lora])


def test_a_new_adapter_of_chroma_changes_its_blocks(chroma):
    lora = init_lora(chroma, rank=2, key=jax.random.key(0))
    assert all(name.startswith(("double.", "single.")) for name in lora.changes["flux"])
    adapted = attach(chroma, [lora])
    assert_close(effective_weights(adapted), weights(chroma), 0)
