"""Section `task`: the prompt of an example, and the judgement of an answer."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from skd_lib.config import tasks
from skd_lib.config._base import ConfigSection, Distinct
from skd_lib.config._reading import parse_section
from skd_lib.errors import SkdError

MetricName = Literal["chrf", "bleu", "comet", "rougeL", "rouge1", "rouge2", "accuracy", "perplexity", "judge"]
LOWER_IS_BETTER: frozenset[MetricName] = frozenset({"perplexity"})
AnswerKind = Literal["hash", "boxed", "marked", "last_number"]


class TaskConfig(ConfigSection):
    """The prompt of an example, and the judgement of an answer."""

    name: str = Field(
        "",
        description="Task to start from; fields that are given with it go before its own. One of "
        f"{', '.join(tasks.known_tasks())}, or a YAML file of such fields: a path or a gs:// URI.",
    )
    prompt: str = Field("{source}", description="Template of the prompt; `{source}` is replaced by the input text.")
    system_prompt: str = Field("", description="System message, where a chat template is used.")
    chat_template: bool = Field(True, description="Wrap the prompt in the tokenizer's chat template.")
    date: str = Field(
        "",
        description="The date that a chat template prints where it asks for today's, as YYYY-MM-DD. Empty: the day of "
        "the run's preflight, so that all steps of a run and its repetitions see the same prompts.",
    )
    stop: list[str] = Field([], description="The answer ends before the first of these strings, e.g. a newline.")
    answer: AnswerKind = Field(
        "hash",
        description="`accuracy`: where the answer stands. `hash`: the number after `####`; `boxed`: in the last "
        "`\\boxed{}`; `marked`: either; `last_number`: the last number of the text.",
    )
    metrics: Annotated[list[MetricName], Distinct] = Field(
        ["chrf", "bleu"],
        min_length=1,
        description="The first decides promotion. `comet` has a step of its own (section `evaluation.comet`).",
    )
    max_prompt_tokens: int = Field(256, ge=1, le=2**20)
    max_new_tokens: int = Field(256, ge=1, le=2**20)

    @model_validator(mode="before")
    @classmethod
    def _start_from_the_named(cls, values: Any) -> Any:
        # With every field spelled out nothing is left to look up: so are tasks handed from step to step, to where the
        # named file need not be.
        if not isinstance(values, dict) or not values.get("name") or cls.model_fields.keys() <= values.keys():
            return values
        try:
            named = tasks.read_task(str(values["name"]))
            parse_section(cls, {**_defaults(cls), **named}, where=str(values["name"]))
        except SkdError as error:
            raise ValueError(str(error)) from error
        return {**named, **values, "name": named["name"]}

    @field_validator("system_prompt", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return "" if value is None else value

    @field_validator("prompt")
    @classmethod
    def _has_source(cls, prompt: str) -> str:
        if "{source}" not in prompt:
            raise ValueError("the template must contain {source}, the place of the input text")
        return prompt

    @field_validator("date", mode="before")
    @classmethod
    def _plain_date(cls, value: Any) -> Any:
        # YAML reads an unquoted 2026-01-31 as a date.
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            return value.isoformat()
        return "" if value is None else value

    @field_validator("date")
    @classmethod
    def _is_date(cls, value: str) -> str:
        try:
            given = datetime.date.fromisoformat(value).isoformat() if value else ""
        except ValueError:
            given = None
        if given != value:
            raise ValueError(f"must be a day as YYYY-MM-DD, e.g. 2026-01-31, got {value!r}")
        return value

    @field_validator("stop")
    @classmethod
    def _stops_say_something(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError('an empty string stands before every answer and would cut it off whole; leave "" out')
        return stop

    @property
    def wants_comet(self) -> bool:
        """The answers are scored by COMET too."""
        return "comet" in self.metrics

    @property
    def own_metrics(self) -> list[MetricName]:
        """The metrics that step `evaluate` measures itself: all but COMET."""
        return [name for name in self.metrics if name != "comet"]

    def without_judgement(self) -> TaskConfig:
        """Return this task with the metrics and the place of the answer that it would have by its name alone.

        Training and drafting depend on neither.
        """
        usual = TaskConfig(name=self.name) if self.name in tasks.known_tasks() else TaskConfig()
        return self.model_copy(update={"metrics": usual.metrics, "answer": usual.answer})

    def without_comet(self) -> TaskConfig:
        """Return this task as step `evaluate` reads it: without COMET, unless that is its only metric."""
        return self.model_copy(update={"metrics": self.own_metrics or self.metrics})

    def with_fields_of(self, other: TaskConfig) -> TaskConfig:
        """Return this task with the fields that were given for the other one; an empty date counts as not given."""
        given = other.model_fields_set - ({"date"} if not other.date else set())
        return self.model_copy(update={name: getattr(other, name) for name in given})


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field.get_default(call_default_factory=True) for name, field in model.model_fields.items()}
