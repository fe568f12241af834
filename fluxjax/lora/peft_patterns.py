"""PEFT's `rank_pattern` and `alpha_pattern`: numbers by a regular expression of a module's name."""

import math
import re
from collections.abc import Mapping

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.printable import printable

_MOST_EXPRESSIONS = 200
_MOST_STEPS = 50_000
_ASSUMED_NAME_LENGTH = 80
"""Characters of a long module name, for the bound of the steps that a match takes."""
_LONGEST_EXPRESSION = 300


class Patterns:
    """Numbers by the end of a module's name, matched as PEFT matches them.

    A pattern matches if `(.*\\.)?(pattern)` matches the whole name; the first one in the table
    that matches counts. Nearly all patterns are plain names, which are looked up in a dict.
    Regular expressions come from a file, so they are run only if all of them together take a
    bounded number of steps.

    **Arguments:**

    - `numbers`: ranks or alphas by pattern, in the order of the file.

    **Raises:** `WeightsError` for expressions that may take too long, or that are not valid.
    """

    def __init__(self, numbers: Mapping[str, float]):
        expressions = [text for text in numbers if not _is_plain_name(text)]
        _check_steps(expressions)
        # Both keep the position in the table, because the first match counts.
        self.names: dict[str, tuple[int, float]] = {}
        self.expressions: list[tuple[re.Pattern, tuple[int, float]]] = []
        for position, (text, number) in enumerate(numbers.items()):
            if _is_plain_name(text):
                self.names[text] = (position, number)
            else:
                self.expressions.append((_compile_expression(text), (position, number)))

    def find(self, module: str, default: float) -> float:
        """Return the number of the first pattern that matches a module's name.

        **Arguments:**

        - `module`: its name inside the network.
        - `default`: the number if no pattern matches.
        """
        # A pattern may begin with any field of the name: that is PEFT's `(.*\\.)?`.
        starts = [0]
        starts += [dot.end() for dot in re.finditer(r"\.", module)]
        # Plain names are looked up, not compared one by one: a file may hold 100,000 of them.
        found = [self.names[module[start:]] for start in starts if module[start:] in self.names]
        for pattern, numbered in self.expressions:
            # `match` with a start position lets a caret match only where the whole name begins.
            if any(pattern.match(module, start) for start in starts):
                found.append(numbered)
        if not found:
            return default
        _, number = min(found)
        return number


def _is_plain_name(pattern: str) -> bool:
    """Return whether a pattern is compared as text; the dot counts as itself, not as a wildcard."""
    return re.fullmatch(r"[\w.-]*", pattern) is not None


def _check_steps(expressions: list[str]) -> None:
    """**Raises:** `WeightsError` if matching a name against all of these may take too long."""
    too_many = len(expressions) > _MOST_EXPRESSIONS
    if not too_many and sum(_most_steps(text) for text in expressions) <= _MOST_STEPS:
        return
    slowest = max(expressions[:_MOST_EXPRESSIONS], key=_most_steps)
    raise WeightsError(
        f"the pattern {printable(slowest, 60)!r} is a regular expression that may take too long. "
        "Write module names instead."
    )


def _most_steps(pattern: str) -> float:
    """Return an upper bound of the steps that matching one name takes.

    Each repetition multiplies the steps by the length of the name, and each group by the number
    of its alternatives. Repeated groups, look-arounds and back-references have no bound here.
    """
    # Escaped characters and character classes match one character each, whatever is in them.
    bare = re.sub(r"\\[^1-9]|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern).replace("(?:", "(")
    unbounded = re.search(r"\)[*+?{]|\(\?|\\", bare)
    if len(pattern) > _LONGEST_EXPRESSION or unbounded:
        return math.inf
    steps = _ASSUMED_NAME_LENGTH ** len(re.findall(r"[*+?{]", bare))
    # The numbers of alternatives of the groups that are open; the first is the whole pattern.
    alternatives = [1]
    for character in bare:
        if character == "(":
            alternatives.append(1)
        elif character == "|":
            alternatives[-1] += 1
        elif character == ")" and len(alternatives) > 1:
            steps *= alternatives.pop()
    return steps * math.prod(alternatives)


def _compile_expression(pattern: str) -> re.Pattern:
    """Return an expression that matches up to the end of a name."""
    try:
        return re.compile(f"(?:{pattern})\\Z")
    except (re.error, OverflowError, RecursionError) as error:
        raise WeightsError(
            f"the pattern {printable(pattern, 60)!r} is not a valid regular expression."
        ) from error
