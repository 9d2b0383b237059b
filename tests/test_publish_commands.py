"""`skd card` and `skd push`, on a finished run with tiny models and a hub in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT, SaveTinyModel, Skd
from tests.support.hub_server import TOKEN, Hub, Repository, serving
from tests.support.local_runs import finished_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    finished_run(folder, "demo", save_tiny_model)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def head_of(card: str) -> dict[str, object]:
    head: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return head


def test_a_card_says_what_the_student_is(skd: Skd, runs: Path) -> None:
    done = skd("card", "demo", "--runs-dir", runs, "--license", "apache-2.0", "--as", "me/draft")
    assert done.returncode == 0, done.stderr
    assert head_of(done.stdout)["license"] == "apache-2.0"
    assert head_of(done.stdout)["base_model"] == "org/student"
    for text in (
        "# draft\n",
        "`org/teacher`, which was fine-tuned on the task first",
        'pipeline("text-generation", model="me/draft")',
        'generate([{"role": "user", "content": "Translate: ...\\n"}]',
        "vllm serve path/to/the/fine-tuned/teacher --speculative-config",
        '"model": "me/draft", "num_speculative_tokens": 4}',
        "| student after | 35.3 [33.3, 37.3] | 64 |",
        "| after | 60.0% | 1.60 |",
        "| Source | /home/someone/train.jsonl |",
        "| top_k | 25 |",
        f"| Weights (sha256) | {'5' * 64} |",
    ):
        assert text in done.stdout, text
    assert "licence follows" not in done.stdout


def test_a_teacher_that_others_can_load_is_named(skd: Skd, tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    finished_run(tmp_path, "untuned", save_tiny_model, tuned=False)
    assert "vllm serve org/teacher --spec" in skd("card", "untuned", "--runs-dir", tmp_path).stdout
    tuned = skd("card", tmp_path / "untuned", "--teacher", "me/teacher", "--output", tmp_path / "card.md")
    assert tuned.stdout.endswith("card.md\n")
    assert "vllm serve me/teacher --spec" in (tmp_path / "card.md").read_text()


def test_a_card_drafts_as_many_tokens_as_were_measured_to_be_fastest(
    skd: Skd, tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    summary = finished_run(tmp_path, "measured", save_tiny_model) / "summary.json"
    figures = json.loads(summary.read_text())
    figures["specdec"]["after"] |= {"gamma": 2, "best_gamma": 3}
    summary.write_text(json.dumps(figures))
    assert '"num_speculative_tokens": 3}' in skd("card", "measured", "--runs-dir", tmp_path).stdout
    figures["specdec"]["after"].pop("best_gamma")  # vLLM is measured with one length
    summary.write_text(json.dumps(figures))
    assert '"num_speculative_tokens": 2}' in skd("card", "measured", "--runs-dir", tmp_path).stdout


def test_a_teachers_card_has_no_figures_of_the_student(skd: Skd, runs: Path) -> None:
    done = skd("card", runs / "demo/teacher")
    assert "fine-tuned on reference answers. It started from `org/teacher`" in done.stdout
    assert "35.3" not in done.stdout


def test_a_push_holds_a_model_that_loads_and_no_example(skd: Skd, runs: Path, hub: Hub, tmp_path: Path) -> None:
    done = skd("push", "demo", "me/draft", "--private", "--runs-dir", runs, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    repository = hub.repositories["me/draft"]
    assert repository.private
    assert repository.messages == ["Upload demo, student"]
    assert {file["name"]: file["bytes"] for file in told["files"]} == {
        name: len(content) for name, content in repository.files.items()
    }
    assert told["url"].startswith(f"{hub.url}/me/draft/commit/")
    assert not [name for name in repository.files if "skd_record" in name or "samples" in name]
    card = repository.files["README.md"].decode()
    assert "/home/someone" not in card
    assert "| Source | train.jsonl |" in card
    pushed = repository.checkout(tmp_path / "pushed")
    loaded = AutoModelForCausalLM.from_pretrained(pushed)
    own = AutoModelForCausalLM.from_pretrained(runs / "demo/student")
    assert all(a.equal(b) for a, b in zip(loaded.parameters(), own.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(pushed).chat_template


def test_a_second_push_replaces_the_first(skd: Skd, runs: Path, hub: Hub) -> None:
    old = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    hub.repositories["me/draft"] = Repository(private=False, files=old)
    assert skd("push", runs / "demo/student", "me/draft", "--public", "-m", "Again").returncode == 0
    files = hub.repositories["me/draft"].files
    assert "model.safetensors" in files
    assert "model-00001-of-00002.safetensors" not in files
    assert files["notes.txt"] == b"mine"
    assert hub.repositories["me/draft"].messages == ["Again"]


def test_a_dry_run_lists_files_and_asks_nobody(skd: Skd, runs: Path, hub: Hub) -> None:
    done = skd("push", "demo", "me/draft", "--public", "--dry-run", "--runs-dir", runs)
    assert "model.safetensors" in done.stdout
    assert "would go to me/draft (public)" in done.stdout
    assert hub.asked == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "me/draft"], "add --private"),
        (["demo", "draft", "--private"], "draft: not the id of a repository"),
        (["demo", "me/a b", "--private"], "me/a b: not the id of a repository"),
        (["nothing", "me/draft", "--private"], "there is no folder nothing"),
        (["demo", "other/draft", "--private"], "other/draft: the token may not write there"),
        (["demo", "me/public", "--private"], "the repository exists and is public, and not --private"),
    ],
)
def test_what_cannot_be_pushed_is_refused(skd: Skd, runs: Path, hub: Hub, arguments: list[str], message: str) -> None:
    hub.repositories["me/public"] = Repository(private=False)
    done = skd("push", *arguments, "--runs-dir", runs)
    assert done.returncode == 2
    assert message in done.stderr
    assert hub.repositories.keys() == {"me/public"}
    assert hub.repositories["me/public"].files == {}


def test_a_token_is_needed_and_has_to_be_the_right_one(
    skd: Skd, runs: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    push = ("push", "demo", "me/draft", "--private", "--runs-dir", runs)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    assert "me/draft: the hub does not accept the token\n  hint: `hf auth login`" in skd(*push).stderr
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "there is no token" in skd(*push).stderr


def test_a_hub_that_is_down_is_named(skd: Skd, runs: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    push = ("push", "demo", "me/draft", "--private", "--runs-dir", runs)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "cannot reach the Hugging Face hub at http://127.0.0.1:1" in skd(*push).stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in skd(*push).stderr


@pytest.mark.parametrize("lost", ["summary.json", "student"])
def test_an_unfinished_run_has_no_card(skd: Skd, tmp_path: Path, save_tiny_model: SaveTinyModel, lost: str) -> None:
    (finished_run(tmp_path, "stopped", save_tiny_model) / lost).unlink()
    for command in (["card", "stopped"], ["push", "stopped", "me/draft", "--private"]):
        done = skd(*command, "--runs-dir", tmp_path)
        assert done.returncode == 2
        assert f"the run has not finished: there is no {lost} in it" in done.stderr


def test_a_model_of_others_has_no_card(skd: Skd, tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    done = skd("card", save_tiny_model(tmp_path / "model"))
    assert done.returncode == 2
    assert "there is no record of its training" in done.stderr


@pytest.mark.slow
def test_the_environment_names_hub_and_token(runs: Path) -> None:
    with serving() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "skd_kfp.pipelines.cli", "push", str(runs / "demo"), "me/draft", "--public"]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" in hub.repositories["me/draft"].files
        assert done.stdout.splitlines()[-1].startswith(f"{hub.url}/me/draft/commit/")
