"""HTTP to an API that may be busy: requests that are repeated, with longer and longer pauses."""

from __future__ import annotations

import logging
import os
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

log = logging.getLogger(__name__)
UNQUOTED = "its words are not shown, since they may quote private data (`data.private`)"
"""In the place of a server's words about private data."""
_BUSY = (408, 409, 429, 500, 502, 503, 504)
_LONGEST_PAUSE_S = 60
_LONGEST_ASKED_S = 600


class _Bounded(Retry):
    """Obeys a header Retry-After, up to a limit: a server may ask for a day."""

    def get_retry_after(self, response: Any) -> float | None:
        """Return the seconds that the server asks for, or the limit."""
        asked = super().get_retry_after(response)
        if asked is not None and asked > _LONGEST_ASKED_S:
            log.warning("the server asks for a pause of %.0f s, asked again in %d s", asked, _LONGEST_ASKED_S)
            return _LONGEST_ASKED_S
        return asked


def patient_session(*, retries: int, parallel: int, key_variable: str, pause_s: float = 0.5) -> requests.Session:
    """Return a session for an OpenAI-compatible API.

    Args:
        retries: Further tries where the server is busy, fails or does not answer. A header Retry-After sets the pause,
            up to ten minutes.
        parallel: Connections at once.
        key_variable: Environment variable of the API's key; no key is sent where it is not set.
        pause_s: Pause before the third try; each further one is twice as long, up to a minute.
    """
    retry = _Bounded(
        retries,
        backoff_factor=pause_s,
        backoff_max=_LONGEST_PAUSE_S,
        status_forcelist=_BUSY,
        allowed_methods=None,  # a question asked twice does no harm
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=parallel))
    if key := os.environ.get(key_variable):
        session.headers["Authorization"] = f"Bearer {key}"
    return session
