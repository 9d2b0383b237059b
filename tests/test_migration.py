"""The page for those who come from TRL or from the paper's code: what it says is there."""

from __future__ import annotations

import re

import pytest
import yaml

from skd_lib import SKDConfig
from skd_lib.config import RunConfig, parse_section
from skd_lib.distillation.methods import METHODS
from tests.conftest import ROOT

PAGE = (ROOT / "docs/guides/migration.md").read_text(encoding="utf-8")


def test_the_file_in_place_of_the_papers_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    config = parse_section(RunConfig, yaml.safe_load(block), where="docs/guides/migration.md")
    assert config.distill.sampling.teacher.temperature == 0.2
    assert config.task.max_prompt_tokens == 1024


def test_the_methods_of_the_papers_code_are_all_there() -> None:
    rows = re.findall(r"^\| `kd_type: ([\w-]+)`.*?`method: (\w+)`", PAGE, flags=re.MULTILINE)
    assert {theirs for theirs, _ in rows} == {
        *("skd", "supervised_kd", "on-policy", "mixed", "mixed_train", "mixed_skd", "seq_kd")
    }
    assert {ours for _, ours in rows} <= METHODS.keys()


@pytest.mark.parametrize("name", ["packing", "dataset_text_field", "dataset_kwargs"])
def test_what_is_said_to_be_refused_is(name: str) -> None:
    assert f"`{name}`" in PAGE
    with pytest.raises(Exception, match=f"SKDConfig, {name}"):
        SKDConfig(output_dir="x", **{name: True})
