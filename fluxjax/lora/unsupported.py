"""Keys of adapter files that fluxjax does not use: what they look like, or why to ignore them.

No key is dropped without a word: a key is used, or listed in an error with a hint of where it may
come from, or named in a note because it can't have an effect on FLUX.
"""

import re
from collections.abc import Iterable, Sequence

from fluxjax.lora.key_roles import is_adapter_key
from fluxjax.printable import printable

_OTHER_MODELS = {
    "lora_unet_down_blocks": "Stable Diffusion 1 or XL",
    "lora_unet_input_blocks": "Stable Diffusion XL",
    "unet.down_blocks": "Stable Diffusion 1 or XL",
    "joint_blocks": "Stable Diffusion 3",
    "double_stream_modulation": "FLUX.2",
    "single_stream_modulation": "FLUX.2",
    "img_mlp_gate": "FLUX.2",
    "distilled_guidance_layer": "Chroma",
    "lora_te2_text_model": "Stable Diffusion XL",
}
"""Models by a piece of their keys."""
_NUNCHAKU_LORA = (
    "a Nunchaku (SVDQuant) LoRA, fused for its kernels: pass the LoRA that it was converted from"
)
_OTHER_FORMATS = {
    ".quant_state.bitsandbytes__nf4": "an NF4 model of bitsandbytes: pass a LoRA, not a model",
    ".quant_state.bitsandbytes__fp4": "an FP4 model of bitsandbytes: pass a LoRA, not a model",
    ".wscales": "a model of Nunchaku (SVDQuant): pass a LoRA, not a model",
    ".qkv_proj.lora_down": _NUNCHAKU_LORA,
    ".lora_down": _NUNCHAKU_LORA,
    ".glora_A.": "PEFT's GLoRA, which fluxjax does not read: merge it with PEFT",
    ".oft_r": "an OFT of an early version of PEFT: load it and save it again with PEFT",
}
"""Formats by the ending of their keys, or by a piece of them if it ends in a dot."""
_EMBEDDING = re.compile(r"bundle_emb\.(.+?)\.[^.]+\Z")
_PROJECTION = re.compile(
    r"(lora_te1?_|text_encoder\.|text_encoders\.clip_l\.(transformer\.)?)"
    r"(text_projection|logit_scale)(\.|\Z)"
)
_MOST_NAMES = 10


def describe_unknown_keys(keys: Sequence[str]) -> str:
    """Return a sentence that says which model or format keys seem to be of, and what to do.

    **Arguments:**

    - `keys`: of an adapter file, that have no place in FLUX.
    """
    # Other models first: their adapters are in the same formats as those of FLUX.
    for piece, model in _OTHER_MODELS.items():
        if any(piece in key for key in keys):
            return f"They look like {model}'s: use the adapter with that model."
    for mark, description in _OTHER_FORMATS.items():
        if any(_has_mark(key, mark) for key in keys):
            return f"They look like {description}."
    if keys and not any(is_adapter_key(key) for key in keys):
        examples = ", ".join(printable(key, 80) for key in keys[:3])
        return f"They do not look like an adapter's keys ({examples}): pass a LoRA, not a model."
    return "They look like no format that fluxjax knows."


def _has_mark(key: str, mark: str) -> bool:
    """Return whether a key has one of the marks of `_OTHER_FORMATS`."""
    if mark.endswith("."):
        return mark in key
    return key.endswith(mark)


def split_ignored_keys(keys: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Separate the keys that may have an effect on FLUX from those that certainly have none.

    **Arguments:**

    - `keys`: all keys of an adapter file.

    **Returns:** the keys that may have an effect; and one line for each kind of the others, which
    are bundled textual-inversion embeddings and CLIP's projection.
    """
    effective: list[str] = []
    # A dict keeps the order of the file and drops repeats: an embedding has a key per encoder.
    embeddings: dict[str, None] = {}
    projection = None
    for key in keys:
        embedding_match = _EMBEDDING.match(key)
        projection_match = _PROJECTION.match(key)
        if embedding_match:
            embeddings[embedding_match[1]] = None
        elif projection_match:
            projection = projection_match[1] + projection_match[3]
        else:
            effective.append(key)
    notes = []
    if embeddings:
        notes.append(_embeddings_note(list(embeddings)))
    if projection is not None:
        notes.append(
            f"{printable(projection)} is left out: FLUX does not use CLIP's projection, so it has "
            "no effect."
        )
    return effective, tuple(notes)


def _embeddings_note(embeddings: Sequence[str]) -> str:
    """Return the line for the user about bundled embeddings, by their names."""
    names = ", ".join(printable(name, 60) for name in embeddings[:_MOST_NAMES])
    if len(embeddings) > _MOST_NAMES:
        names += " …"
    return f"Its {len(embeddings)} bundled embeddings (textual inversion) are left out: {names}."
