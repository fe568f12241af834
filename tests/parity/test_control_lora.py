"""BFL's Canny and Depth as adapters: what diffusers makes of one, and its full size."""

import gzip
import inspect
import json

import diffusers.loaders.lora_conversion_utils as conversion
import diffusers.loaders.lora_pipeline as lora_pipeline
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapters import Draw
from diffusers import FluxControlPipeline, FluxTransformer2DModel
from layouts import write
from reference import FLOAT32_BOUND, normal, perturbed, relative_error, to_torch
from test_channels import CONFIG
from test_headers import FAMILY_HEADERS

from fluxjax import Flux, FluxConfig, attach, image_ids, load_flux, merge, read_lora
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.weights import parameters_of
from fluxjax.lora.changes import changes_of

WIDTH = 32


@pytest.fixture(autouse=True)
def converter_of_this_size(monkeypatch):
    """diffusers' reader has the numbers of dev's blocks and its width written into its source."""
    source = inspect.getsource(conversion._convert_bfl_flux_control_lora_to_diffusers)
    for dev, small in (
        ("num_layers = 19", "num_layers = 2"),
        ("num_single_layers = 38", "num_single_layers = 2"),
        ("inner_dim = 3072", f"inner_dim = {WIDTH}"),
    ):
        assert dev in source
        source = source.replace(dev, small)
    space = dict(vars(conversion))
    exec(source, space)
    name = "_convert_bfl_flux_control_lora_to_diffusers"
    monkeypatch.setattr(lora_pipeline, name, space[name])


def control_adapter(base, draw):
    """Return the tensors of an adapter of every layer, as BFL's: factors, biases, norms."""
    tensors = {}
    for name, slot in parameters_of(base).items():
        ((key, _),) = tables.FLUX_BFL.keys(name)
        if len(slot.shape) == 1:
            if key.endswith("norm.scale"):
                tensors[key] = 1 + 0.3 * draw(*slot.shape)
            continue
        rows, columns = slot.shape
        columns = 128 if name == "img_in.weight" else columns
        rank, module = min(16, rows, columns), key.removesuffix(".weight")
        down = draw(rank, columns) / columns**0.5
        if name == "final.modulation.weight":
            # diffusers exchanges the halves of this layer's rows, as it should, but also those of
            # the rank in `lora_A` without those in `lora_B`: with equal halves that has no effect.
            down[rank // 2 :] = down[: rank // 2]
        tensors[f"{module}.lora_A.weight"] = down
        tensors[f"{module}.lora_B.weight"] = 0.3 * draw(rows, rank) / rank**0.5
        tensors[f"{module}.lora_B.bias"] = 0.1 * draw(rows)
    return {key: np.asarray(value, np.float32) for key, value in tensors.items()}


def outputs(flux, theirs):
    """Return the output of our transformer and of theirs, for the same inputs."""
    x, ids = normal(6, 128, seed=1), image_ids(32, 48)
    txt, vec = normal(5, 24, seed=2), normal(8, seed=3)
    with torch.no_grad():
        reference = theirs(
            hidden_states=to_torch(x)[None],
            encoder_hidden_states=to_torch(txt)[None],
            pooled_projections=to_torch(vec)[None],
            timestep=torch.tensor([0.6]),
            guidance=torch.tensor([3.5]),
            img_ids=to_torch(ids),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0][0]
    inputs = {"txt": jnp.asarray(txt), "vec": jnp.asarray(vec), "img_ids": ids, "guidance": 3.5}
    return eqx.filter_jit(flux)(jnp.asarray(x), 0.6, **inputs), reference


@pytest.mark.parametrize("scale", [1.0, 0.85])
def test_a_merged_or_attached_control_adapter_gives_what_diffusers_gives(tmp_path, scale):
    theirs = perturbed(FluxTransformer2DModel.from_config(CONFIG | {"in_channels": 64}))
    theirs.save_pretrained(tmp_path / "model")
    base = load_flux(tmp_path / "model")
    path = tmp_path / "control.safetensors"
    write(path, control_adapter(base, Draw(50)))
    pipeline = FluxControlPipeline(None, None, None, None, None, None, theirs)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    pipeline.fuse_lora(lora_scale=scale)
    lora = read_lora(path)
    for adapted in (merge(base, [lora], [scale]), attach(base, [lora], [scale])):
        assert adapted.config.in_channels == 128
        found, expected = outputs(adapted, pipeline.transformer)
        assert relative_error(found, expected) <= FLOAT32_BOUND


def test_every_tensor_of_the_official_adapter_changes_a_weight(tmp_path):
    if not FAMILY_HEADERS.exists():
        pytest.skip(f"{FAMILY_HEADERS} with the official headers is not there")
    headers = json.loads(gzip.decompress(FAMILY_HEADERS.read_bytes()))
    entries = headers["bfl/flux1-canny-dev-lora"]
    header, offset = {}, 0
    for key, entry in entries.items():
        end = offset + 2 * int(np.prod(entry["shape"]))
        header[key] = {"dtype": "BF16", "shape": entry["shape"], "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    path = tmp_path / "canny.safetensors"
    with open(path, "wb") as file:  # zeros, which take no space on the disk
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    lora = read_lora(path)
    dev = eqx.filter_eval_shape(Flux, FluxConfig.dev(), key=jax.random.key(0))
    changes = changes_of(dev, [lora], [1.0])
    assert changes.keys() == parameters_of(dev).keys()
    assert len(entries) == 1094
