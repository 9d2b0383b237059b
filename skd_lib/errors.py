"""Errors that a user can act on."""

from __future__ import annotations

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = ("No space left on device", "disk is full", "Disk quota exceeded", "os error 28")


class SkdError(Exception):
    """An error that the user can fix: what was wrong, where, and what to do about it.

    Args:
        what: One sentence saying what was wrong.
        where: File, row, field, step or model it was found in; empty if there is none.
        hint: What to do about it.

    Attributes:
        exit_code: Of a step that ends with this error.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    @property
    def brief(self) -> str:
        """The place and the problem on one line, without the hint: a reason to be kept."""
        return " ".join(f"{self.where}: {self.what}".removeprefix(": ").split())

    @property
    def line(self) -> str:
        """All of it on one line."""
        return " ".join(f"{self.brief}{f'; hint: {self.hint}' if self.hint else ''}".split())

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{place}{self.what}{advice}"


class SkdErrors(SkdError):
    """Several problems found together, so that the user corrects them together."""

    def __init__(self, errors: list[SkdError]) -> None:
        count = len(errors)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} found")
        self.errors = errors
        if errors and all(isinstance(error, Transient) for error in errors):
            self.exit_code = Transient.exit_code

    @property
    def brief(self) -> str:
        """The first of them, and how many more there are."""
        more = len(self.errors) - 1
        return self.errors[0].brief + (f" (and {more} more)" if more else "")

    def __str__(self) -> str:
        return "\n".join([f"{self.what}:", *(f"- {error}" for error in self.errors)])


class Transient(SkdError):
    """What may pass by itself: nothing is to be corrected, and the same work may succeed when it is tried again.

    Its exit code is BSD's `EX_TEMPFAIL`, "try again later". `skd run`, schedulers that start it, and the nodes of a
    TrainJob tell it from a refusal by that. KFP's launcher does not: it turns every code into 1, as torchrun does.
    """

    exit_code = 75


class Preempted(Transient):
    """SIGTERM received (preemption); the work until now is saved in a checkpoint."""


def is_full_disk(error: BaseException) -> bool:
    """Return whether a write failed on a full disk; libraries in C and Rust say so in words alone."""
    return (isinstance(error, OSError) and error.errno in _FULL) or any(text in str(error) for text in _FULL_TEXTS)


def unwritable(error: Exception, where: str = "") -> SkdError:
    """Return the sentence for a failed write.

    Args:
        error: An operating system's or a library's error.
        where: The file or folder, if the error does not name it; empty: not known.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    place = str(getattr(error, "filename", None) or where)
    full = is_full_disk(error)
    advice = f"free some space {'there' if place else 'on the disk that is full'} (`df -h` shows it)"
    return SkdError(
        f"{'cannot be written' if place else 'something cannot be written'}: {reason}",
        where=place,
        hint=f"{advice if full else 'make it writable'} and run the same command again: what is finished is kept",
    )
