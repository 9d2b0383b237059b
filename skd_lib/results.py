"""The figures of a run: one class for each measured thing, by which all steps write and read their JSON files.

Unknown fields are ignored, so that files of other versions can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from skd_lib.config import Section

Role = Literal["teacher_base", "teacher", "student_before", "student_after"]
Moment = Literal["before", "after"]
ROLES: tuple[Role, ...] = ("teacher_base", "teacher", "student_before", "student_after")
MOMENTS: tuple[Moment, ...] = ("before", "after")
DRAFT_FIGURES = ("acceptance_rate", "tokens_per_teacher_call", "speedup")

Timing = Annotated[float, AfterValidator(lambda value: float(f"{value:.6g}"))]
"""Six digits are more than any clock knows, and keep parameters of the pipeline short."""


def rounded(value: float) -> float:
    """Round a figure to five significant digits, which is what a page shows at most."""
    return float(f"{value:.5g}")


class Figures(Section):
    """A group of figures."""

    model_config = ConfigDict(extra="ignore")


class Score(Figures):
    """One metric of one model: the score, its 95 % interval, and the signature that makes it reproducible.

    Scores are 0 to 100 (`judge`: 1 to 10, `perplexity`: from 1).
    """

    score: float
    low: float
    high: float
    signature: str = ""
    caution: str = Field("", description="Why the interval is not reliable; empty where it is.")
    scored: int | None = Field(None, description="Examples that could be scored, where these are not all.")

    def flat(self) -> dict[str, Any]:
        """Return the fields as JSON values, without empty ones."""
        return self.model_dump(exclude_defaults=True)


class Scores(Figures):
    """The scores of one model by metric, on the test set and on the held-out sets."""

    metrics: dict[str, Score] = Field({}, description="By name.")
    missing: dict[str, str] = Field({}, description="Metrics that could not be computed, and why.")
    held_out: dict[str, Scores] = Field({}, description="The same for each held-out set.")
    examples: int = 0
    seconds: float = Field(0.0, description="What the model took, without the metrics.")

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        metrics = {name: value for name, value in values.items() if isinstance(value, dict) and "score" in value}
        return {"metrics": metrics, **{name: value for name, value in values.items() if name not in metrics}}

    def flat(self) -> dict[str, Any]:
        """Return the content of `scores.json`, in which the metrics stand next to the counts."""
        values: dict[str, Any] = {name: score.flat() for name, score in self.metrics.items()}
        values |= {"missing": self.missing} if self.missing else {}
        values |= {"examples": self.examples, "seconds": self.seconds}
        held_out = {name: each.flat() for name, each in self.held_out.items()}
        return values | ({"held_out": held_out} if held_out else {})

    def by_name(self) -> dict[str, Score]:
        """Return all scores by metric; those of a held-out set as SET.METRIC."""
        held_out = {f"{at}.{name}": score for at, each in self.held_out.items() for name, score in each.metrics.items()}
        return {**self.metrics, **held_out}

    def figures(self) -> dict[str, float]:
        """Return the scores alone."""
        return {name: score.score for name, score in self.metrics.items()}


class DataUse(Figures):
    """Data that a step read: a split or a held-out set, its sha256, its folder, and what it was used for."""

    name: str
    digest: str
    source: str
    context: str = Field(description="`train`, `validation` or `test`.")
    rows: int


class Comet(Figures):
    """COMET's score of each model, or the reason why there is none. Empty where the task does not ask for COMET."""

    models: dict[Role | Literal["champion"], Score] = Field(
        {}, description="By model; scores are 100 times COMET's own."
    )
    missing: str = Field("", description="Why there is none, for a person.")

    def figures(self, role: Role | Literal["champion"]) -> dict[str, float]:
        """Return a model's score, in the form of `Scores.figures`."""
        return {"comet": self.models[role].score} if role in self.models else {}


class Difference(Figures):
    """Two models, or two ways of training, compared by one metric on the same examples: first score minus second."""

    difference: float
    low: float = Field(description="Of the 95 % interval of the difference.")
    high: float
    p_value: float | None = Field(
        None, description="Two-sided; how often chance alone makes a difference as large. None below 20 examples."
    )


class PairedTest(Difference):
    """A paired test between two models of a run: score of a minus score of b."""

    a: Role
    b: Role
    metric: str
    n: int = Field(description="Examples.")


class Course(Figures):
    """The course of a training: one value for each logged step; empty where a method has no such figure."""

    steps: tuple[int, ...] = Field((), description="Those of the sampler's figures.")
    rejection_rate: tuple[float, ...] = Field((), description="Share of tested draft tokens that the teacher replaced.")
    tokens_per_teacher_call: tuple[float, ...] = ()
    training_steps: tuple[int, ...] = ()
    training_loss: tuple[float, ...] = ()
    response_length: tuple[float, ...] = Field((), description="Mean tokens of a response trained on.")
    validation_steps: tuple[int, ...] = ()
    validation_loss: tuple[float, ...] = ()
    validation_half: tuple[float, ...] = Field(
        (), description="Half of the 95 % interval of each validation loss, over the validation examples."
    )
    validation_tokens: tuple[float, ...] = Field((), description="Response tokens trained on before each validation.")
    validation_student_tokens: tuple[float, ...] = Field(
        (), description="Positions that the student's decoder had processed, prompts included; without validation."
    )
    validation_teacher_tokens: tuple[float, ...] = Field((), description="Likewise the teacher's.")
    validation_seconds: tuple[float, ...] = Field(
        (), description="Seconds of training until then: sampling, loss and optimiser."
    )
    seconds: dict[str, float] = Field({}, description="Of each phase: rollout, loss, optimiser, ...")
    peak_bytes: dict[str, int] = Field({}, description="Most memory of the process, and of each phase on the device.")


class Percentiles(Figures):
    """Percentiles of a latency, in seconds."""

    p50: Timing
    p90: Timing
    p99: Timing


class Latency(Figures):
    """The time that a reader waits for tokens."""

    first_token: Percentiles = Field(
        description="From the batch's start to the end of the round that wrote a response's first token: prefill, and "
        "with a draft model a whole block."
    )
    per_token: Percentiles | None = Field(
        None,
        description="Of each token after the first round: the seconds of its round over the tokens that the round "
        "wrote to its response. None where no response took more than one round.",
    )


class Alone(Figures):
    """One model decoding by itself, over all turns of a setting."""

    tokens_per_second: Timing = Field(description="Median over the turns.")
    latency: Latency


class Forwards(Figures):
    """Measured seconds of bare forwards of one batch; medians."""

    draft_seconds: Timing = Field(description="The draft model over one position a row.")
    draft_start_seconds: Timing = Field(description="Over two positions a row: the first forward of a block.")
    teacher_seconds: dict[int, Timing] = Field(description="The teacher, by positions a row: 1, and each gamma + 1.")


class Timed(Figures):
    """A draft length that was timed."""

    speedup: Timing = Field(description="Seconds a token, teacher alone / speculative; the median over the turns.")
    tokens_per_second: Timing = Field(description="Median over the turns.")
    acceptance_rate: Timing = Field(description="Accepted / tested drafted tokens.")
    acceptance_by_position: list[Timing] = Field(
        description="Accepted / tested for each position in the block, given that all before it were accepted; ends "
        "where no block got further. The share of blocks that get beyond a position is the product up to it."
    )
    tested_by_position: list[int] = Field(description="Number of tests behind each rate; gamma long.")
    tokens_per_teacher_call: Timing = Field(
        description="Block efficiency: response tokens for each teacher forward of a row; 1 to gamma + 1."
    )
    tokens: int = Field(description="Response tokens of all timed passes.")
    by_prompt: list[TokensAndCalls] = Field([], description="By prompt.")
    latency: Latency
    ties: int = Field(description="Responses of one pass that differ from the teacher's own by ties within rounding.")


class DraftLength(Figures):
    """One draft length: what theory expects of it, and what was measured if it was timed."""

    gamma: int
    expected_tokens_per_teacher_call: Timing = Field(description="From acceptance by position.")
    theoretical_speedup: Timing = Field(
        description="From acceptance by position and the forwards' measured times, the teacher's over gamma + 1 "
        "positions. What it leaves out (drawing, acceptance, bookkeeping, prefill) is the engine's share."
    )
    theoretical_speedup_iid: Timing = Field(
        description="Leviathan et al. 2023, theorem 3.8: one acceptance rate for all positions, and a teacher forward "
        "that costs the same for a block as for a token."
    )
    timed: Timed | None = Field(None, description="None: not timed.")


class Setting(Figures):
    """One temperature and batch size."""

    temperature: Timing
    batch_size: int
    prompts: int
    teacher_alone: Alone
    draft_alone: Alone | None = Field(None, description="The draft model answering by itself.")
    forwards: Forwards
    lengths: list[DraftLength] = Field(description="By gamma.")
    best_gamma: int = Field(description="Draft length with the highest speed-up among those timed.")
    best_speedup: Timing

    def timed(self, gamma: int) -> Timed:
        """Return the measurements at a draft length that was timed."""
        return next(length.timed for length in self.lengths if length.gamma == gamma and length.timed)


TokensAndCalls = tuple[int, int]
"""Of one prompt, over all passes: tokens that its blocks yielded, and calls of the teacher."""


class DraftCounts(Figures):
    """vLLM's own counts: of all requests' drafts, also those beyond a response's end; no draft of its first token."""

    drafts: int = Field(description="Blocks that were drafted and verified.")
    accepted_by_position: list[int] = Field(description="Blocks of which this position and all before it stood.")

    @classmethod
    def of(cls, histograms: Iterable[Sequence[int]]) -> DraftCounts:
        """Count the drafts of requests; each histogram says how many stood with 0, 1, ... of their tokens."""
        total = [sum(counts) for counts in zip(*histograms, strict=True)]
        return cls(drafts=sum(total), accepted_by_position=[sum(total[at:]) for at in range(1, len(total))])

    @property
    def tokens_and_calls(self) -> TokensAndCalls:
        """Tokens that the blocks yielded, the teacher's own included, and calls of the teacher."""
        return self.drafts + sum(self.accepted_by_position), self.drafts

    @property
    def accepted_length(self) -> float:
        """Mean tokens of a block: those accepted, and the teacher's own after them."""
        return 1 + sum(self.accepted_by_position) / self.drafts if self.drafts else 1.0

    @property
    def shares(self) -> list[float]:
        """Accepted / drafts by position, as vLLM shows them."""
        return [accepted / self.drafts for accepted in self.accepted_by_position if self.drafts]

    @property
    def tested(self) -> list[int]:
        """Blocks in which a position was reached: all before it stood."""
        return [self.drafts, *self.accepted_by_position[:-1]]

    @property
    def by_position(self) -> list[float]:
        """Accepted / reached by position, as `Timed.acceptance_by_position`."""
        return [of / reached for of, reached in zip(self.accepted_by_position, self.tested, strict=True) if reached]

    @property
    def acceptance_rate(self) -> float:
        """Accepted / reached, as `Timed.acceptance_rate`; vLLM's own rate is accepted / drafted."""
        return sum(self.accepted_by_position) / sum(self.tested) if self.drafts else 0.0


class ServedPasses(Figures):
    """A vLLM server at one temperature, with so many requests in flight."""

    temperature: Timing
    concurrency: int
    tokens_per_second: Timing = Field(description="Response tokens of all requests; median over the passes.")
    slowest: Timing = Field(description="Tokens a second of the slowest pass.")
    fastest: Timing
    tokens: int = Field(description="Response tokens of all timed passes.")
    counts: DraftCounts | None = Field(None, description="Of all timed passes; None without a draft model.")
    by_prompt: list[TokensAndCalls] = Field([], description="By prompt; empty without a draft model.")


class ServedModel(Figures):
    """A vLLM server that was started and measured."""

    command: str = Field(description="The line it was started with, but for its address, and what makes it count.")
    passes: list[ServedPasses]
    equal: int | None = Field(
        None,
        description="Greedy responses that are, in all passes, those of the first pass of the server without a draft. "
        "For that server itself: how often rounding leaves a response alone. None: nothing was decoded greedily.",
    )

    def at(self, temperature: float, concurrency: int) -> ServedPasses:
        """Return the passes at a setting that was measured."""
        return next(each for each in self.passes if (each.temperature, each.concurrency) == (temperature, concurrency))


class ServedMeasurement(Figures):
    """What vLLM makes of a teacher and its drafts: each server in turn, the same prompts and no shared prefixes."""

    version: str = Field(description="vLLM's.")
    device: Literal["cpu", "gpu"]
    gamma: int
    prompts: int
    max_new_tokens: int
    repeats: int
    alone: ServedModel = Field(description="The teacher without a draft.")
    drafts: dict[str, ServedModel] = Field(description="The teacher with each draft, by its name.")
    equal_to_transformers: int | None = Field(
        None, description="Greedy responses of `alone` that are those of transformers; None: not asked, see the guide."
    )
    notes: list[str] = Field([], description="What was left out or disturbed the figures, in sentences.")
    seconds: Timing = Field(0.0, description="Of everything, the servers' starts included.")

    def speedup(self, passes: ServedPasses) -> float:
        """Return a draft's tokens a second over those without one at the same setting."""
        return passes.tokens_per_second / self.alone.at(passes.temperature, passes.concurrency).tokens_per_second

    def is_unsure(self, passes: ServedPasses) -> bool:
        """Return whether the speed-up may be chance: one pass alone, or one with a draft as fast as one without."""
        alone = self.alone.at(passes.temperature, passes.concurrency)
        return self.repeats == 1 or (passes.slowest <= alone.fastest and alone.slowest <= passes.fastest)

    def metrics(self) -> dict[str, float]:
        """Return what a draft did at every setting, and its greedy responses that are the server's without one."""
        found: dict[str, float] = {}
        for model in self.drafts.values():
            found |= {} if model.equal is None else {"greedy_equal": model.equal}
            for each in model.passes:
                setting = f"temperature_{each.temperature:g}_in_flight_{each.concurrency}"
                found[f"speedup_{setting}"] = self.speedup(each)
                found[f"tokens_per_second_{setting}"] = each.tokens_per_second
                if each.counts is not None:
                    found[f"tokens_per_teacher_call_{setting}"] = each.counts.accepted_length
        return found


class Vllm(Figures):
    """The command by which vLLM serves a pair."""

    command: str = Field(description="A line for a shell.")
    started: bool = Field(False, description="A server was started with this line, and measured.")
    reasons: list[str] = Field(
        [], description="Which of vLLM's conditions, as far as they can be checked here, are not met; empty if all are."
    )


class Specdec(Figures):
    """Figures of a draft model in speculative decoding.

    Seconds are wall-clock, speed-ups are over the teacher decoding alone in the same turns. The fields at the top are
    the headline: the first temperature and the first batch size of the configuration, at its draft length `gamma`,
    which is the same for every draft model, so that they can be compared. `settings` has all the rest.
    """

    acceptance_rate: Timing
    tokens_per_teacher_call: Timing
    speedup: Timing
    gamma: int | None = None
    temperature: Timing | None = None
    batch_size: int | None = None
    prompts: int | None = None
    repeats: int | None = None
    ties: int = Field(0, description="Over all settings at temperature 0; any other difference there is an error.")
    tokens: int | None = None
    teacher_only_tokens_per_second: Timing | None = None
    draft_only_tokens_per_second: Timing | None = Field(None, description="The draft model answering by itself.")
    speculative_tokens_per_second: Timing | None = None
    seconds: Timing = Field(0.0, description="Of the whole benchmark, all draft models together.")
    acceptance_by_position: list[Timing] = Field([])
    theoretical_speedup: Timing | None = None
    theoretical_speedup_iid: Timing | None = None
    best_gamma: int | None = None
    best_speedup: Timing | None = None
    break_even: Timing | None = Field(
        None,
        description="Cost at which drafting starts to pay, as a share of this draft model's: with its acceptance, the "
        "forwards' measured times and the draft length at which the draft may cost most. 1 and more: it pays in "
        "theory; 0 and less: not even a draft that costs nothing would.",
    )
    teacher_parameters: int | None = None
    draft_parameters: int | None = None
    latency: Latency | None = None
    teacher_only_latency: Latency | None = None
    settings: list[Setting] = Field([], description="Of `engine: transformers`.")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="`vllm`: the headline is from vLLM's counts, and `batch_size` requests in flight."
    )
    served: ServedMeasurement | None = Field(None, description="Of `engine: vllm`, with this draft alone.")
    vllm: Vllm | None = None

    @property
    def is_unsure(self) -> bool:
        """Return whether the headline's speed-up may be chance: vLLM's passes with and without the draft overlap."""
        return (
            any(self.served.is_unsure(model.passes[0]) for model in self.served.drafts.values())
            if self.served
            else False
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without what is None: KFP's structured parameters cannot hold null."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def by_prompt(self) -> list[TokensAndCalls]:
        """Tokens and calls of each prompt in the headline's passes; empty in files of other versions."""
        if self.served is not None:
            return next(iter(self.served.drafts.values())).passes[0].by_prompt
        return self.settings[0].timed(self.gamma).by_prompt if self.settings and self.gamma else []

    @property
    def setting(self) -> str:
        """Describe how the headline figures were measured; only those of one setting compare."""
        if self.gamma is None or self.temperature is None:
            return ""
        return f"{self.engine}, {self.gamma} tokens drafted, temperature {self.temperature:g}"

    @property
    def draft_length(self) -> int | None:
        """Tokens to draft where the pair is served: the length that was fastest of those timed."""
        return self.best_gamma or self.gamma

    def figures(self) -> dict[str, float]:
        """Return the three headline figures, by name."""
        return {name: float(getattr(self, name)) for name in DRAFT_FIGURES}

    def metrics(self) -> dict[str, float]:
        """Return the numbers by which MLflow compares runs, flat: the headline, and the best of every setting."""
        numbers = {name: value for name, value in self if isinstance(value, int | float)}
        by_position = {f"acceptance_position_{at}": rate for at, rate in enumerate(self.acceptance_by_position, 1)}
        latencies = {
            f"{which}{name}": value
            for which, latency in (("", self.latency), ("teacher_only_", self.teacher_only_latency))
            for name, value in _flat(latency)
        }
        best = {
            f"best_speedup_temperature_{setting.temperature:g}_batch_{setting.batch_size}": setting.best_speedup
            for setting in self.settings
        }
        return {**numbers, **by_position, **latencies, **best, **(self.served.metrics() if self.served else {})}


def _flat(latency: Latency | None) -> Iterator[tuple[str, float]]:
    if latency is not None:
        for what, percentiles in (("first_token", latency.first_token), ("per_token", latency.per_token)):
            for name, value in percentiles or ():
                yield f"{what}_{name}_seconds", value
