"""Problems are right, splits share none, and what is written twice is the same twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from evidence import app
from prepare import CONTEXT, prepare
from pretraining import TASK, pretrain
from problems import ProblemSpace, distinct
from skd_lib.config import load_config
from skd_lib.data.examples import make_example, read_jsonl
from skd_lib.data.tokenize import decode_answer, encode, encode_prompt
from skd_lib.errors import SkdError
from skd_lib.evaluation.answers import extract_answer
from skd_lib.models.files import describe, weights_digest
from skd_lib.models.loading import load_model
from tiny_models import EOS, SIZES, forward_cost, random_model, tokenizer_for

CONFIGS = Path(__file__).parents[2] / "docs/evidence/configs"
SPACE = ProblemSpace()


@given(st.integers(0, 2**31), st.tuples(st.integers(1, 3), st.integers(3, 9)), st.integers(81, 250))
def test_every_line_of_a_solution_is_true_and_follows(seed: int, addends: tuple[int, int], largest: int) -> None:
    space = ProblemSpace(largest=largest, addends=addends)
    question, solution = space.draw(random.Random(seed))
    *lines, last = solution.split("\n")
    value = eval(question)  # noqa: S307 - digits and signs, made here
    assert extract_answer(last) == value
    before = None
    for line in lines:
        left, _, right = line.partition("=")
        assert eval(left) == int(right)  # noqa: S307
        assert before is None or left.startswith(before)
        assert 0 <= int(right) <= largest
        before = right
    assert space.operations[0] <= len(lines) <= space.operations[1]


def test_problems_are_distinct_and_follow_from_the_seed() -> None:
    problems = distinct(SPACE, 300, seed=3)
    assert len({question for question, _ in problems}) == 300
    assert problems == distinct(SPACE, 300, seed=3) != distinct(SPACE, 300, seed=4)


def test_too_many_problems_are_told() -> None:
    with pytest.raises(SkdError, match="distinct problems were found"):
        distinct(ProblemSpace(operations=(1, 1), products=1.0), 100, seed=0)


def test_what_is_decoded_is_what_was_encoded() -> None:
    tokenizer = tokenizer_for(SPACE, CONTEXT)
    assert len(tokenizer) == 208
    end = tokenizer.convert_tokens_to_ids(EOS)
    for question, solution in distinct(SPACE, 200, seed=1):
        tokens = encode(tokenizer, TASK, make_example(question, solution), end)
        assert decode_answer(tokenizer, TASK, tokens.response_ids) == solution
        assert tokens.response_ids[-1] == end
        assert len(encode_prompt(tokenizer, TASK, question)) <= TASK.max_prompt_tokens
        assert len(tokens.response_ids) < TASK.max_new_tokens


def test_models_and_splits_are_written_and_are_the_same_again(tmp_path: Path) -> None:
    counts = {"train": 60, "validation": 10, "test": 20, "pretraining": 0, "seed": 5}
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        written = prepare(folder, space=SPACE, **counts)
        assert {path.name for path in written} == {"train.jsonl", "validation.jsonl", "test.jsonl", *SIZES}
    splits = {name: read_jsonl(folders[0] / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 60, "validation": 10, "test": 20}
    assert len({row.source for rows in splits.values() for row in rows}) == 90
    for name in SIZES:
        assert weights_digest(folders[0] / name) == weights_digest(folders[1] / name)
        # What a forward pass multiplies by: all but embeddings (tied to the head) and norms.
        size, layers = describe(folders[0] / name), SIZES[name]["num_hidden_layers"]
        hidden = SIZES[name]["hidden_size"]
        assert size["num_parameters"] == forward_cost(name) + 208 * hidden + (2 * layers + 1) * hidden
    assert (folders[0] / "train.jsonl").read_bytes() == (folders[1] / "train.jsonl").read_bytes()
    assert load_model(folders[0] / "student").config.eos_token_id is not None


def test_pre_training_teaches_the_form() -> None:
    tokenizer = tokenizer_for(SPACE, CONTEXT)
    model = random_model(SIZES["student"], tokenizer, CONTEXT, seed=0)
    result = pretrain(model, tokenizer, SPACE, steps=10, seed=0)
    assert result.best_validation_loss < 0.8 * result.first_validation_loss


def test_the_command_says_what_it_wrote_and_what_is_wrong(tmp_path: Path) -> None:
    few = ["--train", "5", "--validation", "2", "--test", "2", "--pretraining", "0"]
    done = CliRunner().invoke(app, ["prepare", str(tmp_path), *few])
    assert done.exit_code == 0
    assert f"{tmp_path}/student" in done.output
    (tmp_path / "file").touch()
    refused = CliRunner().invoke(app, ["prepare", str(tmp_path / "file"), *few])
    assert isinstance(refused.exception, SkdError)


def test_the_configuration_asks_as_pre_training_does() -> None:
    base = load_config(CONFIGS / "arithmetic.yaml")
    assert base.task == TASK
