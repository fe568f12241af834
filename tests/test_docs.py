"""The documentation: its programs run, its commands parse, and what it names exists."""

import ast
import importlib
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from commands import OPTIONS

import fluxjax
from fluxjax import read_image, sample
from fluxjax.cli.main import build_parser, main
from fluxjax.flow import uniform_times

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {"README.md": ROOT / "README.md"}
"""Each page by its path within docs."""
PAGES |= {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))}
ON_EACH_PAGE = pytest.mark.parametrize("page", PAGES)
FENCE = re.compile(
    r"^(?P<note><!-- not run: .+ -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.S | re.M
)
WRITTEN = {
    "README.md": ["star.png"],
    "sampling.md": ["six.json"],
    "weights.md": ["tiny-own/flux.safetensors", "flux.safetensors", "my-model/fluxjax.json"],
    "recipes/export.md": ["step.bin"],
    "recipes/finetuning.md": ["stripes.safetensors"],
}
"""Files that the programs of a page write, beside the pictures that the page shows."""
FOREIGN = "coming_from.md"
"""Its tables begin with the names of other programs."""
GENERATED = DOCS / "reference" / "command_line.md"
"""A page of the site that `tools/site/hooks.py` makes."""
MAX_COLUMNS = 100
LARGEST_PICTURE = 15_000
"""Bytes of a picture of a recipe."""


HOW_TO = "howto/"
"""Pages whose commands are run too, each block in its turn."""


class Block(NamedTuple):
    """A block of code on a page.

    `line`: where it begins. `runs`: whether the tests can run it.
    """

    kind: str
    text: str
    line: int
    runs: bool


def blocks(page: str, *kinds: str) -> Iterator[Block]:
    text = PAGES[page].read_text()
    for found in FENCE.finditer(text):
        if found["kind"] in kinds:
            line = text.count("\n", 0, found.start("text")) + 1
            yield Block(found["kind"], found["text"], line, found["note"] is None)


def prose(page: str) -> str:
    """Return a page without its blocks of code, and without the names of other programs."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page].read_text(), flags=re.S | re.M)
    if page == FOREIGN:
        text = re.sub(r"^\|[^|]+\|", "| |", text, flags=re.M)
    return text


def pictures(page: str) -> list[str]:
    """Return the names of the pictures that the programs of a recipe draw."""
    if not page.startswith("recipes/"):
        return []
    return re.findall(r"^!\[.+\]\((\w+\.png)\)$", prose(page), re.M)


@ON_EACH_PAGE
def test_the_programs_of_a_page_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    # Users, and optax, leave JAX's promotion of dtypes as it is, in every thread.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    try:
        for block in blocks(page, *(["python", "sh"] if page.startswith(HOW_TO) else ["python"])):
            if block.kind == "sh":
                run_commands(block)
                continue
            # The empty lines give tracebacks the line numbers of the page.
            program = compile("\n" * (block.line - 1) + block.text, str(PAGES[page]), "exec")
            if block.runs:
                exec(program, names)
    finally:
        jax.config.update("jax_numpy_dtype_promotion", "strict")
    for written in [*WRITTEN.get(page, ()), *pictures(page)]:
        assert (tmp_path / written).is_file(), written
    if page == "README.md":
        assert read_image("star.png").shape == (128, 128, 3)


def run_commands(block: Block) -> None:
    for words in commands_of(block):
        assert words[0] == "fluxjax", words
        main(words[1:])


@ON_EACH_PAGE
def test_programs_that_are_not_run_use_names_that_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute):
                check_name(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom):
                check_imports(node)


def check_imports(node: ast.ImportFrom) -> None:
    if node.module.partition(".")[0] == "fluxjax":
        module = importlib.import_module(node.module)
        for alias in node.names:
            assert hasattr(module, alias.name), ast.unparse(node)


@ON_EACH_PAGE
def test_names_in_the_text_of_a_page_exist(page):
    for name in re.findall(r"`(fluxjax(?:\.\w+)+)", prose(page)):
        check_name(name)


def check_name(name: str) -> None:
    """Fail for a dotted name that begins with the package's and that the package does not have."""
    if re.fullmatch(r"fluxjax(\.\w+)+", name) is None or name == "fluxjax.json":
        return
    thing = fluxjax
    path = "fluxjax"
    for part in name.split(".")[1:]:
        path += f".{part}"
        if not hasattr(thing, part):
            importlib.import_module(path)  # a file that nothing has imported yet
        thing = getattr(thing, part)


def commands(page: str) -> Iterator[list[str]]:
    """Yield each command in the blocks of a page, as its words."""
    for block in blocks(page, "sh"):
        yield from commands_of(block)


def commands_of(block: Block) -> Iterator[list[str]]:
    for line in block.text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


@ON_EACH_PAGE
def test_the_command_line_parses_the_commands_of_a_page(page):
    for words in commands(page):
        names = [Path(word).name for word in words]
        # Another program, such as srun, may run it.
        if "fluxjax" in names:
            build_parser().parse_args(words[names.index("fluxjax") + 1 :])


@ON_EACH_PAGE
def test_the_tools_that_a_page_runs_exist(page):
    tools = re.findall(r"`python (tools/[^\s`]+)", prose(page))
    tools += [words[1] for words in commands(page) if words[0] == "python"]
    for tool in tools:
        path = ROOT / tool
        assert path.is_file() or (path / "__main__.py").is_file(), tool


@ON_EACH_PAGE
def test_the_options_that_a_page_names_exist(page):
    options = set().union(*OPTIONS.values())
    for path in ROOT.glob("tools/**/*.py"):
        options |= set(re.findall(r"--[a-z][a-z0-9-]+", path.read_text()))
    for code in re.findall(r"`([^`]+)`", prose(page)):
        if not code.startswith(("LIBTPU", "pip")):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code)) <= options, code


@ON_EACH_PAGE
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, heading = target.partition("#")
        if not path.startswith("https://"):
            file = (PAGES[page].parent / path).resolve() if path else PAGES[page]
            if file == GENERATED:
                continue
            assert file.exists(), target
            assert not heading or heading in anchors(file), target


def anchors(file: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@ON_EACH_PAGE
def test_files_of_the_package_that_a_page_names_exist(page):
    for path in re.findall(r"`((?:fluxjax|tests|tools|weights|docs)/[\w./]*)`", prose(page)):
        assert (ROOT / path).exists(), path


@ON_EACH_PAGE
def test_the_text_of_a_page_is_wrapped(page):
    for line in prose(page).splitlines():
        fits = len(line) <= MAX_COLUMNS
        assert fits or line.startswith(("|", "![", "python3 -m venv")), line


def test_pictures_of_recipes_are_small():
    for picture in (DOCS / "recipes").glob("*.png"):
        assert picture.stat().st_size <= LARGEST_PICTURE, picture.name


def test_the_list_of_recipes_names_each_one():
    recipes = {Path(page).name for page in PAGES if page.startswith("recipes/")} - {"index.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", prose("recipes/index.md"))) == recipes


def test_a_newcomer_can_read_the_readme_in_ten_minutes():
    assert len(PAGES["README.md"].read_text().splitlines()) < 150


def test_the_sampling_pages_custom_integrator_has_its_order():
    program = next(b.text for b in blocks("sampling.md", "python") if "(Step)" in b.text)
    assert program.count("\n") < 25
    names: dict = {}
    exec(program, names)
    # dx/dt = -x over [1, 0] multiplies by e.
    ends = []
    for steps in (8, 16):
        times = uniform_times(steps)
        ends.append(float(sample(lambda x, t: -x, jnp.ones(()), times, step=names["Ralston"]()).x))
    first, second = (abs(end - math.e) for end in ends)
    assert math.log2(first / second) == pytest.approx(2, abs=0.25)
