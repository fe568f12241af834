"""What the documentation site has beside the files of `docs/`: pages made of other files.

Hooks of mkdocs, named in `mkdocs.yml`. Links to files that are no pages are shown as their paths.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from fluxjax.cli.main import build_parser

ROOT = Path(__file__).resolve().parent.parent.parent
_COPIED = {
    "tiny.md": "weights/tiny/README.md",
    "changes.md": "CHANGELOG.md",
    "samples.png": "weights/tiny/samples.png",
    "styles.png": "weights/tiny/loras/styles.png",
    "fill.png": "weights/tiny/loras/fill.png",
    "edges.png": "weights/tiny/loras/edges.png",
    "kontext.png": "weights/tiny/loras/kontext.png",
    "redux.png": "weights/tiny/loras/redux.png",
    "controlnet.png": "weights/tiny/controlnet/controlnet.png",
}
"""Files of the site, and those of the repository that they are."""
_LINK = re.compile(r"\]\((?P<place>[^)#\s:]+)(?P<heading>#[^)\s]*)?\)")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files outside of `docs/`.

    **Raises:** `ValueError` if two files become the same page: mkdocs would keep one of them.
    """
    for name, place in _COPIED.items():
        content: str | bytes = (ROOT / place).read_bytes()
        if name.endswith(".md"):
            content = _FRONT_MATTER.sub("", content.decode())
        files.append(File.generated(config, name, content=content))
    page = "reference/command_line.md"
    files.append(File.generated(config, page, content=command_line_page()))
    sources: dict[str, str] = {}
    for file in files:
        if file.inclusion.is_excluded():
            continue
        other = sources.setdefault(file.dest_uri, file.src_uri)
        if other != file.src_uri:
            raise ValueError(
                f"{other} and {file.src_uri} are both written to {file.dest_uri}. Rename one."
            )
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside of `docs/`, and those of copied pages, to their pages."""
    name = page.file.src_uri
    docs = Path(config.docs_dir)
    folder = (ROOT / _COPIED[name] if name in _COPIED else docs / name).parent

    def replace(found: re.Match) -> str:
        path = (folder / found["place"]).resolve()
        place = path.relative_to(ROOT).as_posix()
        copied = [one for one, source in _COPIED.items() if source == place]
        if copied:
            target = copied[0]
        elif path.is_relative_to(docs):
            target = path.relative_to(docs).as_posix()
        else:
            raise ValueError(
                f"{name} links to {place}, which is no page of the site. Add it to _COPIED in "
                "tools/site/hooks.py, or write its path without a link."
            )
        up = "../" * name.count("/")
        return f"]({up}{target}{found['heading'] or ''})"

    return _LINK.sub(replace, markdown)


def command_line_page() -> str:
    """Return a page with the options of each command."""
    lines = [
        "# Command line",
        "",
        "`fluxjax COMMAND --help` prints what is below. Options may be shortened while they are "
        "unambiguous.",
    ]
    for words, parser in _commands(build_parser(), ["fluxjax"]):
        lines += ["", f"## `{' '.join(words)}`", "", parser.description or ""]
        for group in parser._action_groups:
            lines += _group(group, parser)
    return "\n".join(lines) + "\n"


def _commands(
    parser: argparse.ArgumentParser, words: list[str]
) -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    """Yield each command that has no commands of its own, with the words that choose it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from _commands(child, [*words, name])
            return
    yield words, parser


def _group(group: argparse._ArgumentGroup, parser: argparse.ArgumentParser) -> list[str]:
    shown = [one for one in group._group_actions if one.dest != "help" and one.help]
    if not shown:
        return []
    title = (group.title or "options").capitalize()
    lines = ["", f"**{title}**", "", "| option | what it does |", "| --- | --- |"]
    formatter = parser.formatter_class(parser.prog, width=10_000)
    for action in shown:
        names = formatter._format_action_invocation(action)
        # Repeated for each name of an option: the last one with its value is enough.
        text = formatter._expand_help(action).replace("|", "\\|").replace("<", "&lt;")
        text = text.replace(str(Path.home()), "~")  # defaults name folders of whoever builds
        lines.append(f"| `{names.replace('|', chr(92) + '|')}` | {text} |")
    return lines
