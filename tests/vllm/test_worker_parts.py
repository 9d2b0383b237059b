"""Parts of vLLM's worker that need no vLLM: what is refused, and the rounds of rows in slots."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skd_lib.config import SamplingParams
from skd_lib.errors import SkdError
from skd_lib.sampling.acceptance import min_prob, top_k
from skd_lib.sampling.engine import Sampler
from skd_lib.vllm.head import load_head
from skd_lib.vllm.rollouts import Rollouts
from skd_lib.vllm.settings import RolloutSettings, refusal, unpacked
from tests.conftest import SaveTinyModel, TinyModel

SAMPLED = (SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(temperature=0.7, top_p=0.95))
GAMMA, NEW, SLOTS = 3, 12, 5


def config(*, v2: bool = False, **changed: Any) -> Any:
    """Return what vLLM's configuration says for a server as `skd engine start` starts it, but for some settings."""
    plain = {
        "speculative.method": "draft_model",
        "speculative.use_heterogeneous_vocab": False,
        "speculative.parallel_drafting": False,
        "parallel.data_parallel_size": 1,
        "parallel.pipeline_parallel_size": 1,
        "parallel.prefill_context_parallel_size": 1,
        "parallel.enable_batch_sharded_sampling": None,
        "scheduler.async_scheduling": False,
    }
    sections: dict[str, dict[str, Any]] = {}
    for name, value in {**plain, **{name.replace("__", "."): value for name, value in changed.items()}}.items():
        section, attribute = name.split(".")
        sections.setdefault(f"{section}_config", {})[attribute] = value
    parts = {name: SimpleNamespace(**values) for name, values in sections.items()}
    return SimpleNamespace(use_v2_model_runner=v2, **parts)


both_runners = pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])


@both_runners
@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.1"])
def test_a_server_as_it_is_started_here_is_served(version: str, v2: bool) -> None:
    assert refusal(version, config(v2=v2)) is None


@both_runners
@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.3.20", "1.0", "dev"])
def test_other_versions_are_refused_by_name(version: str, v2: bool) -> None:
    assert f"vLLM is {version}, and only 0.32.x" in str(refusal(version, config(v2=v2)))


def test_asynchronous_scheduling_needs_model_runner_v2() -> None:
    asynchronous = {"scheduler__async_scheduling": True}
    assert "--no-async-scheduling" in str(refusal("0.32.0", config(**asynchronous)))
    assert refusal("0.32.0", config(v2=True, **asynchronous)) is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"speculative__method": "eagle"}, "by the method eagle"),
        ({"speculative__use_heterogeneous_vocab": True}, "use_heterogeneous_vocab"),
        ({"speculative__parallel_drafting": True}, "parallel_drafting"),
        ({"parallel__data_parallel_size": 2}, "start several servers"),
        ({"parallel__pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"parallel__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"parallel__enable_batch_sharded_sampling": True}, "--enable-batch-sharded-sampling"),
    ],
)
@both_runners
def test_settings_that_cannot_be_served_are_named(changed: dict[str, Any], named: str, v2: bool) -> None:
    assert named in str(refusal("0.32.0", config(v2=v2, **changed)))


def test_a_server_without_a_draft_is_refused() -> None:
    without = config()
    without.speculative_config = None
    assert "no --speculative-config" in str(refusal("0.32.0", without))


def runner(hidden: int, device: str = "cpu") -> Any:
    """Return what `Rollouts` asks vLLM's model runner for."""
    model = SimpleNamespace(get_hidden_size=lambda: hidden, dtype=torch.float32)
    return SimpleNamespace(device=torch.device(device), max_num_reqs=SLOTS, model_config=model)


class Played:
    """Rounds as vLLM plays them: whole sequences, without a cache."""

    def __init__(self, student: Any, teacher: Any, settings: RolloutSettings, *, keeps: bool = True) -> None:
        self.student, self.teacher = student, teacher
        self.rollouts = Rollouts(runner(teacher.config.hidden_size), keeps=keeps)
        self.rollouts.begin(settings, NEW + GAMMA + 1)
        self.sequences: dict[int, list[int]] = {}

    def add(self, slot: int, prompt: list[int], seed: int, tokens: list[int] | None = None) -> None:
        asked = {"key": f"row {seed}", "seed": seed, "last": prompt[-1], "length": NEW + GAMMA + 1}
        self.rollouts.add(slot, asked, len(prompt) - 1)
        self.sequences[slot] = tokens or prompt[:-1]

    def round(self, slots: list[int], gamma: int = GAMMA) -> None:
        """Draft and verify; with `gamma` 0 the teacher's sampler alone is asked, as after reading a prompt."""
        slot_B, drafts = torch.tensor(slots), torch.empty(len(slots), 0, dtype=torch.long)
        for step in range(gamma):
            logits_BV = torch.stack([self.logits(self.student, i, drafts[b])[-1] for b, i in enumerate(slots)])
            position_B = torch.tensor([len(self.sequences[i]) + step for i in slots])
            drafts = torch.cat([drafts, self.rollouts.drafts(logits_BV, slot_B, position_B).unsqueeze(1)], dim=1)
        rows, states = [], []
        for b, slot in enumerate(slots):
            logits_TV, states_TH = self.logits(self.teacher, slot, drafts[b], states=True)
            rows.append(logits_TV[-gamma - 1 :])
            states.append(states_TH[-gamma - 1 :])
        self.rollouts.states_MH = torch.cat(states)
        tokens_BS, kept_B = self.rollouts.verify(
            torch.cat(rows),
            drafts,
            first_B=torch.arange(len(slots)) * (gamma + 1),
            slot_B=slot_B,
            position_B=torch.tensor([len(self.sequences[i]) for i in slots]),
            reading_B=torch.zeros(len(slots), dtype=torch.bool),
        )
        for b, slot in enumerate(slots):
            self.sequences[slot] = [*self.sequences[slot], *tokens_BS[b, : kept_B[b]].tolist()]

    def logits(self, model: Any, slot: int, drafts: Tensor, states: bool = False) -> Any:
        ids = torch.tensor([[*self.sequences[slot], *drafts.tolist()]])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        return (out.logits[0], out.hidden_states[-1][0]) if states else out.logits[0]


@pytest.mark.parametrize("rule", [top_k(0), top_k(4), top_k(64), min_prob(0.02)], ids=lambda rule: rule.name)
def test_rounds_in_slots_are_those_of_the_own_engine(tiny_model: TinyModel, rule: Any) -> None:
    """One row is alone, one waits, and one goes on in another slot after vLLM took its own away."""
    student, teacher = tiny_model(seed=1).eval(), tiny_model(seed=2).eval()
    prompts, seeds = [[5, 6, 7], [9, 8], [11, 12, 13, 14]], [31, 32, 33]
    own = Sampler(
        student,
        teacher,
        rule,
        eos_ids=(),
        pad_id=0,
        max_new_tokens=NEW,
        gamma=GAMMA,
        student_params=SAMPLED[0],
        teacher_params=SAMPLED[1],
        keep_teacher_states=True,
    )
    want = own.sample(prompts, seeds)
    name, number = rule.name.partition("(")[0], rule.numbers[0]
    settings = RolloutSettings(
        rule=name, value=number, student=SAMPLED[0], teacher=SAMPLED[1], vocabulary=320, signal="states"
    )
    played = Played(student, teacher, settings)
    slots = [4, 0, 2]
    for slot, prompt, seed in zip(slots, prompts, seeds, strict=True):
        played.add(slot, prompt, seed)
        played.round([slot], gamma=0)
        assert played.sequences[slot] == prompt  # the held-back token came first
    played.round([4])
    played.add(1, prompts[0], seeds[0], played.sequences[4])
    played.add(4, [3, 4], 99)  # another row takes its slot
    slots[0] = 1
    for _ in range(NEW):
        going = [s for s, p in zip(slots, prompts, strict=True) if len(played.sequences[s]) < len(p) + NEW]
        if not going:
            break
        played.round(going)
    taken = played.rollouts.take({f"row {seed}": NEW for seed in seeds})
    for index, seed in enumerate(seeds):
        note = taken[f"row {seed}"]
        assert note["tokens"] == want.tokens_BT[index].tolist()
        assert note["by_teacher"] == want.source_BT[index].bool().tolist()
        assert note["proposals"] == want.proposals_BT[index].tolist()
        assert want.teacher_states_BTH is not None
        assert torch.allclose(unpacked(*note["states"]), want.teacher_states_BTH[index], atol=1e-4)


def test_other_ranks_sample_the_same_and_note_nothing(tiny_model: TinyModel) -> None:
    student, teacher = tiny_model(seed=1).eval(), tiny_model(seed=2).eval()
    settings = RolloutSettings(rule="top_k", value=4, vocabulary=320, signal="states")
    both = [Played(student, teacher, settings, keeps=keeps) for keeps in (True, False)]
    for played in both:
        played.add(0, [5, 6, 7], 31)
        played.round([0], gamma=0)
        for _ in range(3):
            played.round([0])
    assert both[0].sequences == both[1].sequences
    assert both[0].rollouts.take({"row 31": 3})["row 31"]["tokens"] == both[0].sequences[0][3:6]
    assert both[1].rollouts.take({"row 31": 3}) == {"row 31": {}}


def test_another_client_may_have_longer_responses_and_another_signal(tiny_model: TinyModel) -> None:
    teacher = tiny_model(seed=2).eval()
    played = Played(tiny_model(seed=1).eval(), teacher, RolloutSettings(value=4, vocabulary=320, signal="states"))
    played.add(0, [5, 6, 7], 31)
    settings = RolloutSettings(value=4, vocabulary=320, signal="top_k", top_k=6)
    played.rollouts.begin(settings, 40)
    played.add(0, [5, 6, 7], 31)
    played.round([0], gamma=0)
    played.round([0])
    note = played.rollouts.take({"row 31": 1})["row 31"]
    assert set(note) == {"tokens", "by_teacher", "proposals", "log_p", "ids"}
    assert [unpacked(*note[name]).shape for name in ("log_p", "ids")] == [(1, 7), (1, 6)]


@pytest.mark.parametrize("signal", ["none", "states", "top_k"])
def test_a_round_asks_the_device_for_no_value(signal: Any) -> None:
    """On the meta device, which has none to give; as on a GPU, such a question would stop the host."""
    settings = RolloutSettings(value=4, student=SAMPLED[0], teacher=SAMPLED[1], vocabulary=320, signal=signal, top_k=6)
    rollouts = Rollouts(runner(16, "meta"))
    rollouts.begin(settings, NEW)
    rollouts.add(0, {"key": "row", "seed": 3, "last": 5, "length": NEW}, 4)
    with torch.device("meta"):
        rows_B, logits_LV = torch.arange(3), torch.zeros(12, 320)
        rollouts.states_MH = torch.zeros(12, 16)
        drafts_B = rollouts.drafts(logits_LV[:3], rows_B, rows_B)
        tokens_BS, kept_B = rollouts.verify(
            logits_LV,
            drafts_B.unsqueeze(1).expand(3, GAMMA),
            first_B=rows_B,
            slot_B=rows_B,
            position_B=rows_B,
            reading_B=rows_B > 1,
        )
    assert (tokens_BS.shape, kept_B.shape) == ((3, GAMMA + 1), (3,))
    with pytest.raises(NotImplementedError, match="meta"):
        kept_B.tolist()


def test_a_quantized_head_is_refused(save_tiny_model: SaveTinyModel, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(SkdError, match=r"head is quantized: model.embed_tokens.weight is float8(.|\n)*transformers"):
        load_head(folder, dtype=torch.float32)
