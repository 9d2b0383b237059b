"""The vLLM engine of one training, by its configuration."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from skd_lib.config import DistillConfig, Schedule
from skd_lib.distillation.methods import METHODS
from skd_lib.errors import SkdError
from skd_lib.models.files import weights_sample
from skd_lib.models.heads import common_vocabulary
from skd_lib.vllm.client import Engine, wait_for_all
from skd_lib.vllm.guard import TOKEN_VARIABLE, given_token, make_token
from skd_lib.vllm.head import load_head
from skd_lib.vllm.sampler import VllmEngine
from skd_lib.vllm.serve import Served, free_port, serving
from skd_lib.vllm.settings import RolloutSettings


@contextmanager
def vllm_engine(
    distill: DistillConfig,
    *,
    student: PreTrainedModel,
    folders: dict[str, Path],
    eos_ids: tuple[int, ...],
    pad_id: int,
    max_new_tokens: int,
    longest: int,
    dtype: torch.dtype,
    elsewhere: Callable[[Served, bool], AbstractContextManager[list[Engine]]] | None = None,
) -> Iterator[VllmEngine]:
    """Give a training its servers, started here unless the configuration names some; all processes call this together.

    Args:
        distill: Its `vllm`, `sampling`, `method` and `temperature`.
        student: The model in training.
        folders: `student` and `teacher` as they are before training.
        eos_ids: Ids that end a response.
        pad_id: Fills rows up.
        max_new_tokens: Longest sampled response.
        longest: Longest prompt with its response, in tokens.
        dtype: Of both models in the servers, and of the teacher's head.
        elsewhere: Gives servers on other machines, on each process, and is told whether that is the first one.

    Raises:
        SkdError: `pods` are asked for where there is no `elsewhere`; a server does not start, or does not answer.
    """
    settings, sampling = distill.vllm, distill.sampling
    assert not isinstance(sampling.gamma, Schedule)  # noqa: S101 - the configuration refuses it
    gamma = int(sampling.gamma)
    if settings.pods is not None and elsewhere is None:
        hint = "leave it out: a server is started here; or name servers in `urls`"
        raise SkdError("only a pipeline's step makes pods", where="distill.vllm.pods", hint=hint)
    processes = PartialState(cpu=student.device.type == "cpu")
    with ExitStack() as stack:
        agreed = _agreed_session(own_server=not settings.urls)
        engines = [Engine(url, settings.wait_minutes * 60, shared=bool(settings.exchange)) for url in settings.urls]
        served = Served(
            folders["teacher"],
            folders["student"],
            gamma,
            max_model_len=longest,
            max_rows=settings.max_rows,
            dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
            tensor_parallel=settings.tensor_parallel,
            memory=settings.memory,
        )
        if elsewhere is not None:
            engines = stack.enter_context(elsewhere(served, processes.is_main_process))
        elif not engines and processes.is_main_process:
            logs = Path(tempfile.mkdtemp(prefix="skd-vllm-"))
            stack.push(lambda failed, *_: None if failed else shutil.rmtree(logs))  # errors name it
            engines = [stack.enter_context(serving(served, logs, port=agreed["port"]))]
        elif not engines:
            engines = [Engine(f"http://127.0.0.1:{agreed['port']}")]
            wait_for_all(engines)
        head = load_head(folders["teacher"], dtype=dtype, device=student.device)
        yield VllmEngine(
            engines=engines,
            student=student,
            head=head,
            teacher=weights_sample(folders["teacher"]),
            settings=RolloutSettings(
                student=sampling.student,
                teacher=sampling.teacher,
                vocabulary=common_vocabulary(student, head),
                signal=settings.signal if METHODS[distill.method].uses_divergence else "none",
                top_k=settings.top_k,
                temperature=distill.temperature,
            ),
            eos_ids=eos_ids,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
            gamma=gamma,
            exchange=Path(settings.exchange) if settings.exchange else None,
            dtype=dtype,
            session=agreed["session"],
            process=processes.process_index,
        )


def _agreed_session(*, own_server: bool) -> dict[str, Any]:
    """Return the training's name, and the port of a server of its own, the same on all processes.

    Raises:
        SkdError: processes of several machines have no server that all of them reach.
    """
    processes = PartialState()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes.num_processes))
    if own_server and local < processes.num_processes:
        raise SkdError(
            "a training on several machines needs servers that all of them reach",
            where="distill.vllm.urls",
            hint="start them with `skd engine start --host ADDRESS`, and name them there",
        )
    if own_server:
        make_token()
    session = {"session": uuid.uuid4().hex, "port": free_port(), "token": given_token()}
    (agreed,) = broadcast_object_list([session])
    if own_server:
        os.environ[TOKEN_VARIABLE] = agreed["token"]
    return dict(agreed)
