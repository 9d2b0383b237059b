"""A real vLLM in the pod of a step, whose container is a process of this machine; Kubernetes' API is a stand-in."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from skd_lib.config import EnginePodsConfig, SamplingParams
from skd_lib.multinode import servers as module
from skd_lib.multinode.servers import servers
from skd_lib.sampling.acceptance import RULES
from skd_lib.vllm.guard import TOKEN_VARIABLE
from skd_lib.vllm.serve import environment
from tests.multinode.fake_kubernetes import running
from tests.multinode.kubelet import Kubelet
from tests.vllm.conftest import NEW, Pair, served
from tests.vllm.test_rollouts import rows_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def test_a_server_in_a_pod_samples_as_the_own_engine(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(temperature=0.7)
    rule, prompts, seeds = RULES["top_k"].make(8), pair.prompts(6), list(range(6))
    # vLLM's sockets are in the pod's folder, and their paths must be short.
    with running() as kubernetes, monkeypatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("KUBECONFIG", str(kubernetes.kubeconfig(tmp_path)))
        patch.setenv("KFP_POD_NAME", "step-pod")
        patch.setenv("KFP_RUN_ID", "run-1")
        patch.setenv(TOKEN_VARIABLE, "t0ken")
        patch.setattr(module, "POLL_SECONDS", 0.5)
        kubelet = Kubelet(kubernetes, Path(folder), environment())
        kubernetes.on_pod = kubelet.on_pod
        try:
            # No longer than it must be: near its limit vLLM would draft nonsense.
            longest = served(pair, 8, longest=max(map(len, prompts)) + NEW)
            with servers(EnginePodsConfig(image="vllm"), 10, longest) as (server,):
                got = pair.engine(server, tmp_path / "weights", params).sampler(rule, 1).sample(prompts, seeds)
        finally:
            kubelet.close()
    own = pair.own(rule, params).sample(prompts, seeds)
    assert rows_of(got) == rows_of(own)
