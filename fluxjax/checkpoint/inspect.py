"""What a file or a folder holds, told from its headers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxjax.checkpoint.detect import FoundNetwork, open_source, variant
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.folders import MODEL_FOLDERS
from fluxjax.checkpoint.locate import find_source
from fluxjax.checkpoint.plan import Problems
from fluxjax.checkpoint.write import parameters
from fluxjax.printable import printable


@dataclass(frozen=True)
class Summary:
    """What a file or folder holds of one network.

    `names`: whose key names it has. `variant`: which of FLUX.1's transformers. `parameters`: None if its config is not known.
    `nbytes`: in the files. `storage`: bytes by how they are stored. `loads_as`: the dtype of most weights when loaded.
    `problems`: keys that are missing, unexpected, misshapen or repeated. `error`: why its config is not known.
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
        return self.error is None and not any(self.problems.values())

    def __str__(self) -> str:
        size = "unknown size" if self.parameters is None else f"{self.parameters:,} parameters"
        stored = ", ".join(
            f"{name} {nbytes / 1e6:,.1f} MB"
            for name, nbytes in sorted(self.storage.items(), key=lambda i: -i[1])
        )
        what = self.title + ("" if self.variant is None else f" ({self.variant})")
        lines = [
            f"{self.kind}: {what}, {size}, {self.nbytes / 1e6:,.1f} MB",
            f"  in {_listed(self.files)}; {self.names} names; stored as {stored}",
        ]
        for problem, keys in self.problems.items():
            if keys:
                lines.append(f"  {len(keys)} {problem}: {_listed(keys)}")
        verdict = (
            f"  whole: loads with load_{self.kind} as {self.loads_as}"
            if self.whole
            else "  does not load"
        )
        return "\n".join(
            [*lines, verdict if self.error is None else f"  does not load: {self.error}"]
        )


@dataclass(frozen=True)
class Report:
    """What a file or folder holds. `strangers`: files that hold no network of FLUX, and why; `left`: tensors of none."""

    networks: tuple[Summary, ...]
    strangers: dict[str, str]
    left: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether there is a network, and all that there is loads."""
        return bool(self.networks) and all(network.whole for network in self.networks)

    def __str__(self) -> str:
        lines = [str(network) for network in self.networks] + list(self.strangers.values())
        if self.left:
            lines.append(f"{len(self.left)} tensors of no known network: {_listed(self.left)}")
        return "\n".join(lines or ["no weights"])


def _listed(names: Sequence[str]) -> str:
    """Return the first names of a list on one line, with what could fake another line escaped."""
    return ", ".join(printable(name) for name in names[:8]) + (" …" if len(names) > 8 else "")


def inspect_weights(source: str | Path) -> Report:
    """Tell what a file or folder holds, from its headers alone: kind, variant, size, dtypes, what is missing or extra.

    **Arguments:** `source`: as for `convert_weights`, but a name's files have to be in the hub's cache.
    **Raises:** `WeightsError` for a file that can't be read, `FileNotFoundError` for no such source.
    """
    found = open_source(find_source(source, MODEL_FOLDERS, cached=True))
    networks = tuple(_summary(part) for part in found.parts.values())
    return Report(
        networks,
        {path.name: problem for path, problem in found.strangers.items()},
        tuple(found.left),
    )


def _summary(part: FoundNetwork) -> Summary:
    problems: Problems = {}
    count = kind = error = None
    try:
        plan, problems = part.check()
        count, kind = parameters(plan.network), variant(part.config)
    except WeightsError as problem:
        error = str(problem)
    storage: dict[str, int] = {}
    loaded: dict[str, int] = {}
    for tensor in part.tensors.values():
        storage[tensor.storage] = storage.get(tensor.storage, 0) + tensor.nbytes
        loaded[str(tensor.dtype)] = loaded.get(str(tensor.dtype), 0) + tensor.size
    return Summary(
        kind=part.kind.name,
        title=part.kind.title,
        names=part.dialect.name,
        variant=kind,
        files=tuple(file.name for file in part.files),
        parameters=count,
        nbytes=sum(tensor.nbytes for tensor in part.tensors.values()),
        storage=storage,
        loads_as=max(loaded, key=loaded.__getitem__, default="nothing"),
        problems=problems,
        error=error,
    )
