"""Progress of a drawing command: a bar over evaluations of the network, and seconds of stages."""

import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from fluxjax.cli.console import interruptible, start_in_thread
from fluxjax.cli.xla_options import compiler_options
from fluxjax.generate.draw_hooks import DrawHooks, DrawProgress

Result = TypeVar("Result")
_BAR = "{desc:<16} {bar} {n_fmt}/{total_fmt} evaluations"


class Clock(DrawHooks):
    """Runs the stages of drawing, times each, and shows a progress bar that names the present one.

    What takes long runs in a worker thread, so that a signal ends it at once. `watch`: called with
    the progress too, if it is set.
    """

    def __init__(self, steps: int, evaluations: int, *, silent: bool = False):
        """**Arguments:** `steps`: of all batches together. `evaluations`: of the network, for each
        step. `silent`: whether to show no bar."""
        self.steps = steps
        self.evaluations = evaluations
        self.seconds: dict[str, float] = {}
        self.programs: dict[Hashable, Future[Callable[..., Any]]] = {}
        self.done = 0
        self.bar = tqdm(total=steps * evaluations, bar_format=_BAR, disable=silent)
        self.watch: Callable[[DrawProgress], None] | None = None

    def __enter__(self) -> "Clock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.set_description_str("done" if kind is None else "stopped")
        self.bar.close()

    @contextmanager
    def measure(self, stage: str, what: str = "") -> Iterator[None]:
        """Add the seconds of the block to a stage, which the bar shows meanwhile."""
        self.bar.set_description_str(f"{stage} {what}".strip())
        start = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start

    def load(self, name: str, function: Callable[[], Result]) -> Result:
        """Return function(), which loads what `name` says."""
        with self.measure("load", name):
            return interruptible(lambda: jax.block_until_ready(function()))

    def run(
        self, stage: str, function: Callable[..., Result], *inputs: Any, **options: Any
    ) -> Result:
        """Return function(*inputs, **options) of a jitted function.

        It is compiled at the first inputs of their shapes; waiting for that is timed apart.
        """
        program = self._program(function, inputs, options)
        if not program.done():
            with self.measure("compile", stage):
                interruptible(program.result)
        compiled = program.result()
        with self.measure(stage):
            return interruptible(lambda: jax.block_until_ready(compiled(*inputs, **options)))

    def compile_ahead(self, function: Callable[..., Any], *inputs: Any, **options: Any) -> None:
        """Start to compile a jitted function for inputs of these shapes, in another thread."""
        self._program(function, inputs, options)

    def _program(
        self, function: Callable[..., Any], inputs: tuple, options: dict[str, Any]
    ) -> "Future[Callable[..., Any]]":
        """Return the compiled function for inputs of these shapes, or what is to become of it."""

        def compile_function() -> Callable[..., Any]:
            lowered = function.lower(*inputs, **options)  # type: ignore[attr-defined]
            return lowered.compile(compiler_options=compiler_options((inputs, options)))

        kind = function, _shapes((inputs, options))
        if kind not in self.programs:
            self.programs[kind] = start_in_thread(compile_function)
        return self.programs[kind]

    def progress(self, progress: DrawProgress) -> None:
        steps = progress.done - self.done
        self.bar.update(steps * self.evaluations)
        self.done = 0 if progress.done == progress.steps else progress.done
        if self.watch is not None:
            self.watch(progress)

    def report(self) -> str:
        """Return the seconds of each stage, on one line."""
        parts = [f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items()]
        per_step = self.seconds["denoise"] / max(self.steps, 1)
        return f"{', '.join(parts)} ({per_step:.3f} s per step)"


def _shapes(tree: Any) -> Hashable:
    """Return what a compiled program is for: the structure of its inputs, their shapes and dtypes,
    and the leaves that are not arrays."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = []
    for leaf in leaves:
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        kinds.append((leaf.shape, leaf.dtype) if is_array else leaf)
    return structure, tuple(kinds)
