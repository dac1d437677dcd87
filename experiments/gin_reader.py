"""Reads Gin files and command-line settings as data, without importing anything they name.

Gin itself resolves names while it reads, so its errors come late and far from their cause. Here a file becomes a list
of `Setting`s that remember where they were written; `gin_config.py` gives the names their meaning, `gin_checks.py`
judges the result, and only a configuration that passed reaches Gin.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import re
import tokenize
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gin import config_parser

from llm_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
REQUIRED = "gin.REQUIRED"
NAME = re.compile(r"(?:[A-Za-z_]\w*/)*[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME` inside a value."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/selector()` inside a value; `target` is the class or function meant, once `gin_config.py` has looked."""

    scope: str
    selector: str
    evaluate: bool
    target: Any = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """One line `scope/selector.parameter = value`; a macro's definition has its name as selector and no parameter.

    Attributes:
      where: "file:line", or the flag as it was typed.
      imports: the import statements above it in its file; None on the command line.
    """

    scope: str
    selector: str
    parameter: str
    value: Any
    where: str
    imports: tuple[config_parser.ImportStatement, ...] | None = None

    @property
    def is_macro(self) -> bool:
        return not self.parameter

    @property
    def macro_name(self) -> str:
        return f"{self.scope}/{self.selector}" if self.scope else self.selector

    @property
    def on_command_line(self) -> bool:
        return self.imports is None


class _Delegate(config_parser.ParserDelegate):
    """Keeps references and macros as data instead of looking them up."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        *scopes, selector = scoped_configurable_name.split("/")
        return Reference("/".join(scopes), selector, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name most like `name`, or all of them if none is like it."""
    names = sorted(set(known))
    by_lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {by_lower[close[0]]!r}?"
    return f"; known: {', '.join(names[:12])}{' …' if len(names) > 12 else ''}" if names else ""


def map_value(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """`value` with `leaf` applied to everything that is not a list, tuple or dict."""
    if isinstance(value, dict):
        return {map_value(k, leaf): map_value(v, leaf) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_value(v, leaf) for v in value)
    return leaf(value)


def leaves(value: Any) -> list[Any]:
    """Everything inside `value` that is not a list, tuple or dict."""
    found: list[Any] = []
    map_value(value, lambda leaf: found.append(leaf))
    return found


def shown(path: pathlib.Path | str) -> str:
    """`path` as a person would type it: relative to the working directory or the repository where that is shorter."""
    if "://" in str(path):
        return str(path)
    path = pathlib.Path(path).absolute()
    for base in (pathlib.Path.cwd(), ROOT):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)


def find_file(name: str, bases: Sequence[pathlib.Path], where: str) -> str:
    """The path of Gin file `name`, looked for under each of `bases` in turn.

    Raises:
      UserError: there is none; the message names the nearest file that exists.
    """
    if "://" in name:
        return name
    for base in bases:
        path = base / os.path.expanduser(name)
        if path.is_file():
            return str(path)
        if path.is_dir():
            raise UserError(f"{where}: {name!r} is a directory{_nearest_file(name)}")
    raise UserError(f"{where}: there is no file {name!r}{_nearest_file(name)}")


def _nearest_file(name: str) -> str:
    files = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "gin").rglob("*.gin"))]
    if not files:
        return ""
    wanted = pathlib.PurePath(name).stem

    def likeness(path: str) -> tuple[float, float]:
        stem = difflib.SequenceMatcher(None, wanted, pathlib.PurePath(path).stem).ratio()
        return stem, difflib.SequenceMatcher(None, name, path).ratio()

    return f"; did you mean {max(files, key=likeness)!r}?"


def _open(path: str) -> Any:
    if "://" in path:
        from etils import epath
        return epath.Path(path).open("r")
    return open(path, encoding="utf-8")


def read_file(name: str, where: str = "--gin_file", bases: Sequence[pathlib.Path] | None = None,
              including: tuple[str, ...] = ()) -> list[Setting]:
    """The settings of one Gin file and of the files it includes, in the order Gin applies them.

    Args:
      name: path of the file; a relative one is looked for in the working directory, then in the repository.
      where: what asked for the file, for messages.
      bases: folders to look in instead.
      including: the files whose includes led here.

    Raises:
      UserError: the file is missing, is not valid Gin, or includes itself.
    """
    path = find_file(name, bases or (pathlib.Path.cwd(), ROOT), where)
    if path in including:
        raise UserError(f"{where}: {shown(path)} includes itself")
    imports: tuple[config_parser.ImportStatement, ...] = ()
    settings: list[Setting] = []
    try:
        with _open(path) as stream:
            for statement in config_parser.ConfigParser(stream, _Delegate()):
                here = f"{shown(path)}:{statement.location.line_num}"
                if isinstance(statement, config_parser.BindingStatement):
                    settings.append(Setting(statement.scope, statement.selector, statement.arg_name, statement.value,
                                            here, imports))
                elif isinstance(statement, config_parser.ImportStatement):
                    location = statement.location._replace(filename=path)
                    imports = (*imports, statement._replace(location=location))
                elif isinstance(statement, config_parser.IncludeStatement):
                    folders = (ROOT, pathlib.Path(path).parent, pathlib.Path.cwd())
                    settings += read_file(statement.filename, here, folders, (*including, path))
    except SyntaxError as error:
        raise UserError(f"{shown(path)}:{error.lineno}: {_one_line(error.msg)}") from error
    except tokenize.TokenError as error:
        raise UserError(f"{shown(path)}:{error.args[1][0]}: {error.args[0]}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{where}: cannot read {shown(path)}: {error}") from error
    if imports and imports[0].module != "__gin__.dynamic_registration":
        raise UserError(f"{shown(path)}: its first import must be 'from __gin__ import dynamic_registration'")
    return settings


def read_flag(name: str, text: str) -> Setting:
    """The setting `--gin.NAME=VALUE`.

    A value that is not valid Gin and does not start like a Gin string, container, reference or macro is taken as a
    plain string, so that `--gin.CORPUS=/a/folder` needs no quotes inside quotes.

    Raises:
      UserError: NAME is not a name, or VALUE looks like Gin and is not.
    """
    where = f"--gin.{name}={text}"
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: {name!r} is not a macro (NAME) or a parameter (Class.parameter)")
    scope, selector, parameter = config_parser.parse_binding_key(name)
    return Setting(scope, selector, parameter, read_value(text, where), where)


def read_value(text: str, where: str) -> Any:
    """A value typed in a shell: Gin if it parses as Gin, otherwise the string itself (see `read_flag`)."""
    text = text.strip()
    try:
        if "\n" in text:
            raise SyntaxError("a value is one line")
        statements = list(config_parser.ConfigParser(f"VALUE = {text}\n", _Delegate()))
        return statements[0].value
    except (SyntaxError, tokenize.TokenError) as error:
        if not text or text[0] in "@%[](){}'\"":
            raise UserError(f"{where}: not a Gin value ({_one_line(str(error.args[0]))}); "
                            f"a string with quotes is written --gin.NAME=\"'text'\"") from error
        return text


def _one_line(message: str) -> str:
    return " ".join(message.split())


def file_macros(settings: Sequence[Setting]) -> dict[str, str]:
    """For `--help`: each macro that files define, in order, with the comment at the end of its line (or "")."""
    comments: dict[str, str] = {}
    for setting in settings:
        if setting.is_macro and not setting.on_command_line:
            path, _, line = setting.where.rpartition(":")
            try:
                text = (ROOT / path if not pathlib.Path(path).exists() else pathlib.Path(path)).read_text()
                _, mark, comment = text.splitlines()[int(line) - 1].partition("#")
            except (OSError, ValueError, IndexError):
                comment = ""
            comments[setting.macro_name] = comment.strip() or comments.get(setting.macro_name, "")
    return comments
