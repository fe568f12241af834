"""Endings of keys in adapter files: which tensor of a module a key is, in every format."""

import re
from collections.abc import Iterator

# A key's ending, and the role of its tensor.
_ROLES = {
    **{
        f".lora_{name}.weight": role
        for name, role in (("down", "down"), ("up", "up"), ("mid", "mid"))
    },
    **{
        f".lora_{name}{end}": role
        for name, role in (("A", "down"), ("B", "up"))
        for end in ("", ".weight")
    },
    **{
        f"{lead}.{role}.weight": role
        for lead in ("", ".lora", "_lora", ".lora_linear_layer")
        for role in ("down", "up")
    },
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
    **{
        f".lokr_{name}": f"lokr_{name}"
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    },
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    ".oft_R.weight": "oft_R",
    ".boft_R": "boft_R",
    ".boft_s": "boft_s",
}
# PEFT puts an adapter's name, "default" in most files, into the keys of its model; its own files leave it out.
_NAMED = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+(\.weight|\.bias|)\Z")
PLAIN = ("plain", "plain_bias")
"""Roles of tensors that are named as a model's own."""


def splits(key: str) -> Iterator[tuple[str, str]]:
    """Yield the ways in which a key may be a module's name and a role, the longest ending first."""
    for end, role in _BY_LENGTH:
        if key.endswith(end):
            yield key[: -len(end)], role
    named = _NAMED.search(key)
    if named:
        known = _ROLES.get(f".{named[1]}{named[2]}")
        if known is not None:
            yield key[: named.start()], known


_BY_LENGTH = sorted(_ROLES.items(), key=lambda item: len(item[0]), reverse=True)


def is_adapters(key: str) -> bool:
    """Return whether a key is named as an adapter's tensor, and not as a model's."""
    return any(role not in PLAIN for _, role in splits(key)) or key.endswith(
        (".lora_down", ".lora_up")
    )
