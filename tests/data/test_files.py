"""Which files a path, a folder or a glob stands for, what is refused, and that no bytes end in a traceback."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skd_lib.config import DataConfig, FilesSource, parse_section
from skd_lib.data import sources
from skd_lib.data.files import data_files
from skd_lib.data.prepared import data_fingerprint
from skd_lib.errors import SkdError
from skd_lib.specdec.prompts import read_prompts


def row(text: str) -> str:
    return json.dumps({"source": text, "target": text}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as Spark and people leave them."""
    folder = tmp_path / "data"
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl.gz", "_SUCCESS", "README.md", ".hidden.jsonl", "_tmp/x.jsonl"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = row(path.name).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    return folder


def test_folders_and_globs_are_files_in_one_order(folder: Path) -> None:
    def names(pattern: str) -> list[str]:
        return [path.removeprefix(f"{folder}/") for path in data_files(pattern)]

    assert names(str(folder)) == names(f"{folder}/") == ["a.jsonl", "b.jsonl", "deep/c.jsonl.gz"]
    assert names(f"{folder}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{folder}/[b-z].jsonl") == ["b.jsonl"]
    assert names(f"{folder}/*/?.jsonl*") == ["_tmp/x.jsonl", "deep/c.jsonl.gz"]
    assert names(f"{folder}/**/*.gz") == ["deep/c.jsonl.gz"]
    assert names(f"{folder}/**/a.jsonl") == ["a.jsonl"]
    (folder / "odd [1]?.jsonl").write_text(row("odd"), encoding="utf-8")
    assert names(f"{folder}/odd [1]?.jsonl") == ["odd [1]?.jsonl"]
    assert [example.source for example in sources.load(FilesSource(train=[f"{folder}/[ab].jsonl"])).train] == [
        "a.jsonl",
        "b.jsonl",
    ]


def test_the_fingerprint_is_of_the_files_that_a_folder_has_now(folder: Path) -> None:
    def fingerprint() -> str:
        return data_fingerprint(DataConfig(source=FilesSource(train=[str(folder)])))

    before = fingerprint()
    (folder / "README.md").write_text("other words", encoding="utf-8")
    assert fingerprint() == before
    (folder / "c.jsonl").write_text(row("more"), encoding="utf-8")
    assert fingerprint() != before


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder_of_nothing(path: Path) -> None:
    path.mkdir()
    (path / "README.md").touch()


def a_folder_with_a_pipe(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "a.jsonl")


def a_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (a_pipe, "not a regular file"),
        (a_socket, "not a regular file"),
        (a_link_to_a_device, "not a regular file"),
        (a_folder_with_a_pipe, "not a regular file"),
        (a_folder_of_nothing, "there is no data file here"),
        (a_broken_link, "No such file"),
    ],
)
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], what: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("a.jsonl")
    make(path)
    for look in (sources.load, sources.identify):
        with pytest.raises(SkdError, match=what) as caught:
            look(FilesSource(train=[str(path)]))
        assert "a.jsonl" in str(caught.value)
    prompts = Path("prompts.txt")
    make(prompts)
    with pytest.raises(SkdError):
        read_prompts(prompts, column="source", limit=1)


@pytest.mark.parametrize("uri", ["https://user:secret@host/a.jsonl", "hf://datasets/a/b.jsonl"])
def test_a_uri_that_nothing_is_read_from_is_said_to_be_one(uri: str) -> None:
    with pytest.raises(SkdError, match=":// URIs are not read") as caught:
        data_files(uri)
    assert "hub has its id" in str(caught.value)
    assert "secret" not in str(caught.value)
    with pytest.raises(SkdError, match=":// URIs are not read") as caught:
        parse_section(FilesSource, {"train": [uri]}, where="run.yaml")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["*.nothing", "no/such/*.jsonl", "x" * 300])
def test_a_path_that_stands_for_nothing_is_an_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(SkdError) as caught:
        sources.load(FilesSource(train=[str(tmp_path / pattern)]))
    assert "hint" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_are_an_error(folder: Path) -> None:
    for path in (folder / "a.jsonl", folder / "deep"):
        mode = path.stat().st_mode
        path.chmod(0)
        for look in (sources.load, sources.identify):
            with pytest.raises(SkdError, match="Permission denied"):
                look(FilesSource(train=[str(folder)]))
        path.chmod(mode)


# --- prompts ------------------------------------------------------------------------------------------------------


def test_lines_of_a_text_file_are_prompts_whatever_else_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    prompts = ["first\u2028part", "second\x85\x0b\x0c\x1c\x1d\x1epart", "third\u2029", " spaces stay "]
    path.write_bytes(("\ufeff" + "\r\n".join([*prompts[:2], "  ", *prompts[2:]]) + "\n").encode())
    assert read_prompts(path, column="source", limit=10) == prompts
    assert read_prompts(path, column="source", limit=1) == prompts[:1]
    path.write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(SkdError, match="row 2: not UTF-8 text"):
        read_prompts(path, column="source", limit=10)


# --- any bytes at all ---------------------------------------------------------------------------------------------


def _content(ending: str) -> bytes:
    rows = [{"source": f'quest"ion {i}', "target": f"réponse\n{i}"} for i in range(5)]
    if ending == "parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return bytes(sink.getvalue())
    if ending == "json":
        return json.dumps(rows).encode()
    if ending == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    mark = "," if ending == "csv" else "\t"
    return f'source{mark}target\n"a, b{mark} c"{mark}d\n"e ""f"""{mark}g\n'.encode()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]),
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(max_size=3), st.integers(0, 3)), max_size=4),
)
def test_no_bytes_end_in_a_traceback(
    tmp_path: Path, ending: str, packed: bool, edits: list[tuple[float, bytes, int]]
) -> None:
    content = _content(ending)
    packed = packed and ending != "parquet"
    content = gzip.compress(content) if packed else content
    for place, inserted, deleted in edits:
        start = int(place * len(content))
        content = content[:start] + inserted + content[start + deleted :]
    path = tmp_path / f"a.{ending}{'.gz' if packed else ''}"
    path.write_bytes(content)
    for max_rows in (None, 3):
        try:
            examples = sources.load(FilesSource(train=[str(path)]), max_rows=max_rows).train
        except SkdError as error:
            str(error).encode()
        else:
            assert all(example.source.strip() and example.target.strip() for example in examples)
