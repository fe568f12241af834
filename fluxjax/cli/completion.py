"""The command `fluxjax completion`: a script by which a shell completes commands and options.

The script is text that needs nothing of fluxjax when it runs. `shell_scripts.py` writes it of what
is gathered here from the parsers.
"""

import argparse

from fluxjax.cli.options import NameList, NameOrFile
from fluxjax.cli.shell_scripts import WRITERS, CompletedCommand, CompletedOption

_FILE_METAVARS = ("FILE", "DIR", "PATH", "SOURCE", "ADAPTER", "IMAGE", "PATTERN", "FILE[=WEIGHT]")
"""Values that are paths, or may be."""
_MOST_HELP = 60


def run_completion(options: argparse.Namespace) -> None:
    """Print the script of a shell."""
    print(WRITERS[options.shell](completed_commands(options.root)), end="")


def completed_commands(parser: argparse.ArgumentParser, words: str = "") -> list[CompletedCommand]:
    """Return what can be completed after each command, the program itself first.

    **Arguments:** `parser`: of the whole command line. `words`: that have chosen it, "" for all.
    """
    own: list[CompletedOption] = []
    names: dict[str, str] = {}
    below: list[CompletedCommand] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names = {one.dest: one.help or "" for one in action._choices_actions}
            for name, chosen in action.choices.items():
                below += completed_commands(chosen, f"{words} {name}".strip())
        elif action.option_strings:
            own.append(_option(parser, action))
        elif action.choices is not None:
            names |= dict.fromkeys(map(str, action.choices), "")
    return [CompletedCommand(words, names, own), *below]


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> CompletedOption:
    """Return what a shell can complete of an option: its names, its values, files."""
    values: tuple[str, ...] = ()
    if action.choices is not None:
        values = tuple(map(str, action.choices))
    elif isinstance(action.type, NameList | NameOrFile):
        values = tuple(action.type.known)
    return CompletedOption(
        names=tuple(action.option_strings),
        takes_value=action.nargs != 0,
        values=values,
        is_file=action.metavar in _FILE_METAVARS,
        help=_short_help(parser, action),
    )


def _short_help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return the beginning of an option's help."""
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    for end in (";", ": ", " ("):
        text = text.partition(end)[0]
    if len(text) > _MOST_HELP:
        text = text[:_MOST_HELP].rpartition(" ")[0] + " …"
    return text
