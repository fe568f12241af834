"""Adapters that PEFT and LyCORIS made, merged by them and by fluxjax into the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from layouts import write
from lycoris.functional import locon, loha, lokr
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from reference import FLOAT32_BOUND, normal, perturbed, relative_error, to_torch
from torch import nn

from fluxjax import load_flux, merge, read_lora
from fluxjax.nets.stack import leaf_names

CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
TARGETS = [
    "attn.to_q",
    "attn.to_out.0",
    "attn.add_v_proj",
    "ff.net.2",
    "proj_mlp",
    "norm_out.linear",
]
SQUARE = "lora_unet_double_blocks_0_img_attn_proj"
OBLONG = "lora_unet_double_blocks_0_txt_mlp_0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small transformer of diffusers, saved."""
    path = tmp_path_factory.mktemp("model")
    perturbed(FluxTransformer2DModel.from_config(CONFIG)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def flux(folder):
    return load_flux(folder)


def randomize(network: nn.Module, only: str = "") -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if only in name and (weight.requires_grad or only):
                weight.copy_(
                    0.2 * torch.randn(weight.shape, generator=generator) + ("magnitude" in name)
                )


LORA = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
PEFT = {
    "patterns of ranks and alphas": LoraConfig(
        **LORA,
        rank_pattern={"to_q": 2, r"ff\.net\..*": 3},
        alpha_pattern={"^norm_out.linear": 5, "0.attn.add_v_proj": 7},
    ),
    "alphas of expressions": LoraConfig(
        **LORA, alpha_pattern={r".*\.attn\.to_(q|k)": 1, "^attn": 3, "single.*mlp": 9}
    ),
    "rsLoRA with biases": LoraConfig(**LORA, use_rslora=True, lora_bias=True),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "whole modules and biases": LoraConfig(
        **LORA, modules_to_save=["x_embedder"], bias="lora_only"
    ),
    "LoKr": LoKrConfig(
        r=4, alpha=6, target_modules=TARGETS, init_weights=False, alpha_pattern={"to_q": 3}
    ),
    "LoKr with both decomposed": LoKrConfig(
        r=1,
        alpha=3,
        target_modules=TARGETS,
        init_weights=False,
        decompose_both=True,
        rank_pattern={"to_q": 2},
    ),
    "LoHa": LoHaConfig(
        r=4, alpha=6, target_modules=TARGETS, init_weights=False, rank_pattern={"to_q": 2}
    ),
    "OFT": OFTConfig(oft_block_size=8, target_modules=TARGETS, init_weights=False),
    "OFT of three terms": OFTConfig(
        oft_block_size=8, target_modules=TARGETS, init_weights=False, num_cayley_neumann_terms=3
    ),
    "OFT, exact": OFTConfig(
        oft_block_size=8, target_modules=TARGETS, init_weights=False, use_cayley_neumann=False
    ),
    "OFT, shared": OFTConfig(
        oft_block_size=8, target_modules=TARGETS, init_weights=False, block_share=True
    ),
    "OFT, constrained": OFTConfig(
        oft_block_size=8, target_modules=TARGETS, init_weights=False, coft=True, eps=0.5
    ),
    "BOFT": BOFTConfig(boft_block_size=8, target_modules=TARGETS, init_weights=False),
}


@pytest.mark.parametrize("name", PEFT)
def test_a_folder_of_peft_merges_as_peft_merges_it(folder, flux, tmp_path, name):
    adapted = get_peft_model(FluxTransformer2DModel.from_pretrained(folder), PEFT[name])
    randomize(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    theirs = load_flux(tmp_path / "merged")
    for path in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        assert_same_weights(merge(flux, [read_lora(path)]), theirs, flux)


def assert_same_weights(ours, theirs, base) -> None:
    changed = 0
    for name, x, y, before in zip(
        leaf_names(ours), *map(jax.tree.leaves, (ours, theirs, base)), strict=True
    ):
        assert relative_error(x, y) <= FLOAT32_BOUND, name
        changed += not np.array_equal(y, before)
    assert changed >= 5  # the adapter reaches the leaves of most of its targets


@pytest.mark.parametrize("layout", ["no prefix", "component prefix"])
def test_metadata_of_diffusers_is_read_with_and_without_a_prefix(folder, flux, tmp_path, layout):
    network = FluxTransformer2DModel.from_pretrained(folder)
    network.add_adapter(LoraConfig(**LORA, alpha_pattern={"to_q": 3}, use_rslora=True))
    if layout == "no prefix":
        network.save_lora_adapter(tmp_path / "adapter")
    else:
        from diffusers import FluxPipeline
        from diffusers.training_utils import _collate_lora_metadata
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(network)
        FluxPipeline.save_lora_weights(
            tmp_path / "adapter", layers, **_collate_lora_metadata({"transformer": network})
        )
    network.fuse_lora()
    network.unload_lora()
    network.save_pretrained(tmp_path / "merged")
    assert_same_weights(
        merge(flux, [read_lora(tmp_path / "adapter")]), load_flux(tmp_path / "merged"), flux
    )


def linear(name: str) -> nn.Linear:
    rows, columns = {SQUARE: (32, 32), OBLONG: (128, 32)}[name]
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = to_torch(normal(rows, columns, seed=3)) / 4
    return layer


def their_weight(layer: nn.Module, columns: int) -> np.ndarray:
    """Return the weight that a layer's forward amounts to."""
    with torch.no_grad():
        return layer(torch.eye(columns)).T.numpy()


LYCORIS = {
    "GLoRA": (GLoRAModule, dict(lora_dim=4, alpha=3)),
    "OFT": (DiagOFTModule, dict(lora_dim=8)),
    "OFT, constrained and rescaled": (
        DiagOFTModule,
        dict(lora_dim=8, constraint=0.02, rescaled=True),
    ),
    "BOFT": (ButterflyOFTModule, dict(lora_dim=8)),
    "BOFT, constrained and rescaled": (
        ButterflyOFTModule,
        dict(lora_dim=4, constraint=0.05, rescaled=True),
    ),
    "DoRA by column": (
        LoConModule,
        dict(lora_dim=4, alpha=3, weight_decompose=True, wd_on_out=False),
    ),
    "DoRA by row": (LoConModule, dict(lora_dim=4, alpha=3, weight_decompose=True, wd_on_out=True)),
    "LoHa, decomposed by column": (
        LohaModule,
        dict(lora_dim=4, alpha=3, weight_decompose=True, wd_on_out=False),
    ),
    "LoKr": (LokrModule, dict(lora_dim=1, alpha=3, factor=4)),
    "LoKr, both decomposed": (LokrModule, dict(lora_dim=1, alpha=3, factor=4, decompose_both=True)),
    "LoKr of whole factors, decomposed by row": (
        LokrModule,
        dict(
            lora_dim=10000,
            alpha=3,
            factor=4,
            full_matrix=True,
            weight_decompose=True,
            wd_on_out=True,
        ),
    ),
}


@pytest.mark.parametrize("module", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("name", LYCORIS)
def test_a_module_of_lycoris_merges_as_it_runs(tmp_path, name, module):
    kind, options = LYCORIS[name]
    layer = linear(module)
    theirs = kind(module, layer, 1.0, **options).eval()
    randomize(theirs)
    tensors = {
        f"{module}.{key}": np.asarray(value.detach())
        for key, value in theirs.state_dict().items()
        if "org" not in key
    }
    write(tmp_path / "x.safetensors", tensors)
    assert_delta(tmp_path / "x.safetensors", layer.weight, their_weight(theirs, layer.in_features))


def assert_delta(path, base, theirs) -> None:
    (found,) = read_lora(path).changes["flux"].values()
    base = np.asarray(base.detach())
    ours = base + np.asarray(found[0].term.delta(jnp.asarray(base)))
    assert relative_error(theirs - base, 0 * base + 1) > 1e-3  # it changes something
    assert relative_error(ours, theirs) <= FLOAT32_BOUND


def test_the_first_glora_of_lycoris_had_its_factors_the_other_way_round(tmp_path):
    layer = linear(OBLONG)
    a1, a2, b1, b2 = (
        normal(4, 32, seed=4),
        normal(32, 4, seed=5),
        normal(4, 32, seed=6),
        normal(128, 4, seed=7),
    )
    values = dict(a1=a1, a2=a2, b1=b1, b2=b2)
    tensors = {f"{OBLONG}.{name}.weight": value for name, value in values.items()}
    write(tmp_path / "x.safetensors", tensors | {f"{OBLONG}.alpha": np.float32(2).reshape(())})
    base = layer.weight.detach().double().numpy()
    # f(x) = W (x + A x) + B x, with the products that fit.
    assert_delta(tmp_path / "x.safetensors", layer.weight, base + 0.5 * (b2 @ b1 + base @ a2 @ a1))


CORE = (4, 4, 1, 1)


def tucker(kind: str) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """Return a Tucker form of a 1x1 convolution, and LyCORIS's difference of it."""
    if kind == "LoRA":
        down, up, mid = (
            normal(4, 32, 1, 1, seed=1),
            normal(128, 4, 1, 1, seed=2),
            normal(*CORE, seed=3),
        )
        names = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid}
        return names, locon.diff_weight(*map(to_torch, (down, up, mid)), gamma=0.75)
    if kind == "LoHa":
        parts = [
            normal(*shape, seed=i)
            for i, shape in enumerate([(4, 32), (4, 128), (4, 32), (4, 128), CORE, CORE])
        ]
        names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
        return dict(zip(names, parts, strict=True)), loha.diff_weight(
            *map(to_torch, parts), gamma=0.75
        )
    w1, w2_a, w2_b, t2 = (
        normal(8, 4, seed=1),
        normal(4, 16, seed=2),
        normal(4, 8, seed=3),
        normal(*CORE, seed=4),
    )
    weights = [None if x is None else to_torch(x) for x in (w1, None, None, None, w2_a, w2_b, t2)]
    return dict(lokr_w1=w1, lokr_w2_a=w2_a, lokr_w2_b=w2_b, lokr_t2=t2), lokr.kron_weight(
        *weights, scale=0.75
    )


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr"])
def test_tucker_forms_of_1x1_are_what_lycoris_makes_of_them(tmp_path, kind):
    names, theirs = tucker(kind)
    tensors = {f"{OBLONG}.{name}": value for name, value in names.items()}
    write(tmp_path / "x.safetensors", tensors | {f"{OBLONG}.alpha": np.float32(3).reshape(())})
    base = linear(OBLONG).weight
    assert_delta(
        tmp_path / "x.safetensors", base, base.detach().numpy() + theirs.reshape(128, 32).numpy()
    )


def test_butterflies_of_several_stages_are_pefts(tmp_path, monkeypatch):
    """PEFT makes them on CUDA only, so its kernel is replaced by torch's block diagonal."""
    from peft.tuners.boft import layer as boft

    class Diagonal:
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*stage) for stage in blocks])

    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft, "FastBlockDiag", Diagonal, raising=False)
    layer = nn.Sequential()
    layer.add_module("proj", linear(SQUARE))
    base = layer.proj.weight.detach().clone()
    config = BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["proj"], init_weights=False
    )
    adapted = get_peft_model(layer, config)
    (name,) = {
        name.removesuffix(".boft_R.default")
        for name, _ in adapted.named_parameters()
        if name.endswith("boft_R.default")
    }
    values = {
        key: dict(adapted.named_parameters())[f"{name}.{key}.default"]
        for key in ("boft_R", "boft_s")
    }
    assert values["boft_R"].shape[0] == 3
    stem = "base_model.model.transformer_blocks.0.attn.to_out.0"
    write(
        tmp_path / "x.safetensors",
        {f"{stem}.{key}": np.asarray(value.detach()) for key, value in values.items()},
    )
    assert_delta(
        tmp_path / "x.safetensors", base, adapted.merge_and_unload().proj.weight.detach().numpy()
    )
