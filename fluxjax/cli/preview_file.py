"""The file of --preview: what the images of a batch are becoming, replaced as they are drawn."""

import jax
import numpy as np

from fluxjax.cli.output import writable
from fluxjax.cli.progress import Clock
from fluxjax.cli.request import Request
from fluxjax.generate.autoencode import decode_packed
from fluxjax.generate.draw_hooks import DrawProgress
from fluxjax.generate.image import write_png
from fluxjax.generate.image_grid import tile_images
from fluxjax.nets.vae import Vae

_OPTION = "--preview"


def watch_previews(request: Request, clock: Clock, vae: Vae) -> None:
    """Write a preview after every few steps of the batches that are drawn from now on.

    The file is replaced as a whole, so that whoever reads it finds one preview or the next.

    **Arguments:** `request`: at the size of the images.
    **Raises:** `ValueError` where the decoder has no room beside the transformer, or with a mesh.
    """
    if request.preview is None:
        return
    path, every = request.preview, request.preview_every
    if request.load.mesh is not None:
        raise ValueError(f"{_OPTION} is for one device. Leave it out, or --mesh.")
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
        tokens, size = progress.estimate, (request.height, request.width)
        images = clock.run("preview", decode_packed, vae, tokens, *size, request.dtype)
        if jax.process_index() == 0:
            about = {"preview": f"step {progress.done} of {progress.steps}"}
            finite = np.nan_to_num(np.asarray(images))
            write_png(tile_images(finite), path, about, overwrite=True)

    clock.watch = watch
