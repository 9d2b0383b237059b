"""Drive `kfp.local`, with replacements for internal parts of it.

`kfp.local` runs a whole pipeline on one machine (nested DAGs, conditions, loops, exit handlers, cache), but its
subprocess runner refuses container components, and its Docker runner takes a failed container for a successful one when
the engine has removed it before its exit code was read. Some parts are replaced while a pipeline runs: the task
handler; the cache, which reports its hits; the loop, whose rounds run one after another here and go on after a failure;
and what gives a round its item, which in kfp 2.17 also replaces every output of another step.
kfp is pinned to one minor version for this reason, `check_kfp` refuses any other shape of these parts, and tests run
pipelines through them.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kfp
import yaml
from kfp import components, dsl, local
from kfp.compiler import pipeline_spec_builder
from kfp.local import cache, docker_task_handler, status, subprocess_task_handler
from kfp.local.orchestrator import enhanced_dag_orchestrator as orchestrator
from kfp.local.orchestrator import task_spec_utils
from typing_extensions import override

from skd_kfp.pipelines.graph import COMPONENT_PREFIX, round_key
from skd_lib._core.uris import redacted
from skd_lib.errors import SkdError
from skd_lib.steps.kfp_call import OUTPUT_FILE_OPTION
from skd_lib.storage import write_text_atomic

if TYPE_CHECKING:
    from skd_kfp.pipelines.local.runner import LocalRun

UNLABELLED = ("student-init",)
"""Components of which the label in `config` is not part of the key: it only names the step's run in MLflow, and trials
that start from one student make it once where they run one after another."""
HANDLER_ARGUMENTS = ("self", "image", "full_command", "pipeline_root", "runner", "env_vars")
ROUND_ARGUMENTS = (
    *("self", "tasks", "pipeline_resource_name", "components", "executors", "io_store", "pipeline_root", "runner"),
    *("unique_pipeline_id", "fail_stack", "parallelism_limit"),
)
ITEM_ARGUMENTS = ("original_task_spec", "loop_item", "loop_task_name")
KEY_ARGUMENTS = ("self", "component_name", "image", "full_command", "arguments", "env_vars", "custom_cache_key")


def check_kfp() -> None:
    """Check that the parts of kfp that are replaced have the known signatures."""
    known = [
        (subprocess_task_handler.SubprocessTaskHandler.__init__, HANDLER_ARGUMENTS),
        (docker_task_handler.DockerTaskHandler.__init__, HANDLER_ARGUMENTS),
        (cache.LocalCache.compute_key, KEY_ARGUMENTS),
        (orchestrator.ParallelExecutor.execute_parallel_tasks, ROUND_ARGUMENTS),
        (task_spec_utils.create_parameter_loop_iteration_task_spec, ITEM_ARGUMENTS),
    ]
    if any(tuple(inspect.signature(part).parameters) != arguments for part, arguments in known):
        raise SkdError(
            f"kfp {kfp.__version__} has another local runner than the one this project drives",
            hint='install the supported version: pip install "kfp>=2.17,<2.18"',
        )


def run_locally(
    documents: list[dict[str, Any]],
    arguments: Mapping[str, Any],
    run: LocalRun,
    *,
    containers: bool = False,
) -> None:
    """Run a compiled pipeline with `kfp.local`; each container is run by `run`.

    Where a container fails, this returns normally: `run` keeps the failure. kfp's own output goes to `run`'s folder.
    """
    check_kfp()
    folder = run.folder
    pipeline = components.load_component_from_text(yaml.safe_dump_all(documents))
    with (
        contextlib.closing(_Chatter(folder.kfp_log)) as sink,
        contextlib.redirect_stdout(sink),
        warnings.catch_warnings(action="ignore"),
        _replaced(run),
    ):
        local.init(
            local.DockerRunner() if containers else local.SubprocessRunner(use_venv=False),
            pipeline_root=str(folder.artifacts),
            workspace_root=str(folder.root / ".workspace"),  # kfp would make one among temporary files
            raise_on_error=False,
            enable_caching=True,
            cache_root=str(folder.cache),
        )
        pipeline(**arguments)


@contextlib.contextmanager
def _replaced(run: LocalRun) -> Iterator[None]:
    """Put our task handler, cache and loop in the place of kfp's."""
    current_round: int | None = None

    def key_of(component: str) -> str:
        return component if current_round is None else round_key(component, current_round)

    class Rounds(orchestrator.ParallelExecutor):
        """Runs the rounds of a loop in order, in this thread, so that an interruption reaches the running step."""

        def execute_parallel_tasks(
            self,
            tasks: list[tuple[str, Any]],
            *args: Any,
            parallelism_limit: int = 0,  # noqa: ARG002 - it is one
            **kwargs: Any,
        ) -> tuple[dict[str, Any], status.Status]:
            nonlocal current_round
            outputs, failed = {}, False
            for number, (name, task) in enumerate(tasks):
                current_round = number
                try:
                    outputs[name], how = orchestrator.execute_task(name, task, *args, **kwargs)
                finally:
                    current_round = None
                if how == status.Status.FAILURE:
                    failed = True
                    kwargs["fail_stack"].append(name)
            return ({}, status.Status.FAILURE) if failed else (outputs, status.Status.SUCCESS)

    class TaskHandler:
        def __init__(
            self,
            image: str,
            full_command: list[str],
            pipeline_root: str,  # noqa: ARG002 - kfp's signature
            runner: local.SubprocessRunner | local.DockerRunner,  # noqa: ARG002
            env_vars: dict[str, str] | None = None,
        ) -> None:
            self.image = image
            self.command = full_command
            self.env = env_vars or {}

        def run(self) -> status.Status:
            folder = Path(self.command[self.command.index(OUTPUT_FILE_OPTION) + 1]).parent
            done = run.execute(key_of(folder.name), self.image, self.command, self.env, folder)
            return status.Status.SUCCESS if done else status.Status.FAILURE

    class Cache(cache.LocalCache):
        """Keeps with each entry the seconds of the original run, and reports hits."""

        _current = threading.local()

        def compute_key(
            self,
            component_name: str,
            image: str,
            full_command: list[str],
            arguments: dict[str, Any],
            *args: Any,
            **kwargs: Any,
        ) -> str:
            component = component_name.removeprefix(COMPONENT_PREFIX)
            self._current.component = key_of(component)
            if component in UNLABELLED:
                config = {name: value for name, value in json.loads(arguments["config"]).items() if name != "label"}
                arguments = {**arguments, "config": json.dumps(config)}
            return str(super().compute_key(component_name, image, full_command, arguments, *args, **kwargs))

        def get(self, key: str) -> dict[str, Any] | None:
            outputs: dict[str, Any] | None = super().get(key)
            if outputs is not None:
                seconds = float(self._seconds_file(key).read_text(encoding="utf-8"))
                plain = {
                    name: value.uri if isinstance(value, dsl.Artifact) else value for name, value in outputs.items()
                }
                run.reused(self._current.component, plain, seconds)
            return outputs

        def put(self, key: str, outputs: dict[str, Any]) -> None:
            write_text_atomic(self._seconds_file(key), str(run.seconds(self._current.component)))
            super().put(key, outputs)

        def _seconds_file(self, key: str) -> Path:
            return Path(self.cache_root) / f"{key}.seconds"

    replacements = {
        (subprocess_task_handler, "SubprocessTaskHandler"): TaskHandler,
        (docker_task_handler, "DockerTaskHandler"): TaskHandler,
        (cache, "LocalCache"): Cache,
        (orchestrator, "ParallelExecutor"): Rounds,
        (task_spec_utils, "create_parameter_loop_iteration_task_spec"): _with_item,
    }
    originals = {place: getattr(*place) for place in replacements}
    for place, part in replacements.items():
        setattr(*place, part)
    try:
        yield
    finally:
        for place, part in originals.items():
            setattr(*place, part)
        cache.reset_local_cache_singleton()


class _Chatter(io.TextIOBase):
    """Writes what kfp prints to a file; a full disk does not end the run."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    @override
    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._file.write(redacted(text).encode())
        return len(text)

    @override
    def close(self) -> None:
        self._file.close()


def _with_item(original_task_spec: Any, loop_item: Any, loop_task_name: str) -> Any:  # noqa: ARG001 - kfp's signature
    """Return the task of one round of a loop: its item is a constant, its other inputs are the loop's."""
    task = type(original_task_spec)()
    task.CopyFrom(original_task_spec)
    item = task.inputs.parameters[original_task_spec.parameter_iterator.item_input]
    item.runtime_value.constant.CopyFrom(pipeline_spec_builder.to_protobuf_value(loop_item))
    task.ClearField("parameter_iterator")
    return task
