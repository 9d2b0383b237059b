"""The pair in vLLM: the command that serves it, and whether vLLM takes it.

Facts about vLLM are those of 0.32, by its source (`vllm/config/speculative.py`,
`vllm/model_executor/models/registry.py`) and by starting tiny pairs of all architectures below on its CPU build. Draft
models came back to vLLM with 0.15: versions before refuse the command.
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

METHOD_NAMES = ("eagle-", "eagle3", "dflash", "dspark")
"""Where one of these is part of a draft's name, vLLM takes the draft for one of that method, whatever `method` says."""


OWN_CODE = "--trust-remote-code"
"""Lets vLLM run Python code that comes with a model."""


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
    """Return a `vllm serve` line, quoted for a POSIX shell."""
    return shlex.join(["vllm", *serve_words(teacher, draft, gamma)])


def serve_words(teacher: Served, draft: Served | None, gamma: int) -> list[str]:
    """Return the words that serve the teacher, with a draft model or without, from `serve` on.

    Where the draft's context is the shorter one, it limits the server's: model runner V2 lets the draft follow the
    teacher to any position, also to those its rotary embeddings were not made for, and V1 stops drafting for all
    requests while one of them is near the draft's limit. A draft inherits the teacher's dtype, tokenizer and
    `--trust-remote-code`.
    """
    words = ["serve", teacher.name]
    if teacher.revision is not None:
        words += ["--revision", teacher.revision]
    models = [teacher, draft] if draft is not None else [teacher]
    ours, *theirs = (context_length(load_config(model.folder)) for model in models)
    if ours and theirs and theirs[0] and theirs[0] < ours:
        words += ["--max-model-len", str(theirs[0])]
    if any(_has_own_code(model.folder) for model in models):
        words.append(OWN_CODE)
    if draft is not None:
        speculative = {"method": "draft_model", "model": draft.name, "num_speculative_tokens": gamma}
        if draft.revision is not None:
            speculative["revision"] = draft.revision
        words += ["--speculative-config", json.dumps(speculative)]
    return words


def refusals(teacher: Served, draft: Served, *, on_gpu: bool) -> list[str]:
    """List the conditions, in sentences, without which vLLM would not start with the pair, or would draft nonsense."""
    unlike = [*tokenizer_differences(teacher.folder, draft.folder), *_different_sizes(teacher, draft)]
    return unlike if on_gpu else [*unlike, *_mixed_attention(draft)]


def is_misread(draft: Served) -> bool:
    """Return whether vLLM takes the draft for one of another method by its name."""
    return bool(_misread_name(draft))


def _has_own_code(folder: Path) -> bool:
    """Return whether the model or its tokenizer names Python code that comes with it."""
    files = (folder / "config.json", folder / "tokenizer_config.json")
    return any("auto_map" in json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file())


def incompatibilities(teacher: Served, draft: Served) -> list[str]:
    """List vLLM's conditions for a draft model that the pair does not meet, in sentences."""
    return [
        *_unlisted_architectures(teacher, draft),
        *tokenizer_differences(teacher.folder, draft.folder),
        *_different_sizes(teacher, draft),
        *_mixed_attention(draft),
        *_misread_name(draft),
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


def _mixed_attention(draft: Served) -> list[str]:
    """Name a draft with several kinds of attention, which vLLM's model runner V1 does not start."""
    kinds = set(getattr(load_config(draft.folder), "layer_types", None) or ())
    if len(kinds) < 2:
        return []
    return [
        f"the draft has {' and '.join(sorted(kinds))} layers: that needs vLLM 0.32 or later on a GPU, with "
        "VLLM_USE_V2_MODEL_RUNNER unset; the older model runner stops with `All drafting layers should belong to the "
        "same kv cache group`"
    ]


def _misread_name(draft: Served) -> list[str]:
    """Name a part of the draft's name that makes vLLM take it for a draft of another kind."""
    return [
        f"vLLM takes a draft with `{part}` in its name or path for one of another method, although the command says "
        "draft_model: rename or move it, or give a symbolic link to it"
        for part in METHOD_NAMES
        if part in draft.name.lower()
    ]
