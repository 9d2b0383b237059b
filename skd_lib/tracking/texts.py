"""How long texts may be that MLflow keeps."""

from __future__ import annotations

PARAM_LENGTH = 6000
TAG_LENGTH = 5000  # older servers; newer ones take 8000


def clip(text: str, length: int) -> str:
    """The text, shortened to what MLflow takes."""
    return text if len(text) <= length else text[: length - 3] + "..."
