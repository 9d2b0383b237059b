"""`skd --help`, and that of every command: grouped, with examples that the command takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from skd_kfp.pipelines.cli import app
from tests.conftest import Skd


def commands(group: TyperGroup, *names: str) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, *names, name)
        else:
            assert isinstance(command, TyperCommand)
            yield (*names, name), command


SKD = typer.main.get_command(app)
COMMANDS = dict(commands(SKD))  # type: ignore[arg-type]


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_that_it_takes(names: tuple[str, ...]) -> None:
    command = COMMANDS[names]
    examples = re.findall(r"`(skd [^`]+)`", (command.help or "").partition("Example")[2])
    assert examples, f"skd {' '.join(names)} has no example in its help"
    for example in examples:
        words = shlex.split(" ".join(example.split()))[1:]
        assert tuple(words[: len(names)]) == names
        command.make_context(words[0], words[len(names) :])  # raises if an option or an argument is none of its own


def test_commands_are_grouped_by_what_people_want_to_do(skd: Skd) -> None:
    shown = skd("--help").stdout
    groups = ("Train a student", "Look at a model", "Give a model to others", "Look after runs", "Set up")
    places = [shown.index(group) for group in groups]
    assert places == sorted(places)
    for names in COMMANDS:
        assert f" {names[0]} " in shown, names
    assert "Exit codes: 0 done" in shown


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_no_default_is_shown_empty(names: tuple[str, ...]) -> None:
    assert [each.name for each in COMMANDS[names].params if getattr(each, "show_default", None) == ""] == []


@pytest.mark.parametrize(("typed", "meant"), [("evalute", "evaluate"), ("linage", "lineage"), ("pusch", "push")])
def test_a_misspelt_command_is_answered_by_the_right_one(skd: Skd, typed: str, meant: str) -> None:
    done = skd(typed)
    assert done.returncode == 2
    assert f"Did you mean '{meant}'?" in done.stderr


def test_a_misspelt_option_is_answered_by_the_right_one(skd: Skd) -> None:
    done = skd("push", "demo", "me/draft", "--privat")
    assert done.returncode == 2
    assert "--private" in done.stderr


def test_a_shell_completes_commands() -> None:
    asked = {"_SKD_COMPLETE": "complete_bash", "COMP_WORDS": "skd ev", "COMP_CWORD": "1"}
    command = Path(sys.executable).with_name("skd")
    done = subprocess.run([command], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["evaluate"]
