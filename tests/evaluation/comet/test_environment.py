"""COMET's environment, made by pip from a local folder of wheels: with a small package in COMET's place."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from skd_lib.errors import SkdError
from skd_lib.evaluation.comet import environment
from skd_lib.evaluation.comet.environment import COMET, comet_python
from skd_lib.storage.environments import make_environment

CONSTRAINTS = "unbabel-comet==0.0.1\n"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that has but one small package."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "unbabel_comet-0.0.1.dist-info"
    with zipfile.ZipFile(folder / "unbabel_comet-0.0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("comet.py", "SAYS = 'small'\n\ndef say():\n    print(SAYS)\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: unbabel-comet\nVersion: 0.0.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\ncomet-says = comet:say\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_an_environment_is_made_once_and_works(
    wheels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKD_EVENTS", "1")
    python = make_environment(COMET, CONSTRAINTS, tmp_path / "cache")
    said = subprocess.run([python, "-I", "-c", "import comet, sys; print(comet.SAYS, sys.prefix)"], capture_output=True)
    assert said.stdout.decode().split() == ["small", str(python.parents[1])]
    assert subprocess.check_output([python.parent / "comet-says"], text=True) == "small\n"
    first = capfd.readouterr().out
    assert '"what": "installing unbabel-comet==0.0.1", "done": 1, "total": 1' in first
    assert make_environment(COMET, CONSTRAINTS, tmp_path / "cache") == python
    assert capfd.readouterr().out == ""
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [python.parents[1].name]


def test_what_pip_could_not_do_is_said_and_leaves_nothing_behind(wheels: Path, tmp_path: Path) -> None:
    next(wheels.iterdir()).unlink()
    with pytest.raises(SkdError, match=r"pip could not install COMET[\s\S]*No matching distribution[\s\S]*hint: check"):
        make_environment(COMET, CONSTRAINTS, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_container_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(SkdError, match=r"this container has no COMET[\s\S]*the image `comet`"):
        comet_python()


def test_too_new_a_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(SkdError, match=r"COMET needs Python 3\.12 or older"):
        comet_python()


def test_the_pins_are_those_comet_needs() -> None:
    pins = dict(
        line.split("==") for line in environment.CONSTRAINTS.read_text(encoding="utf-8").splitlines() if "==" in line
    )
    assert pins["unbabel-comet"] == "2.2.7"
    for name, limit in {"transformers": 5, "numpy": 2, "protobuf": 5}.items():
        assert int(pins[name].split(".")[0]) < limit, name
