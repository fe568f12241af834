"""Edit an image by prompts, in one call."""

from dataclasses import replace

from fluxjax.arguments import convert_arguments
from fluxjax.flow.runge_kutta import Euler
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.edit_record import Edit, EditMethod, source_conditioning
from fluxjax.generate.image_to_image import drawing_of_image
from fluxjax.generate.load_models import Models
from fluxjax.generate.masks import pad_image
from fluxjax.generate.prompt_batch import guidance_of
from fluxjax.generate.velocity import Guidance
from fluxjax.shapes import Array, Float, Image, PRNGKeyArray


@convert_arguments
def edit_image(
    models: Models,
    image: Image,
    prompt: str,
    *,
    key: PRNGKeyArray | None = None,
    method: EditMethod,
    settings: DrawSettings = DrawSettings(),
    guidance: Guidance | None = None,
    hooks: DrawHooks | None = None,
) -> Float[Array, "images height width 3"]:
    """Change an image to what a prompt says, and keep the rest of it.

    It is padded to multiples of 16 pixels while it is edited.

    **Arguments:** `image`: in [-1, 1], of any size. `prompt`: describes the image as it is to be.
    `method`: `FlowEditing`, `SDEditing`, `FireFlowEditing`, `RFInverting` or `DiffEditing`. The
    rest as for `text_to_image`; guidance leads away from the empty prompt, and applies to the new
    prompt alone. Methods with an inversion have an integrator of their own.
    **Returns:** float32 in [-1, 1], of the image's size.
    **Raises:** `ValueError` as `text_to_image`; for sizes in the settings; for several images of a
    method that draws nothing; for a step cache.
    """
    guidance = guidance_of(models, guidance)
    _check_method(method, settings, guidance)
    distilled = settings.distilled_guidance
    if distilled is None and models.flux.config.guidance_embed:
        settings = replace(settings, distilled_guidance=method.target_guidance)
    drawing = drawing_of_image(
        "edit_image",
        models,
        image,
        prompt,
        key=key,
        settings=settings,
        guidance=guidance,
        hooks=hooks,
    )
    source = None
    if method.source_text is not None:
        scale = getattr(method, "source_guidance", None)
        source = source_conditioning(drawing, method.source_text, scale)
    edit = Edit(drawing=drawing, latent=drawing.encode_image(pad_image(image)), source=source)
    drawn = [method.draw(edit, numbers) for numbers in drawing.groups()]
    height, width = image.shape[:2]
    return drawing.images(drawn)[:, :height, :width]


def _check_method(method: EditMethod, settings: DrawSettings, guidance: Guidance) -> None:
    """**Raises:** `ValueError` for settings and guidance that a method has no use for."""
    images = len(settings.seeds or ()) or settings.images
    if images > 1 and not method.draws:
        raise ValueError(
            f"`edit_image` by {method.name} draws no noise, so that all {images} images "
            "would be the same. Ask for one."
        )
    if not method.any_step and not isinstance(settings.step, Euler):
        raise ValueError(
            f"`edit_image` by {method.name} has an integrator of its own, which "
            f"{type(settings.step).__name__} would replace. Leave the step out of the settings."
        )
    if guidance.cache is not None:
        raise ValueError(
            "`edit_image` evaluates more than one velocity, and a step cache remembers one. "
            "Leave the cache out."
        )
