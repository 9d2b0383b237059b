"""Sources other than single files: the hub's library on a local dataset folder, and gettext catalogs in wheels."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import httpx2
import polib
import pytest

from skd_lib.config import Columns, FilesSource, GettextSource, HubSource
from skd_lib.data import sources
from skd_lib.data.gettext_catalogs import read_wheel
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.models import wheels

# --- hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, count in (("train", 5), ("test", 2)):
        rows = [{"question": f"{split} {i}?", "answer": str(i)} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("max_rows", [None, 3])
def test_a_dataset_is_loaded_by_split(dataset: Path, max_rows: int | None) -> None:
    columns = Columns(source="question", target="answer")
    splits = sources.load(HubSource(type="hub", dataset=str(dataset), columns=columns), max_rows=max_rows)
    assert [example.source for example in splits.train] == [f"train {i}?" for i in range(max_rows or 5)]
    assert [example.target for example in splits.test or []] == ["0", "1"]
    assert splits.validation is None


def test_a_dataset_without_the_column_says_which_it_has(dataset: Path) -> None:
    with pytest.raises(SkdErrors) as caught:
        sources.load(HubSource(type="hub", dataset=str(dataset), columns=Columns(source="question")))
    assert [error.where for error in caught.value.errors] == [
        f"{dataset}, split `train`, field `target`",
        f"{dataset}, split `test`, field `target`",
    ]
    assert "question, answer" in caught.value.errors[0].hint


def test_a_missing_split_is_named(dataset: Path) -> None:
    columns = Columns(source="question", target="answer")
    with pytest.raises(SkdError, match="dev") as caught:
        sources.load(HubSource(type="hub", dataset=str(dataset), validation_split="dev", columns=columns))
    assert "names of the splits" in caught.value.hint


@pytest.mark.parametrize(
    ("train", "test", "rows"),
    [
        ("train[:3]", "train[3:]", ([0, 1, 2], [3, 4])),
        ("train[:60%]", "train[60%:]", ([0, 1, 2], [3, 4])),
        ("train[1:-2]", "train[-2:]", ([1, 2], [3, 4])),
        ("train[:1]+train[2:3]", "train[4:]", ([0, 2], [4])),
    ],
)
def test_slices_of_a_split_are_the_same_for_preflight(
    dataset: Path, train: str, test: str, rows: tuple[list[int], list[int]]
) -> None:
    columns = Columns(source="question", target="answer")
    source = HubSource(type="hub", dataset=str(dataset), train_split=train, test_split=test, columns=columns)
    for max_rows in (None, 100):
        splits = sources.load(source, max_rows=max_rows)
        found = ([example.target for example in part or []] for part in (splits.train, splits.test))
        assert tuple(found) == tuple([str(number) for number in part] for part in rows), max_rows
    assert len(sources.load(source, max_rows=1).train) == 1


def test_a_slice_of_a_split_that_is_not_there_is_named(dataset: Path) -> None:
    columns = Columns(source="question", target="answer")
    for split in ("dev[:3]", "train[", "train[:x]"):
        for max_rows in (None, 3):
            with pytest.raises(SkdError, match="cannot load the dataset"):
                sources.load(
                    HubSource(type="hub", dataset=str(dataset), train_split=split, columns=columns), max_rows=max_rows
                )


def test_names_of_labels_are_targets_where_the_columns_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "labelled"
    folder.mkdir()
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    table.select([0, 1]).to_parquet(str(folder / "train.parquet"))
    source = {"type": "hub", "dataset": str(folder), "test_split": None}
    plain = {"source": "text", "target": "label"}
    named = plain | {"cast": {"label": "label_name"}}
    file = {"type": "files", "train": [str(folder / "train.parquet")]}
    for max_rows in (None, 10):
        for each in (
            HubSource.model_validate(source | {"columns": named}),
            FilesSource.model_validate(file | {"columns": named}),
        ):
            assert [row.target for row in sources.load(each, max_rows=max_rows).train] == ["good", "bad"]
        with pytest.raises(SkdErrors) as caught:
            sources.load(HubSource.model_validate(source | {"columns": plain}), max_rows=max_rows)
        assert "cast: {label: label_name}" in caught.value.errors[0].hint
    table.to_parquet(str(folder / "train.parquet"))
    with pytest.raises(SkdErrors, match="row 3, field `label`: must be the number of a label, 0 to "):
        sources.load(FilesSource.model_validate(file | {"columns": named}))


def test_a_dataset_that_cannot_be_reached_is_named() -> None:
    # The tests run with HF_HUB_OFFLINE=1, so no dataset of the hub can be reached.
    with pytest.raises(SkdError) as caught:
        sources.load(HubSource(type="hub", dataset="an-org/no-such-dataset"))
    assert "an-org/no-such-dataset" in str(caught.value)
    assert "data.source" in caught.value.hint


def test_a_hub_without_a_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise httpx2.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", away)
    with pytest.raises(SkdError, match="cannot reach the dataset on the hub: ") as caught:
        sources.identify(HubSource(type="hub", dataset="an-org/no-such-dataset"))
    assert "check the network" in caught.value.hint


def test_a_pinned_commit_identifies_a_dataset_without_the_network() -> None:
    source = HubSource(type="hub", dataset="an-org/no-such-dataset", revision="0123456789" * 4)
    assert sources.identify(source) == [{"dataset": source.dataset, "revision": source.revision}]


# --- gettext ------------------------------------------------------------------------------------------------------

CATALOG = r"""
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\n"

msgid "The file was saved."
msgstr "Le fichier a été enregistré."

msgctxt "again"
msgid "The file was saved."
msgstr "Le fichier a été enregistré."

#, fuzzy
msgid "The file was closed."
msgstr "Le fichier a été ouvert."

msgid "%d file was found"
msgid_plural "%d files were found"
msgstr[0] "%d fichier a été trouvé"
msgstr[1] "%d fichiers ont été trouvés"

msgid "Save now"
msgstr "Enregistrer maintenant le fichier"

msgid "Not yet translated text"
msgstr ""

msgid "Apache License 2.0"
msgstr "Apache License 2.0"

#~ msgid "An old obsolete entry."
#~ msgstr "Une ancienne entrée obsolète."
"""


def make_wheel(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_only_usable_entries_are_taken(tmp_path: Path) -> None:
    catalog = "pkg/locale/fr/LC_MESSAGES/django.po"
    wheel = make_wheel(tmp_path / "pkg.whl", **{catalog: CATALOG.encode(), "pkg/locale/de/LC_MESSAGES/x.po": b"broken"})
    pairs = read_wheel(wheel, "pkg==1", "fr", min_words=3)
    assert [(example.source, example.target, example.origin) for example in pairs.examples] == [
        ("Le fichier a été enregistré.", "The file was saved.", f"pkg==1: {catalog}")
    ]
    assert pairs.left_out == {
        "duplicate": 1,
        "fuzzy": 1,
        "plural": 1,
        "fewer than 3 words": 1,
        "untranslated": 1,
        "copy of the original": 1,
        "obsolete": 1,
    }


def test_long_entries_are_left_out_on_demand(tmp_path: Path) -> None:
    catalog = (
        b'msgid "One two three"\nmsgstr "Un deux trois"\n\nmsgid "Only three words"\nmsgstr "Quatre mots en tout"\n'
    )
    wheel = make_wheel(tmp_path / "pkg.whl", **{"a/fr/LC_MESSAGES/a.po": catalog})
    pairs = read_wheel(wheel, "pkg==1", "fr", min_words=3, max_words=3)
    assert [example.target for example in pairs.examples] == ["One two three"]
    assert pairs.left_out == {"more than 3 words": 1}


def test_compiled_catalogs_are_read_where_there_is_no_source(tmp_path: Path) -> None:
    compiled = polib.pofile(CATALOG).to_binary()
    wheel = make_wheel(
        tmp_path / "pkg.whl",
        **{
            "a/fr/LC_MESSAGES/a.mo": compiled,
            "b/fr/LC_MESSAGES/b.mo": b"never read: the source is there",
            "b/fr/LC_MESSAGES/b.po": b'msgid "One two three"\nmsgstr "Un deux trois"\n',
        },
    )
    pairs = read_wheel(wheel, "pkg==1", "fr", min_words=3)
    assert [example.target for example in pairs.examples] == ["The file was saved.", "One two three"]


@pytest.mark.parametrize("name", ["a.po", "a.mo"])
def test_a_broken_catalog_is_named(tmp_path: Path, name: str) -> None:
    wheel = make_wheel(tmp_path / "pkg.whl", **{f"fr/LC_MESSAGES/{name}": b"no catalog at all"})
    with pytest.raises(SkdError, match="cannot read the catalog") as caught:
        read_wheel(wheel, "pkg==1", "fr", min_words=3)
    assert caught.value.where == f"pkg.whl, fr/LC_MESSAGES/{name}"


def test_a_language_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "pkg.whl", **{"pt_BR/LC_MESSAGES/a.po": b"", "de/LC_MESSAGES/a.po": b""})
    with pytest.raises(SkdError, match="no gettext catalog") as caught:
        read_wheel(wheel, "pkg==1", "fr", min_words=3)
    assert "de, pt_BR" in caught.value.hint


def test_something_else_than_a_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pkg.whl").write_bytes(b"no zip")
    with pytest.raises(SkdError, match="not a wheel"):
        read_wheel(tmp_path / "pkg.whl", "pkg==1", "fr", min_words=3)


def test_each_split_has_its_own_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(requirement: str, sha256: str) -> Path:
        text = f'msgid "From the package {requirement}"\nmsgstr "Du paquet {requirement}"\n'
        return make_wheel(tmp_path / f"{requirement}.whl", **{"fr/LC_MESSAGES/a.po": text.encode()})

    # The network's part only: what is fetched is a real wheel.
    monkeypatch.setattr(wheels, "fetch_wheel", fetch)
    source = GettextSource.model_validate(
        {
            "type": "gettext",
            "language": "fr",
            "train": [{"requirement": "a==1", "sha256": "0" * 64}, {"requirement": "b==1", "sha256": "1" * 64}],
            "validation": [{"requirement": "c==1", "sha256": "2" * 64}],
            "test": [{"requirement": "d==1", "sha256": "3" * 64}],
        }
    )
    splits = sources.load(source)
    assert [example.source for example in splits.train] == ["Du paquet a==1", "Du paquet b==1"]
    assert [example.target for example in splits.validation or []] == ["From the package c==1"]
    assert [example.target for example in splits.test or []] == ["From the package d==1"]
