"""`image_tools.py pin` against a real registry, and against one that wants to know who asks."""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import json
import ssl
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from image_tools import app
from pins import pin
from registry import registry_digest
from skd_kfp.components.images import Image, read_images
from skd_lib.errors import SkdError

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
FILE = """# What we run.
train:
  image: {host}/team/skd-train  # ours
  version: 0.1.0
  # put here by a command
  digest: ""  # sha256
comet:
  image: {host}/team/skd-comet
  version: 0.1.0
  digest: "{old}"
"""
OLD = "sha256:" + "0" * 64


def image_tools(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, str(result.exception) if isinstance(result.exception, SkdError) else result.output


def push(host: str, name: str, tag: str, *, index: bool = False) -> str:
    """Put a small image into a registry over its API, as docker does; its digest."""
    base = f"http://{host}/v2/{name}"
    config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
    digest = "sha256:" + hashlib.sha256(config).hexdigest()
    place = requests.post(f"{base}/blobs/uploads/", timeout=10).headers["Location"]
    requests.put(f"{place}&digest={digest}", data=config, timeout=10).raise_for_status()
    described = {"mediaType": "application/vnd.docker.container.image.v1+json", "size": len(config), "digest": digest}
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": []}
    response = _put(base, "inner" if index else tag, document)
    if index:
        entry = {
            "mediaType": MANIFEST,
            "size": len(json.dumps(document)),
            "digest": response,
            "platform": {"architecture": "amd64", "os": "linux"},
        }
        response = _put(base, tag, {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]})
    return response


def _put(base: str, tag: str, document: dict[str, Any]) -> str:
    headers = {"Content-Type": document["mediaType"]}
    response = requests.put(f"{base}/manifests/{tag}", data=json.dumps(document), headers=headers, timeout=10)
    response.raise_for_status()
    return response.headers["Docker-Content-Digest"]


@pytest.fixture
def digests_file(registry: str, tmp_path: Path) -> Path:
    path = tmp_path / "digests.yaml"
    path.write_text(FILE.format(host=registry, old=OLD))
    return path


def test_pin_writes_the_registrys_digests_and_check_tells_when_they_move(registry: str, digests_file: Path):
    train, comet = push(registry, "team/skd-train", "0.1.0"), push(registry, "team/skd-comet", "0.1.0", index=True)
    code, said = image_tools("pin", "--check", "--file", digests_file)
    assert code != 0
    assert "pinned is nothing" in said
    assert f"pinned is {OLD}, the registry has {comet}" in said

    code, said = image_tools("pin", "--file", digests_file)
    assert code == 0, said
    assert "skd compile" in said
    expected = FILE.format(host=registry, old=comet).replace('digest: ""', f'digest: "{train}"')
    assert digests_file.read_text() == expected  # comments and all
    assert image_tools("pin", "--check", "--file", digests_file)[0] == 0
    assert f"@{train}" in image_tools("show", "--file", digests_file)[1]
    assert "as before" in image_tools("pin", "train", "--file", digests_file)[1]


def test_missing_images_are_all_named_and_nothing_is_written(registry: str, tmp_path: Path):
    path = tmp_path / "digests.yaml"
    path.write_text(FILE.format(host=registry, old="").replace("0.1.0", "9.9.9"))
    before = path.read_text()
    code, said = image_tools("pin", "--file", path)
    assert code != 0
    for name in ("skd-train:9.9.9", "skd-comet:9.9.9"):
        assert f"{name}: the registry has no such image" in said
    assert path.read_text() == before


def test_unknown_image_and_unreachable_registry(tmp_path: Path):
    assert "there is no image 'trian'" in image_tools("lock", "trian")[1]
    with pytest.raises(SkdError, match="cannot be reached"):
        registry_digest(Image(image="127.0.0.1:9/team/x", version="1", digest=""))


def test_file_without_a_line_for_a_digest_is_left_alone(tmp_path: Path):
    path = tmp_path / "digests.yaml"
    path.write_text('train: {image: a.example/b, version: "1", digest: ""}\n')
    with pytest.raises(SkdError, match="no line of its own"):
        pin(path, {"train": OLD})
    assert OLD not in path.read_text()


def test_pins_of_one_image_leave_the_next_alone(tmp_path: Path):
    path = tmp_path / "digests.yaml"
    path.write_text(
        "a:\n  image: x.example/a\n  version: '1'\n  digest: ''\n"
        "b:\n  digest: ''\n  image: x.example/b\n  version: '2'\n"
    )
    assert pin(path, {"b": OLD}) == ["b"]
    assert {name: image.digest for name, image in read_images(path).items()} == {"a": "", "b": OLD}


class Guarded(BaseHTTPRequestHandler):
    """A registry behind a token service, as ghcr.io is one: who asks gets a challenge, who is known gets a token."""

    digest = "sha256:" + "a" * 64

    def do_HEAD(self) -> None:
        if self.headers.get("Authorization") != "Bearer good":
            self.send_response(401)
            realm = f"https://{self.headers['Host']}/token"
            self.send_header(
                "WWW-Authenticate", f'Bearer realm="{realm}",service="here",scope="repository:team/x:pull"'
            )
        else:
            self.send_response(200)
            self.send_header("Docker-Content-Digest", self.digest)
        self.end_headers()

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        user = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        good = query == {"service": ["here"], "scope": ["repository:team/x:pull"]} and user == "ann:secret"
        body = json.dumps({"token": "good" if good else "bad"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Host of a registry that gives digests to Ann alone, over TLS under a name that is not this machine's own."""
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(_self_signed("localhost.localdomain"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with ThreadingHTTPServer(("0.0.0.0", 0), Guarded) as server:  # noqa: S104
        server.socket = context.wrap_socket(server.socket, server_side=True)
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"0.0.0.0:{server.server_port}"
        server.shutdown()


def _self_signed(name: str) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("0.0.0.0"))  # noqa: S104
    names = x509.SubjectAlternativeName([x509.DNSName(name), address])
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + signed.public_bytes(serialization.Encoding.PEM)


def test_challenge_is_answered_with_the_credentials_of_docker_login(guarded: str, tmp_path: Path):
    image = Image(image=f"{guarded}/team/x", version="1", digest="")
    with pytest.raises(SkdError, match=rf"does not let us see[\s\S]*docker login {guarded}"):
        registry_digest(image)
    auth = base64.b64encode(b"ann:secret").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {guarded: {"auth": auth}}}))
    assert registry_digest(image) == Guarded.digest


def test_answer_that_is_no_digest_is_refused(guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    auth = base64.b64encode(b"ann:secret").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {guarded: {"auth": auth}}}))
    monkeypatch.setattr(Guarded, "digest", "latest")
    with pytest.raises(SkdError, match="where a sha256 digest was expected"):
        registry_digest(Image(image=f"{guarded}/team/x", version="1", digest=""))
