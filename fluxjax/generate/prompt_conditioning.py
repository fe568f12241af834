"""What prompts condition images on, in one call: for programs that sample by themselves."""

from collections.abc import Sequence

import jax
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.generate.conditioning import Conditioning
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.encode_prompts import PromptTexts, encode_prompts
from fluxjax.generate.latents import image_ids
from fluxjax.generate.load_models import Models
from fluxjax.generate.prompt_batch import distilled_guidance, text_conditioning
from fluxjax.shapes import PerImage


@convert_arguments
def prompt_conditioning(
    models: Models,
    prompt: str | Sequence[str],
    *,
    height: int | None = None,
    width: int | None = None,
    guidance: PerImage | None = None,
    max_length: int | None = None,
    dtype: DTypeLike | None = None,
) -> Conditioning:
    """Encode a prompt, or several, and return what images of a size are conditioned on.

    `flux_velocity(models.flux, conditioning)` is then the velocity of one prompt.

    **Arguments:** `prompt`: of one image; of several, the arrays have a leading axis of images.
    `height`, `width`: in pixels, multiples of 16; None takes the model's. `guidance`: the distilled
    scale, by default the model's, of networks that take one. `max_length`: T5 tokens of a prompt;
    None takes the model's. `dtype`: of the activations; None takes that of `activation_dtype`.
    **Raises:** `ValueError` for other sizes, for no prompt, and for a scale that the network does
    not take.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("`prompt_conditioning(prompt)` needs a prompt, got none. Pass one.")
    defaults = models.defaults
    ids = image_ids(
        defaults.height if height is None else height,
        defaults.width if width is None else width,
    )
    settings = DrawSettings(max_length=max_length, dtype=dtype)
    states, _ = encode_prompts(models, PromptTexts(prompts), settings, None)
    if isinstance(prompt, str):
        states = jax.tree.map(lambda rows: rows[0], states)
    return text_conditioning(states, ids, distilled_guidance(models.flux, defaults, guidance))
