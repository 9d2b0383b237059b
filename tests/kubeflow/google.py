"""An issuer of Google's OpenID Connect tokens: real keys, a real token endpoint, real certificates, over HTTP."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import crypt, jwt

from tests.support import http

ACCOUNT = "pusher@project.iam.gserviceaccount.com"


class Issuer:
    """Used as a context manager around its server."""

    def __init__(self) -> None:
        self.issued = 0
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        name, now = x509.Name([]), datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .sign(key, hashes.SHA256())
        )
        self._certs = {"key-1": certificate.public_bytes(serialization.Encoding.PEM).decode()}
        self._signer = crypt.RSASigner.from_string(self._pem, key_id="key-1")
        issuer = self

        class Handler(http.Handler):
            def do_GET(self) -> None:
                self._send(issuer._certs)

            def do_POST(self) -> None:
                body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                asked = jwt.decode(body["assertion"][0], verify=False)
                self._send({"id_token": issuer.token(asked["target_audience"])})

            def _send(self, value: Any) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self._server = http.Server(Handler)
        self.url = self._server.url

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.__exit__()

    def token(self, audience: str, **claims: Any) -> str:
        self.issued += 1
        now = int(time.time())
        payload = {
            "iss": "https://accounts.google.com",
            "aud": audience,
            "iat": now,
            "exp": now + 3600,
            "email": ACCOUNT,
            "email_verified": True,
            "jti": str(self.issued),
            **claims,
        }
        return jwt.encode(self._signer, payload).decode()

    def claims(self, token: str) -> Any:
        return jwt.decode(token, certs=self._certs, audience=None)

    def write_key(self, path: Path) -> Path:
        """A service account's key file whose token endpoint is ours."""
        key = {
            "type": "service_account",
            "client_email": ACCOUNT,
            "private_key": self._pem,
            "private_key_id": "key-1",
            "token_uri": f"{self.url}/token",
        }
        path.write_text(json.dumps(key), encoding="utf-8")
        return path
