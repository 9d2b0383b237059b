"""Step `gate`: whether the student becomes the champion."""

from __future__ import annotations

from typing import Annotated

import typer

from skd_lib.config import LOWER_IS_BETTER, parse_section
from skd_lib.steps.options import Experiment, TrackingUri
from skd_lib.steps.runtime import StepIO, run_step

READ_BY_OTHERS = str.maketrans("${}", "   ")
MEASURED_HELP = "The student and the champion as this run has measured them: JSON of step `report`."


def main(
    measured: Annotated[str, typer.Option(help=MEASURED_HELP)],
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Compare the student with the registered champion: by the task's metric, and as drafts of the same teacher.

    Output parameters: `promote` (`true` or `false`) and `reason`, one sentence. Without a champion the student is
    promoted; without tracking there is no registry, and nothing is. Nor is it where another version has become champion
    since this run measured one.
    """
    from skd_lib.report.measured import Measured
    from skd_lib.tracking import registry
    from skd_lib.tracking.gate import Decision, decide
    from skd_lib.tracking.runs import step_run

    found = parse_section(Measured, measured, where="--measured")
    settings, metric = found.registry, found.task_metric
    io = StepIO({})

    with step_run(
        step="gate", tracking_uri=tracking_uri, experiment=experiment, params={"registry": settings.model_dump()}
    ) as run:
        if metric == "comet" and found.comet_missing:
            decision = Decision(False, "the score that decides, COMET, is missing; the report says why")
        elif tracking_uri:
            now = registry.champion(
                tracking_uri=tracking_uri, model_name=settings.model_name, patience=registry.step_patience()
            )
            if now is not None and now.version != found.champion.version:
                why = f"version {now.version} is the champion now, and was not when this run measured"
                decision = Decision(False, f"{why}; start the run again to compare with it")
            else:
                decision = decide(
                    found.student,
                    found.champion,
                    metric,
                    higher_is_better=metric not in LOWER_IS_BETTER,
                    min_improvement=settings.min_improvement,
                    max_slowdown=settings.max_slowdown,
                )
        else:
            decision = Decision(False, "tracking is off, so there is no registry to promote in")
        run.set_tags({"promote": decision.promote, "reason": decision.reason})
        run.log_metrics(found.student)
    # It goes on as an argument, which Kubeflow and kubelet read too, and may quote tokens of a vocabulary.
    reason = decision.reason.translate(READ_BY_OTHERS).encode("ascii", "backslashreplace").decode()
    verdict = "promoted" if decision.promote else "not promoted"
    print(f"{verdict}: {reason}")

    io.parameter("promote", "true" if decision.promote else "false")
    io.parameter("reason", reason)
    io.write()


if __name__ == "__main__":
    run_step(main)
