"""What a set of settings means: names resolved to functions and classes, later settings over earlier ones, and the
configuration written out again as one Gin file.

That file is both what `--print_config` shows and what Gin is given, so the `config.gin` of a run directory is exactly
what ran.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import keyword
import math
import pkgutil
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.gin_reader import Macro, Reference, Setting, leaves, map_value, nearest, shown
from llm_jax.errors import UserError

Key = tuple[str, Any, str]  # scope, target, parameter


def full_name(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


@functools.cache
def parameters(target: Any) -> dict[str, inspect.Parameter]:
    """The parameters that can be bound by name, and "**" if any name can."""
    found = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found["**"] = parameter
        elif parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            found[name] = parameter
    return found


class Config:
    """A linked configuration.

    Attributes:
      root: the function that runs.
      supplied: names of the root's parameters that the launcher passes itself.
      macro_settings, bindings: every definition of each macro and every setting of each parameter, the last in effect.
    """

    def __init__(self, root: Any, settings: Sequence[Setting], supplied: Sequence[str] = ()):
        self.root = root
        self.supplied = tuple(supplied)
        self.macro_settings: dict[str, list[Setting]] = {}
        self.bindings: dict[Key, list[Setting]] = {}
        self._names: dict[str, Any] = {full_name(root): root}
        for setting in sorted(settings, key=lambda s: s.on_command_line):  # files first: they give the names
            value = map_value(setting.value, functools.partial(self._link, setting=setting))
            linked = Setting(setting.scope, setting.selector, setting.parameter, value, setting.where, setting.imports)
            if setting.is_macro:
                self.macro_settings.setdefault(setting.macro_name, []).append(linked)
                continue
            target = self._resolve(setting.selector, setting)
            known = parameters(target)
            if setting.parameter not in known and "**" not in known:
                raise UserError(f"{setting.where}: {target.__qualname__} has no parameter {setting.parameter!r}"
                                f"{nearest(setting.parameter, known)}")
            if target is root and setting.parameter in self.supplied:
                raise UserError(f"{setting.where}: {target.__qualname__}.{setting.parameter} is set by the launcher")
            self.bindings.setdefault((setting.scope, target, setting.parameter), []).append(linked)

    def _link(self, leaf: Any, setting: Setting) -> Any:
        if not isinstance(leaf, Reference):
            return leaf
        return Reference(leaf.scope, leaf.selector, leaf.evaluate, self._resolve(leaf.selector, setting))

    def _resolve(self, selector: str, setting: Setting) -> Any:
        if setting.imports is None:
            return self._resolve_short(selector, setting.where)
        target, name = resolve(selector, setting.imports, setting.where)
        self._names[full_name(target)] = target
        self._names[name] = target
        return target

    def _resolve_short(self, selector: str, where: str) -> Any:
        """The class or function that the files call `selector`, from however many of its last parts are given."""
        matches = {n: t for n, t in self._names.items() if n == selector or n.endswith("." + selector)}
        if not matches:
            raise UserError(f"{where}: no file of this configuration mentions {selector!r}"
                            f"{nearest(selector, {t.__qualname__ for t in self._names.values()})}")
        if len(set(matches.values())) > 1:
            raise UserError(f"{where}: {selector!r} could be {' or '.join(sorted(matches))}: write more of the name")
        return next(iter(matches.values()))

    def macro(self, name: str) -> Setting | None:
        """The definition of macro `name` that is in effect."""
        settings = self.macro_settings.get(name)
        return settings[-1] if settings else None

    def settings_of(self, scope: str, target: Any) -> dict[str, list[Setting]]:
        """The settings of `target` under `scope` by parameter; the last of each list is in effect."""
        parts = scope.split("/") if scope else []
        found: dict[str, list[Setting]] = {}
        for depth in range(len(parts) + 1):
            prefix = "/".join(parts[:depth])
            for (s, t, parameter), settings in self.bindings.items():
                if s == prefix and t is target:
                    found.setdefault(parameter, []).extend(settings)
        return found

    def walk(self, effective: bool = True) -> Iterator[tuple[str, Any, bool]]:
        """Every (scope, target, evaluated) that the root reaches through references, the root first.

        Args:
          effective: follow what is in effect; otherwise also what later settings replaced.
        """
        seen: set[tuple[str, Any, bool]] = set()
        waiting: list[tuple[str, Any, bool]] = [("", self.root, True)]
        while waiting:
            place = waiting.pop(0)
            if place in seen:
                continue
            seen.add(place)
            yield place
            scope, target, _ = place
            found = self.settings_of(scope, target)
            known = list(parameters(target))  # the order of the signature, so that what is printed is printed again
            for name in sorted(found, key=lambda name: known.index(name) if name in known else len(known)):
                settings = found[name]
                for setting in settings[-1:] if effective else settings:
                    for leaf, inner in self.read(setting.value, scope, effective):
                        if isinstance(leaf, Reference):
                            waiting.append((leaf.scope or inner, leaf.target, leaf.evaluate))

    def read(self, value: Any, scope: str = "", effective: bool = True,
             inside: tuple[str, ...] = ()) -> Iterator[tuple[Any, str]]:
        """The leaves of `value` with the scope each is evaluated in, and those of the macros it reads.

        Raises:
          UserError: a macro's value leads back to itself.
        """
        for leaf in leaves(value):
            yield leaf, scope
            if isinstance(leaf, Macro) and leaf.name in self.macro_settings:
                if leaf.name in inside:
                    raise UserError(f"{self.macro_settings[leaf.name][-1].where}: macro {leaf.name} reads itself")
                settings = self.macro_settings[leaf.name]
                for setting in settings[-1:] if effective else settings:
                    yield from self.read(setting.value, leaf.name, effective, (*inside, leaf.name))

    def plain(self, value: Any) -> Any:
        """`value` with macros replaced by what they stand for; an undefined one stays."""
        def leaf(x: Any) -> Any:
            definition = self.macro(x.name) if isinstance(x, Macro) else None
            return self.plain(definition.value) if definition else x
        return map_value(value, leaf)

    def text(self) -> str:
        """The configuration in effect as one Gin file, the defaults of what the root reaches included."""
        places = list(dict.fromkeys((scope, target) for scope, target, _ in self.walk()))
        evaluated = {target for _, target, is_evaluated in self.walk() if is_evaluated}
        targets = list(dict.fromkeys(target for _, target in places))
        names, imports = _import_lines(targets)
        blocks, used = [], dict.fromkeys(self.macro_settings, False)
        for scope, target in dict.fromkeys(self._scopes_of(places)):
            lines = []
            for name in parameters(target):
                settings = self.bindings.get((scope, target, name))
                if settings:
                    lines.append(f"  {name} = {_text(settings[-1].value, names)}")
                elif not scope and target in evaluated and name != "**":
                    lines += self._default_line(target, name)
            lines += [f"  {p} = {_text(settings[-1].value, names)}" for (s, t, p), settings in self.bindings.items()
                      if s == scope and t is target and p not in parameters(target)]
            if any(not line.startswith("  #") for line in lines):
                lines.insert(0, f"{scope + '/' if scope else ''}{names[target]}:")
            if lines:
                blocks.append("\n".join(lines))
            for (s, t, _), settings in self.bindings.items():
                if s == scope and t is target:
                    used.update({x.name: True for x, _ in self.read(settings[-1].value) if isinstance(x, Macro)})
        macros = [f"{name} = {_text(self.macro_settings[name][-1].value, names)}" for name, is_used in used.items()
                  if is_used and name in self.macro_settings]
        parts = ["\n".join(["from __gin__ import dynamic_registration", *imports]), "\n".join(macros), *blocks]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _scopes_of(self, places: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for scope, target in places:
            parts = scope.split("/") if scope else []
            yield from (("/".join(parts[:depth]), target) for depth in range(len(parts) + 1))

    def _default_line(self, target: Any, name: str) -> list[str]:
        default = parameters(target)[name].default
        if default is inspect.Parameter.empty or (target is self.root and name in self.supplied):
            return []
        if _is_literal(default):
            return [f"  {name} = {_text(default, {})}"]
        return [f"  # {name}: {' '.join(repr(default).split())} by default"]


def resolve(selector: str, imports: Sequence[Any], where: str) -> tuple[Any, str]:
    """The class or function that `selector` means in a file with these imports, and its name from the package's top.

    Raises:
      UserError: a module or a name in it does not exist; the message names the nearest one.
    """
    head, *rest = selector.split(".")
    bound: dict[str, types.ModuleType] = {}
    for statement in imports:
        if not statement.module.startswith("__gin__."):
            module = _import(statement.module, f"{shown(statement.location.filename)}:{statement.location.line_num}")
            is_whole = statement.is_from or statement.alias
            bound[statement.bound_name()] = module if is_whole else importlib.import_module(statement.bound_name())
    if head not in bound:
        raise UserError(f"{where}: {head!r} in {selector!r} is not imported by this file{nearest(head, bound)}")
    place: Any = bound[head]
    name = place.__name__
    for part in rest:
        if not hasattr(place, part):
            raise UserError(f"{where}: {name} has no {part!r}{nearest(part, _public(place))}")
        place = getattr(place, part)
        name += "." + part
    if not callable(place) or not hasattr(place, "__qualname__"):
        raise UserError(f"{where}: {selector!r} is neither a class nor a function")
    return place, name


def _public(place: Any) -> list[str]:
    names = [n for n in dir(place) if not n.startswith("_")]
    return [n for n in names if callable(getattr(place, n))] or names


def _import(module: str, where: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module != missing and not module.startswith(missing + "."):
            raise UserError(f"{where}: importing {module} needs {missing!r}, which is not installed") from error
        parent, _, last = missing.rpartition(".")
        if parent:
            folder = importlib.import_module(parent)
            known = [m.name for m in pkgutil.iter_modules(getattr(folder, "__path__", []))]
            hint = f" ({parent}.{last} is not a module: import {parent} and write {parent}.{last})"
            near = hint if hasattr(folder, last) else nearest(last, known)
        else:
            near = nearest(last, ["llm_jax", "experiments", "serving"])
        raise UserError(f"{where}: there is no module {missing!r}{near}") from error


def _import_lines(targets: Sequence[Any]) -> tuple[dict[Any, str], list[str]]:
    """A name for each target and the import statements that make the names mean it."""
    names: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    lines = []
    for target in targets:
        module = target.__module__
        if module not in aliases:
            parent, _, last = module.rpartition(".")
            alias, n = last, 2
            while alias in aliases.values() or alias == "gin" or keyword.iskeyword(alias):
                alias, n = f"{last}_{n}", n + 1
            aliases[module] = alias
            start = f"from {parent} import {last}" if parent else f"import {last}"
            lines.append(start if alias == last else f"{start} as {alias}")
        names[target] = f"{aliases[module]}.{target.__qualname__}"
    return names, sorted(lines)


def _is_literal(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_literal, value))
    if isinstance(value, dict):
        return type(value) is dict and all(_is_literal(x) for item in value.items() for x in item)
    return value is None or type(value) in (bool, int, str)


def _text(value: Any, names: dict[Any, str]) -> str:
    """`value` in Gin's syntax."""
    inner: Callable[[Any], str] = functools.partial(_text, names=names)
    if isinstance(value, Macro):
        return f"%{value.name}"
    if isinstance(value, Reference):
        scope = f"{value.scope}/" if value.scope else ""
        return f"@{scope}{names[value.target]}{'()' if value.evaluate else ''}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{inner(k)}: {inner(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inner, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(inner, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)
