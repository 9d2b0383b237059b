"""The model card that goes with every model: what it is, how to load it, its origin, settings and scores."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from skd_lib import __version__
from skd_lib._core.format import TextTable
from skd_lib.errors import SkdError
from skd_lib.models.records import read_record
from skd_lib.models.references import HubModel, WheelMember, parse_reference

THIS_FOLDER, TUNED_TEACHER = "path/to/this/folder", "path/to/the/fine-tuned/teacher"
"""Stand in commands for what the card does not know."""
SETTINGS = (
    *("student_init", "divergence", "beta", "alpha", "teacher_signal"),
    *("rule", "top_k", "min_prob", "mixture", "gamma", "replaced_weight", "on_policy_fraction", "sampled_fraction"),
    "precision",
)
"""Fields of a model's record that are settings of its training."""
_TRAINING = {
    "sft": "fine-tuned on reference answers",
    "prune": "cut out of its teacher, and not trained since",
}


@dataclass(frozen=True)
class Lineage:
    """The origin of a model: `base` is the model its weights started from; empty is what is not known or not there.

    `draft_length` is the number of drafted tokens that was measured to be fastest, None where nothing was measured.
    """

    base: str
    method: str
    teacher: str = ""
    teacher_tuned: bool = False
    data_fingerprint: str = ""
    code_version: str = __version__
    settings: Mapping[str, object] = field(default_factory=dict)
    weights_sha256: str = ""
    draft_length: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Lineage:
        """Read the origin of the model in a folder, from the record of its training."""
        record = read_record(folder).lineage
        if not record.get("method"):
            what = "there is no record of its training in it, so there is nothing to tell about it"
            hint = "name a run, or the folder of a model that a run has trained, e.g. runs/NAME/student"
            raise SkdError(what, where=str(folder), hint=hint)
        return cls(
            base=str(record.get("base_student") or record.get("reference") or ""),
            method=str(record["method"]),
            teacher=str(record.get("teacher", "")),
            data_fingerprint=str(record.get("data_fingerprint", "")),
            code_version=str(record.get("code_version", "")),
            settings={name: record[name] for name in SETTINGS if record.get(name) not in (None, "")},
            weights_sha256=str(record.get("weights_sha256", "")),
        )

    def for_others(self) -> Lineage:
        """Return the lineage without what concerns the author's machines alone: folders and buckets."""
        return replace(self, base=_for_others(self.base), teacher=_for_others(self.teacher))


def model_card(
    name: str,
    lineage: Lineage,
    metrics: Mapping[str, float] | None = None,
    *,
    results: Sequence[TextTable] = (),
    data: Mapping[str, object] | None = None,
    dataset: str = "",
    prompt: str = "...",
    chat: bool = True,
    reference: str = THIS_FOLDER,
    teacher: str = "",
    licence: str = "",
) -> str:
    """Return the text of the model card, with the metadata block of the Hugging Face hub.

    Metrics are closing figures of the training, results tables of what was measured afterwards. The reader finds the
    model at `reference`, and its teacher, as it was when it taught, at `teacher` (empty: where `lineage` says).
    `dataset` and `licence` are names on the hub, if any; `chat` says whether prompts are in the chat template.
    """
    bases = [one for one in (lineage.base, lineage.teacher) if _is_on_hub(one)]
    head: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"license": licence} if licence else {}),
        **({"base_model": bases[0]} if bases else {}),
        **({"datasets": [dataset]} if dataset else {}),
        "tags": list(dict.fromkeys(["knowledge-distillation", "speculative-decoding", lineage.method])),
    }
    facts = {
        "Made by": f"skd-lib {lineage.code_version}",
        "Method": lineage.method,
        "Started from": lineage.base,
        "Teacher": lineage.teacher + (", fine-tuned on the task" if lineage.teacher_tuned else ""),
        "Data fingerprint": lineage.data_fingerprint,
        "Weights (sha256)": lineage.weights_sha256,
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        _introduction(lineage),
        _usage(reference, prompt, chat=chat),
        _usage_as_draft(lineage, reference, teacher),
        *("\n".join(table.to_markdown()).strip() for table in results),
        _table("Data", data or {}),
        _table("Lineage", facts),
        _table("Settings", lineage.settings),
        _table("Scores", {key: f"{value:.4g}" for key, value in (metrics or {}).items()}),
        "" if licence else "Its licence follows from the models and data it was made from.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(lineage: Lineage) -> str:
    if not lineage.teacher:
        how = _TRAINING.get(lineage.method, f"trained by the method `{lineage.method}`")
        return f"A language model that was {how}. It started from {_code(lineage.base)}."
    tuned = ", which was fine-tuned on the task first" if lineage.teacher_tuned else ""
    return (
        f"A small language model that was taught by a large one, {_code(lineage.teacher)}{tuned}, with the method "
        f"`{lineage.method}` (knowledge distillation). It started from {_code(lineage.base)}. It answers by itself, "
        "and drafts for its teacher in speculative decoding, where the output stays the teacher's own."
    )


def _usage(reference: str, prompt: str, *, chat: bool) -> str:
    text = json.dumps(prompt, ensure_ascii=False)
    asked = f'[{{"role": "user", "content": {text}}}]' if chat else text
    answer = '["generated_text"][-1]["content"]' if chat else '["generated_text"]'
    return f"""\
## Use it

```python
from transformers import pipeline

generate = pipeline("text-generation", model={json.dumps(reference)})
print(generate({asked}, max_new_tokens=128)[0]{answer})
```

With vLLM, `vllm serve {shlex.quote(reference)}`."""


def _usage_as_draft(lineage: Lineage, reference: str, teacher: str) -> str:
    if not lineage.teacher:
        return ""
    known = lineage.teacher if _is_on_hub(lineage.teacher) and not lineage.teacher_tuned else TUNED_TEACHER
    gamma = lineage.settings.get("gamma")
    # what was measured, else that of the training, else a usual length
    drafted = lineage.draft_length or (gamma if isinstance(gamma, int) else 5)
    speculative = {"method": "draft_model", "model": reference, "num_speculative_tokens": drafted}
    command = ["vllm", "serve", teacher or known, "--speculative-config", json.dumps(speculative)]
    return f"As the draft of its teacher:\n\n```bash\n{shlex.join(command)}\n```"


def _is_on_hub(reference: str) -> bool:
    try:
        return isinstance(parse_reference(reference), HubModel)
    except SkdError:
        return False


def _for_others(reference: str) -> str:
    """Return a reference without folders and buckets; those of the hub and of package indexes stay."""
    try:
        kept = isinstance(parse_reference(reference.partition(", ")[0]), HubModel | WheelMember)
    except SkdError:  # a folder that is gone
        kept = False
    return reference if kept or not reference else f"{_name(reference)} (not published)"


def _name(reference: str) -> str:
    """Return the short name of a model: a hub id unchanged, the last part of a path or URI."""
    kept, comma, remark = reference.partition(", ")
    if not _is_on_hub(kept):
        kept = kept.partition("?sha256=")[0].rstrip("/").rpartition("/")[2]
    return kept + comma + remark


def _code(reference: str) -> str:
    return f"`{_name(reference)}`" if reference else "a model that is not known"


def _table(title: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items() if value != ""]
    return "\n".join([f"| {title} | |", "|---|---|", *lines]) if lines else ""


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
