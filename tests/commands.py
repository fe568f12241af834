"""The commands of the command line, and their options."""

import argparse

from fluxjax.cli.main import build_parser


def _parsers(
    parser: argparse.ArgumentParser, words: str
) -> list[tuple[str, argparse.ArgumentParser]]:
    found = [(words, parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, chosen in action.choices.items():
                found += _parsers(chosen, f"{words} {word}".strip())
    return found


OPTIONS: dict[str, set[str]] = {}
"""The options of each command, by the words that choose it."""
for _words, _parser in _parsers(build_parser(), ""):
    OPTIONS[_words] = set(_parser._option_string_actions)
