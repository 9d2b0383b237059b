"""Names of models and metrics as people write them."""

from __future__ import annotations

from skd_lib.results import Role

ROLE_NAMES: dict[Role, str] = {
    "teacher_base": "teacher base",
    "teacher": "teacher",
    "student_before": "student before",
    "student_after": "student after",
}
METRIC_NAMES = {
    "chrf": "chrF",
    "bleu": "BLEU",
    "comet": "COMET",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "judge": "judge",
}


def metric_name(name: str) -> str:
    """Return a metric's name as people write it."""
    return METRIC_NAMES.get(name, name)
