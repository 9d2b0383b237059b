from __future__ import annotations

import yaml

from skd_lib import __version__
from skd_lib.models.card import Lineage, model_card


def test_card_tells_the_lineage() -> None:
    lineage = Lineage(
        base="org/student",
        method="skd",
        teacher="org/teacher",
        data_fingerprint="fp123",
        settings={"top_k": 25},
    )
    card = model_card("demo student", lineage, {"chrf": 30.512345})
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "transformers"
    assert "skd" in head["tags"]
    assert "# demo student\n" in card
    for row in (
        "| Started from | org/student |",
        "| Teacher | org/teacher |",
        "| Data fingerprint | fp123 |",
        "| Method | skd |",
        f"| Made by | skd-lib {__version__} |",
        "| top_k | 25 |",
        "| chrf | 30.51 |",
    ):
        assert row in card


def test_what_is_unknown_is_left_out() -> None:
    card = model_card("cut", Lineage(base="a|b", method="prune"))
    assert "Teacher" not in card
    assert "Scores" not in card
    assert "Settings" not in card
    assert "| Started from | a\\|b |" in card
