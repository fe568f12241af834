"""The parser of the command line: errors of one line, and the words that options were given by."""

import argparse
import itertools
from collections.abc import Sequence
from typing import NoReturn

from fluxjax.cli.console import complain
from fluxjax.printable import printable
from fluxjax.suggestions import suggestion

OptionGroup = argparse._ActionsContainer
"""A parser, or a group of options in one; argparse has no public name for both."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line.

    What it parses has an attribute `given`: the words of each option that was given, by the name of
    the attribute that the option sets. With `find_problem` as a default, a function of what was
    parsed, the problem that this returns is an error.
    """

    def _check_help(self, action: argparse.Action) -> None:
        """Leave the text of an option's help as it is, until it is shown.

        From Python 3.14 on, argparse fills in the choices as an option is defined, to find mistakes
        in the text; here that would import JAX for every command.
        """

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        """Parse options, also where words that may be left out follow an option.

        argparse gives such a word, as a prompt, the value None as soon as an option comes, and then
        refuses it.
        """
        self._given: dict[str, list[str]] = {}
        namespace, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.option_strings:
                continue
            if action.nargs == "?" and getattr(namespace, action.dest, "") is None:
                for word in _leading_words(unknown)[:1]:
                    setattr(namespace, action.dest, self._read_word(action, word))
                    unknown.pop(0)
            elif action.nargs == "*":
                words = _leading_words(unknown)
                read = [self._read_word(action, word) for word in words]
                setattr(namespace, action.dest, [*getattr(namespace, action.dest), *read])
                unknown = unknown[len(words) :]
        if not hasattr(namespace, "given"):  # the parser of a command has been here before
            namespace.given = self._given
        return namespace, unknown

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> object:
        """Return the value of an option, and note by which words it was given."""
        if action.option_strings:
            given = self._given.setdefault(action.dest, [])
            given += option_words(action.option_strings[-1], arg_strings)
        return super()._get_values(action, arg_strings)  # type: ignore[misc]

    def _read_word(self, action: argparse.Action, word: str) -> object:
        assert callable(action.type)
        try:
            return action.type(word)
        except argparse.ArgumentTypeError as error:
            self.error(f"argument {action.metavar or action.dest}: {error}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """**Raises:** `argparse.ArgumentError` for a wrong choice, with the one it may be."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = suggestion(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}.{near}") from None

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        """Parse all words. One that is left over is an error, with the option that it may be."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = self._option_strings(namespace)
            near = suggestion(unknown[0].partition("=")[0], known)
            self.error(f"unrecognized arguments: {printable(' '.join(unknown))}.{near}")
        problem = getattr(namespace, "find_problem", _no_problem)(namespace)
        if problem is not None:
            namespace.parser.error(problem)
        return namespace

    def _option_strings(self, namespace: argparse.Namespace) -> list[str]:
        """Return the options of the command that was chosen."""
        chosen = getattr(namespace, "parser", self)
        return [name for action in chosen._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def _no_problem(options: argparse.Namespace) -> None:
    return None


def _leading_words(words: Sequence[str]) -> list[str]:
    """Return the words before the first that looks like an option."""
    return list(itertools.takewhile(lambda word: not word.startswith("-"), words))


def option_words(name: str, values: Sequence[str]) -> list[str]:
    """Return the words that give an option these values."""
    if len(values) == 1 and values[0].startswith("-"):  # which would look like an option
        return [f"{name}={values[0]}"]
    return [name, *values]
