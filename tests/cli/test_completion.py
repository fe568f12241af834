"""Completion in a shell: bash runs the script, the others' are looked at."""

import argparse
import shutil
import subprocess

import pytest

from fluxjax.cli.choices import INTEGRATORS
from fluxjax.cli.completion import completed_commands
from fluxjax.cli.completion_options import SHELLS
from fluxjax.cli.main import COMMANDS, LORA_ACTIONS, build_parser, main
from fluxjax.cli.shell_scripts import WRITERS

LINES = {
    "fluxjax pl": {"plan"},
    "fluxjax lora ": {action.name for action in LORA_ACTIONS},
    "fluxjax lora convert --t": {"--to"},
    "fluxjax generate star --integrator eu": {"euler"},
    "fluxjax generate star --integrator = ": set(INTEGRATORS),
    "fluxjax compare star --timers ka": {"karras"},
    "fluxjax generate star --preview": {"--preview", "--preview-every"},
    "fluxjax generate star --lora ": set(),  # files, which bash completes by itself
    "fluxjax generate star --steps ": set(),
    "fluxjax completion ": set(SHELLS),
}


@pytest.fixture(scope="module")
def commands():
    return completed_commands(build_parser())


def test_every_command_and_option_is_completed(commands):
    found = {command.words: command for command in commands}
    names = {command.name for command in COMMANDS} | {"lora"}
    assert set(found[""].names) == names
    assert set(found) == names | {"", *(f"lora {action.name}" for action in LORA_ACTIONS)}
    options = {option.names[-1]: option for option in found["generate"].options}
    assert options["--lora"].is_file
    assert options["--aspect"].help.startswith("shape of the image, as 16:9")
    assert not options["--unroll"].takes_value
    assert not any("%(" in option.help for command in commands for option in command.options)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_values(commands, tmp_path):
    script = tmp_path / "fluxjax.bash"
    script.write_text(WRITERS["bash"](commands))
    program = f"source {script}\n"
    for line in LINES:
        words = line.split(" ")
        program += f"COMP_WORDS=({' '.join(word or repr('') for word in words)})\n"
        program += f'COMP_CWORD={len(words) - 1}; _fluxjax; echo "${{COMPREPLY[@]}}"\n'
    done = subprocess.run(["bash", "-euc", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    replies = [set(line.split()) for line in done.stdout.split("\n")[:-1]]
    assert dict(zip(LINES, replies, strict=True)) == LINES


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_is_printed_whole(shell, capsys):
    main(["completion", shell])
    script = capsys.readouterr().out
    for word in ("integrator", "dpmpp_2m", "lora", "extract"):
        assert word in script
    if shutil.which(shell) is not None:
        done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_options_of_an_own_parser_are_read_as_they_are():
    parser = argparse.ArgumentParser(prog="own")
    parser.add_argument("--kind", choices=("a", "b"), help="it's one: %(choices)s")
    (command,) = completed_commands(parser)
    assert command.options[1].values == ("a", "b")
    assert "it\\'s one" in WRITERS["fish"]([command])
