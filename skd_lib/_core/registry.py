"""Registries: entries of one kind by name, to which user code can add its own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from functools import cached_property
from importlib import import_module
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from skd_lib.errors import SkdError

EntryT = TypeVar("EntryT")


class Registry(dict[str, EntryT]):
    """Entries by name, in the order in which they were added.

    `str` of an entry is its one line in help texts.

    Args:
        kind: The word for an entry in messages.
        entries: The first ones; the others are of their type.
        section: Section of the configuration that an entry's `settings` are fields of.
        fields: Returns the names of these fields, when an entry is added: the section may be imported later.
    """

    def __init__(
        self, kind: str, entries: dict[str, EntryT], section: str, fields: Callable[[], Collection[str]]
    ) -> None:
        super().__init__(entries)
        self.kind = kind
        self._type = type(next(iter(entries.values())))
        self._section, self._fields = section, fields

    def add(self, name: str, entry: EntryT) -> None:
        """Add an entry; configurations may use its name from then on."""
        if not isinstance(name, str) or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name):
            hint = f"use letters, digits and underscores, as in `{next(iter(self))}`"
            raise SkdError(f"{name!r} cannot be the name of a {self.kind}", hint=hint)
        if name in self:
            raise SkdError(f"there is a {self.kind} `{name}` already", hint="choose another name")
        where = f"{self.kind} `{name}`"
        if not isinstance(entry, self._type):
            what = f"an entry is a {self._type.__name__}, got {type(entry).__name__}"
            raise SkdError(what, where=where, hint=f"wrap it: {self._type.__name__}(...)")
        settings = getattr(entry, "settings", ())
        if isinstance(settings, str):
            raise SkdError(f"`settings` is a tuple of names, got {settings!r}", where=where, hint=f"({settings!r},)")
        fields = self._fields()
        unknown = [setting for setting in settings if setting not in fields]
        if unknown:
            hint = f"`settings` names fields of `{self._section}`: {', '.join(fields)}"
            raise SkdError(f"`{self._section}` has no field {unknown[0]!r}", where=where, hint=hint)
        super().__setitem__(name, entry)

    def __setitem__(self, name: str, entry: EntryT) -> None:
        self.add(name, entry)

    def __missing__(self, name: str) -> EntryT:
        similar = difflib.get_close_matches(name, self, n=1)
        guess = f"did you mean `{similar[0]}`? " if similar else ""
        raise SkdError(f"unknown {self.kind} {name!r}", hint=f"{guess}one of {', '.join(f'`{one}`' for one in self)}")

    @property
    def text(self) -> str:
        """All names with their one-line descriptions, for help texts."""
        return " ".join(f"`{name}`: {entry}." for name, entry in self.items())


class NameIn:
    """A name of a registry's entry, as the annotation of a field.

    The registry, `name` in `module`, is imported when it is first needed: it belongs to a layer above, and its entries
    may still be added. `title` is the first sentence of the field's description; the entries' own follow.
    """

    def __init__(self, module: str, name: str, title: str) -> None:
        self._module, self._name, self._title = module, name, title

    @cached_property
    def registry(self) -> Registry[Any]:
        """The registry."""
        registry: Registry[Any] = getattr(import_module(self._module), self._name)
        return registry

    @property
    def description(self) -> str:
        """The field's description."""
        return f"{self._title} {self.registry.text}"

    def check(self, name: str) -> str:
        """Return a name that the registry has.

        Raises:
            ValueError: it does not have it.
        """
        try:
            self.registry[name]
        except SkdError as error:
            raise ValueError(f"{error.what}: {error.hint}") from error
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"enum": list(self.registry), "description": self.description}
