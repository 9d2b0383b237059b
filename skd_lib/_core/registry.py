"""Registries: entries of one kind by name, to which user code can add its own."""

from __future__ import annotations

import difflib
from typing import Protocol, TypeVar

from skd_lib.errors import SkdError


class Described(Protocol):
    """An entry that says in one line what it is."""

    @property
    def text(self) -> str:
        """One line for help texts."""


EntryT = TypeVar("EntryT", bound=Described)


class Registry(dict[str, EntryT]):
    """Entries by name, in the order in which they were added.

    Args:
        kind: Word for an entry in messages, e.g. `method`.
        entries: The entries of the library itself.
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
        return " ".join(f"`{name}`: {entry.text}." for name, entry in self.items())
