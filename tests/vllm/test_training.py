"""Training with vLLM's samples against training with this project's own."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerCallback

from skd_lib import SKDConfig, SKDTrainer
from skd_lib.config import SamplingParams
from skd_lib.errors import SkdError
from skd_lib.models.files import load_tokenizer
from skd_lib.models.loading import load_model
from skd_lib.models.records import read_record
from skd_lib.sampling.acceptance import top_k
from skd_lib.training.run import TrainResult
from skd_lib.vllm.client import Engine
from skd_lib.vllm.guard import TOKEN_VARIABLE
from skd_lib.vllm.sampler import VllmEngine
from skd_lib.vllm.serve import environment, free_port, started
from tests.training.nursery import Nursery
from tests.training.tiny_task import EOS, run
from tests.vllm.conftest import GAMMA, Pair, served
from tests.vllm.test_rollouts import SAMPLED, SEEDS, rows_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

WARM = SamplingParams(temperature=1.0, top_p=0.9)  # as `tiny_task.run` samples
LORA = {"rank": 4, "alpha": 16}


def by_vllm(pair: Pair, server: Engine, folder: Path, callbacks: Any = (), **options: Any) -> TrainResult:
    student = load_model(pair.folders["student"])
    engine = replace(pair.engine(server, folder / "weights", (WARM, WARM), new=8), student=student, pad_id=EOS)
    return trained(student, engine.head, folder, engine, callbacks=list(callbacks), **options)


def trained(
    student: PreTrainedModel, teacher: PreTrainedModel, folder: Path, engine: VllmEngine | None, **options: Any
) -> TrainResult:
    settings = {"learning_rate": 1e-3, "dropout": 0.0, "max_steps": 20, "eval_steps": 10, **options}
    sources: dict[str, Any] = {} if engine is None else {"signals": engine, "sampler_at": engine.sampler}
    return run(student, teacher, folder / "checkpoints", **sources, **settings)


def losses(result: TrainResult) -> list[float]:
    return [entry[name] for entry in result.history for name in ("loss", "validation_loss") if name in entry]


def largest_difference(one: PreTrainedModel, other: PreTrainedModel) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


class Process:
    """A server that can be killed and started again, at one port."""

    def __init__(self, pair: Pair, log: Path) -> None:
        self.port, self._log, self._stack = free_port(), log.open("a"), ExitStack()
        self._start = lambda: started(served(pair, 16), environment(), self.port, stdout=self._log)
        self.again()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def again(self) -> None:
        self.process = self._stack.enter_context(self._start())

    def end(self) -> None:
        self._stack.close()
        self._log.close()


@contextmanager
def process(pair: Pair, log: Path) -> Iterator[Process]:
    made = Process(pair, log)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def nursery(server: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Processes that train together, and know the server's token."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "log.txt")
    yield nursery
    nursery.close()


@pytest.mark.parametrize(
    ("method", "lora"), [("skd", None), ("skd_mixed", None), ("on_policy", None), ("skd", LORA)], ids=str
)
def test_twenty_steps_are_those_of_the_own_engine(
    pair: Pair, server: Engine, tmp_path: Path, method: str, lora: dict[str, int] | None
) -> None:
    options: dict[str, Any] = {"method": method, "lora": lora, "learning_rate": 1e-2 if lora else 1e-3}
    own = trained(load_model(pair.folders["student"]), pair.teacher, tmp_path / "own", None, **options)
    other = by_vllm(pair, server, tmp_path / "vllm", **options)
    assert losses(other) == pytest.approx(losses(own), rel=1e-3, abs=1e-4)
    assert largest_difference(own.student, other.student) < (2e-2 if lora else 2e-3)
    moved = largest_difference(own.student, load_model(pair.folders["student"]))
    assert moved > 5e-3  # else nothing was trained


def test_tokens_are_those_of_merged_adapters(pair: Pair, server: Engine, tmp_path: Path) -> None:
    """And the adapters stay what they were."""
    student = load_model(pair.folders["student"])
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    prompts = pair.prompts(8)
    engine = replace(pair.engine(server, tmp_path, SAMPLED), student=student)
    got = engine.sampler(top_k(8), 0).sample(prompts, SEEDS[:8])
    assert rows_of(got) == rows_of(
        replace(pair, student=adapted.eval()).own(top_k(8), SAMPLED).sample(prompts, SEEDS[:8])
    )
    assert rows_of(got) != rows_of(pair.own(top_k(8), SAMPLED).sample(prompts, SEEDS[:8]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


@pytest.mark.parametrize("fsdp", [False, True], ids=["whole", "sharded"])
def test_two_processes_train_as_one(pair: Pair, server: Engine, nursery: Nursery, tmp_path: Path, fsdp: bool) -> None:
    """By a method of which one process may have no row to sample in a step."""
    training = {"method": "skd_mixed", "dropout": 0.0, "max_steps": 20, "eval_steps": 10, "learning_rate": 1e-3}
    models = {name: str(folder) for name, folder in pair.folders.items()}
    figures, weights = {}, {}
    for processes in (2, 1):
        out = tmp_path / str(processes)
        options = {**models, "figures": f"{out}.json", "weights": f"{out}.safetensors", "checkpoints": str(out)}
        options |= {"urls": [server.url], "gamma": GAMMA, "training": {**training, "fsdp": fsdp and processes > 1}}
        assert nursery.run(options, processes) == [0] * processes, nursery.log.read_text()
        figures[processes] = json.loads(Path(options["figures"]).read_text())
        weights[processes] = load_file(options["weights"])
    for got, want in zip(figures[2], figures[1], strict=True):
        for figure in want.keys() & {"loss", "validation_loss", "rejection_rate", "response_tokens"}:
            assert got[figure] == pytest.approx(want[figure], rel=1e-3, abs=1e-4), (want["step"], figure)
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[2][name], tensor, rtol=1e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("answered", [True, False], ids=["answers", "prompts"])
def test_a_whole_distillation_by_two_processes_and_a_server_of_their_own(
    pair: Pair, nursery: Nursery, tmp_path: Path, answered: bool
) -> None:
    """Of prompts alone the validation set gets the teacher's answers, from the server too."""
    rows = [json.dumps({"source": f"Add {n} and 1"} | ({"target": str(n + 1)} if answered else {})) for n in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    columns = {} if answered else {"source": "source", "target": ""}
    files = {"source": {"type": "files", "train": [str(tmp_path / "train.jsonl")], "columns": columns}}
    config = {
        **{name: str(folder) for name, folder in pair.folders.items()},
        "data": {**files, "validation_examples": 4, "test_examples": 4},
        "task": {"max_new_tokens": 6, "date": "2026-01-31"},
        "teacher_sft": {"enabled": False},
        "distill": {"engine": "vllm", "training": {"max_steps": 3, "batch_size": 4, "dropout": 0.0}},
    }
    found = {}
    for engine, processes in (("vllm", 2), ("transformers", 1)):
        output = tmp_path / engine
        distill = {**config["distill"], "engine": engine}  # type: ignore[dict-item]
        options = {"config": {**config, "distill": distill}, "output": str(output)}
        assert nursery.run(options, processes) == [0] * processes, nursery.log.read_text()
        found[engine] = read_record(output / "student").figures["best_validation_loss"]
    assert found["vllm"] == pytest.approx(found["transformers"], rel=1e-3)


def test_a_training_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(
    pair: Pair, server: Engine, tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    options = {"max_steps": 8, "eval_steps": 2}
    whole = by_vllm(pair, server, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        by_vllm(pair, server, tmp_path / "stopped", [Stop()], **options)
    resumed = by_vllm(pair, server, tmp_path / "stopped", **options)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)
    assert largest_difference(resumed.student, whole.student) < 1e-4


def test_a_server_that_is_killed_and_started_again_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    """It is gone at the third step and comes back while the training waits."""
    threads: list[threading.Thread] = []

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                only.kill()
                threads.append(threading.Thread(target=again))
                threads[0].start()

    def again() -> None:
        time.sleep(1)
        only.again()

    with process(pair, tmp_path / "log") as only:
        server = Engine(only.url)
        server.wait()
        try:
            with_kill = by_vllm(pair, server, tmp_path / "killed", [Kill()], max_steps=6, eval_steps=6)
        finally:
            for thread in threads:
                thread.join()
        without = by_vllm(pair, server, tmp_path / "quiet", max_steps=6, eval_steps=6)
    assert len(threads) == 1
    assert losses(with_kill) == pytest.approx(losses(without), rel=1e-4)
    assert largest_difference(with_kill.student, without.student) < 1e-4
    assert torch.isfinite(torch.tensor(losses(with_kill))).all()


class Watched(Engine):
    """Counts the tokens of the prompts it is asked to continue, and may be killed at one of them."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: list[int] = []
        self.at: tuple[int, Callable[[], None]] | None = None

    def generate(self, prompt: list[int], params: dict[str, Any], salt: str) -> dict[str, Any]:
        self.asked.append(len(prompt))
        if self.at is not None and len(self.asked) == self.at[0]:
            kill, self.at = self.at[1], None
            kill()
        return super().generate(prompt, params, salt)


def test_two_servers_share_the_rows_and_one_may_be_lost(pair: Pair, server: Engine, tmp_path: Path) -> None:
    prompts = pair.prompts(16)
    want = rows_of(pair.own(top_k(8), SAMPLED).sample(prompts, SEEDS))
    with process(pair, tmp_path / "log") as other:
        pair_of = [Watched(server.url), Watched(other.url)]
        pair_of[1].wait()
        engine = replace(pair.engine(server, tmp_path / "weights", SAMPLED), engines=pair_of)

        def sampled(step: int) -> list[list[int]]:
            for each in pair_of:
                each.asked.clear()
            assert rows_of(engine.sampler(top_k(8), step).sample(prompts, SEEDS)) == want
            return [each.asked for each in pair_of]

        first, second = sampled(0)
        assert len(first) == len(second) == 8
        assert abs(sum(first) - sum(second)) <= max(map(len, prompts))

        pair_of[1].at = (4, other.kill)  # in the middle of a step
        first, second = sampled(1)
        assert len(first) > 8
        assert len(second) >= 4
        assert sampled(2)[1] == []

        other.again()
        pair_of[1].wait()
        assert [len(asked) for asked in sampled(3)] == [8, 8]


ROWS = [{"prompt": f"Add {n} and 1: ", "completion": str(n + 1)} for n in range(8)]


@pytest.mark.parametrize("lora", [False, True])
def test_skd_trainer_trains_as_with_its_own_engine(pair: Pair, server: Engine, tmp_path: Path, lora: bool) -> None:
    """Twice with one trainer: the second training has other weights at its first step."""

    def result(name: str, **options: Any) -> list[float]:
        settings = {"report_to": "none", "use_cpu": True, "learning_rate": 1e-2, "max_new_tokens": 6, "gamma": GAMMA}
        settings |= {"max_steps": 3, "logging_steps": 1, "disable_tqdm": True, "per_device_train_batch_size": 4}
        torch.manual_seed(0)  # of the adapters
        trainer = SKDTrainer(
            model=str(pair.folders["student"]),
            teacher_model=str(pair.folders["teacher"]),
            args=SKDConfig(output_dir=str(tmp_path / name), lr_scheduler_type="constant", **settings, **options),
            train_dataset=ROWS,
            eval_dataset=ROWS[:3],
            processing_class=load_tokenizer(pair.folders["student"]),
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear") if lora else None,
        )
        found = []
        for _ in range(2):
            trainer.train()
            found += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            found.append(trainer.evaluate()["eval_loss"])
        return found

    assert result("vllm", engine="vllm", vllm={"urls": [server.url]}) == pytest.approx(result("own"), rel=1e-3)


@pytest.mark.slow
def test_skd_trainer_starts_a_server_and_ends_it(pair: Pair, tmp_path: Path) -> None:
    args = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "max_steps": 1, "max_new_tokens": 6}
    trainer = SKDTrainer(
        model=str(pair.folders["student"]),
        teacher_model=str(pair.folders["teacher"]),
        args=SKDConfig(**args, max_length=64, engine="vllm"),  # type: ignore[arg-type]
        train_dataset=ROWS,
        processing_class=load_tokenizer(pair.folders["student"]),
    )
    trainer.train()
    assert trainer.engine is not None
    (server,) = trainer.engine.engines
    assert server.answers()
    trainer.close()
    assert not Engine(server.url).answers()


def test_a_server_has_one_training(pair: Pair, server: Engine, tmp_path: Path) -> None:
    prompts = pair.prompts(2)
    first, second = (pair.engine(server, tmp_path, SAMPLED).sampler(top_k(8), 0) for _ in range(2))
    first.sample(prompts, SEEDS[:2])
    second.sample(prompts, SEEDS[:2])
    with pytest.raises(SkdError, match=r"another training has taken this server over(.|\n)*servers of its own"):
        first.sample(prompts, SEEDS[:2])


def test_what_is_wrong_is_said(pair: Pair, server: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = Engine(server.url, wait_s=0.1)
    with pytest.raises(SkdError, match=r"does not see the student's weights(.|\n)*distill.vllm.exchange|mount"):
        hidden.load_student(tmp_path / "elsewhere", "1")
    (tmp_path / "file").write_text("")
    unwritable = pair.engine(server, tmp_path / "file", SAMPLED)
    with pytest.raises(SkdError, match=r"weights cannot be written(.|\n)*distill.vllm.exchange"):
        unwritable.sampler(top_k(8), 0).sample(pair.prompts(1), SEEDS[:1])
    nobody = Engine(f"http://127.0.0.1:{free_port()}", wait_s=0.1)
    with pytest.raises(SkdError, match=r"no vLLM server answers(.|\n)*skd engine start"):
        pair.engine(nobody, tmp_path, SAMPLED).sampler(top_k(8), 0).sample(pair.prompts(1), SEEDS[:1])
    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
    stranger = pair.engine(Engine(server.url), tmp_path, SAMPLED)
    with pytest.raises(SkdError, match=r"answers 401(.|\n)*SKD_ENGINE_TOKEN"):
        stranger.sampler(top_k(8), 0).sample(pair.prompts(1), SEEDS[:1])
