"""Registries: what user code adds is checked when it is added."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from skd_lib._core.registry import Registry
from skd_lib.distillation.divergences import DIVERGENCES, DivergenceEntry, forward_kl
from skd_lib.distillation.methods import METHODS, MethodEntry
from skd_lib.errors import SkdError
from skd_lib.sampling.acceptance import RULES, RuleEntry, top_k


@dataclass(frozen=True)
class Entry:
    settings: tuple[str, ...] = ()


@pytest.fixture
def registry() -> Registry[Entry]:
    return Registry("thing", {"first": Entry()}, section="things", fields=lambda: ["size", "colour"])


def test_an_entry_is_added_both_ways(registry: Registry[Entry]) -> None:
    registry.add("second_2", Entry(settings=("size",)))
    registry["third"] = Entry()
    assert list(registry) == ["first", "second_2", "third"]


@pytest.mark.parametrize("name", ["", "a b", "a-b", "a\n", "2", "é", None, 3])
def test_a_name_is_of_letters_digits_and_underscores(registry: Registry[Entry], name: str) -> None:
    with pytest.raises(SkdError, match=f"{re.escape(repr(name))} cannot be the name of a thing"):
        registry.add(name, Entry())


def test_an_entry_is_not_replaced(registry: Registry[Entry]) -> None:
    with pytest.raises(SkdError, match="there is a thing `first` already"):
        registry["first"] = Entry()


def test_an_entry_is_of_the_type_of_the_others(registry: Registry[Entry]) -> None:
    with pytest.raises(SkdError, match="thing `second`: an entry is a Entry, got function"):
        registry.add("second", lambda: None)  # type: ignore[arg-type]
    assert list(registry) == ["first"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("size", "sise"), "thing `second`: `things` has no field 'sise'"),
        ("size", "thing `second`: `settings` is a tuple of names, got 'size'"),
    ],
)
def test_settings_are_fields(registry: Registry[Entry], settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(SkdError, match=message):
        registry.add("second", Entry(settings))
    assert list(registry) == ["first"]


@pytest.mark.parametrize(
    ("registry", "entry", "section"),
    [
        (METHODS, MethodEntry(lambda make: make.ground_truth(), "as `sft`", settings=("gama",)), "distill"),
        (DIVERGENCES, DivergenceEntry(forward_kl, "KL", settings=("gama",)), "distill"),
        (RULES, RuleEntry(top_k, "always", "nothing", settings=("gama",)), "distill.sampling"),
    ],
    ids=["method", "divergence", "rule"],
)
def test_settings_are_fields_of_the_section(registry: Registry[object], entry: object, section: str) -> None:
    with pytest.raises(SkdError, match=f"`{section}` has no field 'gama'"):
        registry.add("another", entry)


@pytest.mark.parametrize("registry", [METHODS, DIVERGENCES, RULES], ids=lambda registry: registry.kind)
def test_first_entries_pass_the_checks(registry: Registry[object]) -> None:
    for entry in list(registry.values()):
        registry.add("another", entry)
        del registry["another"]
