"""What the page of `fluxjax ui` draws: values of its fields in, images and previews out."""

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.cli.adapters import read_adapter
from fluxjax.cli.compound_options import adapter
from fluxjax.cli.output import encodable
from fluxjax.generate.autoencode import decode_tokens
from fluxjax.generate.draw_hooks import DrawHooks, DrawProgress
from fluxjax.generate.image import to_bytes, write_numbered
from fluxjax.generate.image_to_image import Repaint, image_to_image
from fluxjax.generate.latents import seed_key
from fluxjax.generate.load import Models, activation_dtype, load_models
from fluxjax.generate.prompted import DrawSettings, guidance_of
from fluxjax.generate.samplers import integrator, timer
from fluxjax.generate.text_to_image import text_to_image
from fluxjax.generate.velocity import Guidance
from fluxjax.lora.merge import merge
from fluxjax.shapes import Array, Float, Image
from fluxjax.version import __version__

PREVIEW_SECONDS = 1.0
"""Seconds between two previews."""


class Fields(NamedTuple):
    """The values of the page's fields.

    `adapters`: one a line, as for --lora. `width`, `height`: in pixels. `picture`: that is drawn
    again, in [-1, 1]; None draws from noise. `mask`: of what is drawn again of it, [height, width].
    """

    model: str
    prompt: str
    negative_prompt: str
    adapters: str
    integrator: str
    timer: str
    steps: int
    guidance: float
    cfg: float
    width: int
    height: int
    seed: int
    images: int
    picture: Image | None = None
    mask: Float[Array, "height width"] | None = None
    strength: float = 0.6


class Drawn(NamedTuple):
    """What the page shows while it draws, and at the end.

    `pictures`: previews or images in bytes. `status`: a line. `paths`: of the images that were
    written.
    """

    pictures: list[np.ndarray]
    status: str
    paths: list[Path]


class DrawingStoppedError(Exception):
    """Drawing was stopped on the page."""


class _PreviewHooks(DrawHooks):
    """Sends previews to a queue; raises `DrawingStoppedError` once the page has asked for it."""

    def __init__(self, models: Models, size: tuple[int, int], dtype: DTypeLike):
        self.models, self.size, self.dtype = models, size, dtype
        self.sent: queue.Queue[Drawn | BaseException | None] = queue.Queue()
        self.stop = threading.Event()
        self.last = 0.0

    def progress(self, progress: DrawProgress) -> None:
        if self.stop.is_set():
            raise DrawingStoppedError
        if time.monotonic() - self.last < PREVIEW_SECONDS:
            return
        images = decode_tokens(self.models.vae, progress.estimate, *self.size, dtype=self.dtype)
        status = f"step {progress.done} of {progress.steps}"
        self.sent.put(Drawn([to_bytes(image) for image in images], status, []))
        self.last = time.monotonic()


class Studio:
    """Draws for the page. Models stay loaded until others are asked for."""

    def __init__(self, folder: Path, dtype: DTypeLike | None):
        self.folder, self.dtype = folder, dtype
        self.lock = threading.Lock()
        self.loaded: tuple[str, str] | None = None
        self.models: Models | None = None
        self.hooks: _PreviewHooks | None = None

    def load(self, model: str, adapters: str) -> Models:
        """Return a model with adapters merged into its transformer.

        **Raises:** `ValueError` or `OSError` for a model or an adapter that can't be loaded.
        """
        if self.loaded == (model, adapters) and self.models is not None:
            return self.models
        self.models = None  # so that two are never in memory
        models = load_models(model, dtype=self.dtype)
        read = [adapter(line.strip()) for line in adapters.splitlines() if line.strip()]
        if read:
            loras, scales = [read_adapter(one) for one in read], [one.scale for one in read]
            models = models._replace(flux=merge(models.flux, loras, scales, donate=True))
        self.models, self.loaded = models, (model, adapters)
        return models

    def draw(self, fields: Fields) -> Iterator[Drawn]:
        """Draw, and yield previews, then the images, which are written to the folder.

        **Raises:** `ValueError` or `OSError` for fields that can't be drawn.
        """
        with self.lock:  # one at a time
            yield Drawn([], "loading", [])
            models = self.load(fields.model, fields.adapters)
            dtype = activation_dtype() if self.dtype is None else self.dtype
            size = fields.height, fields.width
            if fields.picture is not None:
                size = _padded(fields.picture.shape[0]), _padded(fields.picture.shape[1])
            hooks = self.hooks = _PreviewHooks(models, size, dtype)
            thread = threading.Thread(target=_work, args=(models, fields, hooks, dtype))
            thread.start()
            yield Drawn([], "compiling and drawing", [])
            while (sent := hooks.sent.get()) is not None:
                if isinstance(sent, DrawingStoppedError):
                    yield Drawn([], "stopped", [])
                    return
                if isinstance(sent, BaseException):
                    raise sent
                yield self._written(sent, fields) if sent.status == "done" else sent

    def stop(self) -> None:
        """Stop what is being drawn at its next progress."""
        if self.hooks is not None:
            self.hooks.stop.set()

    def _written(self, drawn: Drawn, fields: Fields) -> Drawn:
        paths = []
        for number, image in enumerate(drawn.pictures):
            about = _metadata(fields) | {"image": str(number)}
            floats = np.asarray(image, np.float32) / 127.5 - 1
            paths.append(write_numbered(floats, self.folder, about))
        names = ", ".join(path.name for path in paths)
        return drawn._replace(status=f"written: {names}", paths=paths)


def _work(models: Models, fields: Fields, hooks: _PreviewHooks, dtype: DTypeLike) -> None:
    """Draw in a thread, and send the images or the error to the hooks' queue."""
    try:
        images = _draw(models, fields, hooks, dtype)
        hooks.sent.put(Drawn([to_bytes(image) for image in images], "done", []))
        hooks.sent.put(None)
    except BaseException as error:
        hooks.sent.put(error)


def _draw(models: Models, fields: Fields, hooks: DrawHooks, dtype: DTypeLike) -> Array:
    is_new = fields.picture is None
    height, width = fields.height, fields.width
    if fields.picture is not None:
        height, width = fields.picture.shape[:2]
    times = timer(fields.timer, fields.steps, models.defaults, _padded(height), _padded(width))
    guidance = guidance_of(models, None if fields.cfg == 1 else Guidance(scale=fields.cfg))
    settings = DrawSettings(
        height=height if is_new else None,
        width=width if is_new else None,
        images=fields.images,
        times=times,
        step=integrator(fields.integrator),
        distilled_guidance=fields.guidance if models.flux.config.guidance_embed else None,
        dtype=dtype,
    )
    common: dict[str, Any] = {
        "key": seed_key(fields.seed),
        "settings": settings,
        "guidance": guidance,
        "hooks": hooks,
    }
    if fields.picture is None:
        negative = fields.negative_prompt if fields.cfg != 1 else ""
        return text_to_image(models, fields.prompt, negative_prompt=negative, **common)
    repaint = Repaint(strength=fields.strength, mask=fields.mask)
    return image_to_image(models, fields.picture, fields.prompt, repaint=repaint, **common)


def _padded(pixels: int) -> int:
    """Return the next multiple of 16 pixels, at which a picture is drawn."""
    return -(-pixels // 16) * 16


def _metadata(fields: Fields) -> dict[str, str]:
    """Return what an image's file says of how it was drawn."""
    about = {
        "prompt": fields.prompt,
        "seed": str(fields.seed),
        "steps": str(fields.steps),
        "guidance": f"{fields.guidance:g}",
        "integrator": fields.integrator,
        "timer": fields.timer,
        "size": f"{fields.width}x{fields.height}",
        "model": encodable(fields.model),
    }
    if fields.cfg != 1:
        about |= {"cfg": f"{fields.cfg:g}", "negative_prompt": fields.negative_prompt}
    if fields.adapters.strip():
        about["lora"] = encodable(", ".join(fields.adapters.split()))
    if fields.picture is not None:
        height, width = fields.picture.shape[:2]
        about |= {"size": f"{width}x{height}", "strength": f"{fields.strength:g}"}
        about["init_image"] = "from the page" + (", masked" if fields.mask is not None else "")
    about["version"] = f"fluxjax {__version__}"
    return about


def picture_and_mask(editor: dict[str, Any] | None) -> tuple[Image | None, Array | None]:
    """Return the picture of an image editor in [-1, 1], and the mask that was drawn on it.

    **Arguments:** `editor`: its "background" and its "layers", [height, width, 4] in bytes.
    **Returns:** None for a missing picture, and for a mask in which nothing is drawn.
    """
    if editor is None or editor.get("background") is None:
        return None, None
    background = np.asarray(editor["background"], np.float32)
    if not background[..., 3].any():
        return None, None
    opacity = background[..., 3:] / 255
    picture = jnp.asarray((background[..., :3] * opacity + 255 * (1 - opacity)) / 127.5 - 1)
    drawn = np.zeros(background.shape[:2], bool)
    for layer in editor.get("layers") or ():
        drawn |= np.asarray(layer)[..., 3] > 0
    return picture, jnp.asarray(drawn, jnp.float32) if drawn.any() else None
