"""A large model as judge of open-ended answers (Zheng et al. 2023, arXiv 2306.05685), behind an OpenAI-compatible API.

Only `POST {url}/chat/completions` is used, which vLLM, SGLang, llama.cpp, Ollama and the commercial services speak.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import requests

from skd_lib._core.events import Progress
from skd_lib._core.http import UNQUOTED, patient_session
from skd_lib.config import JudgeConfig
from skd_lib.errors import SkdError
from skd_lib.evaluation.metrics import CorpusMetric, mean_of

KEY = "SKD_JUDGE_API_KEY"
LOWEST, HIGHEST = 1.0, 10.0
MAX_CHARACTERS = 20_000
"""Of each text shown to the judge: a model that repeats itself must not cost a fortune."""

MAX_FAILURES = 3
"""Questions in a row that fail, each after its retries, until the judge is given up."""

TRIAL = {"timeout": 15.0, "retries": 1, "max_tokens": 16}
"""The most that is spent on seeing whether the judge answers: seconds, further tries, tokens."""

_RATING = re.compile(r"\[\[\s*([0-9]{1,2}(?:\.[0-9]{1,3})?)\s*\]\]")
_PLACES = re.compile(r"{(source|target|prediction)}")
log = logging.getLogger(__name__)


class JudgeUnavailable(SkdError):
    """The judge cannot be reached or refuses: a later try may find it, so that no result without it may be kept."""


def check_judge(config: JudgeConfig) -> None:
    """Ask the judge one short question, with little patience.

    Raises:
        JudgeUnavailable: it cannot be reached or refuses.
    """
    brief = config.model_copy(update={name: min(getattr(config, name), most) for name, most in TRIAL.items()})
    with _session(brief) as session:
        reply = _ask(session, brief, "Answer with OK.")
    if isinstance(reply, JudgeUnavailable):
        raise reply


def grade(config: JudgeConfig, rows: Sequence[tuple[str, str, str]], *, private: bool = False) -> list[float | None]:
    """Return ratings, 1 to 10, of the answers in rows of (source, target, prediction).

    With `private` rows errors quote no words of the judge.

    Returns:
        One a row; None where none was asked for or given.

    Raises:
        JudgeUnavailable: the judge cannot be reached or refuses.
        SkdError: there is no judge, or it gave no rating at all.
    """
    where = "metric `judge`"
    if not config.url:
        hint = "set `evaluation.judge.url` and `model`"
        raise SkdError("no judge is configured", where=where, hint=hint)
    asked = rows[: config.examples]
    progress = Progress("judging", len(asked))
    ratings: list[float | None] = []
    with _session(config) as session, ThreadPoolExecutor(config.parallel) as pool:
        replies = pool.map(lambda row: _ask(session, config, _fill(config.prompt, row), private=private), asked)
        failed = 0
        for reply in replies:
            failed = failed + 1 if isinstance(reply, JudgeUnavailable) else 0
            if isinstance(reply, JudgeUnavailable) and failed == min(MAX_FAILURES, len(asked)):
                pool.shutdown(cancel_futures=True)
                raise reply
            ratings.append(None if isinstance(reply, JudgeUnavailable) else parse_rating(reply))
            progress.update(len(ratings))
    unrated = ratings.count(None)
    if unrated:
        log.warning("%d of %d answers got no rating from the judge", unrated, len(asked))
    if unrated == len(asked):
        hint = "`evaluation.judge.prompt` must ask for one, and `max_tokens` must leave room for it"
        raise SkdError("no reply of the judge holds a rating like [[5]]", where=where, hint=hint)
    return ratings + [None] * (len(rows) - len(asked))


def parse_rating(reply: str) -> float | None:
    """Return the last rating in double brackets, if it is between 1 and 10."""
    found = _RATING.findall(reply)
    rating = float(found[-1]) if found else 0.0
    return rating if LOWEST <= rating <= HIGHEST else None


def mean_rating(config: JudgeConfig, ratings: Sequence[float]) -> CorpusMetric:
    """Measure the mean rating, 1 to 10."""
    prompt = hashlib.sha256(config.prompt.encode()).hexdigest()[:8]
    signature = f"judge|model:{config.model}|prompt:{prompt}|scale:1-10"
    return mean_of(ratings, signature)


def _session(config: JudgeConfig) -> requests.Session:
    return patient_session(retries=config.retries, parallel=config.parallel, key_variable=KEY)


def _ask(
    session: requests.Session, config: JudgeConfig, prompt: str, *, private: bool = False
) -> str | JudgeUnavailable:
    """Return the judge's reply, or the error in its place."""
    where = f"metric `judge`, {config.url}"
    body = {
        "model": config.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": config.max_tokens,
    }
    try:
        # A redirect would carry the texts, and perhaps the key, to another server.
        response = session.post(
            f"{config.url}/chat/completions", json=body, timeout=config.timeout, allow_redirects=False
        )
    except requests.RequestException as error:
        hint = "check `evaluation.judge.url`, and that the server runs; then run the same again"
        return JudgeUnavailable(f"the judge does not answer: {str(error)[:300]}", where=where, hint=hint)
    words = UNQUOTED if private else response.text[:200]
    if response.status_code != requests.codes.ok:
        hint = "see that the server takes requests for `evaluation.judge.model`, then run the same again"
        if response.status_code in (401, 403):
            hint = f"put the key into the environment variable {KEY} (in a cluster: Secret `skd-judge`, key `api-key`)"
        what = f"the judge refuses: {response.status_code} {response.reason}: {words}"
        return JudgeUnavailable(what, where=where, hint=hint)
    try:
        return str(response.json()["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        hint = "`url` must be the base of an OpenAI-compatible API, e.g. http://vllm:8000/v1"
        return JudgeUnavailable(f"not a chat completion: {words}", where=where, hint=hint)


def _fill(template: str, row: tuple[str, str, str]) -> str:
    """Fill in the prompt; in one pass, so that a text which holds `{target}` is shown unchanged."""
    values = dict(zip(("source", "target", "prediction"), row, strict=True))
    # Half a surrogate pair has no form in UTF-8.
    texts = {name: text[:MAX_CHARACTERS].encode("utf-8", "replace").decode() for name, text in values.items()}
    return _PLACES.sub(lambda place: texts[place[1]], template)
