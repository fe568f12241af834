"""Keys of adapter files that fluxjax has no place for: what they look like, and which of them have no effect on FLUX."""

import re
from collections.abc import Iterable, Sequence

from fluxjax.lora.roles import is_adapters
from fluxjax.printable import printable

_OTHERS = {
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
_STORED = {
    ".quant_state.bitsandbytes__nf4": "an NF4 model of bitsandbytes: pass a LoRA, not a model",
    ".quant_state.bitsandbytes__fp4": "an FP4 model of bitsandbytes: pass a LoRA, not a model",
    ".wscales": "a model of Nunchaku (SVDQuant): pass a LoRA, not a model",
    ".qkv_proj.lora_down": "a Nunchaku (SVDQuant) LoRA, fused for its kernels: pass the LoRA that it was converted from",
    ".lora_down": "a Nunchaku (SVDQuant) LoRA, fused for its kernels: pass the LoRA that it was converted from",
    ".glora_A.": "PEFT's GLoRA, which fluxjax does not read: merge it with PEFT",
    ".oft_r": "an OFT of an early PEFT: load it and save it anew with PEFT",
}


def looks_like(keys: Sequence[str]) -> str:
    """Say which model or format keys seem to be of, and what to do."""
    for mark, model in _OTHERS.items():
        if any(mark in key for key in keys):
            return f"They look like {model}'s: use the adapter with that model."
    for mark, what in _STORED.items():
        if any(key.endswith(mark) or (mark.endswith(".") and mark in key) for key in keys):
            return f"They look like {what}."
    if keys and not any(is_adapters(key) for key in keys):
        some = ", ".join(printable(key, 80) for key in keys[:3])
        return f"They look like no adapter's ({some}): pass a LoRA, not a model."
    return "They look like no format that fluxjax knows."


_EMBEDDING = re.compile(r"bundle_emb\.(.+?)\.[^.]+\Z")
_PROJECTION = re.compile(
    r"(lora_te1?_|text_encoder\.|text_encoders\.clip_l\.(transformer\.)?)(text_projection|logit_scale)(\.|\Z)"
)


def without_effect(keys: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the keys that may have an effect, and a line for each kind of those that have none on FLUX."""
    rest: list[str] = []
    embeddings: dict[str, None] = {}
    projection = None
    for key in keys:
        if match := _EMBEDDING.match(key):
            embeddings[match[1]] = None
        elif match := _PROJECTION.match(key):
            projection = match[1] + match[3]
        else:
            rest.append(key)
    notes = []
    if embeddings:
        names = ", ".join(printable(name, 60) for name in list(embeddings)[:10]) + (
            " …" if len(embeddings) > 10 else ""
        )
        notes.append(
            f"Its {len(embeddings)} bundled embeddings (textual inversion) are left out: {names}."
        )
    if projection is not None:
        notes.append(
            f"{printable(projection)} is left out: FLUX does not use CLIP's projection, so it has no effect."
        )
    return rest, tuple(notes)
