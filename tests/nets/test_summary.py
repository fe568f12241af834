"""A network's `repr` fits on a screen, whatever its arrays are."""

import equinox as eqx
import jax
import pytest
from jax.sharding import PartitionSpec
from small import CONFIG, small_flux

from fluxjax import T5, Clip, Flux, FluxConfig, Vae
from fluxjax.nets import ClipConfig, T5Config, VaeConfig, quantize, unroll


@pytest.mark.parametrize(
    ("network", "config", "title"),
    [
        (Flux, FluxConfig.dev(), "Flux: 11,901,408,320 parameters, 47.6 GB"),
        (T5, T5Config.xxl(), "T5: 4,762,310,656 parameters, 19.0 GB"),
        (Clip, ClipConfig.large(), "Clip: 123,060,480 parameters, 492.2 MB"),
        (Vae, VaeConfig.flux(), "Vae: 83,819,683 parameters, 335.3 MB"),
    ],
)
def test_of_abstract_networks_it_tells_parts_and_sizes(network, config, title):
    shown = repr(eqx.filter_eval_shape(network, config, key=jax.random.key(0)))
    lines = shown.splitlines()
    assert lines[0] == title
    assert len(lines) <= 14
    assert max(map(len, lines)) <= 100
    # The dataclass's repr, wrapped.
    assert repr(config) in " ".join(line.strip() for line in lines)


def test_it_tells_how_blocks_are_kept():
    flux = small_flux()
    rows = {}
    for name, network in (("stacked", flux), ("unrolled", unroll(flux))):
        rows[name] = repr(network).splitlines()
    assert any("DoubleBlock, 3 stacked" in row for row in rows["stacked"])
    assert any("DoubleBlock, 3 unrolled" in row for row in rows["unrolled"])
    assert rows["stacked"][0] == rows["unrolled"][0]


def test_a_weight_of_8_bits_counts_as_its_matrix():
    flux = small_flux()
    plain, quantized = repr(flux).splitlines(), repr(quantize(flux, "int8")).splitlines()
    assert plain[0].partition(",  ")[0].split()[1] == quantized[0].split()[1]
    assert any(row.split()[0] == "single" and "int8" in row for row in quantized)
    assert plain[0] != quantized[0]  # fewer bytes


def test_a_network_without_guidance_has_no_row_for_it():
    schnell = eqx.filter_eval_shape(Flux, FluxConfig.schnell(), key=jax.random.key(0))
    assert not any(row.startswith("  guidance_in") for row in repr(schnell).splitlines())


def test_traced_networks_have_it_too():
    seen = []

    @jax.jit
    def run(flux):
        seen.append(repr(flux))
        return flux.img_in.bias

    flux = small_flux()
    run(flux)
    assert seen == [repr(flux)]


def test_pytrees_of_other_leaves_are_shown_leaf_by_leaf():
    network = eqx.filter_eval_shape(Flux, CONFIG, key=jax.random.key(0))
    specs = jax.tree.map(lambda _: PartitionSpec("fsdp"), network)
    assert "weight=Dense(value=P('fsdp',))" in repr(specs)


def test_of_a_partitioned_network_it_counts_the_arrays_that_are_there():
    network = eqx.filter_eval_shape(Flux, CONFIG, key=jax.random.key(0))
    names = repr(eqx.filter(network, lambda leaf: leaf.ndim == 1)).splitlines()
    assert any(row.split()[:2] == ["img_in", "Linear"] for row in names)
    assert repr(eqx.filter(network, lambda leaf: False)).startswith("Flux: 0 parameters, 0 B")
