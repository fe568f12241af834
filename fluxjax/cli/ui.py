"""The command `fluxjax ui`: a local page that draws, by gradio, which is in the extra `ui`."""

import argparse
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.console import complain, interruptible
from fluxjax.cli.output import writable
from fluxjax.cli.page_drawing import Fields, Studio, picture_and_mask
from fluxjax.generate.compare import Comparison, compare
from fluxjax.generate.comparison_files import comparison_csv
from fluxjax.generate.comparison_grid import comparison_grid
from fluxjax.generate.image import read_metadata
from fluxjax.generate.latents import seed_key
from fluxjax.generate.limits import check_devices
from fluxjax.generate.samplers import INTEGRATORS, TIMERS
from fluxjax.zoo import ZOO, Defaults

_SHOWN_FILES = 60
"""Images of the folder that the gallery shows, the newest first."""
_LOCAL = ("127.0.0.1", "localhost", "::1")


def run_ui(options: argparse.Namespace) -> None:
    """Serve the page until the command is interrupted."""
    check_devices()
    folder = writable(options.output_dir)
    use_cache(options.compilation_cache)
    defaults = interruptible(load_defaults, options.model)
    dtype = None if options.dtype is None else jnp.dtype(options.dtype)
    page = _Page(Studio(folder, dtype), folder, options.model, defaults).build()
    if options.host not in _LOCAL:
        complain(f"anyone who reaches {options.host} can draw on this machine")
    _, address, _ = page.launch(
        server_name=options.host,
        server_port=options.port or None,
        allowed_paths=[str(folder.resolve())],
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
    )
    print(f"{address} (stop by Ctrl-C)", flush=True)
    try:
        interruptible(threading.Event().wait)
    finally:
        page.close(verbose=False)


def import_gradio() -> Any:
    """Return gradio, which sends nothing about its use.

    **Raises:** `ValueError` that says how to install it.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise ValueError(
            "`fluxjax ui` needs gradio. Install it with: pip install 'fluxjax[ui]'"
        ) from None
    return gradio


class _Page:
    """The page's parts, and what they call."""

    def __init__(self, studio: Studio, folder: Path, model: str, defaults: Defaults):
        self.studio, self.folder = studio, folder
        self.model, self.defaults = model, defaults
        self.gradio = import_gradio()

    def build(self) -> Any:
        """Return the page, as gradio's `Blocks`."""
        gr = self.gradio
        with gr.Blocks(title="fluxjax") as page:
            with gr.Tab("Draw"):
                self._draw_tab()
            with gr.Tab("Compare samplers"):
                self._compare_tab()
            with gr.Tab("Gallery"):
                self._gallery_tab(page)
        return page

    def _draw_tab(self) -> None:
        gr, defaults = self.gradio, self.defaults
        with gr.Row():
            with gr.Column():
                names = list(dict.fromkeys([self.model, *ZOO]))
                first = [
                    gr.Dropdown(names, value=self.model, label="Model", allow_custom_value=True),
                    gr.Textbox(label="Prompt", lines=2),
                    gr.Textbox(label="Negative prompt (with guidance by cfg)"),
                    gr.Textbox(label="Adapters, one a line: FILE:SCALE", lines=1),
                ]
                with gr.Row():
                    sampler = [
                        gr.Dropdown(list(INTEGRATORS), value="euler", label="Integrator"),
                        gr.Dropdown(list(TIMERS), value="model", label="Times"),
                        gr.Number(defaults.steps, label="Steps", precision=0, minimum=1),
                    ]
                with gr.Row():
                    scale = defaults.guidance or 0.0
                    numbers = [
                        gr.Number(scale, label="Guidance (distilled)"),
                        gr.Number(defaults.cfg, label="Guidance (cfg)"),
                        gr.Number(defaults.width, label="Width", precision=0, step=16),
                        gr.Number(defaults.height, label="Height", precision=0, step=16),
                        gr.Number(0, label="Seed", precision=0, minimum=0),
                        gr.Number(1, label="Images", precision=0, minimum=1),
                    ]
                with gr.Accordion("Draw a picture again", open=False):
                    editor = gr.ImageEditor(
                        label="Picture; paint what is drawn again (nothing: all of it)",
                        image_mode="RGBA",
                        type="numpy",
                        transforms=(),
                    )
                    strength = gr.Slider(0, 1, 0.6, label="Strength")
                with gr.Row():
                    button = gr.Button("Draw", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column():
                status = gr.Textbox(label="Status", interactive=False)
                pictures = gr.Gallery(label="Images", columns=2, object_fit="contain")
                files = gr.Files(label="Files", interactive=False)
        inputs = [*first, *sampler, *numbers, editor, strength]
        button.click(self._draw, inputs, [pictures, status, files])
        stop.click(self.studio.stop, queue=False)

    def _draw(self, *values: Any) -> Iterator[tuple]:
        """Yield the pictures, the status and the files that the page shows."""
        *plain, editor, strength = values
        picture, mask = picture_and_mask(editor)
        fields = Fields(*plain)._replace(picture=picture, mask=mask, strength=float(strength))
        try:
            for drawn in self.studio.draw(fields):
                yield drawn.pictures, drawn.status, [str(path) for path in drawn.paths]
        except (ValueError, OSError, RuntimeError) as error:
            raise self.gradio.Error(str(error), duration=None) from None

    def _compare_tab(self) -> None:
        gr = self.gradio
        prompt = gr.Textbox(label="Prompt", lines=2)
        with gr.Row():
            chosen = ["euler", "heun", "dpmpp_2m"]
            integrators = gr.Dropdown(
                list(INTEGRATORS), value=chosen, multiselect=True, label="Integrators"
            )
            timers = gr.Dropdown(list(TIMERS), value=["model"], multiselect=True, label="Times")
            steps = gr.Textbox("4,8", label="Steps, separated by commas")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        button = gr.Button("Compare", variant="primary")
        grid = gr.Image(label="Beside a reference of many steps", interactive=False)
        table = gr.Dataframe(label="Distances from the reference", interactive=False)
        button.click(self._compare, [prompt, integrators, timers, steps, seed], [grid, table])

    def _compare(
        self, prompt: str, integrators: list[str], timers: list[str], steps: str, seed: int
    ) -> tuple[np.ndarray, dict]:
        """Return the grid of images, and the table."""
        try:
            counts = [int(count) for count in steps.split(",")]
            with self.studio.lock:
                models = self.studio.load(self.model, "")
                comparison = Comparison(integrators=integrators, timers=timers, steps=counts)
                runs, images = compare(models, prompt, comparison, key=seed_key(int(seed)))
        except (ValueError, OSError, RuntimeError) as error:
            raise self.gradio.Error(str(error), duration=None) from None
        header, *rows = comparison_csv(runs).splitlines()
        table = {"headers": header.split(","), "data": [row.split(",") for row in rows]}
        return np.asarray(comparison_grid(runs, images)), table

    def _gallery_tab(self, page: Any) -> None:
        gr = self.gradio
        button = gr.Button("Refresh")
        gallery = gr.Gallery(label=str(self.folder), columns=6, object_fit="contain")
        about = gr.JSON(label="How it was drawn")
        button.click(self._files, None, gallery)
        page.load(self._files, None, gallery)

        def describe(event) -> dict[str, str]:
            return read_metadata(Path(self._files()[event.index]))

        # gradio passes what was selected to an argument of this type.
        describe.__annotations__["event"] = gr.SelectData
        gallery.select(describe, None, about)

    def _files(self) -> list[str]:
        """Return the paths of the newest images of the folder."""
        files = sorted(self.folder.glob("*.png"), key=lambda path: path.stat().st_mtime)
        return [str(path.resolve()) for path in files[::-1][:_SHOWN_FILES]]
