"""The full-size networks name and shape every tensor of the official files, no less and no more."""

import gzip
import json
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

from fluxjax import T5, Clip, ClipConfig, Flux, FluxConfig, T5Config, Vae, VaeConfig
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.detect import fused_parts
from fluxjax.checkpoint.plan import abstract, plan
from fluxjax.checkpoint.tensors import StoredTensor

HEADERS = Path(__file__).parents[3] / "shared" / "reference" / "headers.json.gz"
FILL = FluxConfig(in_channels=384, out_channels=64)
DEPTH = FluxConfig(in_channels=128, out_channels=64)
CASES = {
    "bfl/flux1-dev": (Flux, FluxConfig.dev(), tables.FLUX_BFL),
    "diffusers/flux1-dev.transformer": (Flux, FluxConfig.dev(), tables.FLUX_DIFFUSERS),
    "diffusers/flux1-schnell.transformer": (Flux, FluxConfig.schnell(), tables.FLUX_DIFFUSERS),
    "diffusers/flux1-fill-dev.transformer": (Flux, FILL, tables.FLUX_DIFFUSERS),
    "diffusers/flux1-depth-dev.transformer": (Flux, DEPTH, tables.FLUX_DIFFUSERS),
    "bfl/ae": (Vae, VaeConfig.flux(), tables.vae_bfl(4)),
    "diffusers/flux1.vae": (Vae, VaeConfig.flux(), tables.VAE_DIFFUSERS),
    "transformers/clip-l.text_encoder": (Clip, ClipConfig.large(), tables.CLIP_TRANSFORMERS),
    "transformers/t5-xxl.text_encoder_2": (T5, T5Config.xxl(), tables.T5_TRANSFORMERS),
}


@pytest.fixture(scope="module")
def headers():
    if not HEADERS.exists():
        pytest.skip("the official headers are not at hand")
    return json.loads(gzip.decompress(HEADERS.read_bytes()))


@pytest.mark.parametrize("name", CASES)
def test_every_official_tensor_has_its_place_and_every_place_its_tensor(headers, name):
    make, config, dialect = CASES[name]
    tensors = {
        key: StoredTensor(Path(name), np.dtype(np.float32), tuple(entry["shape"]), 0)
        for key, entry in headers[name].items()
    }
    network = abstract(make, config)
    pieces = [
        piece
        for pieces in plan(network, tensors, dialect, fused_parts(config)).pieces.values()
        for piece in pieces
    ]
    used = {id(piece.tensor): piece.tensor for piece in pieces}.values()
    assert len(used) == len(tensors) - sum(
        dialect.strip(key) in dialect.unneeded for key in tensors
    )
    sizes = sum(
        leaf.size
        for leaf in jax.tree.leaves(eqx.filter_eval_shape(make, config, key=jax.random.key(0)))
    )
    assert sum(tensor.size for tensor in used) == sizes
