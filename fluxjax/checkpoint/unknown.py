"""What a file is that holds no network of FLUX.1, judged by the names of its tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fluxjax.checkpoint.tensors import Tensor, TensorFile
from fluxjax.printable import printable, printable_path

_ADAPTER_FIELDS = frozenset(
    (
        "lora_A",
        "lora_B",
        "lora_down",
        "lora_up",
        "lokr_w1",
        "lokr_w1_a",
        "hada_w1_a",
        "dora_scale",
        "lora_magnitude_vector",
        "oft_blocks",
        "oft_R",
        "boft_R",
        "set_weight",
    )
)
_OTHER_MODELS = {
    "double_stream_modulation_img": "FLUX.2",
    "joint_blocks": "Stable Diffusion 3",
    "input_blocks": "Stable Diffusion 1, 2 or XL",
    "down_blocks.0.attentions": "Stable Diffusion's UNet",
    "controlnet_blocks": "a ControlNet of another model",
    "controlnet_double_blocks": "a ControlNet of another model",
    "vision_model": "a vision encoder without its projection",
}
"""Other models, by a text that the names of their tensors hold."""
_CONTROL_INPUTS = ("controlnet_x_embedder", "x_embedder")
"""The layers of a ControlNet that take the condition's and the noisy image's tokens."""


def is_inpainting_control(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors are those of a ControlNet for inpainting.

    The features of its condition are those of a packed latent, and four of a mask.
    """
    condition, image = (tensors.get(f"{name}.weight") for name in _CONTROL_INPUTS)
    if condition is None or image is None or condition.shape[:1] != image.shape[:1]:
        return False
    return condition.shape[1:] == tuple(size + 4 for size in image.shape[1:])


def is_radiance(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors are those of Chroma Radiance, which has Chroma's and some more."""
    return any("nerf_blocks." in name for name in tensors)


def describe_unknown_file(path: Path, files: Sequence[TensorFile]) -> str:
    """Return what files are that hold no network of FLUX.1, and what to pass instead.

    **Arguments:** `path`: of the first file, for the message. `files`: their headers.
    """
    where = printable_path(path)
    names: list[str] = []
    fields: set[str] = set()
    for file in files:
        for name in file.tensors:
            names.append(name)
            fields.update(name.split("."))
    # Nunchaku's files hold low-rank matrices too, so they are looked for before adapters.
    if "wscales" in fields:
        return (
            f"{where} is a Nunchaku (SVDQuant) model, which fluxjax does not read. "
            "Pass the model that it was made from."
        )
    if fields & _ADAPTER_FIELDS or any(name.startswith("lora_") for name in names):
        return f"{where} is a LoRA, not a model. Pass the model that it adapts."
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    if is_inpainting_control(tensors):
        return (
            f"{where} is a ControlNet for inpainting, whose condition has a mask, which fluxjax "
            "does not run. Pass a ControlNet without one, or inpaint with FLUX.1 Fill."
        )
    if is_radiance(tensors):
        return (
            f"{where} is Chroma Radiance, which works on pixels and not on latents, and which "
            "fluxjax does not run. Pass a Chroma1 checkpoint."
        )
    for text, model in _OTHER_MODELS.items():
        if any(text in name for name in names):
            return f"{where} holds {model}, which is not FLUX.1. Pass a FLUX.1 checkpoint."
    some = printable(", ".join(names[:3])) or "no tensors at all"
    return f"{where} holds no network of FLUX: found {some}. Pass the network's own file or folder."
