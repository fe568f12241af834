"""The file of --preview: what the images of a batch are becoming, replaced as they are drawn."""

import jax
import numpy as np

from fluxjax.cli.image_stages import on_host
from fluxjax.cli.output import writable
from fluxjax.cli.progress import Clock
from fluxjax.cli.request import Request
from fluxjax.generate.autoencode import decode, decode_packed, unpack_images
from fluxjax.generate.draw_hooks import DrawProgress
from fluxjax.generate.image import write_png
from fluxjax.generate.image_grid import tile_images
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float

_OPTION = "--preview"


def watch_previews(request: Request, clock: Clock, vae: Vae) -> None:
    """Write a preview after every few steps of the batches that are drawn from now on.

    The file is replaced as a whole, so that whoever reads it finds one preview or the next.

    **Arguments:** `request`: at the size of the images.
    **Raises:** `ValueError` where the decoder has no room beside the transformer.
    """
    if request.preview is None:
        return
    path, every = request.preview, request.preview_every
    if request.choice is not None and request.choice.frees:
        raise ValueError(
            f"{_OPTION} decodes beside the transformer, which does not fit here. Leave it out, or "
            "lower --batch or the size."
        )
    writable(path.parent, _OPTION)
    clock.steps_between = every

    def watch(progress: DrawProgress) -> None:
        if progress.done % every and progress.done < progress.steps:
            return
        images = on_host(_decode_preview(request, clock, vae, progress.estimate))
        if jax.process_index() == 0:
            about = {"preview": f"step {progress.done} of {progress.steps}"}
            write_png(tile_images(np.nan_to_num(images)), path, about, overwrite=True)

    clock.watch = watch


def _decode_preview(
    request: Request, clock: Clock, vae: Vae, tokens: Float[Array, "images img_tokens channels"]
) -> Float[Array, "images height width 3"]:
    """Decode the image tokens of a batch; on one device, by the program of the final images."""
    size = request.height, request.width
    mesh = request.load.mesh
    if mesh is not None:
        # A program is compiled for one way to split its inputs, and that of the final latents may
        # be another.
        return clock.run("preview", decode_packed, vae, tokens, *size, request.dtype, mesh)
    latents = unpack_images(tokens, *size)
    return clock.run("preview", decode, vae, latents, dtype=request.dtype, mesh=mesh)
