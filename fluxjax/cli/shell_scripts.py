"""Completion scripts of bash, zsh and fish, written of what can be completed."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class CompletedOption(NamedTuple):
    """An option: its names, whether a value follows, the values that are known, whether the value
    is a path, and a few words of help."""

    names: tuple[str, ...]
    takes_value: bool
    values: tuple[str, ...]
    is_file: bool
    help: str


class CompletedCommand(NamedTuple):
    """What follows the words that choose a command.

    `names`: words that may follow, as those of actions, with their help. `options`: of the command.
    """

    words: str
    names: Mapping[str, str]
    options: Sequence[CompletedOption]


_FIND_COMMAND = """\
    local command="" word
    for word in {words}; do
        case "$command $word" in
            {known}) command="${{command:+$command }}$word" ;;
        esac
    done
"""


def _patterns(commands: Sequence[CompletedCommand]) -> list[str]:
    """Return the words of each command, with those that choose the one above before a space."""
    found = []
    for command in commands:
        above, _, last = command.words.rpartition(" ")
        if last:
            found.append(f"{above} {last}")
    return found


def _find_command(commands: Sequence[CompletedCommand], words: str) -> str:
    """Return the lines, of bash and zsh, that find which command a line is of."""
    known = "|".join(f'"{pattern}"' for pattern in _patterns(commands))
    return _FIND_COMMAND.format(words=words, known=known)


def _cases(
    commands: Sequence[CompletedCommand],
    write_values: Callable[[CompletedOption], str],
    write_rest: Callable[[CompletedCommand], str],
) -> str:
    """Return the cases, of bash and zsh, of all commands: values of an option that is before the
    cursor, else what may follow."""
    lines = []
    for command in commands:
        lines.append(f'        "{command.words}")')
        lines.append('            case "$before" in')
        for option in command.options:
            if option.takes_value:
                lines.append(f"                {'|'.join(option.names)}) {write_values(option)} ;;")
        lines.append("            esac")
        lines.append(f"            {write_rest(command)} ;;")
    return "\n".join(lines)


def bash_script(commands: Sequence[CompletedCommand]) -> str:
    """Return the script of bash, which completes file names where nothing else is known."""

    def reply(words: Sequence[str]) -> str:
        return f'COMPREPLY=($(compgen -W {shlex.quote(" ".join(words))} -- "$current"))'

    def values(option: CompletedOption) -> str:
        return f"{reply(option.values)}; return" if option.values else "return"

    def rest(command: CompletedCommand) -> str:
        names = [name for option in command.options for name in option.names]
        after = f"{reply(names)}"
        if command.names:
            return f"if [[ $current == -* ]]; then {after}; else {reply([*command.names])}; fi"
        return f"if [[ $current == -* ]]; then {after}; fi"

    return f"""\
_fluxjax() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    COMPREPLY=()
    # bash breaks --name=value at the equals sign.
    if [[ $current == "=" ]]; then
        current=""
    elif [[ $before == "=" ]]; then
        before="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
{_find_command(commands, '"${COMP_WORDS[@]:1:COMP_CWORD-1}"')}\
    case "$command" in
{_cases(commands, values, rest)}
    esac
}}
complete -o bashdefault -o default -F _fluxjax fluxjax
"""


def zsh_script(commands: Sequence[CompletedCommand]) -> str:
    """Return the script of zsh: a file `_fluxjax` in a folder of `fpath`."""

    def described(entries: Mapping[str, str]) -> str:
        words = []
        for name, text in entries.items():
            words.append(shlex.quote(f"{name}:{text}" if text else name))
        return " ".join(words)

    def values(option: CompletedOption) -> str:
        if option.values:
            return f"compadd -- {shlex.join(option.values)}; return"
        return (
            "_files; return" if option.is_file else f"_message {shlex.quote(option.help)}; return"
        )

    def rest(command: CompletedCommand) -> str:
        options = {name: option.help for option in command.options for name in option.names}
        after = f"found=({described(options)}); _describe -o option found"
        names = f"found=({described(command.names)}); _describe command found"
        return (
            f"if [[ $PREFIX == -* ]]; then {after}; else {names if command.names else '_files'}; fi"
        )

    return f"""\
#compdef fluxjax
_fluxjax() {{
    local before="${{words[CURRENT-1]}}"
    local -a found
{_find_command(commands, '"${(@)words[2,CURRENT-1]}"')}\
    case "$command" in
{_cases(commands, values, rest)}
    esac
}}
if [ "$funcstack[1]" = "_fluxjax" ]; then
    _fluxjax "$@"
else
    compdef _fluxjax fluxjax
fi
"""


def fish_script(commands: Sequence[CompletedCommand]) -> str:
    """Return the script of fish."""
    cases = " ".join(f'"{pattern}"' for pattern in _patterns(commands))
    lines = [
        "function __fluxjax_is",
        '    set -l command ""',
        "    for word in (commandline -opc)[2..-1]",
        '        switch "$command $word"',
        f"            case {cases}",
        '                set command (string trim "$command $word")',
        "        end",
        "    end",
        '    test "$command" = "$argv[1]"',
        "end",
    ]
    for command in commands:
        start = f"complete -c fluxjax -n '__fluxjax_is \"{command.words}\"'"
        for name, text in command.names.items():
            lines.append(f"{start} -f -a {_fish_text(name)} -d {_fish_text(text)}")
        for option in command.options:
            lines.append(f"{start} {_fish_option(option)}")
    return "\n".join(lines) + "\n"


def _fish_option(option: CompletedOption) -> str:
    """Return the part of fish's `complete` that describes an option."""
    words = []
    for name in option.names:
        kind = "-l" if name.startswith("--") else "-s"
        words += [kind, name.lstrip("-")]
    if option.takes_value:
        words.append("-r")
    if option.values:
        words += ["-f", "-a", _fish_text(" ".join(option.values))]
    elif option.takes_value and not option.is_file:
        words.append("-f")
    return " ".join([*words, "-d", _fish_text(option.help)])


def _fish_text(text: str) -> str:
    """Return a text in single quotes, in which fish has other escapes than other shells."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


WRITERS: Mapping[str, Callable[[Sequence[CompletedCommand]], str]] = {
    "bash": bash_script,
    "zsh": zsh_script,
    "fish": fish_script,
}
