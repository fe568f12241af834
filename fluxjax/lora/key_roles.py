"""The last part of a key in an adapter file: which tensor of its module the key names.

A key is the name of a module and an ending, as in "….img_attn_proj.lora_down.weight". Endings
of all formats that mean the same get the same role, here "down". Roles of LyCORIS's methods keep
the names of LyCORIS ("hada_w1_a").
"""

import re
from collections.abc import Iterator

MODEL_ROLES = ("plain", "plain_bias")
"""Roles of tensors that are named as a model's own weights."""

_FIXED_ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A": "down",
    ".lora_A.weight": "down",
    ".lora_B": "up",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "row_magnitude",
    ".lora_magnitude_vector.weight": "row_magnitude",
    ".reshape_weight": "reshape",
    ".diff": "full",
    ".diff_b": "bias",
    ".w_norm": "full",
    ".b_norm": "bias",
    ".set_weight": "assigned",
    ".scale": "plain",
    ".weight": "plain",
    ".bias": "plain_bias",
    ".base_layer.bias": "plain_bias",
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    ".oft_R.weight": "oft_R",
    ".boft_R": "boft_R",
    ".boft_s": "boft_s",
}
_LOKR_NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
_LOHA_NAMES = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_GLORA_NAMES = ("a1", "a2", "b1", "b2")
_PROCESSOR_STEMS = ("", ".lora", "_lora", ".lora_linear_layer")
"""What stands before ".down.weight" and ".up.weight" in files of XLabs and of old diffusers."""


def _all_endings() -> dict[str, str]:
    """Return the role of every known ending of a key."""
    roles = dict(_FIXED_ENDINGS)
    for name in _LOKR_NAMES:
        roles[f".lokr_{name}"] = f"lokr_{name}"
    for name in _LOHA_NAMES:
        roles[f".hada_{name}"] = f"hada_{name}"
    for name in _GLORA_NAMES:
        roles[f".{name}.weight"] = name
    for stem in _PROCESSOR_STEMS:
        for role in ("down", "up"):
            roles[f"{stem}.{role}.weight"] = role
    return roles


_ROLES = _all_endings()
_ROLES_BY_LENGTH = sorted(_ROLES.items(), key=lambda item: len(item[0]), reverse=True)
# PEFT puts an adapter's name, mostly "default", into the keys of a model in memory; the files
# that PEFT itself writes leave it out, others keep it.
_NAMED_ADAPTER = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+(\.weight|\.bias|)\Z")


def modules_and_roles(key: str) -> Iterator[tuple[str, str]]:
    """Yield each way to read a key as the name of a module and a role, longest ending first.

    For example, "x.to_q.lora.down.weight" is the role "down" of "x.to_q", or of "x.to_q.lora", or
    the weight ("plain") of a module "x.to_q.lora.down". The caller takes the first module that it
    knows.
    """
    for ending, role in _ROLES_BY_LENGTH:
        if key.endswith(ending):
            yield key[: -len(ending)], role
    match = _NAMED_ADAPTER.search(key)
    if match is None:
        return
    ending = f".{match[1]}{match[2]}"
    if ending in _ROLES:
        yield key[: match.start()], _ROLES[ending]


def is_adapter_key(key: str) -> bool:
    """Return whether a key names a tensor of an adapter, rather than one of a model."""
    # Nunchaku's low-rank tensors have these endings without ".weight".
    if key.endswith((".lora_down", ".lora_up")):
        return True
    return any(role not in MODEL_ROLES for _, role in modules_and_roles(key))
