"""Running a command in a terminal: a signal ends it at once, and an error is one line."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, ParamSpec, TypeVar

from fluxjax.cli.streams import tolerant_streams
from fluxjax.printable import printable

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_received_signals: list[int] = []
"""The number of the first signal that came within `stop_signals`; empty before."""
_CLEAN_UP_SECONDS = 5.0
"""Seconds that clean-up may take; after them another signal ends the process at once."""
_POLL_SECONDS = 0.2
"""Seconds after which the main thread looks for a signal that was received but not raised."""
_WORKER_STACK = 64 * 2**20
"""Bytes of the worker thread's stack. On some systems threads get less than the main thread has,
and compilers recurse deeply."""
_MOST_REASON = 300
"""Characters of the reason why memory ran out: the rest lists allocations."""
_MAX_MESSAGE = 2000
"""Characters of an error message that are printed."""


class Stopped(BaseException):
    """A signal asked the command to stop.

    **Arguments:** `number`: the number of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_command(command: Callable[[], None], *, program: bool) -> None:
    """Run a command; its errors and the signals that end it are one line on standard error.

    A mistake of the user ends with exit code 2, a signal with 128 plus its number, after every
    `with` block of the main thread has ended.

    **Arguments:** `command`: called without arguments. `program`: whether the process exits
    without its exit handlers after a signal. These would wait until the computation that a device
    is running has ended. Without it, `SystemExit` is raised after a signal too.
    **Raises:** `SystemExit` after an error of the user or a signal. Other exceptions pass through.
    """
    with tolerant_streams(), stop_signals():
        try:
            command()
            sys.stdout.flush()
        except Stopped as stopped:
            _exit_after_signal(stopped.number, program=program)
        except KeyboardInterrupt:
            _exit_after_signal(signal.SIGINT, program=program)
        except (ValueError, OSError) as error:
            complain(str(error))
            raise SystemExit(2) from None
        except (MemoryError, RuntimeError) as error:
            message = _explain_machine_error(error)
            if message is None:
                raise
            complain(message)
            raise SystemExit(2) from None


def complain(message: str) -> None:
    """Print a message as one line on standard error.

    Line breaks become spaces, and control characters are escaped.
    """
    line = " ".join(message.split())
    print(f"fluxjax: {printable(line, _MAX_MESSAGE)}", file=sys.stderr)


def raise_problems(path: Path, problems: Sequence[str]) -> None:
    """Print what is wrong with each line of a file.

    **Raises:** `ValueError` with the last of them, if there are any.
    """
    for problem in problems[:-1]:
        complain(f"{path}: {problem}")
    if problems:
        raise ValueError(f"{path}: {problems[-1]}")


def _explain_machine_error(error: Exception) -> str | None:
    """Return a message about an error of the machine, or None for a defect of the program."""
    text = str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        reason = text.strip().split("\n")[0][:_MOST_REASON] or "out of memory"
        return (
            f"There is not enough memory ({reason}). `fluxjax plan` with the same options shows "
            "what fits: a smaller --batch or image, --quantize int8, or --stream-blocks. Of a GPU, "
            "JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."
        )
    if "Unable to initialize backend" in text or "No visible" in text:
        return (
            f"JAX finds no such device: {text}. Unset JAX_PLATFORMS, or install JAX for the device."
        )
    return None


def _exit_after_signal(number: int, *, program: bool) -> NoReturn:
    """End the command with the exit code that shells give to a signal.

    **Arguments:** `program`: whether the process is ended at once, whatever its threads do.
    """
    complain(f"stopped by {signal.Signals(number).name}")
    if program:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + number)
    raise SystemExit(128 + number)


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread at the first SIGINT, SIGTERM or SIGHUP within the block.

    Later signals do not disturb the clean-up, but end the process if it takes longer than a few
    seconds. A signal that was ignored before (by nohup, for example) stays ignored. In another
    thread than the main one nothing is changed.
    """
    first_time: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not first_time:
            first_time.append(time.monotonic())
            _received_signals.append(number)
            raise Stopped(number)
        if time.monotonic() - first_time[0] > _CLEAN_UP_SECONDS:
            os._exit(128 + number)

    original_handlers = _replaceable_handlers()
    for number in original_handlers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        _received_signals.clear()
        for number, original in original_handlers.items():
            signal.signal(number, original)


class PendingSignal:
    """A signal that was received, and is to be acted on between two steps.

    `number`: of the first one; None before.
    """

    number: int | None = None


@contextmanager
def deferred_signals() -> Iterator[PendingSignal]:
    """Note the first SIGINT, SIGTERM or SIGHUP within the block, instead of raising `Stopped`.

    The block looks at the number between two steps, and ends itself. A second signal ends the
    process at once. In another thread than the main one nothing is changed.
    """
    pending = PendingSignal()

    def handle(number: int, frame: FrameType | None) -> None:
        if pending.number is not None:
            os._exit(128 + number)
        pending.number = number

    original_handlers = _replaceable_handlers()
    for number in original_handlers:
        signal.signal(number, handle)
    try:
        yield pending
    finally:
        for number, original in original_handlers.items():
            signal.signal(number, original)


_Handler = Callable[[int, FrameType | None], object] | int


def _replaceable_handlers() -> dict[int, _Handler]:
    """Return the present handler of each signal that may be handled here."""
    handlers: dict[int, _Handler] = {}
    if threading.current_thread() is not threading.main_thread():
        return handlers  # Python lets only the main thread set handlers
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        # None: the handler was not installed by Python, and could not be restored.
        if handler is not None and handler is not signal.SIG_IGN:
            handlers[number] = handler
    return handlers


def interruptible(
    function: Callable[Parameters, Result],
    *arguments: Parameters.args,
    **options: Parameters.kwargs,
) -> Result:
    """Call a function in a worker thread, so that a signal ends the wait for it at once.

    Python handles signals in the main thread between two of its instructions: not while that
    thread is inside a compiler, or waits for a device. After a signal the worker thread goes on
    until the process ends.

    **Arguments:** `function`: what to call, with the `arguments` and `options`.
    **Returns:** what the function returns. In another thread than the main one it is called
    directly.
    **Raises:** what the function raises; `Stopped` after a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments, **options)
    future = start_in_thread(function, *arguments, **options)
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    while not done.wait(_POLL_SECONDS):  # on Windows a wait without a time limit is uninterruptible
        # `Stopped` may have been lost: Python drops exceptions of signal handlers that run inside
        # a finalizer or a callback of the garbage collector.
        if _received_signals:
            raise Stopped(_received_signals[0])
    return future.result()


def start_in_thread(
    function: Callable[Parameters, Result],
    *arguments: Parameters.args,
    **options: Parameters.kwargs,
) -> "Future[Result]":
    """Call a function in a worker thread, which does not keep the process from ending.

    **Returns:** the future of what the function returns or raises.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    original_size = threading.stack_size(_WORKER_STACK)
    try:
        threading.Thread(target=work, daemon=True).start()
    finally:
        threading.stack_size(original_size)
    return future
