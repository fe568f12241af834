"""A command in a terminal: output streams that may be closed, signals that end it at once, and errors in one line."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TextIO, TypeVar, cast

from fluxjax.checkpoint.printable import printable

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_requested: list[int] = []  # the first signal within `stop_signals`
_PATIENCE = 5.0
"""Seconds of cleaning up after which another signal leaves the process at once."""
_STACK = 64 * 2**20
"""Bytes of the worker's stack: threads get less than the main thread on some systems, and compilers recurse deeply."""
_LONGEST = 2000
"""Characters of an error message that are printed."""


class Stopped(BaseException):
    """A signal asked the command to end. `number`: of the signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_command(command: Callable[[], None], *, program: bool) -> None:
    """Run a command: a user's mistake is one line on standard error and exit code 2; a signal is one line and 128 plus its
    number, after every `with` block of the main thread has ended.

    **Arguments:** `program`: whether the process may be left without its exit hooks after a signal: they wait until the
    program that a device is running has ended. Else `SystemExit` is raised then too.
    """
    with tolerant_streams(), stop_signals():
        try:
            command()
            sys.stdout.flush()
        except (Stopped, KeyboardInterrupt) as stop:
            _leave(stop.number if isinstance(stop, Stopped) else signal.SIGINT, program)
        except (ValueError, OSError) as error:
            complain(str(error))
            raise SystemExit(2) from None
        except (MemoryError, RuntimeError) as error:
            if (message := _machine_error(error)) is None:
                raise
            complain(message)
            raise SystemExit(2) from None


def complain(message: str) -> None:
    """Print one line on standard error; line breaks and control characters in it are escaped or joined."""
    print(f"fluxjax: {printable(' '.join(message.split()), _LONGEST)}", file=sys.stderr)


def _machine_error(error: Exception) -> str | None:
    """Return what to do about an error of the machine, or None for one that is a defect of the program."""
    text = str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"There is not enough memory ({text or 'out of memory'}). Choose a smaller image or batch."
    if "Unable to initialize backend" in text or "No visible" in text:
        return (
            f"JAX finds no such device: {text}. Unset JAX_PLATFORMS, or install JAX for the device."
        )
    return None


def _leave(number: int, program: bool) -> NoReturn:
    complain(f"stopped by {signal.Signals(number).name}")
    if program:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(128 + number)
    raise SystemExit(128 + number)


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread at the first SIGINT, SIGTERM or SIGHUP within the block.

    Later ones do not disturb the cleaning up, but end the process if it takes more than a few seconds. A signal that was
    ignored before (by nohup, say) stays so, and in another thread than the main one nothing is changed.
    """
    first: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            _requested.append(number)
            raise Stopped(number)
        if time.monotonic() - first[0] > _PATIENCE:
            os._exit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS if main}
    changed = {
        number: handler
        for number, handler in before.items()
        if handler not in (None, signal.SIG_IGN)
    }
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        _requested.clear()
        for number, handler in changed.items():
            signal.signal(number, handler)


def interruptible(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Result:
    """Return function(*arguments, **options), computed in another thread while this one waits for it or for a signal.

    Python handles signals in the main thread between two of its instructions, so never while that thread compiles, or waits
    for a device. After a signal the other thread goes on until the process ends.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments, **options)
    future: Future[Result] = Future()
    done = threading.Event()

    def work() -> None:
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)
        finally:
            done.set()

    _start(work)
    while not done.wait(0.2):  # with a time-out, as without one Windows would not be interrupted
        if (
            _requested
        ):  # Python drops what is raised in a finalizer, or in the garbage collector's callbacks
            raise Stopped(_requested[0])
    return future.result()


def _start(work: Callable[[], None]) -> None:
    before = threading.stack_size(_STACK)
    try:
        threading.Thread(target=work, daemon=True).start()
    finally:
        threading.stack_size(before)


class _Tolerant:
    """A text stream whose reader may have gone, and whose encoding may lack a character.

    `required`: whether other errors of writing, as a full disk, are raised.
    """

    def __init__(self, stream: TextIO, *, required: bool):
        self._stream = stream
        self._required = required

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Write to nowhere from now on: what nobody reads is no error of the command's."""
        reason = getattr(error, "strerror", None) or error
        self._silence()
        if self._required and not isinstance(error, BrokenPipeError):
            raise OSError(f"Standard output can't be written to ({reason}).") from error

    def _silence(self) -> None:
        with suppress(
            OSError, ValueError
        ):  # what is still buffered is written when the interpreter ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._stream = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Let a command print within the block where standard output or error is closed, full, or a pipe without a reader."""
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    streams = [open(os.devnull, "w") if stream is None else stream for stream in before]  # noqa: SIM115
    sys.stdout = cast(TextIO, _Tolerant(streams[0], required=True))
    sys.stderr = cast(TextIO, _Tolerant(streams[1], required=False))
    try:
        yield
    finally:
        with suppress(OSError):  # raised before, where it was the command's
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _fill_closed_descriptors() -> None:
    """Open what is closed of descriptors 0 to 2, as the next file to be opened would get its number, and all that libraries
    print to standard error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened > 2:
                os.close(opened)
