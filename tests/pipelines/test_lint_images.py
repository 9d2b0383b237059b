"""A wrong image is one problem, however many components run in it."""

from __future__ import annotations

from typing import Any

import pytest

from skd_kfp.pipelines.lint import lint


def spec(*images: str) -> dict[str, Any]:
    """One with a component for each image."""
    return {
        "root": {"dag": {}},
        "components": {f"comp-{number}": {"executorLabel": f"exec-{number}"} for number in range(len(images))},
        "deploymentSpec": {
            "executors": {f"exec-{number}": {"container": {"image": image}} for number, image in enumerate(images)}
        },
    }


def test_a_wrong_image_is_one_problem():
    """Commit 9e44b4e: one for each component."""
    assert lint(spec("reg/train", "reg/train", "reg/comet:1", "reg/train")) == [
        "component comp-0: image 'reg/train' has neither version nor digest (and 2 further components)"
    ]
    assert lint(spec("reg/train:latest", "reg/comet")) == [
        "component comp-0: image 'reg/train:latest' has neither version nor digest",
        "component comp-1: image 'reg/comet' has neither version nor digest",
    ]


@pytest.mark.parametrize(
    "image", ["bad image:1", "https://reg/train:1", "reg/Train:1", "reg/train:", "reg/train@sha256:0", ""]
)
def test_what_is_no_image_is_said_to_be_none(image: str):
    (problem,) = lint(spec(image, image))
    assert f"image {image!r} is not the name of an image: REGISTRY/NAME:VERSION or" in problem


@pytest.mark.parametrize(
    "image",
    [
        "skd:1",
        "localhost:5000/skd:1",
        "[::1]:5000/skd:1",
        "europe-docker.pkg.dev/my-project/repo/skd_train:0.1.0-rc.1",
        "REG.example/team/skd@sha256:" + "0" * 64,
        "reg.example/skd:1@sha256:" + "a" * 64,
    ],
)
def test_images_are_taken(image: str):
    assert lint(spec(image)) == []
