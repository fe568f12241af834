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
from fluxjax.generate.autoencode import decode, unpack_images
from fluxjax.generate.draw_hooks import DrawHooks, DrawProgress
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.image import to_bytes, write_numbered
from fluxjax.generate.image_to_image import Repaint, image_to_image
from fluxjax.generate.latents import seed_key
from fluxjax.generate.load import activation_dtype
from fluxjax.generate.load_models import Models, load_models
from fluxjax.generate.prompt_batch import guidance_of
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


_NUMBERS = ("steps", "guidance", "cfg", "width", "height", "seed", "images")


def check_filled(fields: Fields) -> None:
    """**Raises:** `ValueError` for numbers that are missing."""
    missing = [name for name in _NUMBERS if getattr(fields, name) is None]
    if missing:
        raise ValueError(f"No number is given for {', '.join(missing)}. Fill it in.")


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
        """**Arguments:** `size`: at which is drawn, height and width. `dtype`: of previews."""
        self.models = models
        self.size = size
        self.dtype = dtype
        self.sent: queue.Queue[Drawn | BaseException | None] = queue.Queue()
        self.stop = threading.Event()
        self.last = 0.0

    def progress(self, progress: DrawProgress) -> None:
        """Send a preview, if the last one was a while ago."""
        if self.stop.is_set():
            raise DrawingStoppedError
        if time.monotonic() - self.last < PREVIEW_SECONDS:
            return
        latents = unpack_images(progress.estimate, *self.size)
        # The program of the final images, which is then compiled once.
        images = decode(self.models.vae, latents, dtype=self.dtype, mesh=None)
        self.send(images, f"step {progress.done} of {progress.steps}")
        self.last = time.monotonic()

    def send(self, images: Array, status: str) -> None:
        """Send images, [images, height, width, 3] in [-1, 1]."""
        pictures = [to_bytes(image) for image in images]
        self.sent.put(Drawn(pictures, status, []))


class Studio:
    """Draws for the page. Models stay loaded until others are asked for."""

    def __init__(self, folder: Path, dtype: DTypeLike | None):
        """**Arguments:** `folder`: of the images. `dtype`: None for that of the device."""
        self.folder = folder
        self.dtype = dtype
        self.lock = threading.Lock()
        self.loaded: tuple[str, str] | None = None
        self.models: Models | None = None
        self.hooks: _PreviewHooks | None = None

    def load(self, model: str, adapters: str) -> Models:
        """Return a model with adapters merged into its transformer.

        **Arguments:** `adapters`: one a line, as for --lora.
        **Raises:** `ValueError` or `OSError` for a model or an adapter that can't be loaded.
        """
        if self.loaded == (model, adapters) and self.models is not None:
            return self.models
        self.models = None  # so that two are never in memory
        models = load_models(model, dtype=self.dtype)
        loras, scales = [], []
        for line in adapters.splitlines():
            if line.strip():
                named = adapter(line.strip())
                loras.append(read_adapter(named))
                scales.append(named.scale)
        if loras:
            merged = merge(models.flux, loras, scales, donate=True)
            models = models._replace(flux=merged)
        self.models = models
        self.loaded = (model, adapters)
        return models

    def draw(self, fields: Fields) -> Iterator[Drawn]:
        """Draw, and yield previews, then the images, which are written to the folder.

        **Raises:** `ValueError` or `OSError` for fields that can't be drawn.
        """
        with self.lock:  # one at a time
            yield Drawn([], "loading", [])
            models = self.load(fields.model, fields.adapters)
            dtype = activation_dtype() if self.dtype is None else self.dtype
            hooks = self.hooks = _PreviewHooks(models, _drawn_size(fields), dtype)
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
        """Write the images, and return what the page shows of that."""
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
        hooks.send(_draw(models, fields, hooks, dtype), "done")
        hooks.sent.put(None)
    except BaseException as error:
        hooks.sent.put(error)


def _draw(models: Models, fields: Fields, hooks: DrawHooks, dtype: DTypeLike) -> Array:
    """Return the images of the page's fields, from noise or from a picture."""
    is_new = fields.picture is None
    is_guided = fields.cfg != 1
    takes_scale = models.flux.config.guidance_embed
    settings = DrawSettings(
        # A picture has its own size.
        height=fields.height if is_new else None,
        width=fields.width if is_new else None,
        images=fields.images,
        times=timer(fields.timer, fields.steps, models.defaults, *_timed_size(fields)),
        step=integrator(fields.integrator),
        distilled_guidance=fields.guidance if takes_scale else None,
        dtype=dtype,
    )
    common: dict[str, Any] = {
        "key": seed_key(fields.seed),
        "settings": settings,
        "guidance": guidance_of(models, Guidance(scale=fields.cfg) if is_guided else None),
        "hooks": hooks,
    }
    if fields.picture is None:
        negative = fields.negative_prompt if is_guided else ""
        return text_to_image(models, fields.prompt, negative_prompt=negative, **common)
    repaint = Repaint(strength=fields.strength, mask=fields.mask)
    return image_to_image(models, fields.picture, fields.prompt, repaint=repaint, **common)


def _drawn_size(fields: Fields) -> tuple[int, int]:
    """Return the height and width at which is drawn."""
    if fields.picture is None:
        return fields.height, fields.width
    height, width = fields.picture.shape[:2]
    return _padded(height), _padded(width)


def _timed_size(fields: Fields) -> tuple[int, int]:
    """Return the height and width that the times are for, which are whole tokens."""
    height, width = _drawn_size(fields)
    return _padded(height), _padded(width)


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
        about["size"] = f"{width}x{height}"
        about["strength"] = f"{fields.strength:g}"
        about["init_image"] = "from the page"
        if fields.mask is not None:
            about["init_image"] += ", masked"
    about["version"] = f"fluxjax {__version__}"
    return about


def picture_and_mask(editor: dict[str, Any] | None) -> tuple[Image | None, Array | None]:
    """Return the picture of an image editor in [-1, 1], and the mask that was drawn on it.

    **Arguments:** `editor`: its "background" and its "layers", [height, width, 4] in bytes.
    **Returns:** None for a missing picture, and for a mask in which nothing is drawn.
    **Raises:** `ValueError` for a mask without a picture.
    """
    if editor is None or editor.get("background") is None:
        return None, None
    background = np.asarray(editor["background"], np.float32)
    drawn = np.zeros(background.shape[:2], bool)
    for layer in editor.get("layers") or ():
        drawn |= np.asarray(layer)[..., 3] > 0
    colors, alpha = background[..., :3], background[..., 3:]
    if not alpha.any():
        if drawn.any():
            raise ValueError(
                "What is painted has no picture below it. Put a picture in the editor and paint "
                "on it, or clear the editor."
            )
        return None, None
    opacity = alpha / 255
    on_white = colors * opacity + 255 * (1 - opacity)
    picture = jnp.asarray(on_white / 127.5 - 1)
    if not drawn.any():
        return picture, None
    return picture, jnp.asarray(drawn, jnp.float32)
