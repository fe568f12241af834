"""What the tests of the command line share: a way to run it, and the programs that it compiles."""

from typing import NamedTuple

import pytest

from fluxjax.cli.main import main


class Finished(NamedTuple):
    """A command that has ended. `errors`: the lines on standard error that are fluxjax's own."""

    code: int
    output: str
    errors: list[str]
    progress: str


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The folder in which all commands keep compiled programs: no test is about compiling."""
    return tmp_path_factory.getbasetemp() / "programs"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, programs):
    """Run a command in this process, in a folder of the test; return what `Finished` says."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        arguments = list(map(str, words))
        if arguments[0] in ("generate", "compare", "edit", "fill", "outpaint", "restore"):
            arguments += ["--compilation-cache", str(programs)]
        code = 0
        try:
            main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        printed = capsys.readouterr()
        # Progress bars end in carriage returns, and messages in line breaks.
        lines = printed.err.replace("\r", "\n").split("\n")
        errors = [line for line in lines if line.startswith("fluxjax: ")]
        return Finished(code, printed.out, errors, printed.err)

    return call
