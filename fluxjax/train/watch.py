"""What is seen of a training while it runs: a progress bar, a log of JSON lines, TensorBoard."""

import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from fluxjax.shapes import Array
from fluxjax.train.mesh_step import StepMetrics
from fluxjax.train.optimizers import OptimizerSettings, learning_rates

_MEASURED = 9
"""Steps that a speed is the median of, so that validations and compilations do not count."""


class StepReport(NamedTuple):
    """A step that was dispatched.

    `number`: of the step, from 1 on. `metrics`: which may still be computed. `images`: examples
    that counted. `flop`: operations, over all devices.
    """

    number: int
    metrics: StepMetrics
    images: int
    flop: float


class Watch:
    """Shows and logs the steps of a training.

    The numbers of a step are read once the next one is dispatched, so that devices never wait for
    the host.

    **Arguments:** `folder`: of `log.jsonl`. `first`, `steps`: steps that are done, and of all.
    `rates`: for the learning rate in the log. `every`: steps between two lines. `peak`: operations
    per second of all devices, None if unknown. `tensorboard`: whether its files are written too.
    `silent`: whether to show no bar, and write nothing: for all processes but one.
    **Raises:** `ImportError` without the package for TensorBoard, if that is asked for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first: int,
        steps: int,
        rates: OptimizerSettings,
        every: int = 10,
        peak: float | None = None,
        tensorboard: bool = False,
        silent: bool = False,
    ):
        self.rate, self.every, self.peak = learning_rates(rates, steps), every, peak
        self.silent, self.folder = silent, folder
        self.bar = tqdm(total=steps, initial=first, unit="step", disable=silent)
        self._waiting: StepReport | None = None
        self._times = [time.monotonic()]
        self._board = None
        if silent:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._board = import_tensorboard()(str(folder))

    def step(self, report: StepReport) -> None:
        """Show a step, and log the one before it.

        **Raises:** `FloatingPointError` if the loss is no longer finite.
        """
        self.flush()
        self._waiting = report

    def record(self, number: int, values: Mapping[str, Any]) -> None:
        """Log values by name at a step, as those of a validation."""
        if self.silent:
            return
        line = {"step": number, **values}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, number)

    def image(self, number: int, name: str, image: Array) -> None:
        """Show an image of a validation in TensorBoard. `image`: [height, width, 3] in [-1, 1]."""
        if self._board is not None:
            levels = jax.numpy.clip((image + 1) / 2, 0, 1)
            self._board.add_image(name, jax.device_get(levels), number, dataformats="HWC")

    def close(self) -> None:
        """Log the last step. **Raises:** as `step`."""
        try:
            self.flush()
        finally:
            self.bar.close()
            if self._board is not None:
                self._board.close()

    def flush(self) -> None:
        """Show and log the last step now, which waits for it. **Raises:** as `step`."""
        report, self._waiting = self._waiting, None
        if report is None:
            return
        loss = float(report.metrics.loss)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss of step {report.number} is {loss}: the training diverged. Continue from "
                "an earlier checkpoint with a lower optimizer.learning_rate."
            )
        norm = float(report.metrics.gradient_norm)
        self._times = [*self._times, time.monotonic()][-_MEASURED - 1 :]
        pairs = zip(self._times, self._times[1:], strict=False)
        seconds = statistics.median(after - before for before, after in pairs)
        self.bar.update()
        shown = {"loss": f"{loss:.4f}", "gradient": f"{norm:.3g}"}
        share = None
        if self.peak is not None:
            share = report.flop / seconds / self.peak
            shown["peak"] = f"{share:.0%}"
        self.bar.set_postfix(shown, refresh=False)
        if report.number % self.every and report.number != self.bar.total:
            return
        values = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": float(self.rate(report.number - 1)),
            "seconds_per_step": seconds,
            "images_per_second": report.images / seconds,
        }
        if share is not None:
            values["share_of_peak"] = share
        self.record(report.number, values)


def import_tensorboard() -> Any:
    """Return the class that writes TensorBoard's files.

    **Raises:** `ImportError` that names the package, without it.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "log.tensorboard needs tensorboardX. Install it with "
            "`pip install 'fluxjax[tensorboard]'`."
        ) from error
    return SummaryWriter
