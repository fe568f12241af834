"""What a file or a folder holds, reported from the headers of its files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import jax

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.family import family_of_source
from fluxjax.checkpoint.identify import AnyFoundNetwork
from fluxjax.checkpoint.kinds import Network, flux_variant
from fluxjax.checkpoint.locate import find_source
from fluxjax.checkpoint.match import Problems
from fluxjax.checkpoint.members import described_variant
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.printable import printable

_MOST_LISTED = 8


@dataclass(frozen=True)
class Summary:
    """What a file or folder holds of one network.

    `kind`: its name, as "flux", "chroma", "t5" or "siglip". `title`: of the network, for people.
    `names`: whose key names it has. `variant`: which of the published transformers or ControlNets
    it is; None for others.
    `files`: their names. `parameters`: how many numbers; None if its config is not known.
    `nbytes`: its bytes in the files. `storage`: bytes by how they are stored. `loads_as`: the dtype
    or packed format of most weights when loaded. `problems`: keys that are missing, unexpected,
    misshapen or repeated. `error`: why its config is not known.
    """

    kind: str
    title: str
    names: str
    variant: str | None
    files: tuple[str, ...]
    parameters: int | None
    nbytes: int
    storage: dict[str, int]
    loads_as: str
    problems: Problems
    error: str | None

    @property
    def whole(self) -> bool:
        """Whether the network loads."""
        return self.error is None and not any(self.problems.values())

    def __str__(self) -> str:
        title = self.title
        if self.variant is not None:
            title += f" ({self.variant})"
        size = "unknown size"
        if self.parameters is not None:
            size = f"{self.parameters:,} parameters"
        files = list_names(self.files)
        lines = [
            f"{self.kind}: {title}, {size}, {_megabytes(self.nbytes)}",
            f"  in {files}; {self.names} names; stored as {self._storage_line()}",
        ]
        for problem, keys in self.problems.items():
            if keys:
                lines.append(f"  {len(keys)} {problem}: {list_names(keys)}")
        # The last line says whether it loads, and with which function.
        if self.error is not None:
            lines.append(f"  does not load: {self.error}")
        elif self.whole:
            lines.append(f"  whole: loads with load_{self.kind} as {self.loads_as}")
        else:
            lines.append("  does not load")
        return "\n".join(lines)

    def _storage_line(self) -> str:
        """Return how many MB are stored in which way, the most first."""
        by_size = sorted(self.storage, key=lambda name: -self.storage[name])
        entries = []
        for name in by_size:
            entries.append(f"{name} {_megabytes(self.storage[name])}")
        return ", ".join(entries)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Report:
    """What a file or folder holds.

    `networks`: one summary each. `unknown_files`: files without any network of FLUX.1, by name,
    and what they are. `unknown_tensors`: tensors beside the networks' that belong to none.
    """

    networks: tuple[Summary, ...]
    unknown_files: Mapping[str, str]
    unknown_tensors: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether there is a network, and every network that there is loads."""
        return bool(self.networks) and all(network.whole for network in self.networks)

    def __str__(self) -> str:
        lines = [str(network) for network in self.networks]
        lines += self.unknown_files.values()
        if self.unknown_tensors:
            count, names = len(self.unknown_tensors), list_names(self.unknown_tensors)
            lines.append(f"{count} tensors of no known network: {names}")
        return "\n".join(lines or ["no weights"])


def list_names(names: Sequence[str]) -> str:
    """Return the first names of a list on one line, with characters that do not print escaped.

    A file's names could otherwise imitate further lines of a report.
    """
    line = ", ".join(printable(name) for name in names[:_MOST_LISTED])
    return f"{line} …" if len(names) > _MOST_LISTED else line


def inspect_weights(source: str | Path) -> Report:
    """Report what a file or folder holds: kind, variant, size, dtypes, what is missing or extra.

    Only the headers of the files are read.

    **Arguments:** `source`: as for `convert_weights`, but a name's files have to be in the hub's
    cache.
    **Returns:** the report; `str` of it is for people, and `report.whole` is whether all loads.
    **Raises:** `WeightsError` for a file that can't be read, `FileNotFoundError` for no such
    source.
    """
    folders = family_of_source(source, cached=True).folders
    found = open_source(find_source(source, folders, cached=True))
    networks = []
    for network in found.networks.values():
        networks.append(_summarize(network))
    unknown_files = {}
    for path, problem in found.unknown_files.items():
        unknown_files[path.name] = problem
    return Report(tuple(networks), unknown_files, tuple(found.unknown_tensors))


def _summarize(network: AnyFoundNetwork) -> Summary:
    """Return the summary of one network; an unknown config is part of it and no error."""
    problems: Problems = {}
    count = variant = error = None
    try:
        # Matching reads no values, so this is fast for files of any size.
        plan, problems = network.check()
        count = parameter_count(plan.network)
        variant = flux_variant(network.config)
        if isinstance(network.config, FluxConfig):
            variant = described_variant(network.files[0], network.config)
    except WeightsError as problem:
        error = str(problem)
    bytes_by_storage: Counter[str] = Counter()
    values_by_dtype: Counter[str] = Counter()
    for tensor in network.tensors.values():
        bytes_by_storage[tensor.storage] += tensor.nbytes
        values_by_dtype[tensor.packed_format or str(tensor.dtype)] += tensor.size
    return Summary(
        kind=network.kind.name,
        title=network.kind.title,
        names=network.dialect.name,
        variant=variant,
        files=tuple(file.name for file in network.files),
        parameters=count,
        nbytes=bytes_by_storage.total(),
        storage=dict(bytes_by_storage),
        # Most values, not most tensors: a few large matrices outweigh many biases.
        loads_as=max(values_by_dtype, key=values_by_dtype.__getitem__, default="nothing"),
        problems=problems,
        error=error,
    )


def parameter_count(network: Network) -> int:
    """Return how many numbers a network holds."""
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(network))
