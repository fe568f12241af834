"""Every layer of the blocks has a rule of how it is split, and every rule has a layer."""

import equinox as eqx
import jax
import pytest
from jax.sharding import PartitionSpec
from meshes import mesh_of
from small import CONFIG, small_controlnet

from fluxjax import T5, Flux, Vae
from fluxjax.devices import specs
from fluxjax.devices.specs import TENSOR_SPLITS, array_role, tensor_axis
from fluxjax.nets import ControlNet, T5Config, VaeConfig, leaf_names
from fluxjax.nets.flux_config import fused_features

NETWORKS = {
    "flux": (Flux, CONFIG),
    "t5": (T5, T5Config(vocabulary=8, width=8, heads=2, head_dim=4, depth=2, mlp_width=8)),
    "controlnet": (ControlNet, small_controlnet().config),
    "vae": (Vae, VaeConfig(channels=(8, 16), resnets=1, groups=4)),
}


def roles_and_shapes(name):
    network = eqx.filter_eval_shape(*NETWORKS[name], key=jax.random.key(0))
    leaves = jax.tree_util.tree_flatten_with_path(network)[0]
    return [(array_role(path), leaf.shape) for path, leaf in leaves]


def test_every_rule_matches_a_layer_of_blocks():
    layers = set()
    for name in ("flux", "t5", "controlnet"):
        layers |= {role.layer for role, _ in roles_and_shapes(name) if role.in_blocks}
    assert set(TENSOR_SPLITS) <= layers
    assert set(fused_features(CONFIG)) <= layers


@pytest.mark.parametrize("name", ["flux", "t5", "controlnet"])
def test_every_matrix_of_blocks_has_a_rule(name):
    matrices = [role for role, shape in roles_and_shapes(name) if role.in_blocks and len(shape) > 2]
    assert len(matrices) >= 7
    assert all(tensor_axis(role) is not None for role in matrices)


def test_the_sizes_of_fused_layers_are_those_of_their_arrays():
    shapes = {role.layer: shape for role, shape in roles_and_shapes("flux") if len(shape) == 3}
    for layer, sizes in fused_features(CONFIG).items():
        axis = tensor_axis(array_role_of(layer))
        assert shapes[layer][axis] == sum(sizes)


def array_role_of(layer):
    return next(role for role, shape in roles_and_shapes("flux") if role.layer == layer)


EXPECTED = {
    # [depth, out, in]: fsdp splits the axis that tensor leaves.
    ("flux", "double.img.qkv.weight"): (None, "tensor", "fsdp"),
    ("flux", "double.img.qkv.bias"): (None, "tensor"),
    ("flux", "single.linear2.weight"): (None, "fsdp", "tensor"),
    ("flux", "single.linear2.bias"): (None, None),
    ("flux", "single.modulation.weight"): (None, "tensor", "fsdp"),
    ("flux", "single.modulation.bias"): (None, None),
    ("flux", "double.img.query_norm.scale"): (None, None),
    ("flux", "img_in.weight"): ("fsdp", None),
    ("controlnet", "double_residual.weight"): (None, "tensor", "fsdp"),
    ("controlnet", "double_residual.bias"): (None, None),
    ("t5", "position_bias.weight"): (None, "tensor"),
    ("t5", "tokens.weight"): (None, None),
    ("vae", "decoder.conv_in.weight"): (None, None, None, "fsdp"),
    ("vae", "decoder.conv_out.weight"): (None, None, None, None),  # 3 outputs
    ("vae", "decoder.middle.attention.q.weight"): ("fsdp", None),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_arrays_of_each_kind_are_split_as_documented(name):
    network = eqx.filter_eval_shape(*NETWORKS[name], key=jax.random.key(0))
    placed = jax.tree.leaves(specs(network, mesh_of(fsdp=2, tensor=2)))
    by_name = dict(zip(leaf_names(network), placed, strict=True))
    for (owner, array), axes in EXPECTED.items():
        if owner == name:
            assert by_name[array] == PartitionSpec(*axes), array
