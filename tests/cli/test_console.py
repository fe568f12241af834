"""Commands in a terminal: signals end them at once, streams may be closed, errors are one line."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from fluxjax.cli.console import Stopped, interruptible, run_command, stop_signals


def command(*arguments):
    return [sys.executable, "-m", "fluxjax", *arguments]


@pytest.mark.parametrize(
    ("name", "code", "moment"),
    [
        ("SIGINT", 130, rb"denoise .* [1-9][0-9]*/10000"),  # the device computes
        ("SIGTERM", 143, rb"compile denoise"),  # XLA compiles
    ],
)
def test_a_signal_ends_the_command_at_once_in_one_line(tmp_path, programs, name, code, moment):
    size = ["--steps", "10000", "--height", "32", "--width", "32"]
    folder = programs if name == "SIGINT" else tmp_path.parent / "none"
    process = subprocess.Popen(
        command("generate", "a star", *size, "--compilation-cache", str(folder)),
        cwd=tmp_path,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # compiles faster
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    printed = b""
    while not re.search(moment, printed) and (read := process.stderr.read1(4096)):
        printed += read
    for _ in range(2):
        process.send_signal(getattr(signal, name))
    out, rest = process.communicate(timeout=10)
    assert process.returncode == code
    assert rest.decode().split("\r")[-1].splitlines()[-1] == f"fluxjax: stopped by {name}"
    assert b"Traceback" not in rest
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_jax_is_imported_is_one_line(tmp_path, name, code):
    words = [sys.executable, "-X", "importtime", "-m", "fluxjax", "generate", "a star"]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:  # one for each module that has been imported
        if "jax._src" in line:
            break
    process.send_signal(getattr(signal, name))
    out, rest = process.communicate(timeout=10)
    assert process.returncode == code
    assert not re.search(r" fluxjax\.cli\.generate$", rest, re.MULTILINE)  # not so far yet
    # The worker thread goes on importing, so that its lines may begin within the message's.
    printed = re.sub(r"import time:.*\n?", "", rest)
    assert printed.split("\n") == [f"fluxjax: stopped by {name}", ""]
    assert not out
    assert not list(tmp_path.iterdir())


def test_streams_that_are_closed_and_a_folder_that_is_gone(tmp_path):
    shell = 'mkdir gone; cd gone; rmdir ../gone; "$@" --steps 0 2>&-; echo $?; "$@" 2>&1'
    found = subprocess.run(
        ["sh", "-c", shell, "sh", *command("generate", "a")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stderr) == (2, "")
    code, message = found.stdout.splitlines()
    assert code == "2"
    assert message.startswith("fluxjax: --output-dir . can't be made")
    assert not (tmp_path / "gone").exists()
    pipe = subprocess.Popen(
        command("--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pipe.stdout.close()
    assert pipe.stderr.read() == ""
    assert pipe.wait() == 0


def test_output_that_nobody_reads_is_no_error_and_a_full_disk_is_one(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        run_command(lambda: print("a" * 100_000), program=False)
        assert sys.stdout is pipe
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: print("a"), program=False)
    assert stopped.value.code == 2
    assert "Standard output can't be written to (No space left" in capsys.readouterr().err


def test_a_character_that_the_terminal_lacks_is_escaped(monkeypatch, tmp_path):
    with open(tmp_path / "terminal", "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        run_command(lambda: print("a ⭐"), program=False)
    assert (tmp_path / "terminal").read_text() == "a \\u2b50\n"


def test_a_device_that_jax_does_not_find_is_one_line(tmp_path):
    found = subprocess.run(
        command("generate", "a"),
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("fluxjax: JAX finds no device of JAX_PLATFORMS='cuda'")
    assert "()" not in found.stderr  # JAX's error has no text
    assert found.stderr.count("\n") == 1


def test_a_signal_whose_exception_is_swallowed_ends_the_next_wait():
    before = signal.getsignal(signal.SIGINT)
    with stop_signals():
        with suppress(Stopped):  # as Python does in finalizers
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a second one has no effect
        with pytest.raises(Stopped):
            interruptible(time.sleep, 5)
    assert signal.getsignal(signal.SIGINT) is before
    assert interruptible(lambda: 3) == 3


def test_a_function_is_called_in_another_thread_and_its_error_is_raised_here():
    main = threading.current_thread()
    assert interruptible(threading.current_thread) is not main
    # In that thread no other one is started.
    assert interruptible(lambda: interruptible(threading.current_thread) is not main)
    with pytest.raises(ZeroDivisionError):
        interruptible(divmod, 1, 0)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a\nb \x1b[2J"), "a b \\x1b[2J"),
        (FileNotFoundError("There is no file."), "There is no file."),
        (MemoryError(), "There is not enough memory (out of memory). `fluxjax plan`"),
        (RuntimeError("RESOURCE_EXHAUSTED: 4 GB"), "enough memory (RESOURCE_EXHAUSTED: 4 GB)"),
        (RuntimeError("Unable to initialize backend 'tpu'"), "JAX finds no such device: Unable"),
    ],
)
def test_an_error_that_the_user_can_mend_is_one_line(error, message, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(fail, program=False)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fluxjax: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_an_error_of_the_program_is_not_hidden():
    def fail():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_command(fail, program=False)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_within_a_program_raises_system_exit_after_clean_up(name, code, capsys):
    cleaned = []

    def wait():
        try:
            signal.raise_signal(getattr(signal, name))
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as stopped:
        run_command(wait, program=False)
    assert stopped.value.code == code
    assert cleaned
    assert capsys.readouterr().err == f"fluxjax: stopped by {name}\n"
