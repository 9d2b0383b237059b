"""What all sections of a configuration are."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration. Unknown fields are errors: a misspelt name must never be swallowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
