"""Registries: entries of one kind by name, to which user code can add its own."""

from __future__ import annotations

import difflib
from functools import cached_property
from importlib import import_module
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from skd_lib.errors import SkdError

EntryT = TypeVar("EntryT")


class Registry(dict[str, EntryT]):
    """Entries by name, in the order in which they were added; `kind` is the word for an entry in messages.

    `str` of an entry is its one line in help texts.
    """

    def __init__(self, kind: str, entries: dict[str, EntryT]) -> None:
        super().__init__(entries)
        self.kind = kind

    def add(self, name: str, entry: EntryT) -> None:
        """Add an entry; configurations may use its name from then on.

        Raises:
            SkdError: the name is taken.
        """
        if name in self:
            raise SkdError(f"there is a {self.kind} `{name}` already", hint="choose another name")
        self[name] = entry

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

    The registry is imported when it is first needed: it belongs to a layer above, and its entries may still be added.

    Args:
        module: Its module.
        name: Its name there.
        title: First sentence of the field's description; the entries' own follow.
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
