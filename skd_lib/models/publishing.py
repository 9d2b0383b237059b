"""Upload a model to the Hugging Face hub: safetensors, tokenizer and card, and nothing else of its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib._core.format import first_line
from skd_lib.errors import SkdError
from skd_lib.models.files import check_model_folder, weight_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
SMALL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"),
    *("LICENSE*", "NOTICE*"),
)
"""What a reader of the model needs besides its weights. Records of the training hold examples, and stay here."""
_LOGIN = "`hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)"


@dataclass(frozen=True)
class File:
    """A file to upload, under its name in the repository."""

    name: str
    path: Path
    size: int


def files_to_publish(folder: Path) -> list[File]:
    """Return the files of a model's folder that are uploaded, by name; the card is not among them."""
    check_model_folder(folder)
    found = {*weight_files(folder), *(path for pattern in SMALL_FILES for path in folder.glob(pattern))}
    return [File(path.name, path, path.stat().st_size) for path in sorted(found) if path.is_file()]


def check_repository(name: str) -> str:
    """Return the id of a repository of the hub, ORG/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        hint = "ORG/NAME or USER/NAME, of letters, digits, `-`, `_` and `.`"
        raise SkdError("not the id of a repository of the hub", where=name or "(empty)", hint=hint)
    return name


def publish(files: list[File], repository: str, *, private: bool, card: str, message: str) -> str:
    """Upload files and card as one commit, into a repository that is made where there is none; return its address.

    Weights of an earlier upload that are no longer among the files are deleted. A repository that is there already has
    to be as `private`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise SkdError("there is no token for the Hugging Face hub", where=repository, hint=_LOGIN)
    api = HfApi()
    with _explained(repository):
        present = _create(api, repository, private=private)
        stale = {name for name in present if "/" not in name and ".safetensors" in name} - {file.name for file in files}
        return str(
            api.create_commit(
                repository,
                [
                    *(CommitOperationAdd(file.name, file.path) for file in files),
                    CommitOperationAdd(CARD, card.encode()),
                    *(CommitOperationDelete(name) for name in sorted(stale)),
                ],
                commit_message=message,
            ).commit_url
        )


def _create(api: HfApi, repository: str, *, private: bool) -> list[str]:
    """Make the repository where there is none; returns the names of the files in it."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repository, private=private)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
    else:
        return []
    found = api.model_info(repository)
    if bool(found.private) != private:
        is_now, asked = ("private", "--public") if found.private else ("public", "--private")
        hint = "change it in the repository's settings on the hub, or name another repository"
        raise SkdError(f"the repository exists and is {is_now}, and not {asked}", where=repository, hint=hint)
    return [file.rfilename for file in found.siblings or []]


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Raise the hub's errors as sentences."""
    from huggingface_hub import constants, errors

    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # see `references.hub_snapshot`
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise SkdError("HF_HUB_OFFLINE is set", where=repository, hint="unset it to upload") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        what, hint = {
            401: ("the hub does not accept the token", _LOGIN),
            403: ("the token may not write there", f"check the name; take another token: {_LOGIN}"),
            404: ("the hub has no such user or organisation, or it is not yours", f"check the name; {_LOGIN}"),
            429: ("the hub has had too many requests", "wait, then run the same command again"),
        }.get(
            status, (f"the hub refuses: {first_line(error)}", "run the same command again; see status.huggingface.co")
        )
        raise SkdError(what, where=repository, hint=hint) from error
    except (http_error, ConnectionError) as error:
        what = f"cannot reach the Hugging Face hub at {constants.ENDPOINT}: {first_line(error)}"
        hint = "check the network and HF_ENDPOINT, then run the same command again: what is uploaded is kept"
        raise SkdError(what, where=repository, hint=hint) from error
    except ValueError as error:  # what the hub says of the card's metadata, or of a file
        raise SkdError(f"the hub refuses: {first_line(error)}", where=repository) from error
