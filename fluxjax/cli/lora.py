"""The commands about adapters: `fluxjax lora inspect`, `convert` and `extract`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.locate import find_part
from fluxjax.cli.adapters import adapter_file, read_adapter
from fluxjax.cli.console import interruptible
from fluxjax.generate.limits import check_devices
from fluxjax.lora.describe import describe_lora
from fluxjax.lora.extract import extract_lora
from fluxjax.lora.write import write_lora


def run_lora_inspect(options: argparse.Namespace) -> None:
    """Print what an adapter contains."""
    summary = describe_lora(interruptible(adapter_file, options.adapter.place))
    print(json.dumps(asdict(summary)) if options.json else summary)


def run_lora_convert(options: argparse.Namespace) -> None:
    """Write an adapter in another format."""
    check_devices()
    destination = _check_new(options.destination)
    write_lora(destination, read_adapter(options.adapter), to=options.to)
    print(destination)


def run_lora_extract(options: argparse.Namespace) -> None:
    """Write the adapter that best approximates how a fine-tuned checkpoint differs from its base.

    Both networks are read from their files tensor by tensor.
    """
    check_devices()
    kind = KINDS[options.only]
    destination = _check_new(options.destination)
    places = [interruptible(find_part, name, kind.folder) for name in (options.base, options.tuned)]
    base, tuned = (open_source(place).network(kind).plan() for place in places)
    lora = interruptible(extract_lora, base, tuned, kind.name, rank=options.rank, to=options.to)
    write_lora(destination, lora, to=options.to)
    print(destination)


def _check_new(path: Path) -> Path:
    """Return a path. **Raises:** `FileExistsError` if something exists there."""
    if path.exists():
        raise FileExistsError(
            f"There is something at {path} already. Remove it, or choose another destination."
        )
    return path
