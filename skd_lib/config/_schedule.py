"""Settings that may change in the course of training: a number, or `{start, end, shape}`."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Discriminator, Field, Tag

from skd_lib.config._base import ConfigSection

NumberT = TypeVar("NumberT")
NUMBER, SCHEDULE = "<number>", "<schedule>"


class Schedule(ConfigSection, Generic[NumberT]):
    """A setting that goes from `start` at the first optimiser step to `end` at the last."""

    start: NumberT = Field(description="Value at the first optimiser step.")
    end: NumberT = Field(description="Value at the last optimiser step.")
    shape: Literal["linear", "cosine"] = Field("linear", description="`cosine`: slow at both ends, half a wave.")

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        """A name for people who read the JSON schema."""
        return f"Schedule_{getattr(params[0], '__origin__', params[0]).__name__}"

    def __str__(self) -> str:
        return f"{self.start:g} to {self.end:g}, {self.shape}"


def _number_or_schedule(value: Any) -> str:
    return SCHEDULE if isinstance(value, dict | Schedule) else NUMBER


_EITHER = Discriminator(_number_or_schedule)
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
DraftLength = Annotated[int, Field(ge=1, le=256)]
Share = Annotated[float, Field(ge=0, le=1)]
# A number, or a mapping `{start, end, shape}`.
ScheduledCount = Annotated[Annotated[Count, Tag(NUMBER)] | Annotated[Schedule[Count], Tag(SCHEDULE)], _EITHER]
ScheduledDraftLength = Annotated[
    Annotated[DraftLength, Tag(NUMBER)] | Annotated[Schedule[DraftLength], Tag(SCHEDULE)], _EITHER
]
ScheduledShare = Annotated[Annotated[Share, Tag(NUMBER)] | Annotated[Schedule[Share], Tag(SCHEDULE)], _EITHER]
