"""The command `fluxjax encode`: images and captions encoded once, for training."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.console import complain, interruptible
from fluxjax.generate.limits import check_devices
from fluxjax.train.config_file import read_config
from fluxjax.train.data_settings import DataSettings, data_settings
from fluxjax.train.encode_data import EncodeOptions, EncodeReport, encode_examples
from fluxjax.train.encoders import load_encoders
from fluxjax.train.ordered import ProcessShare


def run_encode(options: argparse.Namespace) -> None:
    """Encode the examples of a training, and print the folder."""
    config: dict[str, Any] = {}
    folder = Path()
    if options.config is not None:
        config, folder = read_config(options.config), options.config.parent
    settings = _settings(options, config, folder)
    if settings.cache is None:
        raise ValueError("`fluxjax encode` needs a folder to write. Pass --cache.")
    check_devices()
    use_cache(options.compilation_cache)
    model = options.model or _text(config, "model") or "tiny"
    dtype = options.dtype or _text(config, "dtype")
    try:
        report = interruptible(_encode, settings, model, dtype, _work(options))
    except ImportError as error:
        raise ValueError(str(error)) from None
    for line in report.broken:
        complain(f"left out: {line}")
    complain(
        f"{report.examples:,} examples in {report.written + report.kept:,} files, of which "
        f"{report.kept:,} were there"
    )
    print(settings.cache)


def _settings(options: argparse.Namespace, config: dict[str, Any], folder: Path) -> DataSettings:
    """Return the settings of the data: those of the configuration, where no option is given."""
    table = config.get("data", {})
    if not isinstance(table, dict):
        raise ValueError("`data` of a configuration is a table. Write it as [data].")
    table = dict(table)
    here = Path.cwd()
    for one in fields(DataSettings):
        value = getattr(options, one.name, None)
        if value is None:
            continue
        if one.name == "cache":
            value = str(here / value)
        if one.name == "sources":
            value = [str(here / place) for place in value]
        table[one.name] = value
    return data_settings(table, folder)


def _text(config: dict[str, Any], name: str) -> str | None:
    """Return a value of a configuration. **Raises:** `ValueError` for one that is no text."""
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"`{name}` of a configuration is a text, as {name} = 'tiny'. Change it.")
    return value


def _work(options: argparse.Namespace) -> EncodeOptions:
    return EncodeOptions(
        batch_size=options.batch,
        shard_examples=options.shard_examples,
        part=ProcessShare(*options.part),
    )


def _encode(
    settings: DataSettings, model: str, dtype: str | None, work: EncodeOptions
) -> EncodeReport:
    """Load the encoders, and encode with a progress bar over images."""
    encoders = load_encoders(model, dtype=dtype)
    with tqdm(desc="encode", unit="image") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return encode_examples(settings, encoders, str(settings.cache), options=work, report=show)
