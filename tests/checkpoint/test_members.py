"""Members of FLUX.1 of the same shapes: told apart by their names or hashes."""

from dataclasses import replace

import pytest
from layouts import random_network

from fluxjax import Flux, FluxConfig, load_flux
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.inspect import inspect_weights
from fluxjax.checkpoint.members import described_variant, member_of_file, member_of_source
from fluxjax.generate import save
from fluxjax.nets import widen_input
from fluxjax.zoo import ZOO

DEV = FluxConfig.dev()
SMALL = FluxConfig(
    width=32,
    heads=2,
    double_depth=1,
    single_depth=1,
    mlp_width=128,
    context=12,
    pooled=6,
    rope_axes=(4, 6, 6),
)
TITLES = {"openflux": "OpenFLUX", "libreflux": "LibreFLUX"}
CONTROL = replace(DEV, in_channels=128)
FILL = replace(DEV, in_channels=384)


@pytest.mark.parametrize(
    ("path", "config", "member"),
    [
        ("flux1-fill-dev.safetensors", FILL, "fill"),
        ("anything.safetensors", FILL, "fill"),
        ("flux1-canny-dev.safetensors", CONTROL, "canny"),
        ("flux1-depth-dev-Q4.gguf", CONTROL, "depth"),
        ("my-control.safetensors", CONTROL, None),
        ("FLUX.1-Depth-dev/transformer/model-00001-of-00003.safetensors", CONTROL, "depth"),
        ("flux1-dev-kontext_fp8_scaled.safetensors", DEV, "kontext"),
        ("flux1-krea-dev.safetensors", DEV, "krea"),
        ("flux1-dev.safetensors", DEV, None),
        ("flux1-fill-dev.safetensors", DEV, None),  # the shapes say that it is not
        ("kontextual.safetensors", DEV, None),
        ("kontext/models/flux1-dev.safetensors", DEV, None),
        ("kontext.safetensors", FluxConfig.schnell(), None),
        ("any.safetensors", FluxConfig.lite(), "lite"),
        ("OpenFLUX.1.safetensors", FluxConfig.schnell(), "openflux"),
        ("LibreFLUX/transformer/a.safetensors", FluxConfig.schnell(), "libreflux"),
        ("openflux.safetensors", DEV, None),
        ("flux-dev-de-distill-Q8_0.gguf", DEV, "de-distilled"),
        ("flux_dedistilled.safetensors", FluxConfig.schnell(), "de-distilled"),
        ("flux-dev-distilled.safetensors", DEV, None),
        (
            "models--black-forest-labs--FLUX.1-Kontext-dev/snapshots/0a/transformer/a.safetensors",
            DEV,
            "kontext",
        ),
    ],
)
def test_a_name_tells_among_those_of_the_same_shapes(tmp_path, path, config, member):
    assert member_of_file(tmp_path / path, config) == member


def test_the_cache_of_the_hub_names_files_by_their_hash(tmp_path):
    blob = tmp_path / "blobs" / ("41360d16" + 56 * "0")
    blob.parent.mkdir()
    blob.touch()
    link = tmp_path / "renamed.safetensors"
    link.symlink_to(blob)
    assert member_of_file(link, CONTROL) == "depth"
    assert member_of_file(link, DEV) is None
    assert described_variant(link, CONTROL) == "Depth"
    assert described_variant(link, replace(CONTROL, double_depth=2)) == "Depth, of another size"
    assert described_variant(link, DEV) == "dev"


def test_models_without_an_effective_distilled_scale_have_true_guidance_by_default(tmp_path):
    flux = random_network(Flux, replace(SMALL, guidance_embed=False))
    for name, member, cfg in (
        ("OpenFLUX.1", "openflux", 3.5),
        ("LibreFLUX", "libreflux", 4.0),
        ("flux-de-distilled", "de-distilled", 3.5),
        ("other", None, 1.0),
    ):
        save(flux, tmp_path / name, to="diffusers")
        defaults = load_defaults(tmp_path / name)
        assert (defaults.cfg, defaults.guidance) == (cfg, None)
        network = inspect_weights(tmp_path / name).networks[0]
        expected = "schnell" if member is None else TITLES.get(member, "De-distilled")
        assert network.variant == f"{expected}, of another size"
    assert ZOO["libreflux"].defaults.visible_padding == 0
    assert not ZOO["libreflux"].defaults.shift


def test_names_of_the_zoo_need_no_file():
    assert member_of_source("kontext") == "kontext"
    assert member_of_source("black-forest-labs/FLUX.1-Canny-dev") == "canny"
    assert member_of_source("someone/something") is None


def test_a_file_is_described_and_has_the_defaults_of_what_it_is(tmp_path):
    flux = load_flux("tiny")
    for features, name, member in (
        (64, "my-depth", "depth"),
        (64, "other", None),
        (320, "other-fill", "fill"),
        (0, "kontext", "kontext"),
    ):
        save(widen_input(flux, features), tmp_path / name, to="diffusers")
        assert member_of_source(tmp_path / name) == member
        expected = "Canny/Depth" if member is None else member.capitalize()
        report = str(inspect_weights(tmp_path / name))
        assert f"transformer ({expected}, of another size)" in report.replace("FLUX ", "")
        defaults = load_defaults(tmp_path / name)
        assert defaults == ZOO["canny" if member is None else member].defaults
