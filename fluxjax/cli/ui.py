"""The command `fluxjax ui`: a local page that draws, by gradio, which is in the extra `ui`."""

import argparse
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.console import complain, interruptible
from fluxjax.cli.options import step_counts
from fluxjax.cli.output import writable
from fluxjax.cli.page_drawing import Fields, Studio, check_filled, picture_and_mask
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
_BUTTONS = ["download", "fullscreen"]
"""Buttons of an image; by default gradio has one more that sends it to another site."""
_TRANSLUCENT_RED = "rgba(220, 30, 30, 0.5)"


def run_ui(options: argparse.Namespace) -> None:
    """Serve the page until the command is interrupted."""
    check_devices()
    folder = writable(options.output_dir)
    use_cache(options.compilation_cache)
    defaults = interruptible(load_defaults, options.model)
    dtype = None if options.dtype is None else jnp.dtype(options.dtype)
    studio = Studio(folder, dtype)
    page = _Page(studio, folder, options.model, defaults).build()
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


def _read_steps(text: str) -> list[int]:
    """Return numbers of steps. **Raises:** `ValueError` for a text that has none, or others."""
    try:
        return step_counts(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"Steps: {error}") from None


class _Page:
    """The page's parts, and what they call."""

    def __init__(self, studio: Studio, folder: Path, model: str, defaults: Defaults):
        self.studio = studio
        self.folder = folder
        self.model = model
        self.defaults = defaults
        self.gradio = import_gradio()

    def build(self) -> Any:
        """Return the page, as gradio's `Blocks`."""
        gr = self.gradio
        with gr.Blocks(title="fluxjax") as page:
            with gr.Tab("Draw"):
                model = self._draw_tab()
            with gr.Tab("Compare samplers"):
                self._compare_tab(model)
            with gr.Tab("Gallery") as tab:
                self._gallery_tab(tab)
        return page

    def _draw_tab(self) -> Any:
        """Add the fields of a drawing on the left, and what is drawn on the right.

        The inputs are in the order of `Fields`.

        **Returns:** the list of models.
        """
        gr = self.gradio
        with gr.Row():
            with gr.Column():
                first = [
                    self._model_field(),
                    gr.Textbox(label="Prompt", lines=2),
                    gr.Textbox(label="Negative prompt (with guidance by cfg)"),
                    gr.Textbox(label="Adapters, one per line: FILE:SCALE", lines=1),
                ]
                with gr.Row():
                    sampler = [
                        gr.Dropdown(list(INTEGRATORS), value="euler", label="Integrator"),
                        gr.Dropdown(list(TIMERS), value="model", label="Times"),
                        gr.Number(self.defaults.steps, label="Steps", precision=0, minimum=1),
                    ]
                numbers = self._number_fields()
                picture = self._picture_fields()
                with gr.Row():
                    button = gr.Button("Draw", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column():
                status = gr.Textbox(label="Status", interactive=False)
                # A height; without one, gradio cuts off what is lower than half of the window.
                pictures = gr.Gallery(
                    label="Images",
                    columns=2,
                    height="100%",
                    object_fit="contain",
                    buttons=_BUTTONS,
                )
                files = gr.Files(label="Files", interactive=False)
        inputs = [*first, *sampler, *numbers, *picture]
        button.click(self._draw, inputs, [pictures, status, files])
        stop.click(self.studio.stop, queue=False)
        model = first[0]
        model.input(self._defaults_of, model, [sampler[2], *numbers[:4]])
        return model

    def _defaults_of(self, model: str) -> tuple[int, float, float, int, int]:
        """Return the steps, both scales of guidance, the width and the height of a model."""
        with self._shown_errors():
            found = load_defaults(model)
        return found.steps, found.guidance or 0.0, found.cfg, found.width, found.height

    def _model_field(self) -> Any:
        """Add a list of the models by name, in which another place may be written."""
        names = list(dict.fromkeys([self.model, *ZOO]))
        return self.gradio.Dropdown(
            names,
            value=self.model,
            label="Model",
            allow_custom_value=True,
        )

    def _number_fields(self) -> list[Any]:
        """Add the scales of guidance, the size, the seed and the number of images."""
        gr, defaults = self.gradio, self.defaults
        with gr.Row():
            return [
                gr.Number(defaults.guidance or 0.0, label="Guidance (distilled)"),
                gr.Number(defaults.cfg, label="Guidance (cfg)"),
                gr.Number(defaults.width, label="Width", precision=0, step=16),
                gr.Number(defaults.height, label="Height", precision=0, step=16),
                gr.Number(0, label="Seed", precision=0, minimum=0),
                gr.Number(1, label="Images", precision=0, minimum=1),
            ]

    def _picture_fields(self) -> list[Any]:
        """Add what says which picture is drawn again, and how strongly."""
        gr = self.gradio
        with gr.Accordion("Draw a picture again", open=False):
            gr.Markdown(
                "Paint over what is drawn again; without paint, all of the picture is. It keeps "
                "its own size."
            )
            editor = gr.ImageEditor(
                label="Picture",
                image_mode="RGBA",
                type="numpy",
                sources=("upload", "clipboard"),
                transforms=(),
                layers=False,
                brush=gr.Brush(colors=[_TRANSLUCENT_RED], color_mode="fixed"),
                buttons=[],
            )
            strength = gr.Slider(0, 1, 0.6, label="Strength")
        return [editor, strength]

    def _draw(self, *values: Any) -> Iterator[tuple]:
        """Yield the pictures, the status and the files that the page shows."""
        *plain, editor, strength = values
        with self._shown_errors():
            fields = Fields(*plain)
            check_filled(fields)
            picture, mask = picture_and_mask(editor)
            fields = fields._replace(picture=picture, mask=mask, strength=float(strength))
            for drawn in self.studio.draw(fields):
                paths = [str(path) for path in drawn.paths]
                # The files where there are some: gradio compresses arrays, with losses.
                yield paths or drawn.pictures, drawn.status, paths

    @contextmanager
    def _shown_errors(self) -> Iterator[None]:
        """Show errors of what was asked for on the page, until they are clicked away."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            # Without a traceback in the terminal: the page has the whole message.
            raise self.gradio.Error(str(error), duration=None, print_exception=False) from None

    def _compare_tab(self, model: Any) -> None:
        """Add the samplers to compare, and below them the grid and the table of their images.

        **Arguments:** `model`: the list of models of the first tab.
        """
        gr = self.gradio
        gr.Markdown(
            "Images of one prompt and seed by each sampler, and a reference of "
            f"{Comparison.reference_steps} steps, with the model of the first tab, without "
            "adapters. Beside each image, enlarged, is the part that differs most from the "
            "reference."
        )
        prompt = gr.Textbox(label="Prompt", lines=2)
        with gr.Row():
            integrators = gr.Dropdown(
                list(INTEGRATORS),
                value=["euler", "heun", "dpmpp_2m"],
                multiselect=True,
                label="Integrators",
            )
            timers = gr.Dropdown(
                list(TIMERS),
                value=["model"],
                multiselect=True,
                label="Times",
            )
            steps = gr.Textbox("4,8", label="Steps, separated by commas")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        button = gr.Button("Compare", variant="primary")
        # Without its label, which would lie on the reference.
        grid = gr.Image(show_label=False, interactive=False, format="png", buttons=_BUTTONS)
        table = gr.Dataframe(label="Distances from the reference", interactive=False)
        inputs = [model, prompt, integrators, timers, steps, seed]
        button.click(self._compare, inputs, [grid, table])

    def _compare(
        self,
        model: str,
        prompt: str,
        integrators: list[str],
        timers: list[str],
        steps: str,
        seed: int | None,
    ) -> tuple[np.ndarray, dict]:
        """Return the grid of images, and the table."""
        with self._shown_errors():
            if seed is None:
                raise ValueError("Seed is empty. Give a number.")
            counts = _read_steps(steps)
            with self.studio.lock:
                models = self.studio.load(model, "")
                comparison = Comparison(integrators=integrators, timers=timers, steps=counts)
                key = seed_key(int(seed))
                runs, images = compare(models, prompt, comparison, key=key)
        header, *rows = comparison_csv(runs).splitlines()
        table = {
            "headers": header.split(","),
            "data": [row.split(",") for row in rows],
        }
        return np.asarray(comparison_grid(runs, images)), table

    def _gallery_tab(self, tab: Any) -> None:
        """Add the newest images of the folder; one that is clicked says how it was drawn."""
        gr = self.gradio
        button = gr.Button("Refresh")
        gallery = gr.Gallery(
            label=str(self.folder), columns=6, object_fit="contain", buttons=_BUTTONS
        )
        about = gr.JSON(label="How it was drawn")
        shown = gr.State([])  # newer images may have come to the folder since

        def refresh() -> tuple[list[str], list[str]]:
            paths = self._files()
            return paths, paths

        def describe(paths: list[str], event) -> dict[str, str]:
            with self._shown_errors():
                return read_metadata(Path(paths[event.index]))

        # gradio passes what was selected to an argument of this type.
        describe.__annotations__["event"] = gr.SelectData
        button.click(refresh, None, [gallery, shown])
        tab.select(refresh, None, [gallery, shown])
        gallery.select(describe, shown, about)

    def _files(self) -> list[str]:
        """Return the paths of the newest images of the folder."""
        oldest_first = sorted(self.folder.glob("*.png"), key=lambda path: path.stat().st_mtime)
        shown = oldest_first[::-1][:_SHOWN_FILES]
        return [str(path.resolve()) for path in shown]
