"""A teacher that is asked once, before training, and is not needed after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from skd_lib.config import DistillConfig
from skd_lib.data.tokenize import TokenizedExample
from skd_lib.distillation.divergences import forward_kl
from skd_lib.distillation.rollouts import RowKey, rollout_for
from skd_lib.errors import SkdError
from skd_lib.training.checkpoints import MARKER
from skd_lib.training.stored_teacher import StoredSignals, examples_digest, store_responses, store_signals
from tests.training.tiny_task import FirstGradients, examples, run

ALL = [*examples(30, seed=0), *examples(9, seed=1)]
VOCABULARY = 64


@pytest.fixture
def teacher(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(seed=2, vocab_size=72, hidden=48)


def store(folder: Path, teacher: PreTrainedModel, k: int, temperature: float = 1.0, **options: int) -> StoredSignals:
    return store_signals(
        folder,
        lambda: teacher,
        ALL,  # type: ignore[arg-type]
        k=k,
        temperature=temperature,
        vocabulary=VOCABULARY,
        rows=4,
        pad_id=0,
        **options,
    )


def test_training_from_all_tokens_equals_training_beside_the_teacher(
    teacher: PreTrainedModel, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    gradients, losses = [], []
    for signals in (None, store(tmp_path / "signals", teacher, VOCABULARY, temperature=1.5)):
        first = FirstGradients()
        result = run(
            tiny_model(seed=1, vocab_size=VOCABULARY),
            None if signals else teacher,
            tmp_path / ("stored" if signals else "online"),
            method="supervised_kd",
            signals=signals,
            callbacks=[first],
            distill={"temperature": 1.5, "divergence": "jsd", "selective": {}},
            max_steps=3,
            micro_batch_size=2,
        )
        gradients.append(first.gradients)
        losses.append([entry.get("loss", entry.get("validation_loss")) for entry in result.history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


def test_a_few_tokens_are_enough_to_learn_from(
    teacher: PreTrainedModel, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    def first_loss(signals: StoredSignals | None, name: str) -> float:
        student = tiny_model(seed=1, vocab_size=VOCABULARY)
        options = {"method": "supervised_kd", "signals": signals, "max_steps": 12, "eval_steps": 4}
        result = run(student, None if signals else teacher, tmp_path / name, **options)  # type: ignore[arg-type]
        assert result.best_validation_loss < 0.9 * result.first_validation_loss
        return result.first_validation_loss

    few, more = (first_loss(store(tmp_path / f"top{k}", teacher, k), f"run{k}") for k in (4, 32))
    assert few < more < first_loss(None, "online") * (1 + 1e-6)


def test_each_example_gets_its_own_signal(teacher: PreTrainedModel, tmp_path: Path) -> None:
    signals = store(tmp_path / "signals", teacher, k=5, temperature=2.0, shard_positions=20)  # several files
    assert len(list((tmp_path / "signals").glob("*/*.safetensors"))) > 2
    for example in ALL:
        tokens = torch.tensor([example.prompt_ids + example.response_ids])
        start = len(example.prompt_ids) - 1
        logits = teacher(tokens).logits[0, start:-1, :VOCABULARY] / 2.0
        expected, ids = logits.log_softmax(-1).topk(5)
        signal = signals.along(example)  # type: ignore[arg-type]
        torch.testing.assert_close(signal.log_p_NE[:, :5], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(signal.ids_NK.long(), ids)
        rest = 1 - expected.exp().sum(-1)
        torch.testing.assert_close(signal.log_p_NE[:, 5].exp(), rest, rtol=1e-3, atol=1e-5)
        assert forward_kl(*signal.compare(logits * 2.0, 2.0)[:2]).abs().max() < 1e-4
    with pytest.raises(SkdError, match=r"does not have this example(.|\n)*made again"):
        signals.along(TokenizedExample([1, 2], [3], "of another data set"))


def test_the_teacher_is_asked_once_unless_it_was_interrupted(teacher: PreTrainedModel, tmp_path: Path) -> None:
    loaded: list[int] = []

    def load() -> PreTrainedModel:
        loaded.append(1)
        return teacher

    def ask() -> None:
        store_signals(tmp_path / "s", load, ALL[:5], k=3, temperature=1.0, vocabulary=64, rows=2, pad_id=0)  # type: ignore[arg-type]

    ask()
    ask()
    assert len(loaded) == 1
    (marker,) = (tmp_path / "s").glob(f"*/{MARKER}")
    assert json.loads(marker.read_text()) == {"temperature": 1.0, "vocabulary": 64}
    marker.unlink()
    ask()
    assert len(loaded) == 2
    assert len(list((tmp_path / "s").glob("*/*.safetensors"))) == 1  # the interrupted attempt's are gone


def test_two_trainings_may_ask_the_teacher_at_once(
    teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: list[StoredSignals | None] = []

    def another_begins(tensors: dict[str, torch.Tensor], file: Path) -> None:
        save_file(tensors, file)
        if not inner:
            inner.append(None)
            inner.append(store(tmp_path / "s", teacher, k=3))

    monkeypatch.setattr("skd_lib.training.stored_teacher.save_file", another_begins)
    outer = store(tmp_path / "s", teacher, k=3)
    for signals in (outer, inner[1]):
        assert signals is not None
        assert len(signals.along(ALL[0])) == len(ALL[0].response_ids)
    assert len(list((tmp_path / "s").glob(f"*/{MARKER}"))) == 2


def test_the_teachers_responses_are_sampled_once(
    teacher: PreTrainedModel, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    student = tiny_model(seed=1, vocab_size=VOCABULARY)
    made: list[int] = []

    def strategy():  # type: ignore[no-untyped-def]
        made.append(1)
        options = {"steps": 1, "seed": 3, "eos_ids": (2,), "pad_id": 0, "max_new_tokens": 6}
        return rollout_for("seqkd", student=student, teacher=teacher, distill=DistillConfig(), **options)  # type: ignore[arg-type]

    written = [
        store_responses(tmp_path / name, strategy, ALL, rows=rows)  # type: ignore[arg-type]
        for name, rows in (("a", 4), ("a", 4), ("b", 7))
    ]
    assert len(made) == 2
    assert written[0] == written[1] == written[2]
    assert [example.prompt_ids for example in written[0]] == [example.prompt_ids for example in ALL]
    direct = strategy()([ALL[4]], [RowKey(0, 4)])
    assert written[0][4].response_ids == direct.targets_N.tolist()
    assert examples_digest(written[0]) != examples_digest(ALL)  # type: ignore[arg-type]
