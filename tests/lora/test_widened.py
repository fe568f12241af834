"""Adapters that add input features to a transformer: created, attached, merged, written."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels import with_appended
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_flux

from fluxjax import attach, merge
from fluxjax.lora import BLOCKS, init_lora, read_lora, write_lora
from fluxjax.lora.widen import adapted_config
from fluxjax.nets import quantize, widen_input
from fluxjax.nets.t5 import T5, T5Config

EXTRA = 16
INPUTS = {
    "txt": draw(TEXT, CONFIG.context, seed=90),
    "vec": draw(CONFIG.pooled, seed=91),
    "img_ids": IDS,
    "guidance": 3.5,
}
velocity = eqx.filter_jit(lambda flux, x: flux(x, 0.4, **INPUTS))


@pytest.fixture(scope="module")
def flux():
    return small_flux()


def trained(flux):
    """Return an adapter as after training: none of its ups is zero."""
    lora = init_lora(flux, 4, [*BLOCKS, "img_in"], extra_features=EXTRA, key=jax.random.key(1))
    (change,) = lora.changes["flux"]["img_in.weight"]
    assert change.term.down.shape == (4, CONFIG.in_channels + EXTRA)
    leaves, structure = jax.tree.flatten(lora)
    ups = [leaf if jnp.any(leaf) else 0.2 * draw(*leaf.shape, seed=leaf.size) for leaf in leaves]
    return jax.tree.unflatten(structure, ups)


def test_features_that_a_widened_network_reads_have_no_effect_yet(flux):
    x, more = draw(IMAGE, CONFIG.in_channels), draw(IMAGE, EXTRA, seed=3)
    wide = widen_input(flux, EXTRA)
    assert wide.config.in_channels == CONFIG.in_channels + EXTRA
    assert wide.config.out_channels == CONFIG.out_channels
    found = velocity(wide, jnp.concatenate([x, more], axis=-1))
    np.testing.assert_allclose(found, velocity(flux, x), rtol=1e-5, atol=1e-6)
    new = init_lora(flux, 4, "img_in", extra_features=EXTRA, key=jax.random.key(0))
    attached = attach(flux, [new])
    np.testing.assert_array_equal(velocity(attached, jnp.concatenate([x, more], axis=-1)), found)


def test_attached_merged_and_written_adapters_widen_alike(flux, tmp_path):
    lora = trained(flux)
    x = draw(IMAGE, CONFIG.in_channels + EXTRA)
    merged = merge(flux, [lora])
    expected = velocity(merged, x)
    assert merged.config == adapted_config(flux.config, [lora])
    assert not np.allclose(expected, velocity(widen_input(flux, EXTRA), x))
    paths = [tmp_path / f"{name}.safetensors" for name in ("peft", "kohya")]
    for path in paths:
        write_lora(path, lora, to=path.stem, config=flux.config)
    others = [
        attach(flux, [lora]),
        attach(widen_input(flux, EXTRA), [lora]),
        *(merge(flux, [read_lora(path)]) for path in paths),
    ]
    for other in others:
        np.testing.assert_allclose(velocity(other, x), expected, rtol=1e-4, atol=1e-5)
    # Weights of 8 bits stay as they are; the input layer is not among them.
    eight_bits = attach(quantize(flux, "int8"), [lora])
    assert eight_bits.config.in_channels == CONFIG.in_channels + EXTRA
    assert np.isfinite(velocity(eight_bits, x)).all()


def test_a_wide_adapter_fits_a_base_of_its_width_and_no_other(flux):
    lora = trained(flux)
    wide = with_appended(flux, EXTRA)
    merged = merge(wide, [lora], [0.5])
    (change,) = lora.changes["flux"]["img_in.weight"]
    expected = wide.img_in.weight.value + 0.5 * change.term.delta(jnp.zeros(()))
    np.testing.assert_allclose(merged.img_in.weight.value, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="can't widen"):
        attach(with_appended(flux, 8), [lora])


def test_extra_features_need_the_input_layer_of_a_transformer(flux):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="img_in among the targets"):
        init_lora(flux, 2, extra_features=8, key=key)
    with pytest.raises(ValueError, match="number from 0 on, got -1"):
        init_lora(flux, 2, "img_in", extra_features=-1, key=key)
    t5 = eqx.filter_eval_shape(T5, T5Config(), key=key)
    with pytest.raises(ValueError, match="widens the input of a Flux, got T5"):
        init_lora(t5, 2, extra_features=8, key=key)
    stored = quantize(flux, "int8").double.img.qkv.weight
    rounded = eqx.tree_at(lambda flux: flux.img_in.weight, flux, stored)
    with pytest.raises(ValueError, match="stored as an array, got QuantizedWeight"):
        widen_input(rounded, 8)
