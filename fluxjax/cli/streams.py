"""Standard output and error that may be closed, full, or a pipe that nobody reads any more."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TextIO, cast, runtime_checkable


@runtime_checkable
class _TextStream(Protocol):
    """What is needed of a text stream that the user or a test may have replaced."""

    @property
    def encoding(self) -> str | None: ...

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...

    def fileno(self) -> int: ...


class _TolerantStream:
    """A text stream whose reader may have gone, and whose encoding may lack a character.

    **Arguments:** `stream`: what is written to. `required`: whether other errors of writing, such
    as a full disk, are raised.
    """

    def __init__(self, stream: _TextStream, *, required: bool):
        self._stream = stream
        self._required = required

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; characters that the encoding lacks become escapes.

        **Returns:** the number of characters, as if all had been written.
        """
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._handle_write_error(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._handle_write_error(error)

    def _handle_write_error(self, error: Exception) -> None:
        """Discard all further output. A reader that has gone is no error of the command."""
        reason = getattr(error, "strerror", None) or error
        self._discard_output()
        if self._required and not isinstance(error, BrokenPipeError):
            raise OSError(f"Standard output can't be written to ({reason}).") from error

    def _discard_output(self) -> None:
        # The descriptor is replaced too: what is still buffered for it is written when the
        # interpreter exits, and would fail there with a traceback.
        with suppress(OSError, ValueError):
            null_device = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_device, self._stream.fileno())
            os.close(null_device)
        self._stream = _open_null_device()


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Let a command print where standard output or error is closed, full, or an unread pipe.

    Within the block such output is discarded. Standard output raises `OSError` if it can't be
    written to for another reason, such as a full disk.
    """
    _fill_closed_descriptors()
    original_output, original_error = sys.stdout, sys.stderr
    # Python sets a stream to None if its descriptor was closed as the process began.
    output = _open_null_device() if original_output is None else original_output
    error = _open_null_device() if original_error is None else original_error
    sys.stdout = cast(TextIO, _TolerantStream(output, required=True))
    sys.stderr = cast(TextIO, _TolerantStream(error, required=False))
    try:
        yield
    finally:
        with suppress(OSError):  # if it matters, the command has raised it already
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = original_output, original_error


def _open_null_device() -> _TextStream:
    return open(os.devnull, "w")


def _fill_closed_descriptors() -> None:
    """Open the null device in place of those of the descriptors 0 to 2 that are closed.

    Otherwise the next file that is opened gets such a number, and receives everything that
    libraries print to standard error.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened > 2:
                os.close(opened)
