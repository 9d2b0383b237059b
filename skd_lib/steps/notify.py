"""The message to a chat channel about the end of a pipeline run, through an incoming webhook as Slack has it.

Mattermost, Rocket.Chat, Google Chat and Discord (with `/slack` after its URL) take the same message. The webhook's URL
is a secret, by which anyone can write to the channel: it is read from the environment, and neither logged nor part of
an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from skd_lib._core.uris import redacted, shown

log = logging.getLogger(__name__)
WEBHOOK_VARIABLE = "SKD_NOTIFY_WEBHOOK"
TIMEOUT_SECONDS = (5.0, 10.0)
BACKOFF_SECONDS = 1.0
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
_LONGEST_ERROR = 500
_MOST_FIGURES = 12
_ENDS = {"SUCCEEDED": "succeeded", "FAILED": "failed", "CANCELED": "was cancelled", "STOPPED": "was stopped"}


@dataclass(frozen=True)
class Message:
    """The end of a run.

    `state` is how it ended, see `skd_lib.tracking.ending.Ending`; empty if nothing tells. `figures` have the names of
    `Summary.headline`.
    """

    run_name: str
    state: str
    error: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)

    def head(self) -> str:
        """Return the end in one or two lines of plain text."""
        return f"{self.run_name} {self._end()}" + (f"\n{self._reason()}" if self.error else "")

    def text(self) -> str:
        """Return the message, in Slack's markup."""
        lines = [f"*{_escaped(self.run_name)}* {self._end()}"]
        if self.error:
            lines.append(_escaped(self._reason()))
        lines += [f"• {_escaped(line)}" for line in _figure_lines(self.figures)[:_MOST_FIGURES]]
        links = [f"<{_escaped(shown(url))}|{_escaped(what)}>" for what, url in self.links.items()]
        return "\n".join([*lines, *([" · ".join(links)] if links else [])])

    def _end(self) -> str:
        return _ENDS.get(self.state, "ended; Kubeflow does not say how")

    def _reason(self) -> str:
        return " ".join(redacted(self.error).split())[:_LONGEST_ERROR]


def notify(message: Message) -> bool:
    """Send the message to the webhook in `SKD_NOTIFY_WEBHOOK`; a failure is a warning, never an error.

    It is sent up to three times where the service cannot be reached or says that it is not able to. Returns whether the
    service took it.
    """
    url = os.environ.get(WEBHOOK_VARIABLE, "").strip()
    if not url:
        return False
    try:
        reason = _fault(url) or _send(url, message.text())
    except (OSError, ValueError) as error:  # requests' and urllib3's; their text may hold the URL
        reason = type(error).__name__
    if reason:
        log.warning("the run's end was not sent to the channel: %s (the webhook is in %s)", reason, WEBHOOK_VARIABLE)
    return not reason


def _fault(url: str) -> str:
    """Return what is wrong with a webhook's URL, in words that do not contain it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "the webhook is not a URL"
    if parts.scheme not in ("http", "https") or not host:
        return "the webhook is not a URL"
    if parts.scheme == "http" and host not in _LOCAL_HOSTS:
        return "the webhook is not https://"
    return ""


def _send(url: str, text: str) -> str:
    """Post the message, and return why it did not arrive; empty if it did."""
    # Both log the URL's path: at each repetition, and at level DEBUG at each request.
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.CRITICAL)
    retry = Retry(
        total=2,
        read=0,  # a message that was sent and not answered is there, most likely
        redirect=False,
        backoff_factor=BACKOFF_SECONDS,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods={"POST"},
        raise_on_status=False,
        respect_retry_after_header=False,
    )
    with requests.Session() as session:
        session.mount(f"{urlsplit(url).scheme}://", HTTPAdapter(max_retries=retry))
        # A redirect would take the message, and with it the run's figures, to another place.
        with session.post(
            url, json={"text": text}, timeout=TIMEOUT_SECONDS, allow_redirects=False, stream=True
        ) as answer:
            return "" if answer.ok and not answer.is_redirect else f"the service answered {answer.status_code}"


def _figure_lines(figures: Mapping[str, float]) -> list[str]:
    """Return the student's scores with the teacher's and those before, drafts likewise; of a comparison every mean."""
    lines = []
    for name, value in figures.items():
        thing, _, metric = name.partition("/")
        if thing == "student_after":
            others = {"before": f"student_before/{metric}", "teacher": f"teacher/{metric}"}
            what = f"{metric} of the student"
        elif thing == "draft_after":
            others, what = {"before": f"draft_before/{metric}"}, metric
        else:
            continue
        known = ", ".join(f"{label} {figures[other]:.4g}" for label, other in others.items() if other in figures)
        lines.append(f"{what.replace('_', ' ')}: {value:.4g}" + (f" ({known})" if known else ""))
    return lines or [f"{name}: {value:.4g}" for name, value in figures.items()]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
