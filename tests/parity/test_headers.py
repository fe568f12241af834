"""The full-size networks have a parameter for every tensor of the official files, and no others."""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from fluxjax import T5, Clip, Flux, FluxConfig, Vae
from fluxjax.checkpoint import image_prompt_names, names as tables
from fluxjax.checkpoint.chroma_names import CHROMA_BFL, CHROMA_DIFFUSERS
from fluxjax.checkpoint.controlnet_names import CONTROLNET_DIFFUSERS, CONTROLNET_XLABS
from fluxjax.checkpoint.fused import fused_parts
from fluxjax.checkpoint.match import complete_plan
from fluxjax.checkpoint.tensors import StoredTensor
from fluxjax.checkpoint.weights import abstract
from fluxjax.nets import (
    Chroma,
    ChromaConfig,
    ClipConfig,
    ControlNet,
    ControlNetConfig,
    IpAdapter,
    IpAdapterConfig,
    Redux,
    ReduxConfig,
    Siglip,
    SiglipConfig,
    T5Config,
    VaeConfig,
)

FOLDER = Path(__file__).parents[3] / "shared" / "reference"
FAMILY_HEADERS = FOLDER / "family_headers.json.gz"
HEADERS = (FOLDER / "headers.json.gz", FAMILY_HEADERS)
SIGLIP = (Siglip, SiglipConfig.so400m(), image_prompt_names.SIGLIP_TRANSFORMERS)
REDUX = (Redux, ReduxConfig.dev(), image_prompt_names.REDUX_BFL)
FILL = FluxConfig(in_channels=384, out_channels=64)
DEPTH = FluxConfig(in_channels=128, out_channels=64)
CASES = {
    "bfl/flux1-dev": (Flux, FluxConfig.dev(), tables.FLUX_BFL),
    "diffusers/flux1-dev.transformer": (Flux, FluxConfig.dev(), tables.FLUX_DIFFUSERS),
    "diffusers/flux1-schnell.transformer": (Flux, FluxConfig.schnell(), tables.FLUX_DIFFUSERS),
    "diffusers/flux1-fill-dev.transformer": (Flux, FILL, tables.FLUX_DIFFUSERS),
    "diffusers/flux1-depth-dev.transformer": (Flux, DEPTH, tables.FLUX_DIFFUSERS),
    "bfl/flux1-fill-dev": (Flux, FILL, tables.FLUX_BFL),
    "bfl/flux1-canny-dev": (Flux, DEPTH, tables.FLUX_BFL),
    "bfl/flux1-depth-dev": (Flux, DEPTH, tables.FLUX_BFL),
    "bfl/flux1-kontext-dev": (Flux, FluxConfig.dev(), tables.FLUX_BFL),
    "diffusers/flux1-canny-dev.transformer": (Flux, DEPTH, tables.FLUX_DIFFUSERS),
    "diffusers/flux1-kontext-dev.transformer": (Flux, FluxConfig.dev(), tables.FLUX_DIFFUSERS),
    "bfl/chroma1-hd": (Chroma, ChromaConfig.hd(), CHROMA_BFL),
    "diffusers/chroma1-hd.transformer": (Chroma, ChromaConfig.hd(), CHROMA_DIFFUSERS),
    "diffusers/instantx-flux1-controlnet-union": (
        ControlNet,
        ControlNetConfig.union(),
        CONTROLNET_DIFFUSERS,
    ),
    "diffusers/shakker-flux1-controlnet-union-pro-2": (
        ControlNet,
        ControlNetConfig.union_pro_2(),
        CONTROLNET_DIFFUSERS,
    ),
    "diffusers/xlabs-flux1-controlnet": (
        ControlNet,
        ControlNetConfig.xlabs(),
        CONTROLNET_DIFFUSERS,
    ),
    "xlabs/flux-controlnet-v3": (ControlNet, ControlNetConfig.xlabs(), CONTROLNET_XLABS),
    "bfl/ae": (Vae, VaeConfig.flux(), tables.vae_bfl(4)),
    "diffusers/flux1.vae": (Vae, VaeConfig.flux(), tables.VAE_DIFFUSERS),
    "transformers/clip-l.text_encoder": (Clip, ClipConfig.large(), tables.CLIP_TRANSFORMERS),
    "transformers/t5-xxl.text_encoder_2": (T5, T5Config.xxl(), tables.T5_TRANSFORMERS),
    "diffusers/flux1-redux-dev.image_encoder": SIGLIP,
    "comfyui/sigclip_vision_patch14_384": SIGLIP,
    "diffusers/flux1-redux-dev.image_embedder": REDUX,
    "bfl/flux1-redux-dev": REDUX,
    "xlabs/flux-ip-adapter": (
        IpAdapter,
        IpAdapterConfig.xlabs(),
        image_prompt_names.IP_ADAPTER_XLABS,
    ),
    "xlabs/flux-ip-adapter-v2": (
        IpAdapter,
        IpAdapterConfig.xlabs(tokens=16),
        image_prompt_names.IP_ADAPTER_XLABS,
    ),
    "instantx/flux1-ip-adapter": (
        IpAdapter,
        IpAdapterConfig.instantx(),
        image_prompt_names.IP_ADAPTER_INSTANTX,
    ),
}


@pytest.fixture(scope="module")
def headers():
    found = {}
    for path in HEADERS:
        if not path.exists():
            pytest.skip(f"{path} with the official headers is not there")
        found |= json.loads(gzip.decompress(path.read_bytes()))
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_official_tensor_has_its_place_and_every_place_its_tensor(headers, name):
    make, config, dialect = CASES[name]
    tensors = {
        key: StoredTensor(Path(name), np.dtype(np.float32), tuple(entry["shape"]), 0)
        for key, entry in headers[name].items()
    }
    network = abstract(make, config)
    plan = complete_plan(network, tensors, dialect, fused_parts(config))
    used = {}
    for sources in plan.sources.values():
        for source in sources:
            used[id(source.tensor)] = source.tensor
    ignored = sum(dialect.without_prefix(key) in dialect.ignored for key in tensors)
    assert len(used) == len(tensors) - ignored
    values = sum(leaf.size for leaf in jax.tree.leaves(network))
    assert sum(tensor.size for tensor in used.values()) == values
