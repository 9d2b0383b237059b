"""The pair in vLLM: the command that serves it, and whether vLLM takes it.

Facts about vLLM are those of 0.27, August 2026 (`vllm/config/speculative.py`, `vllm/model_executor/models/registry.py`,
the page "Draft Models" of its documentation). Draft models left vLLM in 0.10 and came back with pull request 24322 of
19 January 2026: versions before, such as 0.13, refuse the command.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from skd_lib.models.files import context_length, load_config, load_tokenizer
from skd_lib.models.references import HubModel, LocalFolder, StoredFolder, parse_reference
from skd_lib.models.vocabulary import differing_ids, rows_in_config, tokens_by_id
from skd_lib.results import Vllm

ARCHITECTURES = frozenset(
    f"{family}ForCausalLM"
    for family in (
        *("Apertus", "Arcee", "Cohere", "Cohere2", "Gemma", "Gemma2", "Gemma3", "Glm", "Glm4", "Granite", "Llama"),
        *("Mistral", "Mixtral", "Olmo", "Olmo2", "Olmo3", "Phi", "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe"),
        *("SeedOss", "SmolLM3", "StableLm", "Starcoder2"),
    )
)
"""Decoders that both this project samples from and vLLM's registry lists as text generation models."""


@dataclass(frozen=True)
class Served:
    """A model's folder on this machine, and the hub id, folder or URI by which vLLM finds it."""

    folder: Path
    name: str
    revision: str | None = None

    @classmethod
    def from_reference(cls, ref: str, folder: Path) -> Served:
        """Return the model that `ref` names, resolved to `folder`, from where vLLM reads a converted one."""
        match parse_reference(ref):
            case HubModel(repository, revision):
                return cls(folder, repository, revision)
            case StoredFolder(uri):
                return cls(folder, uri)
            case LocalFolder(path):
                return cls(folder, str(path.resolve()))
            case _:
                return cls(folder, str(folder))


def export(teacher: Served, draft: Served, gamma: int) -> Vllm:
    """Return the command that serves the teacher with a draft model, and vLLM's conditions that they do not meet."""
    return Vllm(command=serve_command(teacher, draft, gamma), reasons=incompatibilities(teacher, draft))


def serve_command(teacher: Served, draft: Served, gamma: int) -> str:
    """Return a `vllm serve` line, quoted for a POSIX shell.

    Where the draft's context is the shorter one, it limits the server's: vLLM lets the draft follow the teacher to any
    position, also to those its rotary embeddings were not made for.
    """
    speculative = {"method": "draft_model", "model": draft.name, "num_speculative_tokens": gamma}
    if draft.revision is not None:
        speculative["revision"] = draft.revision
    words = ["vllm", "serve", teacher.name]
    if teacher.revision is not None:
        words += ["--revision", teacher.revision]
    ours, theirs = (context_length(load_config(model.folder)) for model in (teacher, draft))
    if ours and theirs and theirs < ours:
        words += ["--max-model-len", str(theirs)]
    return shlex.join([*words, "--speculative-config", json.dumps(speculative)])


def incompatibilities(teacher: Served, draft: Served) -> list[str]:
    """List vLLM's conditions for a draft model that the pair does not meet, in sentences."""
    return [
        *_unlisted_architectures(teacher, draft),
        *tokenizer_differences(teacher.folder, draft.folder),
        *_different_sizes(teacher, draft),
    ]


def tokenizer_differences(teacher: Path, draft: Path) -> list[str]:
    """Say where an id is another token for the draft; vLLM itself compares the vocabularies' sizes only."""
    ours, theirs = (tokens_by_id(load_tokenizer(folder)) for folder in (teacher, draft))
    if not (differing := differing_ids(ours, theirs)):
        return []
    token = ours.get(differing[0], theirs.get(differing[0]))
    return [f"the tokenizers differ in {len(differing)} tokens, the first is {token!r} (id {differing[0]})"]


def _unlisted_architectures(teacher: Served, draft: Served) -> list[str]:
    reasons = []
    for role, model in (("teacher", teacher), ("draft", draft)):
        names = getattr(load_config(model.folder), "architectures", None) or []
        if not ARCHITECTURES.intersection(names):
            reasons.append(
                f"the {role}'s architecture {', '.join(names) or '(none in its config.json)'} is not among those known "
                "to be in vLLM; try it, vLLM may run it on its Transformers backend"
            )
    return reasons


def _different_sizes(teacher: Served, draft: Served) -> list[str]:
    ours, theirs = (rows_in_config(model.folder) for model in (teacher, draft))
    if ours == theirs:
        return []
    return [
        f"vocab_size is {ours} for the teacher and {theirs} for the draft, and vLLM wants them equal: pad the smaller "
        f"model's embeddings (`model.resize_token_embeddings({max(ours, theirs)})`, then save it), or add "
        '`"use_heterogeneous_vocab": true` to the speculative config (vLLM 0.25 or later, greedy drafts only)'
    ]
