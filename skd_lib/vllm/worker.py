"""vLLM's worker extension: `--worker-extension-cls skd_lib.vllm.worker.SkdExtension`.

vLLM mixes the class into its worker; the training calls the methods by `/collective_rpc`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import vllm

from skd_lib.errors import SkdError
from skd_lib.models.files import weights_sample
from skd_lib.vllm import weights
from skd_lib.vllm.serve import spare_positions
from skd_lib.vllm.settings import RolloutSettings, packed, refusal

weights.register()


class SkdExtension:
    """Methods of a worker with a teacher and a student."""

    model_runner: Any
    rank: int
    skd_session = ""  # what the worker is set up for
    skd_version: str | None = None  # the student's weights that are loaded
    skd_coming: tuple[str, str] | None = None  # session and client that bring others

    def skd_install(self, settings: dict[str, Any], session: str, length: int) -> dict[str, Any]:
        """Sample interleaved from now on.

        Args:
            settings: `RolloutSettings`.
            session: Name of the training.
            length: The longest response.

        Returns:
            `runner`, the module for vLLM's model runner, and the teacher's `folder` and `weights_sample`; `error`, a
            sentence where the server cannot do it.
        """
        runner = self.model_runner
        if (error := refusal(vllm.__version__, runner.vllm_config)) is not None:
            return {"error": error}
        if runner.vllm_config.use_v2_model_runner:
            from skd_lib.vllm import runner_v2 as adapted
        else:
            from skd_lib.vllm import runner_v1 as adapted  # type: ignore[no-redef]
        if getattr(self, "skd_rollouts", None) is None:
            self.skd_rollouts: Any = adapted.install(runner, keeps=self.rank == 0)
            self._keep_states()
            self._watch_prompts()
        try:
            self.skd_rollouts.begin(RolloutSettings(**settings), length)
        except torch.OutOfMemoryError as error:
            hint = "give vLLM a smaller share of the GPU (--gpu-memory-utilization), or fewer rows (--max-num-seqs)"
            return {"error": f"no memory is left for the teacher's signal of the rows in flight: {hint}. {error}"}
        self.skd_scored: dict[str, list[torch.Tensor]] = {}
        self.skd_asking: dict[str, dict[str, Any] | None] = {}  # settings by client
        self.skd_session = session
        folder = runner.vllm_config.model_config.model
        try:
            return {"runner": adapted.__name__, "folder": folder, "teacher": weights_sample(Path(folder))}
        except SkdError as error:
            return {"error": f"the teacher's files cannot be read: {error.brief}"}

    def skd_claim(
        self, session: str, version: str | None, client: str, settings: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Say whether a client may sample, or is the one that brings what is missing: clients of a session ask at once.

        Args:
            session: Name of a training.
            version: Name of the student's weights that are wanted; None if any will do.
            client: Name of one of the training's processes.
            settings: `RolloutSettings` from the next round on; None if any will do.

        Returns:
            `state`: `ready` (ask, then call `skd_release`), `yours` (set up the session and load the weights, then
            call `skd_arrived`), or `wait` (another client does that, or still asks: vLLM fails if weights are loaded
            meanwhile, and knows one set of settings); `session`: the one that the worker is set up for, empty after a
            restart; `gamma`, and `longest`: the longest prompt with its response that is drafted for to its end.
        """
        coming, have = self.skd_coming, self.skd_session
        others = [theirs for name, theirs in self.skd_asking.items() if name != client] if session == have else []
        if coming is not None and coming[0] == session and coming[1] != client:
            state = "wait"
        elif session != have or version not in (None, self.skd_version):
            state = "wait" if others else "yours"
        else:
            state = "ready" if settings is None or all(theirs in (None, settings) for theirs in others) else "wait"
        if state == "yours":
            self.skd_coming = (session, client)
        elif state == "ready":
            self.skd_asking[client] = settings
            if settings is not None:
                self.skd_rollouts.use(RolloutSettings(**settings))
        if state != "ready":
            return {"state": state, "session": have}
        config = self.model_runner.vllm_config
        drafts = config.speculative_config
        gamma = drafts.num_speculative_tokens
        # The student may have fewer positions than the teacher.
        positions = min(config.model_config.max_model_len, drafts.draft_model_config.max_model_len)
        longest = positions - spare_positions(gamma)
        return {"state": state, "session": have, "gamma": gamma, "longest": longest}

    def skd_release(self, client: str) -> None:
        """Note that a client asks nothing more for now."""
        self.skd_asking.pop(client, None)

    def skd_arrived(self, version: str | None) -> None:
        """Let clients sample: the session is set up and the weights are loaded."""
        self.skd_version, self.skd_coming = version, None

    def skd_sees(self, folder: str) -> dict[str, bool]:
        """Return `seen`: a folder with the student's weights is there for this machine."""
        return {"seen": (Path(folder) / "model.safetensors").is_file()}  # of a plain bool vLLM would make a text

    def skd_take(self, lengths: dict[str, int]) -> dict[str, dict[str, Any]]:
        """Return what is known of finished responses: tokens, by_teacher, proposals, and the teacher's signal."""
        taken: dict[str, dict[str, Any]] = self.skd_rollouts.take(lengths)
        return taken

    def skd_take_states(self, keys: list[str]) -> dict[str, list[Any]]:
        """Return the teacher's states along given prompts, from the position that was asked for on."""
        taken = {key: torch.cat(self.skd_scored.pop(key)) for key in keys}
        return {key: packed(states_TH) for key, states_TH in taken.items()} if self.rank == 0 else {}

    def _keep_states(self) -> None:
        """Keep the teacher's states that the current logits are made from."""
        model, compute_logits = self.model_runner.model, self.model_runner.model.compute_logits

        def keeping(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.skd_rollouts.states_MH = hidden_states
            return compute_logits(hidden_states, *args, **kwargs)

        model.compute_logits = keeping

    def _watch_prompts(self) -> None:
        """Keep the teacher's states along prompts whose request asks for them."""
        runner, sample_tokens = self.model_runner, self.model_runner.sample_tokens

        def watching(*args: Any, **kwargs: Any) -> Any:
            if (state := runner.execute_model_state) is not None and state.hidden_states is not None:
                for asked, position, row, count in self.skd_rollouts.scheduled():
                    start = asked.get("states_from")
                    if start is None or position + count <= start:
                        continue
                    if position <= start:  # also where a request that was preempted begins again
                        self.skd_scored[asked["key"]] = []
                    states_TH = state.hidden_states[row + max(start - position, 0) : row + count]
                    self.skd_scored[asked["key"]].append(states_TH.to("cpu", copy=True))
            return sample_tokens(*args, **kwargs)

        runner.sample_tokens = watching
