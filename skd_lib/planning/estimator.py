"""Time and memory of a run's steps, from the models' sizes, lengths and what the machine achieves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skd_lib.config import DistillConfig, RunConfig, Schedule, TrainingConfig
from skd_lib.distillation.methods import METHODS
from skd_lib.errors import SkdError
from skd_lib.planning.assumptions import Assumptions
from skd_lib.planning.machines import GB, Machine
from skd_lib.planning.memory import Estimate, ModelSize, estimates
from skd_lib.planning.work import (
    Pass,
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

_BASE64 = 4 / 3
"""Bytes sent for each byte of the teacher's signal."""
_TOP_BYTES = 8
"""Bytes of a likely token of the teacher's: its id and log-probability."""


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
    """Time and memory of the steps of one run on one machine.

    Raises:
        SkdError: vLLM's servers leave no device for the training.
    """

    def __init__(self, config: RunConfig, machine: Machine, assumptions: Assumptions) -> None:
        self.config, self.machine, self.assumed = config, machine, assumptions
        self.rates = assumptions.rates(machine)
        distill = config.distill
        self.method = METHODS[distill.method]
        self.stored = self.method.storable and distill.teacher_signal.mode == "stored"
        served = distill.engine == "vllm" and self.method.needs_teacher and not self.stored
        self.split = distill.vllm.tensor_parallel
        pods = distill.vllm.pods.count if distill.vllm.pods else 1
        self.server_count = (assumptions.servers or len(distill.vllm.urls) or pods) if served else 0
        taken = self.server_count * self.split
        if machine.kind != "cpu" and taken > 1 and taken >= machine.devices:
            raise SkdError(
                f"vLLM takes {taken} devices ({self.server_count} servers of {self.split}), which leaves none of "
                f"{machine.name} for the training",
                where="distill.vllm",
                hint="plan for more devices (--profile), with fewer servers (--assume servers=N), or lower "
                "distill.vllm.tensor_parallel",
            )
        # On one device server and training take turns.
        self.servers = taken if machine.devices > taken else 0
        self.trainers = self.devices_of(distill.training, machine.devices - self.servers)

    def devices_of(self, training: TrainingConfig, most: int = 0) -> int:
        """Return the devices that train together: one has a row at least."""
        return min(most or self.machine.devices, training.batch_size)

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
        training, served = distill.training, self.server_count > 0
        rows = training.batch_size / devices
        share = _sampled_share(distill)
        parts: list[Part] = []
        machines = max(1, devices // self.machine.per_node)
        sending = self.assumed.send_gbytes * GB
        if served:
            # Each machine brings them to its share of the servers.
            turns = -(-self.server_count // machines)
            parts.append(Part("weights", {"link": turns * self.rates.element * student.parameters / sending}))
        if (self.method.student_writes or self.method.teacher_writes) and not self.stored:
            sampling = times(share, self._sampling(teacher, student, rows))
            if training.fsdp and devices > 1:
                whole = student.parameters + (teacher.parameters if self.method.needs_teacher and not served else 0)
                sampling["link"] += self._gather(whole, devices)
            parts.append(Part("sampling", sampling))
        if self.method.uses_divergence and not self.stored:
            # What was verified while sampling is the loss's signal.
            unasked = 1 - share if self.method.teacher_writes or served else 1.0
            asked, split = (training.batch_size / self.server_count, self.split) if served else (rows, 1)
            if unasked:
                whole_rows = self._whole(asked * unasked)
                parts.append(Part("teacher", forward_terms(teacher, whole_rows, self.rates, split=split)))
            if served:
                states = distill.vllm.signal == "states"
                token = teacher.hidden * self.rates.element if states else _TOP_BYTES * distill.vllm.top_k
                kept = training.batch_size / machines * self.assumed.response_tokens * token
                parts.append(Part("signal", {"link": _BASE64 * kept / sending}))
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
        served = asked.engine == "vllm"
        gammas = [asked.gamma]
        if asked.sweep == "all" and not served:
            gammas = sorted({*asked.gammas, asked.gamma})
        # `best` mostly takes one more length, each time next to the teacher alone.
        turns = 2 if asked.sweep == "best" and len(asked.gammas) > 1 and not served else 1
        prompts = min(asked.examples, assumed.test_rows)
        total = 0.0
        for rows in [size for size in asked.batch_sizes if size <= prompts] or [prompts]:
            if not rows:
                break
            alone = turns * self.generation(teacher, rows) + (0 if served else 2 * self.generation(student, rows))
            drafted = turns * sum(self._drafted(teacher, student, rows, gamma) for gamma in gammas)
            total += len(asked.temperatures) * asked.repeats * prompts / rows * (alone + 2 * drafted)
        starts = 3 if served else 1  # a server for the teacher alone, and for each of the drafts
        return total + starts * assumed.start_seconds

    def memory(self, teacher: ModelSize, student: ModelSize) -> dict[str, Estimate]:
        """Return what each training step takes on a device."""
        processes = {"teacher_sft": self.devices_of(self.config.teacher_sft.training), "distill": self.trainers}
        device = torch.device("cpu" if self.machine.kind == "cpu" else "meta")
        found = estimates(self.config, teacher, student, device=device, processes=processes)
        return {each.step: each for each in found}

    def server(self, teacher: ModelSize, student: ModelSize) -> float:
        """Return the bytes that a vLLM server takes on each of its devices; 0 without one."""
        if not self.server_count:
            return 0.0
        return self.held([teacher, student], self._in_flight) / self.split

    @property
    def _in_flight(self) -> float:
        """Return the rows that a server samples together."""
        vllm, rows = self.config.distill.vllm, self.config.distill.training.batch_size / self.server_count
        return rows if vllm.urls else min(rows, vllm.max_rows)

    def held(self, sizes: list[ModelSize], rows: float) -> float:
        """Return the bytes of models that decode some rows: weights, keys and values."""
        kept = rows * (self.assumed.prompt_tokens + self.assumed.longest_tokens)
        return sum(size.parameters + kept * size.layers * size.cache for size in sizes) * self.rates.element

    def _gradient(self, training: TrainingConfig, size: ModelSize, devices: int) -> Terms:
        """Return forward and backward passes of a device's rows, and what it exchanges meanwhile."""
        rows = training.batch_size / devices
        micro = min(training.micro_batch_size or rows, rows)
        passes = 3 - (training.lora is not None) + training.gradient_checkpointing
        padded = self._whole(micro, self.assumed.padding if micro > 1 else 1.0)
        terms = times(rows / micro, training_terms(size, padded, self.rates, passes=passes))
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

    def _sampling(self, teacher: ModelSize, student: ModelSize, rows: float) -> Terms:
        """Return the sampling of a device's rows, or of a batch by vLLM's servers, which draft with any method."""
        rates, longest = self.rates, self.assumed.longest_tokens  # devices wait for each other
        served, waves, split = self.server_count > 0, 1.0, 1
        if served:
            rows, split = self._in_flight, self.split
            waves = self.config.distill.training.batch_size / self.server_count / rows
        writers = [
            size
            for size, writes in ((student, self.method.student_writes), (teacher, self.method.teacher_writes))
            if writes or served
        ]
        prefill = added(*(forward_terms(size, self._prefill(rows), rates, split=split) for size in writers))
        if len(writers) == 1:
            one = self._decoding(rows, 1, 1)
            decoding = added(forward_terms(writers[0], one, rates), self._drawing(one.rows))
            return added(prefill, times(longest, decoding))
        sampling = self.config.distill.sampling
        given = sampling.gamma
        most = round((given.start + given.end) / 2) if isinstance(given, Schedule) else given
        # One writer alone: all drafts are kept, or none.
        kept = self.assumed.acceptance if self.method.interleaves else float(self.method.student_writes)
        blocks = []
        for gamma in [most] if served or not sampling.adaptive_gamma else range(1, most + 1):
            drafting = times(gamma, forward_terms(student, self._decoding(rows, 1, 1), rates, split=split))
            # vLLM scores one position more than it has drafts.
            width = gamma + served
            verifying = forward_terms(teacher, self._decoding(rows, width, width), rates, split=split)
            rounds = longest / expected_tokens([kept] * (gamma - 1))
            drawing = self._drawing(self._decoding(rows, 1, 1).rows * (gamma + 1))
            blocks.append(times(rounds, added(drafting, verifying, drawing)))
        return times(waves, added(prefill, min(blocks, key=lambda terms: sum(terms.values()))))

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

    def _whole(self, rows: float, padding: float = 1.0) -> Pass:
        """Return a pass over prompts with their responses, whose predictions count."""
        width = padding * self.length
        return Pass(rows, width, width / 2, rows * self.assumed.response_tokens, cached=False)

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
