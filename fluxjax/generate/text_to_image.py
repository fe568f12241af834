"""Text to image in one call: prompts to conditioning, conditioning to images."""

from collections.abc import Sequence

from fluxjax.arguments import convert_arguments
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.encode_prompts import PromptTexts, negative_prompts
from fluxjax.generate.load_models import Models
from fluxjax.generate.prompt_batch import guidance_of
from fluxjax.generate.prompted import prompted_drawing
from fluxjax.generate.velocity import Guidance
from fluxjax.shapes import Array, Float, PRNGKeyArray


@convert_arguments
def text_to_image(
    models: Models,
    prompt: str | Sequence[str],
    *,
    key: PRNGKeyArray | None = None,
    prompt_2: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] = "",
    settings: DrawSettings = DrawSettings(),
    guidance: Guidance | None = None,
    hooks: DrawHooks | None = None,
) -> Float[Array, "images height width 3"]:
    """Draw images of prompts.

    An image depends on the key, its prompt and its number, not on the batch that it is drawn in.

    **Arguments:** `models`: from `load_models`. `prompt`: one, or several. `key`: of the noise of
    all images; left out where the settings have `seeds`, with which each image of a prompt is the
    one that its seed alone draws, as on the command line. `prompt_2`: as many,
    which T5 reads in their place. `negative_prompt`: what `guidance` guides away from, one for all
    prompts or one for each. `settings`: sizes, steps, integrator. `guidance`: classifier-free
    guidance, NAG, degraded blocks, step cache; None for what the model is meant to be sampled with.
    `hooks`: called as drawing proceeds.
    **Returns:** float32 in [-1, 1]; the images of each prompt one after another, prompt by prompt.
    **Raises:** `ValueError` for sizes that are not multiples of 16; no steps, images or prompts;
    both steps and times; both a key and seeds, or none of them; numbers that are not finite or not
    as many as images; a guidance that the model does not take; a negative prompt that no guidance
    uses; what `denoise` refuses; an image that is not finite (unless it is traced).
    """
    guidance = guidance_of(models, guidance)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = negative_prompts("text_to_image", negative_prompt, len(prompts), guidance)
    seconds = [prompt_2] if isinstance(prompt_2, str) else prompt_2
    drawing = prompted_drawing(
        "text_to_image",
        models,
        PromptTexts(prompts, None if seconds is None else list(seconds), negatives),
        key=key,
        settings=settings,
        guidance=guidance,
        hooks=hooks,
    )
    drawn = []
    for numbers in drawing.groups():
        drawn.append(drawing.draw(drawing.batch(numbers), drawing.recipe(numbers)))
    return drawing.images(drawn)
