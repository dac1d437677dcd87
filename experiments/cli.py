"""How a launch script meets its user: flags, Gin, help, and errors in one line.

A script that takes its settings from Gin is three lines; `root` names the one function it runs, as "module:function":

    def main(argv=None) -> int:
        return cli.gin_main("llm_jax.training.loop:train", ["gin/runs/quickstart.gin"], argv, description=__doc__)

    if __name__ == "__main__":
        sys.exit(cli.run(main))

A script with flags of its own (`--run_dir=…`) gives `flags=True`: every parameter of the root is then a flag too, and
`--gin_file` and `--gin.NAME=VALUE` work beside them. A str takes what is typed as it is, a bool may stand alone, a
tuple[str, ...] may be repeated. Such a root lives in a module that is cheap to import.

So that `python experiments/NAME.py` works like `python -m experiments.NAME`, a script puts the repository on its path
before it imports anything of ours:

    if not __package__:
        sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
"""

from __future__ import annotations

import importlib
import inspect
import os
import pathlib
import re
import select
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from llm_jax.errors import UserError

if TYPE_CHECKING:
    from experiments.gin_reader import Setting

COMMON_FLAGS = ("gin_file", "print_config", "help")
_SIGPIPE = 128 + 13


class Flags(NamedTuple):
    """What a command line says: files and settings for Gin, the root's own flags, and what to do with them."""

    files: list[str]
    settings: list[tuple[str, str]]
    own: list[tuple[str, str | None]]
    print_config: bool
    help: bool


def run(main: Callable[[], int | None]) -> int:
    """Runs a script's `main`; returns the exit status.

    A `UserError` is printed as one line and gives 2, Ctrl-C gives 130; any other exception is a bug and keeps its
    traceback. That nobody reads the output any more (`… | head`) is none: what is told then is nothing, and the status
    is the script's own if it had ended, else what a shell says of a program that SIGPIPE has ended.
    """
    status = _SIGPIPE
    try:
        status = main() or 0
        sys.stdout.flush()  # or the interpreter would find out when nobody can catch it
        return status
    except BrokenPipeError:
        if _is_read(sys.stdout):
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return status
    except UserError as error:
        # Gin adds the calls that led to an error on further lines.
        print(f"error: {str(error).split(chr(10) + '  In call to configurable')[0]}", file=sys.stderr)
        # All is said: what background threads were at when it happened, such as Orbax's readers, would only bury it.
        sys.unraisablehook = lambda _: None
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _is_read(stream: TextIO) -> bool:
    """Whether somebody may still read what was written to `stream`: a pipe without a reader says so when polled."""
    try:
        polled = select.poll()
        polled.register(stream, 0)
    except (OSError, ValueError):  # no file of the system's
        return True
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in polled.poll(0))


def gin_main(root: str, default_files: Sequence[str] = (), argv: Sequence[str] | None = None, *, description: str = "",
             examples: Sequence[str] = (), flags: bool = False, command: str = "") -> int:
    """Reads flags and Gin files, checks them, and calls the root function with what they bind.

    If the root has a parameter `config_text`, it receives the whole configuration as the text of one Gin file, which
    can be given back with `--gin_file`.

    Args:
      root: the function to run, "module:function".
      default_files: Gin files used when no `--gin_file` is given, relative to the repository.
      argv: the arguments; those of this process by default.
      description: what the script does, for `--help`; the first paragraph is shown.
      examples: command lines for `--help`.
      flags: whether the root's parameters are flags as well.
      command: the script's word for the root, where it has several; for `--help`.

    Returns:
      The root's result if it is an int, otherwise 0.

    Raises:
      UserError: a flag, a file or a setting is wrong.
    """
    module_name, _, function_name = root.partition(":")
    arguments = list(sys.argv[1:] if argv is None else argv)
    function = getattr(importlib.import_module(module_name), function_name) if flags else None
    own = _own_flags(function) if function else {}
    parsed = parse(arguments, own, shorthand=bool(default_files))
    files = parsed.files or list(default_files)
    if parsed.help:
        _print_help(root, files, description, examples, own, command)
        return 0
    from experiments import gin_checks, gin_reader
    settings = [setting for file in files for setting in gin_reader.read_file(file)]
    settings += [gin_reader.read_flag(name, text) for name, text in parsed.settings]
    settings += _own_settings(parsed.own, own, root, settings)
    gin_checks.check_names(settings, function_name)

    from experiments import gin_config
    function = function or getattr(importlib.import_module(module_name), function_name)
    supplied = ["config_text"] if "config_text" in gin_config.parameters(function) else []
    config = gin_config.Config(function, settings, supplied)
    gin_checks.check(config, own)
    text = config.text()
    if parsed.print_config:
        print(text, end="")
        return 0
    result = call(config, text)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def call(config: Any, text: str) -> Any:
    """Gives Gin the configuration's text and calls the root with what it binds."""
    import gin
    from absl import flags as absl_flags

    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags and refuse to before they are parsed
    gin.clear_config()
    gin.parse_config(text)
    try:
        function = gin.get_configurable(config.root)
    except ValueError:  # Gin knows only what some setting mentions, and a root without parameters has none
        function = config.root
    return function(**{name: text for name in config.supplied})


def parse(arguments: Sequence[str], own: dict[str, inspect.Parameter] | None = None, shorthand: bool = False) -> Flags:
    """Splits a command line into `Flags`.

    Args:
      own: the flags of this script besides the common ones.
      shorthand: whether `--name=value` may stand for `--gin.NAME=value`.

    Raises:
      UserError: a flag is unknown or lacks its value; the message names the nearest right one.
    """
    own = own or {}
    flags = Flags([], [], [], False, False)
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.partition("=")
        if argument in ("-h", "--help", "--print_config", "--print-config"):
            is_print = "print" in argument
            flags = flags._replace(print_config=flags.print_config or is_print, help=flags.help or not is_print)
            continue
        if not name.startswith("--"):
            raise UserError(f"{argument!r} is not a flag; settings are --gin.NAME=VALUE, files --gin_file PATH")
        name = name[2:] if name.startswith("--gin.") else name[2:].replace("-", "_")
        is_gin = name.startswith("gin.")
        if not (is_gin or name == "gin_file" or name in own or shorthand and name.isidentifier()):
            from experiments.gin_reader import nearest
            raise UserError(f"unknown flag {argument!r}{nearest(name, _spelt([*COMMON_FLAGS, *own]))}")
        if not has_value and name in own and _is_switch(own[name]):
            flags.own.append((name, None))
            continue
        if not has_value:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif is_gin or name == "gin_file" or name in own:
                raise UserError(f"{argument} needs a value: {argument}=VALUE")
        if is_gin:
            flags.settings.append((name.removeprefix("gin."), value))
        elif name == "gin_file":
            flags.files.append(value)
        else:
            flags.own.append((name, value))
    return flags


def _own_flags(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {n: p for n, p in inspect.signature(function, eval_str=True).parameters.items() if n != "config_text"}


def _spelt(names: Sequence[str]) -> list[str]:
    return [f"--{name}" for name in names]


def _is_switch(parameter: inspect.Parameter) -> bool:
    return parameter.annotation is bool


def _own_settings(given: Sequence[tuple[str, str | None]], own: dict[str, inspect.Parameter], root: str,
                  settings: Sequence[Setting]) -> list[Setting]:
    """The root's own flags as settings; without any, `--name=value` is the macro NAME if there is one."""
    from experiments import gin_reader
    found = {}
    macros = {name.lower(): name for name in gin_reader.file_macros(settings)}
    for name, text in given:
        where = f"--{name}" if text is None else f"--{name}={text}"
        if name in own:
            value: Any
            if text is None:
                value = True
            elif own[name].annotation in (str, str | None):
                value = text
            elif own[name].annotation == tuple[str, ...] and text[:1] != "(":
                value = (*(found[name].value if name in found else ()), text)
            else:
                value = gin_reader.read_value(text, where)
            found[name] = gin_reader.Setting("", root.replace(":", "."), name, value, where)
        elif name in macros:
            found[name] = gin_reader.read_flag(macros[name], text or "")
        else:
            raise UserError(f"unknown flag '--{name}'{gin_reader.nearest(name, _spelt([*COMMON_FLAGS, *macros]))}")
    return list(found.values())


def _print_help(root: str, files: Sequence[str], description: str, examples: Sequence[str],
                own: dict[str, inspect.Parameter], command: str = "") -> None:
    """Help from the text of the Gin files and of the root's docstring; imports nothing that takes long."""
    from experiments import gin_reader
    script = pathlib.Path(sys.argv[0]).stem
    program = f"python -m experiments.{script}" if script.isidentifier() and script != "__main__" else "python -m …"
    program += f" {command}" if command else ""
    mine = " ".join(f"--{n}={n.upper()}" for n, p in own.items() if p.default is inspect.Parameter.empty)
    print(f"usage: {program} {mine + ' ' if mine else ''}[--gin_file PATH]... [--gin.NAME=VALUE]... [--print_config]\n")
    if description:
        print(description.strip().split("\n\n")[0] + "\n")
    if own:
        module, _, function = root.partition(":")
        text = getattr(sys.modules[module], function).__doc__ or ""
        docs = {name: " ".join(words.split())
                for _, name, words in re.findall(r"^( {4,8})(\w+): (.*(?:\n\1 {2}.*)*)$", text, re.M)}
        print("flags:")
        for name, parameter in own.items():
            default = f" [{parameter.default!r}]" if parameter.default not in (inspect.Parameter.empty, None) else ""
            print(f"  --{name:<18} {docs.get(name, '')}{default}")
        print()
    print("common flags:\n"
          "  --gin_file PATH      settings from a file; may be repeated, later files win"
          f"{' [' + ' '.join(files) + ']' if files else ''}\n"
          "  --gin.NAME=VALUE     one setting: a macro of the files, or a parameter as Class.parameter\n"
          "  --print_config       print every setting that would be used, check them, and stop\n"
          "  --help               print this and stop")
    settings = [setting for file in files for setting in gin_reader.read_file(file)]
    comments = gin_reader.file_macros(settings)
    if comments:
        values = {s.macro_name: s.value for s in settings if s.is_macro}
        print(f"\nsettings of {' '.join(files)}, each as --gin.NAME=VALUE:")
        for name, comment in comments.items():
            value = values[name]
            text = ("(required)" if value == gin_reader.Macro(gin_reader.REQUIRED) else
                    f"%{value.name}" if isinstance(value, gin_reader.Macro) else repr(value))
            print(f"  {name + ' = ' + text:<42} {comment}".rstrip())
    lines = list(examples) or [program, f"{program} --print_config"]
    print("\nexamples:\n" + "\n".join(f"  {line}" for line in lines))
