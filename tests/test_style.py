"""The measures of the code that the design sets: short lines, bodies and signatures."""

import ast
import re
from pathlib import Path

import fluxjax

PACKAGE = Path(fluxjax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_COLUMNS = 100
MOST_BODY_LINES = 45
MOST_PARAMETERS = 8
# For each 1,000 lines that are not blank.
MOST_ANY = 20
MOST_DENSE = 30
MOST_NODES = 6500
DENSE = (ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(PACKAGE)}: {node.name}", node


def per_thousand_lines(count):
    lines = sum(bool(line.strip()) for path in FILES for line in path.read_text().splitlines())
    return 1000 * count / lines


def test_no_line_is_longer_than_a_hundred_columns():
    long = []
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > MOST_COLUMNS:
                long.append(f"{path.relative_to(PACKAGE)}:{number}")
    assert not long


def test_no_body_is_longer_than_a_screen():
    long = []
    for name, node in functions():
        first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
        if node.end_lineno - first.lineno + 1 > MOST_BODY_LINES:
            long.append(name)
    assert not long


def test_no_function_has_more_than_eight_parameters():
    """Save constructors."""
    wide = []
    for name, node in functions():
        names = [one.arg for one in [*node.args.posonlyargs, *node.args.args]]
        count = len(names) + len(node.args.kwonlyargs) - (names[:1] in (["self"], ["cls"]))
        if count > MOST_PARAMETERS and node.name != "__init__":
            wide.append(name)
    assert not wide


def test_few_types_are_open():
    count = sum(len(re.findall(r"\bAny\b", path.read_text())) for path in FILES)
    assert per_thousand_lines(count) < MOST_ANY


def test_few_expressions_hold_a_loop_or_a_choice():
    trees = [ast.parse(path.read_text()) for path in FILES]
    count = sum(isinstance(node, DENSE) for tree in trees for node in ast.walk(tree))
    assert per_thousand_lines(count) <= MOST_DENSE


def test_lines_are_not_dense():
    count = sum(1 for path in FILES for _ in ast.walk(ast.parse(path.read_text())))
    assert per_thousand_lines(count) <= MOST_NODES
