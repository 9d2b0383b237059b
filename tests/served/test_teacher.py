"""A teacher on a server against the same model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skd_lib.config import EvaluationConfig, SamplingParams, TaskConfig
from skd_lib.config.models import ServedTeacher
from skd_lib.data.examples import make_example
from skd_lib.data.tokenize import TokenizedExample
from skd_lib.errors import SkdError
from skd_lib.evaluation.evaluate import evaluate
from skd_lib.sampling.acceptance import student_only
from skd_lib.sampling.engine import Sampler
from skd_lib.served import answers, client
from skd_lib.served.teacher import RemoteTeacher, Unreadable, with_rest
from skd_lib.training.stored_teacher import store_signals
from tests.served.conftest import ENDS, EOS, MakeTeacher
from tests.support.completions_server import MODEL, CompletionsServer
from tests.support.logged import undocumented
from tests.support.storage_server import Server

NEW = 12
ROWS = 24
FAILS = 10
"""Number of the request that fails, when that of `ROWS` prompts are asked for."""
MOST_REPEATED = 1 + ROWS - FAILS + 1
"""Requests of the next attempt: the probe of the tokens, what was not asked for, and the one that failed."""
GREEDY = SamplingParams(temperature=0.0)
WARM = SamplingParams(temperature=0.8, top_p=0.9)
PROMPTS = [[1, 40 + row, *range(60, 60 + row % 5)] for row in range(ROWS)]
RECORD = Path(__file__).with_name("vllm-0.32.0.json")


def own_responses(model: PreTrainedModel, params: SamplingParams, seeds: list[int]) -> list[list[int]]:
    sampler = Sampler(
        student=model,
        teacher=None,
        rule=student_only(),
        student_params=params,
        eos_ids=ENDS,
        pad_id=0,
        max_new_tokens=NEW,
    )
    return sampler.sample(PROMPTS, seeds).responses()


def examples(model: PreTrainedModel) -> list[TokenizedExample]:
    return [
        TokenizedExample(prompt, response, f"example {row}")
        for row, (prompt, response) in enumerate(
            zip(PROMPTS, own_responses(model, WARM, list(range(ROWS))), strict=True)
        )
    ]


def ask(teacher: RemoteTeacher, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return teacher.responses(prompts, list(range(len(prompts))), GREEDY, max_new_tokens=NEW)


@pytest.mark.parametrize("params", [GREEDY, WARM])
def test_responses_are_the_models_own(
    model: PreTrainedModel, make_teacher: MakeTeacher, params: SamplingParams
) -> None:
    seeds = [7 * row for row in range(len(PROMPTS))]
    found = make_teacher().responses(PROMPTS, seeds, params, max_new_tokens=NEW)
    assert found == own_responses(model, params, seeds)
    assert {len(ids) for ids in found} != {NEW}  # some end


def test_requests_name_all_that_decides(server: CompletionsServer, make_teacher: MakeTeacher) -> None:
    make_teacher().responses([[1, 40]], [2**40 + 5], WARM, max_new_tokens=NEW)
    assert server.requests[-1] == {
        "model": MODEL,
        "prompt": [1, 40],
        "seed": 5,
        "max_tokens": NEW,
        "temperature": 0.8,
        "top_p": 0.9,
        "stop_token_ids": list(ENDS),
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "return_token_ids": True,
    }


def test_a_bounded_number_of_requests_is_in_flight(server: CompletionsServer, make_teacher: MakeTeacher) -> None:
    ask(make_teacher(), PROMPTS * 2)
    assert 1 < server.most_at_once <= client.IN_FLIGHT


def test_text_where_a_server_takes_no_ids(server: CompletionsServer, make_teacher: MakeTeacher) -> None:
    server.ids = False
    teacher = make_teacher()
    text = teacher.tokenizer("Add 12 and 30.")["input_ids"]
    (found,) = teacher.responses([text], [0], GREEDY, max_new_tokens=NEW)
    body = server.requests[-1]
    # BOS, which the server's tokenizer puts before a text by itself, is not in it.
    assert body["prompt"] == "Add 12 and 30."
    assert set(body) == {"model", "prompt", "seed", "max_tokens", "temperature", "top_p"}
    said = server.complete(body)[1]["choices"][0]
    ended = [EOS] if said["finish_reason"] == "stop" else []
    assert found == [*teacher.tokenizer(said["text"], add_special_tokens=False)["input_ids"], *ended][:NEW]
    with pytest.raises(Unreadable, match="no log-probabilities along a given text: it takes no token ids"):
        teacher.read([1], [40], 4)


@pytest.mark.parametrize("k", [5, 320])
def test_signals_are_the_models_own(
    server: CompletionsServer, model: PreTrainedModel, make_teacher: MakeTeacher, tmp_path: Path, k: int
) -> None:
    server.max_logprobs = 320
    chosen = examples(model)
    settings = {"k": k, "temperature": 1.0, "vocabulary": 320, "rows": 4, "pad_id": 0}
    there, here = (
        store_signals(tmp_path / name, source, chosen, **settings)  # type: ignore[arg-type]
        for name, source in (("there", make_teacher()), ("here", lambda: model))
    )
    for example in chosen:
        theirs, ours = there.along(example), here.along(example)
        assert torch.equal(theirs.ids_NK[:, :5], ours.ids_NK[:, :5])
        torch.testing.assert_close(theirs.log_p_NE.exp(), ours.log_p_NE.exp(), atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs.log_p_NE[:, :5], ours.log_p_NE[:, :5], atol=1e-4, rtol=0)
        assert (theirs.vocabulary, theirs.temperature) == (ours.vocabulary, ours.temperature)


def test_the_rest_is_a_probability() -> None:
    for probabilities, rest in (([0.5, 0.25], 0.25), ([0.75, 0.25 + 1e-7], 0.0), ([0.75, 0.25 - 1e-8], 0.0)):
        found = with_rest(torch.tensor([probabilities]).double().log().numpy(), 9)
        assert torch.tensor(found).exp().sum() == pytest.approx(1)
        assert torch.tensor(found).exp()[0, -1] == rest
    assert with_rest(torch.zeros(1, 1).numpy(), 1).shape == (1, 1)


def test_work_that_was_broken_off_goes_on_without_asking_again(
    server: CompletionsServer, model: PreTrainedModel, make_teacher: MakeTeacher
) -> None:
    server.fail = lambda number: (500, {}, "out of memory") if number == FAILS else None
    with pytest.raises(SkdError, match=r"answers 500 to /completions: .*out of memory"):
        ask(make_teacher())
    before = len(server.requests)
    again = make_teacher()
    assert ask(again) == own_responses(model, GREEDY, [0] * ROWS)
    repeated = [body["prompt"] for body in server.requests[before:]]
    assert len(repeated) <= MOST_REPEATED
    assert ask(make_teacher()) == ask(again)
    again.forget()
    assert again.costs()["served_requests"] == len(repeated)
    assert undocumented({f"final/{name}" for name in again.costs()}) == set()


def test_a_line_that_was_cut_off_is_asked_for_again(
    server: CompletionsServer, make_teacher: MakeTeacher, tmp_path: Path
) -> None:
    first = ask(make_teacher())
    (file,) = [path for path in (tmp_path / "asked").rglob("*.jsonl") if path.stat().st_size]
    file.write_bytes(bytes(9) + b"\n" + file.read_bytes()[:-3])
    before = len(server.requests)
    assert ask(make_teacher()) == first
    assert len(server.requests) - before == 1 + 1  # the probe of its tokens, and the response


def test_signals_go_on_too(
    server: CompletionsServer, model: PreTrainedModel, make_teacher: MakeTeacher, tmp_path: Path
) -> None:
    chosen = examples(model)
    server.fail = lambda number: (503, {}, "restarting") if number == FAILS else None
    settings = {"k": 4, "temperature": 1.0, "vocabulary": 320, "rows": 4, "pad_id": 0}
    with pytest.raises(SkdError, match="503"):
        store_signals(tmp_path / "signals", make_teacher(), chosen, **settings)  # type: ignore[arg-type]
    before = len(server.requests)
    stored = store_signals(tmp_path / "signals", make_teacher(), chosen, **settings)  # type: ignore[arg-type]
    assert len(server.requests) - before <= MOST_REPEATED
    assert all(len(stored.along(example)) == len(example.response_ids) for example in chosen)


def test_answers_go_to_storage_that_outlives_the_pod(
    server: CompletionsServer, make_teacher: MakeTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Server()
    store.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.address)
    monkeypatch.setattr(answers, "SECONDS_BETWEEN_UPLOADS", 0.0)
    asked = []
    try:
        server.fail = lambda number: (500, {}, "gone") if number == 5 else None
        for number in range(3):
            teacher = make_teacher(keep=False)
            teacher.keep(tmp_path / f"pod {number}", "gs://bucket/asked")
            before = len(server.requests)
            if number == 0:
                with pytest.raises(SkdError, match="500"):
                    ask(teacher, PROMPTS[:8])
            else:
                ask(teacher, PROMPTS[:8])
            asked.append(len(server.requests) - before)
            if number == 1:
                teacher.forget()
        assert asked == [9, 2, 9]  # with the probe of the tokens
    finally:
        store.stop()


def test_a_busy_server_is_asked_again_when_it_says(server: CompletionsServer, make_teacher: MakeTeacher) -> None:
    server.fail = {1: (429, {"Retry-After": "0"}, "quota")}.get
    ask(make_teacher(retries=1), PROMPTS[:1])
    assert len(server.requests) == 1 + 2


def test_the_key_is_sent_and_never_shown(
    server: CompletionsServer, make_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", "sk-secret")
    ask(make_teacher(key_env="OTHER_KEY"), PROMPTS[:1])
    assert set(server.keys) == {"Bearer sk-secret"}
    server.fail = lambda number: (401, {}, "no")
    with pytest.raises(SkdError, match="environment variable OTHER_KEY") as caught:
        ask(make_teacher(keep=False, key_env="OTHER_KEY"), PROMPTS[:1])
    assert "sk-secret" not in str(caught.value)
    server.fail = lambda number: (400, {}, "wrong key: Bearer sk-secret")
    with pytest.raises(SkdError, match=r"wrong key: Bearer .key.") as caught:
        ask(make_teacher(keep=False, key_env="OTHER_KEY"), PROMPTS[:1])
    server.fail = lambda number: (401, {}, "no")
    with pytest.raises(SkdError, match=r"SKD_TEACHER_API_KEY .in a cluster: Secret `skd-teacher`, key `api-key`"):
        ask(make_teacher(keep=False), PROMPTS[:1])


@pytest.mark.parametrize("status", [400, 200, 500])
def test_a_server_that_quotes_a_prompt_is_not_quoted_about_private_data(
    server: CompletionsServer, make_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    for private in (False, True):
        teacher = make_teacher(retries=0, private=private, keep=False)
        assert teacher.takes_ids
        with monkeypatch.context() as patch:
            patch.setattr(server, "complete", lambda body: (status, {"input": "Dear Anna"}))
            with pytest.raises(SkdError) as caught:
                ask(teacher, PROMPTS[:1])
        assert ("Dear Anna" in str(caught.value)) != private
        assert ("its words are not shown" in str(caught.value)) == private


def test_another_model_is_refused(server: CompletionsServer, make_teacher: MakeTeacher) -> None:
    with pytest.raises(SkdError, match=f"no model of this name\n  hint: set `teacher.model` to one of: {MODEL}"):
        _ = make_teacher(model="org/other").context
    with pytest.raises(SkdError, match="`org/other` does not exist"):
        ask(make_teacher(model="org/other"))
    assert server.requests


def test_another_tokenizer_is_refused(
    server: CompletionsServer, make_teacher: MakeTeacher, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    server.tokenizer = _shifted(tiny_tokenizer)
    for ids in (True, False):
        server.ids = ids
        with pytest.raises(SkdError, match="its tokens are not the student's"):
            ask(make_teacher())


def _shifted(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer without merges: every byte is a token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = []
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(state)), eos_token=tokenizer.eos_token
    )


def test_a_response_of_which_nobody_knows_whether_it_is_whole(
    server: CompletionsServer, make_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_teacher()
    assert teacher.takes_ids
    whole = server.complete

    def silent(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, answer = whole(body)
        return status, {**answer, "choices": [{**answer["choices"][0], "finish_reason": None}]}

    monkeypatch.setattr(server, "complete", silent)
    with pytest.raises(SkdError, match="does not say that a response is whole: `finish_reason` is None"):
        ask(teacher, PROMPTS[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": None}, "an answer has no tokens"),
        ({"prompt_logprobs": [None, None, {"a": -1}]}, "its `prompt_logprobs` are not as vLLM gives them"),
        ({"token_ids": [40, 320]}, "it answers with token 320, and the student's tokens are 0 to 319"),
        ({"token_ids": [-1]}, "it answers with token -1"),
    ],
)
def test_an_answer_in_another_form(
    server: CompletionsServer,
    make_teacher: MakeTeacher,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    teacher = make_teacher()
    assert teacher.takes_ids
    whole = server.complete

    def other(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, answer = whole(body)
        return status, {**answer, "choices": [{**answer["choices"][0], **change}]}

    monkeypatch.setattr(server, "complete", other)
    with pytest.raises(SkdError, match=message):
        _ = teacher.read([1], [40, 41], 1) and ask(teacher, PROMPTS[:1])


def test_a_redirect_is_named_and_not_followed(server: CompletionsServer, make_teacher: MakeTeacher) -> None:
    server.fail = lambda number: (307, {"Location": "http://127.0.0.1:9/v1/completions"}, "")
    with pytest.raises(SkdError, match=r"answers 307 .*\n  hint: it sends on to another address"):
        ask(make_teacher(), PROMPTS[:1])


def test_more_tokens_than_the_server_gives(make_teacher: MakeTeacher) -> None:
    with pytest.raises(SkdError, match=r"greater than max allowed: 20.*\n  hint: .*`--max-logprobs 64`"):
        make_teacher().read([1], [40, 41], 64)


def test_a_server_that_is_gone(server: CompletionsServer, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    served = ServedTeacher(url="http://127.0.0.1:9/v1", model=MODEL)
    teacher = RemoteTeacher(served, tiny_tokenizer, TaskConfig(chat_template=False), ENDS, 0)
    with pytest.raises(SkdError, match=r"does not answer: .*\n  hint: check `teacher.url`.*keeps what is answered"):
        ask(teacher)
    assert not server.requests


def test_an_evaluation_is_that_of_the_model_in_memory(
    server: CompletionsServer, model: PreTrainedModel, make_teacher: MakeTeacher
) -> None:
    rows = [make_example(f"Add {row} and 30.", f"{row + 30}") for row in range(6)]
    task = TaskConfig(
        prompt="{source}\n", chat_template=False, max_new_tokens=NEW, metrics=["chrf", "perplexity"], stop=["q"]
    )
    teacher, settings = make_teacher(keep=False, ends=(EOS,)), EvaluationConfig(bootstrap_samples=100)
    there, here = (evaluate(each, teacher.tokenizer, rows, task, settings) for each in (teacher, model))
    assert [row.prediction for row in there.predictions] == [row.prediction for row in here.predictions]
    for name, score in here.scores.metrics.items():
        assert there.scores.metrics[name].score == pytest.approx(score.score, rel=1e-4)
    server.ids = False
    blind = evaluate(make_teacher(keep=False), teacher.tokenizer, rows, task, settings)
    assert set(blind.scores.metrics) == {"chrf"}
    assert "no log-probabilities" in blind.scores.missing["perplexity"]


def test_what_does_not_fit_the_server_is_not_answered(server: CompletionsServer, make_teacher: MakeTeacher) -> None:
    server.context = 120
    rows = [make_example("Add.", "3"), make_example("Add 1 and 2 " * 60, "3")]
    task = TaskConfig(prompt="{source}", chat_template=False, max_new_tokens=8, metrics=["chrf"])
    teacher = make_teacher(keep=False)
    found = evaluate(teacher, teacher.tokenizer, rows, task, EvaluationConfig(bootstrap_samples=100)).predictions
    assert [row.tokens > 0 for row in found] == [True, False]
    assert found[1].truncated


def test_the_server_of_these_tests_answers_as_vllm_does(server: CompletionsServer) -> None:
    """`vllm-0.32.0.json` holds a real server's answers, and the command it was started with."""
    record = json.loads(RECORD.read_text())
    server.max_logprobs = 64
    status, answer = server.complete(record["request"])
    assert status == 200
    for ours, theirs in ((answer, record["answer"]), (answer["choices"][0], record["answer"]["choices"][0])):
        assert set(ours) <= set(theirs)
        for name in ("prompt_token_ids", "usage", "finish_reason"):
            assert set(ours.get(name, ())) <= set(theirs.get(name, ()))
    position, real = (each["choices"][0]["prompt_logprobs"][1] for each in (answer, record["answer"]))
    assert [set(found) for found in position.values()] == [set(found) for found in real.values()]
    assert len(position) == len(real) == 3
    refused = server.complete({**record["request"], "prompt_logprobs": 65})
    assert refused == (400, record["refused"])
