"""Pauses of a session for a busy API."""

from __future__ import annotations

import logging

import pytest
from urllib3 import HTTPResponse

from skd_lib._core.http import patient_session


@pytest.mark.parametrize(("asked", "obeyed"), [("86400", 600), ("601", 600), ("599", 599), ("0", 0), (None, None)])
def test_a_server_may_ask_for_a_pause_of_ten_minutes_at_most(
    asked: str | None, obeyed: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    retry = patient_session(retries=1, parallel=1, key_variable="NO_KEY").get_adapter("http://host").max_retries
    answer = HTTPResponse(status=429, headers={} if asked is None else {"Retry-After": asked})
    with caplog.at_level(logging.WARNING):
        assert retry.new().get_retry_after(answer) == obeyed
    assert ("asks for a pause" in caplog.text) == (obeyed == 600)
