"""`import skd_lib`: quick, and with all the names that it promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

import skd_lib


def test_importing_it_loads_nothing_large() -> None:
    code = "import sys, skd_lib; print(sorted({'torch', 'transformers', 'pydantic'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("name", skd_lib.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(skd_lib, name).__name__ == name
    assert getattr(skd_lib, name).__doc__
    assert name in dir(skd_lib)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = skd_lib.Trainer
