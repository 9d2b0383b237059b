"""`make mutants` makes mistakes in code that is there."""

from __future__ import annotations

import pytest

from tests.sampling.mutants import MUTANTS, Mutant, text_of


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_has_its_place(mutant: Mutant) -> None:
    assert text_of(mutant).count(mutant.old) == 1
    compile(text_of(mutant).replace(mutant.old, mutant.new), mutant.module, "exec")


def test_no_two_mistakes_are_the_same() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len({(m.module, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)
