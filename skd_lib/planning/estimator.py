"""Time and memory of a run's steps, from the models' sizes, lengths and what the machine achieves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from skd_lib.config import DistillConfig, RunConfig, Schedule, TrainingConfig
from skd_lib.config._base import ConfigSection
from skd_lib.distillation.methods import METHODS
from skd_lib.planning.machines import GB, Machine
from skd_lib.planning.memory import Estimate, ModelSize, estimates
from skd_lib.planning.work import (
    Pass,
    Rates,
    Terms,
    added,
    forward_terms,
    gather_seconds,
    reduce_seconds,
    times,
    training_terms,
    update_seconds,
)
from skd_lib.sampling.drafting import expected_tokens
from skd_lib.training.plan import plan_steps

MOST_OF_A_PEAK = 1000
"""The largest share: peaks of CPUs are guesses."""
_ANY_GPU = torch.device("meta")


class Assumptions(ConfigSection):
    """What a plan cannot know. Shares are of the machine's peak."""

    teacher_rows: int = Field(10_000, ge=1, description="Training examples of the teacher.")
    train_rows: int = Field(10_000, ge=1, description="Training examples of the student.")
    validation_rows: int = Field(200, ge=0, description="Validation examples.")
    test_rows: int = Field(500, ge=0, description="Test examples.")
    prompt_tokens: float = Field(256, gt=0, description="Mean prompt.")
    response_tokens: float = Field(128, gt=0, description="Mean response.")
    longest_tokens: float = Field(256, gt=0, description="Longest response of a batch, on average.")
    acceptance: float = Field(0.8, ge=0, le=1, description="Drafted tokens that the teacher keeps in `skd`.")
    draft_acceptance: float = Field(0.6, ge=0, le=1, description="The same in speculative decoding.")
    inference_share: float = Field(0.5, gt=0, le=MOST_OF_A_PEAK, description="Arithmetic achieved in forward passes.")
    training_share: float = Field(0.4, gt=0, le=MOST_OF_A_PEAK, description="Arithmetic achieved in training.")
    bandwidth_share: float = Field(0.6, gt=0, le=MOST_OF_A_PEAK, description="Memory bandwidth achieved.")
    update_share: float = Field(0.6, gt=0, le=MOST_OF_A_PEAK, description="The same by the optimiser.")
    link_share: float = Field(0.7, gt=0, le=MOST_OF_A_PEAK, description="Bandwidth achieved between devices.")
    layer_seconds: float = Field(1e-5, ge=0, description="A layer's time beside that: launches.")
    draw_seconds: float = Field(0, ge=0, description="A sampled token's time beside forward passes.")
    servers: int = Field(0, ge=0, description="vLLM servers; 0: as many as the run names.")
    send_gbytes: float = Field(1.0, gt=0, description="GB/s of the student's weights from a machine to vLLM servers.")
    start_seconds: float = Field(90, ge=0, description="A step's start: imports, loading, saving.")

    def rates(self, machine: Machine) -> Rates:
        """Return what a device achieves."""
        return Rates(
            inference=self.inference_share * machine.flops,
            training=self.training_share * machine.flops,
            bandwidth=self.bandwidth_share * machine.bandwidth,
            update=self.update_share * machine.bandwidth,
            layer=self.layer_seconds,
            link=self.link_share * machine.link,
            network=self.link_share * machine.network,
            element=machine.element,
        )


@dataclass(frozen=True)
class Part:
    """A part of an optimiser step of `distill`, in seconds by what they go into."""

    name: str
    terms: Terms

    @property
    def seconds(self) -> float:
        """Return the sum."""
        return sum(self.terms.values())

    @property
    def bound(self) -> str:
        """Return what most of it goes into."""
        return max(self.terms, key=lambda name: self.terms[name])


class Estimator:
    """Time and memory of the steps of one run on one machine."""

    def __init__(self, config: RunConfig, machine: Machine, assumptions: Assumptions, rates: Rates) -> None:
        self.config, self.machine, self.assumed, self.rates = config, machine, assumptions, rates
        distill = config.distill
        self.method = METHODS[distill.method]
        self.stored = self.method.storable and distill.teacher_signal.mode == "stored"
        served = distill.engine == "vllm" and self.method.needs_teacher and not self.stored
        self.split = distill.vllm.tensor_parallel
        pods = distill.vllm.pods.count if distill.vllm.pods else 1
        self.server_count = (assumptions.servers or len(distill.vllm.urls) or pods) if served else 0
        # On one device server and training take turns.
        self.servers = self.server_count * self.split if machine.devices > self.server_count * self.split else 0
        self.trainers = min(machine.devices - self.servers, distill.training.batch_size)

    @property
    def length(self) -> float:
        """Tokens of a prompt with its response."""
        return self.assumed.prompt_tokens + self.assumed.response_tokens

    def sft(self, training: TrainingConfig, size: ModelSize, devices: int, examples: int) -> float:
        """Return the seconds of supervised fine-tuning."""
        steps = plan_steps(training, examples, processes=1).steps
        step = added(self._gradient(training, size, devices), self._update(training, size, devices))
        validations = steps / training.eval_steps + 1
        return steps * sum(step.values()) + validations * self._validation([size], devices) + self.assumed.start_seconds

    def distill_step(self, teacher: ModelSize, student: ModelSize) -> list[Part]:
        """Return the parts of an optimiser step."""
        distill, devices = self.config.distill, self.trainers
        training = distill.training
        rows = training.batch_size / devices
        share = _sampled_share(distill)
        parts: list[Part] = []
        if self.server_count:
            # Each machine brings them to its share of the servers.
            turns = -(-self.server_count // max(1, devices // self.machine.per_node))
            sent = self.rates.element * student.parameters / (self.assumed.send_gbytes * GB)
            parts.append(Part("weights", {"link": turns * sent}))
        if (self.method.student_writes or self.method.teacher_writes) and not self.stored:
            served = self.server_count > 0
            together = training.batch_size / self.server_count if served else rows
            sampling = times(share, self._sampling(teacher, student, together, split=self.split if served else 1))
            if training.fsdp and devices > 1 and not served:
                whole = student.parameters + (teacher.parameters if self.method.needs_teacher else 0)
                sampling["link"] += self._gather(whole, devices)
            parts.append(Part("sampling", sampling))
        # What was verified while sampling is the loss's signal.
        unasked = 1 - share if self.method.teacher_writes else 1.0
        if self.method.uses_divergence and not self.stored and unasked:
            signal = forward_terms(teacher, self._whole(rows * unasked), self.rates, split=1)
            parts.append(Part("teacher", signal))
        loss = self._gradient(training, student, devices)
        if self.method.uses_divergence:
            heads = rows * self.assumed.response_tokens * 2 * teacher.vocabulary * teacher.hidden
            loss["arithmetic"] += heads / self.rates.inference
        parts.append(Part("loss", loss))
        parts.append(Part("optimiser", self._update(training, student, devices)))
        if training.eval_steps:
            validation = self._validation([student], devices) / training.eval_steps
            parts.append(Part("validation", {"arithmetic": validation}))
        return parts

    def distill(self, parts: list[Part], teacher: ModelSize) -> float:
        """Return the seconds of the whole distillation."""
        training, assumed = self.config.distill.training, self.assumed
        steps = plan_steps(training, assumed.train_rows, processes=1).steps
        once = self._validation([teacher], self.trainers) if self.method.uses_divergence else 0.0
        if self.stored:
            batch = training.batch_size
            asked = (
                self.generation(teacher, batch)
                if self.method.teacher_writes
                else sum(forward_terms(teacher, self._whole(batch), self.rates).values())
            )
            once += assumed.train_rows / batch * asked
        return steps * sum(part.seconds for part in parts) + once + assumed.start_seconds

    def generation(self, size: ModelSize, rows: float) -> float:
        """Return the seconds in which a model answers some prompts together."""
        prefill = forward_terms(size, self._prefill(rows), self.rates)
        decoding = forward_terms(size, self._decoding(rows, 1, 1), self.rates)
        return sum(added(prefill, times(self._steps(rows), decoding)).values())

    def specdec(self, teacher: ModelSize, student: ModelSize) -> float:
        """Return the seconds of the benchmark of drafts, of the student before and after training."""
        asked, assumed = self.config.specdec, self.assumed
        every = sorted({*asked.gammas, asked.gamma})
        gammas = {"all": every, "best": every[: -(-len(every) // 2)], "none": [asked.gamma]}[asked.sweep]
        prompts = min(asked.examples, assumed.test_rows)
        total = 0.0
        for rows in asked.batch_sizes:
            if rows > prompts:
                continue
            alone = self.generation(teacher, rows) + 2 * self.generation(student, rows)
            drafted = sum(self._drafted(teacher, student, rows, gamma) for gamma in gammas)
            total += len(asked.temperatures) * asked.repeats * prompts / rows * (alone + 2 * drafted)
        return total + assumed.start_seconds

    def memory(self, teacher: ModelSize, student: ModelSize) -> dict[str, float]:
        """Return the bytes that each training step takes on a device."""
        config, gpu = self.config, self.machine.kind != "cpu"
        sections: dict[str, Any] = {
            "teacher_sft": config.teacher_sft,
            "student_init": config.student_init,
            "distill": config.distill,
        }
        changed = {}
        for name, section in sections.items():
            devices = self.trainers if name == "distill" else min(self.machine.devices, section.training.batch_size)
            update: dict[str, Any] = {"batch_size": max(1, section.training.batch_size // devices)}
            if gpu and section.training.precision == "auto":
                update["precision"] = "bf16"
            training = section.training.model_copy(update=update)
            changed[name] = section.model_copy(update={"training": training})
        device = _ANY_GPU if gpu else torch.device("cpu")
        found = estimates(config.model_copy(update=changed), teacher, student, device=device)
        return {each.step: self._on_each(each, sections[each.step].training, teacher) for each in found}

    def server(self, teacher: ModelSize, student: ModelSize) -> float:
        """Return the bytes that a vLLM server takes on each of its devices; 0 without one."""
        if not self.server_count:
            return 0.0
        rows = min(self.config.distill.training.batch_size / self.server_count, self.config.distill.vllm.max_rows)
        return self.held([teacher, student], rows) / self.split

    def held(self, sizes: list[ModelSize], rows: float) -> float:
        """Return the bytes of models that decode some rows: weights, keys and values."""
        kept = rows * (self.assumed.prompt_tokens + self.assumed.longest_tokens)
        return sum(size.parameters + kept * size.layers * size.cache for size in sizes) * self.rates.element

    def _on_each(self, whole: Estimate, training: TrainingConfig, teacher: ModelSize) -> float:
        parts: dict[str, float] = dict(whole.parts)
        if training.fsdp:
            devices = self.trainers if whole.step == "distill" else min(self.machine.devices, training.batch_size)
            for name in ("weights", "gradients", "AdamW", "checkpoint"):
                if name in parts:
                    parts[name] /= devices
        if whole.step == "distill" and self.server_count:
            parts["teacher"] = teacher.vocabulary * teacher.hidden * self.rates.element
            parts.pop("caches", None)
        return sum(parts.values())

    def _gradient(self, training: TrainingConfig, size: ModelSize, devices: int) -> Terms:
        """Return forward and backward passes of a device's rows, and what it exchanges meanwhile."""
        rows = training.batch_size / devices
        micro = min(training.micro_batch_size or rows, rows)
        passes = 3 - (training.lora is not None) + training.gradient_checkpointing
        terms = times(rows / micro, training_terms(size, self._whole(micro), self.rates, passes=passes))
        adapters = 0 if training.lora is None else training.lora.rank * size.adapted
        exchanged = reduce_seconds(adapters or size.parameters, devices, self.rates, per_node=self.machine.per_node)
        if training.fsdp:  # gathered for each forward and backward pass; each process adds up its own part
            exchanged = exchanged / 2 + 2 * rows / micro * self._gather(size.parameters, devices)
        # It is exchanged while it is computed: what is longer counts.
        terms["link"] = max(0.0, exchanged - sum(terms.values()))
        return terms

    def _update(self, training: TrainingConfig, size: ModelSize, devices: int) -> Terms:
        trained = size.parameters if training.lora is None else training.lora.rank * size.adapted
        return {"memory": update_seconds(trained / (devices if training.fsdp else 1), self.rates)}

    def _gather(self, elements: float, devices: int) -> float:
        per_node, element = self.machine.per_node, self.rates.element
        return gather_seconds(elements, devices, self.rates, per_node=per_node, element=element)

    def _validation(self, sizes: list[ModelSize], devices: int) -> float:
        """Return a forward pass of each model over the validation set."""
        whole = self._whole(self.assumed.validation_rows / devices)
        return sum(sum(forward_terms(size, whole, self.rates).values()) for size in sizes) if whole.rows else 0.0

    def _sampling(self, teacher: ModelSize, student: ModelSize, rows: float, *, split: int) -> Terms:
        """Return the sampling of a batch."""
        rates, longest = self.rates, self.assumed.longest_tokens  # devices wait for each other
        writers = [
            size
            for size, writes in ((student, self.method.student_writes), (teacher, self.method.teacher_writes))
            if writes
        ]
        prefill = added(*(forward_terms(size, self._prefill(rows), rates, split=split) for size in writers))
        if not self.method.interleaves:
            one = self._decoding(rows, 1, 1)
            decoding = added(forward_terms(writers[0], one, rates, split=split), self._drawing(one.rows))
            return added(prefill, times(longest, decoding))
        sampling = self.config.distill.sampling
        given = sampling.gamma
        most = round((given.start + given.end) / 2) if isinstance(given, Schedule) else given
        served = self.server_count > 0
        blocks = []
        for gamma in [most] if served or not sampling.adaptive_gamma else range(1, most + 1):
            drafting = times(gamma, forward_terms(student, self._decoding(rows, 1, 1), rates, split=split))
            # vLLM scores one position more than it has drafts.
            width = gamma + served
            verifying = forward_terms(teacher, self._decoding(rows, width, width), rates, split=split)
            rounds = longest / expected_tokens([self.assumed.acceptance] * (gamma - 1))
            drawing = self._drawing(self._decoding(rows, 1, 1).rows * (gamma + 1))
            blocks.append(times(rounds, added(drafting, verifying, drawing)))
        return added(prefill, min(blocks, key=lambda terms: sum(terms.values())))

    def _drawing(self, tokens: float) -> Terms:
        """Return the time to draw tokens; vLLM's is part of what its servers achieve."""
        return {"drawing": 0.0 if self.server_count else tokens * self.assumed.draw_seconds}

    def _drafted(self, teacher: ModelSize, student: ModelSize, rows: float, gamma: int) -> float:
        """Return the seconds of speculative decoding of some rows."""
        rounds = self._steps(rows) / expected_tokens([self.assumed.draft_acceptance] * gamma)
        drafting = times(gamma, forward_terms(student, self._decoding(rows, 1, 1), self.rates))
        verifying = forward_terms(teacher, self._decoding(rows, gamma + 1, gamma + 1), self.rates)
        prefill = [forward_terms(size, self._prefill(rows), self.rates) for size in (teacher, student)]
        return sum(added(times(rounds, added(drafting, verifying)), *prefill).values())

    def _steps(self, rows: float) -> float:
        """Return the tokens of the row that ends last."""
        return self.assumed.response_tokens if rows <= 1 else self.assumed.longest_tokens

    def _whole(self, rows: float) -> Pass:
        """Return a pass over prompts with their responses, whose predictions count."""
        return Pass(rows, self.length, self.length / 2, rows * self.assumed.response_tokens, cached=False)

    def _prefill(self, rows: float) -> Pass:
        return Pass(rows, self.assumed.prompt_tokens, self.assumed.prompt_tokens / 2, rows, cached=False)

    def _decoding(self, rows: float, width: float, at_head: float) -> Pass:
        """Return a pass in mid-response: rows that have ended are gone."""
        running = max(1.0, rows * self.assumed.response_tokens / self.assumed.longest_tokens)
        context = self.assumed.prompt_tokens + self.assumed.response_tokens / 2
        return Pass(running, width, context, running * at_head)


def _sampled_share(distill: DistillConfig) -> float:
    """Return the share of responses that are sampled."""
    shares = {
        "on_policy": distill.on_policy_fraction,
        "imitkd": distill.sampled_fraction,
        "skd_mixed": distill.sampled_fraction,
        "two_stage": 0.5,
    }
    share = shares.get(distill.method, 1.0)
    return (share.start + share.end) / 2 if isinstance(share, Schedule) else float(share)
