"""HTTP to an API that may be busy: requests that are repeated, with longer and longer pauses."""

from __future__ import annotations

import os

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

_BUSY = (408, 409, 429, 500, 502, 503, 504)
_LONGEST_PAUSE_S = 60


def patient_session(*, retries: int, parallel: int, key_variable: str, pause_s: float = 0.5) -> requests.Session:
    """Return a session for an OpenAI-compatible API.

    Args:
        retries: Further tries where the server is busy, fails or does not answer. A header Retry-After sets the pause.
        parallel: Connections at once.
        key_variable: Environment variable of the API's key; no key is sent where it is not set.
        pause_s: Pause before the third try; each further one is twice as long, up to a minute.
    """
    retry = Retry(
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
