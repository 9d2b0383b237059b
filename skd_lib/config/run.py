"""The whole configuration of one run."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from skd_lib.config._base import ConfigSection, OptionalText, Schedule
from skd_lib.config._reading import Overrides, apply, check_unset, parse_section, read_yaml
from skd_lib.config.data import DataConfig
from skd_lib.config.distill import DistillConfig, InterleavedConfig
from skd_lib.config.evaluation import EvaluationConfig, RegistryConfig, SpecdecConfig
from skd_lib.config.models import StudentInitConfig, TeacherReference, TeacherSftConfig, served_teacher
from skd_lib.config.task import TaskConfig
from skd_lib.errors import SkdError, SkdErrors


class RunConfig(ConfigSection):
    """Everything one run needs."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="Name of the run: lower case, digits and dashes."
    )
    teacher: TeacherReference = Field(
        description="Hub id (org/name or org/name@revision), local folder, .gguf file, gs:// URI, or "
        "wheel://NAME==VERSION/PATH.gguf?sha256=HEX; or a model on a server: `{url, model, key_env}`, or URL#MODEL."
    )
    student: OptionalText = Field(
        None, description="Like `teacher`; unset where `student_init.mode` cuts it from the teacher."
    )
    seed: int = Field(0, ge=0, lt=2**31)
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a model. Leave it off.")
    data: DataConfig
    task: TaskConfig = TaskConfig()
    teacher_sft: TeacherSftConfig = TeacherSftConfig()
    student_init: StudentInitConfig = StudentInitConfig()
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    specdec: SpecdecConfig = SpecdecConfig()
    registry: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _student_is_named_or_cut(self) -> RunConfig:
        initial = self.student_init
        if initial.cuts and self.student is not None:
            hint = f"`student_init.mode: {initial.mode}` cuts the student from the teacher"
            raise ValueError(f"student: leave it out, {hint}")
        if not initial.cuts and self.student is None:
            cut = "or `mode: prune` with keep_first and keep_last cuts one from the teacher"
            raise ValueError(f"student: needed for `student_init.mode: {initial.mode}`; {cut}")
        return self

    @model_validator(mode="after")
    def _served_teacher_suffices(self) -> RunConfig:
        if served_teacher(self.teacher) and (problems := self._needs_of_weights()):
            raise ValueError(f"teacher: a server gives its answers, not its weights: {'; '.join(problems)}")
        return self

    def _needs_of_weights(self) -> list[str]:
        """Return what this run does with the teacher's weights, each with the way out."""
        needs = self.distill.needs_of_weights()
        if self.teacher_sft.enabled:
            needs.append("it cannot be fine-tuned here, set `teacher_sft.enabled: false`")
        if self.student_init.cuts:
            needs.append(f"`student_init.mode: {self.student_init.mode}` cuts the student from it, name a student")
        if self.registry.gate == "draft":
            needs.append("no draft is measured with it, set `registry.gate: score`")
        return needs

    @model_validator(mode="after")
    def _held_out_tasks_start_from_the_runs(self) -> RunConfig:
        sets = self.data.held_out
        sets[:] = [each.model_copy(update={"task": self.task.with_fields_of(each.task)}) for each in sets]
        return self

    @model_validator(mode="after")
    def _drafts_fit_a_response(self) -> RunConfig:
        check_gammas(self.specdec, self.task)
        longest = self.task.max_new_tokens
        gamma = self.distill.sampling.gamma
        most = max(gamma.start, gamma.end) if isinstance(gamma, Schedule) else gamma
        if most > longest and gamma != InterleavedConfig().gamma:
            raise ValueError(f"distill.sampling.gamma: {most} is beyond task.max_new_tokens, which is {longest}")
        return self

    @model_validator(mode="after")
    def _judges_are_there(self) -> RunConfig:
        if self.wants_judge and not self.evaluation.judge.url:
            raise ValueError("metric `judge`: needs `evaluation.judge.url` and `evaluation.judge.model`")
        return self

    @property
    def wants_judge(self) -> bool:
        """Answers to the test set, or to a held-out set, are graded by a judge."""
        return any("judge" in task.metrics for task in [self.task, *(each.task for each in self.data.held_out)])


def check_gammas(specdec: SpecdecConfig, task: TaskConfig) -> None:
    """Raise ValueError if a draft is longer than a response; the defaults are allowed for any."""
    longest, defaults = task.max_new_tokens, SpecdecConfig()
    if specdec.gamma > longest and specdec.gamma != defaults.gamma:
        raise ValueError(f"specdec.gamma: {specdec.gamma} is beyond task.max_new_tokens, which is {longest}")
    if specdec.gammas != defaults.gammas and (beyond := [gamma for gamma in specdec.gammas if gamma > longest]):
        raise ValueError(f"specdec.gammas: {beyond[0]} is beyond task.max_new_tokens, which is {longest}")


def refuse_multinode(config: RunConfig, *, where: str) -> None:
    """Raise SkdErrors with `where` and each field if a run asks for several machines."""
    hint = "leave it out here, or run it in a cluster: `skd submit`"
    asked = {"teacher_sft": config.teacher_sft.multinode, "distill": config.distill.multinode}
    errors = [
        SkdError(
            "several nodes need a cluster with Kubeflow Trainer", where=f"{where}, field `{step}.multinode`", hint=hint
        )
        for step, multinode in asked.items()
        if multinode is not None
    ]
    if errors:
        raise SkdErrors(errors)


def load_config(path: Path, overrides: Overrides | None = None) -> RunConfig:
    """Read a run's YAML file, with `overrides` in place of the file's values; an SkdError names what is wrong in it."""
    where = f"{path} with --set" if overrides else str(path)
    values = read_yaml(path)
    if "base" in values:
        hint = "`skd compare` runs it on this machine, `skd submit` in Kubeflow"
        raise SkdError("this is the file of a comparison, not of a run", where=str(path), hint=hint)
    check_unset(RunConfig, overrides or {}, where=where)
    return parse_section(RunConfig, apply(values, overrides or {}, where=where), where=where)
