"""The commands about weights: `fluxjax convert`, `inspect`, `download`, and `lora merge`."""

import argparse
import json
from dataclasses import asdict
from types import TracebackType

import jax.numpy as jnp
from tqdm import tqdm

from fluxjax.checkpoint.convert import convert_weights
from fluxjax.checkpoint.family import hub_folder
from fluxjax.checkpoint.gguf_layout import GGUF_FORMATS
from fluxjax.checkpoint.inspect import inspect_weights
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.locate import download
from fluxjax.cli.adapters import read_adapter
from fluxjax.cli.console import complain, interruptible
from fluxjax.generate.limits import check_devices
from fluxjax.lora.convert import adapter_notes, merge_while_converting


def run_convert(options: argparse.Namespace) -> None:
    """Write a checkpoint in another layout, with adapters merged into it if there are any."""
    check_devices()
    loras = [read_adapter(adapter) for adapter in options.lora]
    transform = None
    if loras:
        scales = [adapter.scale for adapter in options.lora]
        transform = merge_while_converting(loras, scales)
    with _ByteBar() as bar:
        destination = convert_weights(
            options.source,
            options.destination,
            to=options.to,
            dtype=_file_dtype(options.dtype),
            only=options.only,
            shard_size=options.shard_size,
            transform=transform,
            progress=bar.show,
        )
    if loras:
        for note in adapter_notes(options.source, loras):
            complain(f"an adapter: {note}")
    print(destination)


def _file_dtype(name: str | None) -> jnp.dtype | str | None:
    """Return the dtype or block format that an option names, or None for the source's dtypes."""
    if name is None or name in GGUF_FORMATS:
        return name
    # What files call float8_e4m3 has no infinities; the JAX dtype of that name does.
    if name == "float8_e4m3":
        return jnp.dtype(jnp.float8_e4m3fn)
    return jnp.dtype(name)


class _ByteBar:
    """A progress bar of bytes, which appears when the number of all bytes is known."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __enter__(self) -> "_ByteBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, written: int, total: int) -> None:
        """Show how many of all bytes are written."""
        if self._bar is None:
            self._bar = tqdm(total=total, unit="B", unit_scale=True)
        self._bar.update(written - self._bar.n)


def run_inspect(options: argparse.Namespace) -> None:
    """Print what a file or folder contains. **Raises:** `SystemExit(1)` if it does not load."""
    report = inspect_weights(options.source)
    if options.json:
        networks = [{**asdict(one), "whole": one.whole} for one in report.networks]
        print(json.dumps({**asdict(report), "networks": networks, "whole": report.whole}))
    else:
        print(report)
    if not report.whole:
        raise SystemExit(1)


def run_download(options: argparse.Namespace) -> None:
    """Download a model, or some of its networks, and print the folder."""
    parts = None
    if options.only is not None:
        parts = [hub_folder(options.name, KINDS[name]) for name in options.only]
    print(interruptible(download, options.name, parts))
