"""`moe-gpu completion`: a shell's script, made from the commands themselves; it runs nothing while one types."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from moe_gpu.cli.options import one_of

SHELLS = ("bash", "zsh", "fish")


@dataclass
class Words:
    """What may follow a command: its subcommands, and its options with what each takes.

    options: a tuple of choices, `None` for a file or any other value, `()` for a flag.
    """

    path: tuple[str, ...]
    help: str = ""
    subcommands: list[str] = field(default_factory=list)
    options: dict[str, tuple[str, ...] | None] = field(default_factory=dict)


def commands_of(app: typer.Typer, path: tuple[str, ...] = (), text: str = "") -> Iterator[Words]:
    """Every command of an app, the app itself first."""
    own = Words(path, text, options={"--help": ()} if path else {"--help": (), "--version": ()})
    inner: list[Words] = []
    for command in app.registered_commands:
        assert command.callback is not None, "a command is a function"
        name = command.name or command.callback.__name__.replace("_", "-")
        own.subcommands.append(name)
        said = (command.callback.__doc__ or "").strip().splitlines()[0]
        inner.append(Words((*path, name), said, options={**_options(command.callback), "--help": ()}))
    for group in app.registered_groups:
        assert group.typer_instance is not None, "a group is an app"
        assert group.name is not None, "a group is added by name"
        own.subcommands.append(group.name)
        callback = group.typer_instance.registered_callback
        said = (callback.callback.__doc__ if callback and callback.callback else "") or ""
        inner += commands_of(group.typer_instance, (*path, group.name), said.strip())
    yield own
    yield from inner


def _options(function: Callable[..., Any]) -> dict[str, tuple[str, ...] | None]:
    found: dict[str, tuple[str, ...] | None] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        for option in getattr(parameter.annotation, "__metadata__", ()):
            kind = get_args(parameter.annotation)[0]
            choices = getattr(option.parser or option.callback, "choices", ()) or None
            named = [option.default, *(option.param_decls or ())]  # typer takes the first for a default
            flags = [flag for name in named if isinstance(name, str) for flag in name.split("/")]
            for flag in flags:
                if flag.startswith("-"):
                    found[flag] = () if kind is bool else choices
    return found


def bash_script(commands: list[Words]) -> str:
    """A function for bash's `complete`; where it has no words, bash offers files."""
    paths = "|".join(f'"{" ".join(("", *one.path))}"' for one in commands if one.path)
    lines = [
        "_moe_gpu() {",
        '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" path="" words="" word i',
        "  for ((i = 1; i < COMP_CWORD; i++)); do",
        '    word="${COMP_WORDS[i]}"',
        f'    case "$path $word" in {paths}) path="$path $word" ;; esac',
        "  done",
        '  case "$path $prev" in',
    ]
    for one in commands:
        for flag, choices in one.options.items():
            if choices != ():
                label = " ".join(("", *one.path, flag))
                lines.append(f'    "{label}") words={shlex.quote(" ".join(choices or ()))} ;;')
    lines += ["    *)", '      case "$path" in']
    for one in commands:
        words = " ".join([*one.subcommands, *one.options])
        lines.append(f'        "{" ".join(("", *one.path)) if one.path else ""}") words={shlex.quote(words)} ;;')
    lines += [
        "      esac",
        '      [[ $cur != -* ]] && words=" $words" && words="${words// -*/}" ;;',
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "$cur")) || COMPREPLY=()',
        "  return 0",
        "}",
        "complete -o default -F _moe_gpu moe-gpu",
    ]
    return "\n".join(lines) + "\n"


def fish_script(commands: list[Words]) -> str:
    """`complete` lines for fish, one for each word."""
    lines = ["complete -c moe-gpu -e"]
    for one in commands:
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in one.path)
        fresh = f"not __fish_seen_subcommand_from {' '.join(one.subcommands)}" if one.subcommands else ""
        here = shlex.quote("; and ".join(filter(None, (seen, fresh))) or "true")
        for name in one.subcommands:
            said = next(other.help for other in commands if other.path == (*one.path, name))
            lines.append(f"complete -c moe-gpu -f -n {here} -a {name} -d {shlex.quote(said)}")
        for flag, choices in one.options.items():
            takes = "" if choices == () else " -r" if choices is None else f" -x -a {shlex.quote(' '.join(choices))}"
            lines.append(f"complete -c moe-gpu -n {here} -l {flag.removeprefix('--')}{takes}")
    return "\n".join(lines) + "\n"


def script(shell: str) -> str:
    """The completion script of a shell, ready to be sourced."""
    from moe_gpu.cli.commands import app

    commands = list(commands_of(app))
    if shell == "fish":
        return fish_script(commands)
    prefix = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
    return (prefix if shell == "zsh" else "") + bash_script(commands)


def completion(
    shell: Annotated[str, typer.Argument(parser=one_of(*SHELLS), metavar="|".join(SHELLS), help="The shell.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the script here instead of printing it.")
    ] = None,
) -> None:
    """Print the shell's completion script.

    Load it with: eval "$(moe-gpu completion bash)".
    """
    if output is None:
        print(script(shell), end="")
    else:
        output.write_text(script(shell))
