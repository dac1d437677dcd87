"""Judges a configuration before anything starts: what Gin lets pass in silence is an error here.

`check_names` needs the text alone and runs before the library is imported; `check` needs the signatures.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Any
from unittest import mock

import typeguard

from experiments.gin_config import Config, parameters
from experiments.gin_reader import REQUIRED, Macro, Reference, Setting, leaves, map_value, nearest
from llm_jax.errors import UserError


def check_names(settings: Sequence[Setting], root: str) -> None:
    """Settings for another script, macros that no file knows or that are never defined, and required ones not given.

    Args:
      settings: those of all files and flags.
      root: name of the function that runs, without its module.

    Raises:
      UserError: naming the macro and the nearest right one.
    """
    bound = {s.selector.split(".")[-1] for s in settings if not s.is_macro}
    if bound and not difflib.get_close_matches(root, bound, n=1):  # a misspelt one gets its own message later
        raise UserError(f"these settings are not for this script, which runs {root!r}: they are for "
                        f"{', '.join(sorted(bound))}")
    read = {leaf.name: s.where for s in reversed(settings) for leaf in leaves(s.value) if isinstance(leaf, Macro)}
    in_files = {s.macro_name for s in settings if s.is_macro and not s.on_command_line}
    defined = {s.macro_name: s for s in settings if s.is_macro}
    known = in_files | read.keys() - {REQUIRED}
    for setting in settings:
        if setting.is_macro and setting.on_command_line and setting.macro_name not in known:
            raise UserError(f"{setting.where}: no file defines or reads a macro {setting.macro_name!r}"
                            f"{nearest(setting.macro_name, known)}")
    for name, where in read.items():
        if name != REQUIRED and name not in defined:
            raise UserError(f"{where}: macro %{name} is read but never defined{nearest(name, {*defined, REQUIRED})}")
    missing = [s for s in defined.values() if Macro(REQUIRED) in leaves(s.value) and s.macro_name in read]
    if missing:
        flags = " ".join(f"--gin.{s.macro_name}=…" for s in missing)
        raise UserError(f"{missing[0].where}: {' and '.join(s.macro_name for s in missing)} must be given: add {flags}")


def check(config: Config, flags: Collection[str] = ()) -> None:
    """Settings that nothing would read, parameters nobody gives, and values of the wrong type.

    Args:
      config: what the files and flags say.
      flags: the root's parameters that are flags as well.

    Raises:
      UserError: naming the setting, where it stands, and what would be right.
    """
    _check_read(config)
    for scope, target, evaluated in config.walk():
        given = config.settings_of(scope, target)
        for name, settings in given.items():
            _check_type(config, target, name, settings[-1])
        if evaluated:
            supplied = config.supplied if target is config.root else ()
            absent = [n for n, p in parameters(target).items()
                      if n != "**" and p.default is inspect.Parameter.empty and n not in given and n not in supplied]
            if absent:
                what = [f"{target.__qualname__}.{n}" for n in absent]
                if target is config.root and set(absent) <= set(flags):
                    raise UserError(f"{' and '.join(what)} must be given: add {' '.join(f'--{n}=…' for n in absent)}")
                raise UserError(f"{' and '.join(what)} must be given: no Gin file sets it, nor --gin.{what[0]}=…")


def _check_read(config: Config) -> None:
    """A file's setting counts as read also if a later one replaced its reader; a name's last flag must take effect."""
    for effective in (False, True):
        places = list(config.walk(effective))
        targets = {target for _, target, _ in places}
        read: set[str] = set()
        in_effect: set[int] = set()
        for scope, target, _ in places:
            for settings in config.settings_of(scope, target).values():
                for setting in settings[-1:] if effective else settings:
                    in_effect.add(id(setting))
                    read |= {x.name for x, _ in config.read(setting.value, scope, effective) if isinstance(x, Macro)}
        for (_, target, _), settings in config.bindings.items():
            for setting in settings[-1:] if effective else settings:
                if setting.on_command_line == effective and id(setting) not in in_effect:
                    raise UserError(f"{setting.where}: nothing would read it: "
                                    f"{_why_unread(config, setting, target, targets)}")
        for name, settings in config.macro_settings.items():
            for setting in settings[-1:] if effective else settings:
                if setting.on_command_line == effective and name not in read:
                    raise UserError(f"{setting.where}: nothing would read it: no setting in effect reads %{name}"
                                    f"{nearest(name, read - {name, REQUIRED})}")


def _why_unread(config: Config, setting: Setting, target: Any, reached: set[Any]) -> str:
    if target not in reached:
        names = {t.__qualname__ for t in reached}
        return (f"{config.root.__qualname__} reaches no @{target.__qualname__}"
                f"{nearest(target.__qualname__, names)}")
    return f"{target.__qualname__} is never used in scope {setting.scope!r}, or another setting replaces it"


def _check_type(config: Config, target: Any, name: str, setting: Setting) -> None:
    value, where = setting.value, setting.where
    while isinstance(value, Macro) and config.macro(value.name):
        definition = config.macro(value.name)
        assert definition is not None
        value, where = definition.value, definition.where
    value = config.plain(value)
    if Macro(REQUIRED) in leaves(value):
        raise UserError(f"{where}: {target.__qualname__}.{name} must be given: add "
                        f"--gin.{target.__qualname__}.{name}=…")
    annotation = hints(target).get(name, Any)
    if fits(value, annotation):
        return
    shown = _shown(value)
    hint = ""
    if isinstance(value, Reference) and not value.evaluate and fits(_called(value), annotation):
        hint = f"; did you mean {shown}()?"
    elif not isinstance(value, str) and fits("", annotation):
        hint = f"; a string is written \"'{shown}'\"" if setting.on_command_line or where.startswith("--") else \
            f"; a string is written '{shown}'"
    elif isinstance(value, list) and fits(tuple(value), annotation):
        hint = f"; did you mean {_shown(tuple(value))}?"
    raise UserError(f"{where}: {target.__qualname__}.{name} takes {describe(annotation)}, not {shown}"
                    f"{'' if isinstance(value, Reference) else f' ({type(value).__name__})'}{hint}")


def _called(reference: Reference) -> Reference:
    return Reference(reference.scope, reference.selector, True, reference.target)


def _shown(value: Any) -> str:
    def leaf(x: Any) -> Any:
        return _Bare(f"@{x.target.__qualname__}{'()' if x.evaluate else ''}") if isinstance(x, Reference) else x
    return repr(map_value(value, leaf))


class _Bare(str):
    def __repr__(self) -> str:
        return str(self)


def hints(target: Any) -> dict[str, Any]:
    """The annotations of `target`'s parameters; one that cannot be evaluated counts as Any."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except Exception:  # a name imported for type checkers alone
        namespace = {**vars(typing), **getattr(inspect.unwrap(function), "__globals__", {})}
        found = {}
        for name, annotation in getattr(function, "__annotations__", {}).items():
            with contextlib.suppress(Exception):
                found[name] = eval(annotation, namespace) if isinstance(annotation, str) else annotation
        return found


def describe(annotation: Any) -> str:
    """An annotation as it is written in source."""
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", inspect.formatannotation(annotation))


def fits(value: Any, annotation: Any) -> bool:
    """Whether a Gin value may be passed where `annotation` stands.

    As PEP 484 has it an int may stand for a float; unlike there, a bool may not stand for an int.
    """
    if isinstance(annotation, str):  # written in a way that could not be evaluated
        return True
    try:
        with _bools_are_not_numbers():
            typeguard.check_type(map_value(value, _stand_in), annotation,
                                 collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        return False
    except Exception:  # an annotation typeguard cannot read judges nothing
        return True
    return True


def _stand_in(leaf: Any) -> Any:
    """Something of the type that a reference will become; a mock, which fits everywhere, where that is unknown."""
    if isinstance(leaf, Macro):
        return mock.Mock()
    if not isinstance(leaf, Reference):
        return leaf
    if not leaf.evaluate:
        return leaf.target
    made = leaf.target if inspect.isclass(leaf.target) else hints(leaf.target).get("return")
    try:
        return object.__new__(made)
    except TypeError:
        return mock.Mock()


@contextlib.contextmanager
def _bools_are_not_numbers() -> Iterator[None]:
    def check_number(value: Any, origin: Any, args: Any, memo: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float) if origin is float else int):
            if not isinstance(value, mock.Mock):
                raise typeguard.TypeCheckError(f"is not {origin.__name__}")

    def lookup(origin: Any, args: Any, extras: Any) -> Any:
        return check_number if origin in (int, float) else None

    typeguard.checker_lookup_functions.insert(0, lookup)
    try:
        yield
    finally:
        typeguard.checker_lookup_functions.remove(lookup)
