"""Step `gate`: whether the student becomes the champion."""

from __future__ import annotations

from typing import Annotated

import typer

from skd_lib.config import LOWER_IS_BETTER, RegistryConfig, TaskConfig, parse_section
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step


def main(
    student_after: Annotated[str, typer.Option(help="Scores of the distilled student: JSON of step `evaluate`.")],
    champion: Annotated[
        str, typer.Option(help="The champion as this run has measured it: JSON of step `evaluate_champion`.")
    ] = "{}",
    comet: Annotated[str, typer.Option(help="COMET's scores of all models: JSON of step `comet_score`.")] = "",
    registry_config: Annotated[str, typer.Option(help="Section `registry` of the run's config, as JSON.")] = "{}",
    task_config: Annotated[
        str, typer.Option(help="Section `task` of the run's config, as JSON; its first metric decides.")
    ] = "{}",
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI; empty: no tracking.")] = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Compare the student with the registered champion: by the task's metric, and as drafts of the same teacher.

    Output parameters: `promote` (`true` or `false`) and `reason`, one sentence. Without a champion the student is
    promoted; without tracking there is no registry, and nothing is. Nor is it where another version has become champion
    since this run measured one.
    """
    from skd_lib.report.summary import Comet, Scores
    from skd_lib.tracking import registry
    from skd_lib.tracking.gate import Decision, Rival, decide
    from skd_lib.tracking.runs import step_run

    settings = parse_section(RegistryConfig, registry_config, where="--registry-config")
    task = parse_section(TaskConfig, task_config, where="--task-config")
    figures = parse_section(Scores, student_after, where="--student-after").figures()
    judged = parse_section(Comet, comet or "{}", where="--comet")
    figures |= judged.figures("student_after")
    measured = parse_section(Rival, champion, where="--champion")
    rival = measured.model_copy(update={"figures": {**measured.figures, **judged.figures("champion")}})
    io = StepIO(executor_input, {})

    with step_run(
        step="gate", tracking_uri=tracking_uri, experiment=experiment, params={"registry": settings.model_dump()}
    ) as run:
        if task.metrics[0] == "comet" and judged.missing:
            decision = Decision(False, "the score that decides, COMET, is missing; the report says why")
        elif tracking_uri:
            now = registry.champion(
                tracking_uri=tracking_uri, model_name=settings.model_name, patience=registry.step_patience()
            )
            if now is not None and now.version != rival.version:
                why = f"version {now.version} is the champion now, and was not when this run measured"
                decision = Decision(False, f"{why}; start the run again to compare with it")
            else:
                decision = decide(
                    figures,
                    rival,
                    task.metrics[0],
                    higher_is_better=task.metrics[0] not in LOWER_IS_BETTER,
                    min_improvement=settings.min_improvement,
                    max_slowdown=settings.max_slowdown,
                )
        else:
            decision = Decision(False, "tracking is off, so there is no registry to promote in")
        run.set_tags({"promote": decision.promote, "reason": decision.reason})
        run.log_metrics(figures)
    verdict = "promoted" if decision.promote else "not promoted"
    print(f"{verdict}: {decision.reason}")

    io.parameter("promote", "true" if decision.promote else "false")
    io.parameter("reason", decision.reason)
    io.write()


if __name__ == "__main__":
    run_step(main)
