"""The comparison: methods, settings, student inits and seeds on one prepared data set and one teacher.

    preflight -> import_model, prepare_data -> teacher_sft -> evaluate (teacher)
        -> for each run: compare_variant -> student_init -> distill -> evaluate, specdec_benchmark
        -> compare_table
    exit handler: finish

Compiled by `skd compile` into `pipelines/compiled/compare_methods.yaml`; `skd compare` runs the same definition on this
machine, one run after another.
"""

from pathlib import Path
from typing import Any

from kfp import dsl, kubernetes

from components.compare_table.component import compare_table
from components.compare_variant.component import compare_variant
from components.distill.component import distill
from components.evaluate.component import evaluate
from components.finish.component import finish
from components.import_model.component import import_model
from components.preflight.component import preflight
from components.prepare_data.component import prepare_data
from components.specdec_benchmark.component import specdec_benchmark
from components.student_init.component import student_init
from components.teacher_sft.component import teacher_sft
from pipelines.resources import DATA, GPU, SMALL
from pipelines.tasks import retried, settle
from skd_lib.compare.config import load_compare
from skd_lib.compare.plan import to_parameters

# The page in Kubeflow opens with the example filled in.
_EXAMPLE = Path(__file__).parent / "configs" / "compare-demo.yaml"
DEMO = to_parameters(*load_compare(_EXAMPLE), where=_EXAMPLE.name)


def _evaluated(*, role: str, **arguments: Any) -> dict[str, Any]:
    """The outputs of one evaluation."""
    task = evaluate(role=role, **arguments)
    kubernetes.use_secret_as_env(task, "skd-judge", {"api-key": "SKD_JUDGE_API_KEY"}, optional=True)
    outputs: dict[str, Any] = settle(task, f"evaluate-{role}", GPU).outputs
    return outputs


@dsl.pipeline(
    name="skd-compare-methods",
    description="Train students by several methods, settings and seeds under one teacher, and compare them: means, "
    "intervals, paired tests, and what each cost.",
)
def compare_methods(
    run_name: str = DEMO["run_name"],
    teacher: str = DEMO["teacher"],
    student: str = DEMO["student"],
    method: str = DEMO["method"],
    divergence: str = DEMO["divergence"],
    top_k: int = DEMO["top_k"],
    gamma: int = DEMO["gamma"],
    max_steps: int = DEMO["max_steps"],
    learning_rate: float = DEMO["learning_rate"],
    seed: int = DEMO["seed"],
    trials: list[dict] = DEMO["trials"],  # type: ignore[type-arg]
    reference: str = DEMO["reference"],
    drafts: bool = DEMO["drafts"],
    failed: list[dict] = DEMO["failed"],  # type: ignore[type-arg]
    tracking_uri: str = "",
    experiment: str = "skd",
    checkpoint_root: str = "",
    config: dict[str, Any] = DEMO["config"],
) -> None:
    """Compare ways of distilling a teacher into a student.

    Args:
        run_name: Name of the comparison: lower case letters, digits and dashes.
        teacher: Teacher of all runs: hub id, local folder, gs:// URI or wheel:// reference.
        student: Student of the runs that name none; empty where it is cut from the teacher.
        method: Method of the runs that name none.
        divergence: Distillation loss of the runs that name none.
        top_k: SKD's K in the runs that name none; -1: as `config` says.
        gamma: Tokens drafted per teacher call in the runs that name none; -1: as `config` says.
        max_steps: Optimiser steps of the runs that name none; 0 goes by epochs.
        learning_rate: Peak learning rate of the runs that name none.
        seed: Seed of the data's splits and of the teacher. Each run has its own.
        trials: The runs: variant, seed, student init, and by dotted field what differs. `skd compare CONFIG --dry-run
            --json` prints this list for a comparison's YAML file.
        reference: The variant that the others are tested against.
        drafts: Measure every student as a draft of the teacher too, as section `specdec` of `config` says.
        failed: Runs that are left out, each with a `reason`: they stand in the table as failed.
        tracking_uri: MLflow tracking server, e.g. `http://mlflow.mlflow:5000`. Empty turns tracking off.
        experiment: MLflow experiment.
        checkpoint_root: Where training keeps checkpoints: a gs:// URI, or a folder on a volume that outlives the pods.
        config: The rest of the configuration that all runs start from, field by field as in a run's YAML file.
    """
    tracking = {"tracking_uri": tracking_uri, "experiment": experiment}
    end = settle(finish(**tracking), "finish", SMALL, cache=False)
    with dsl.ExitHandler(end, name="run"):
        checked = settle(
            preflight(
                run_name=run_name,
                teacher=teacher,
                student=student,
                method=method,
                divergence=divergence,
                top_k=top_k,
                gamma=gamma,
                max_steps=max_steps,
                learning_rate=learning_rate,
                seed=seed,
                config=config,
                checkpoint_root=checkpoint_root,
                trials=trials,
                **tracking,
            ),
            "preflight",
            DATA,
            cache=False,
        )
        settings = checked.outputs
        base = retried(
            settle(
                import_model(reference=teacher, trust_remote_code=settings["trust_remote_code"], **tracking),
                "import_model",
                DATA,
            )
        ).outputs["model"]
        prepared = retried(
            settle(
                prepare_data(
                    data_config=settings["data_config"],
                    data_fingerprint=settings["data_fingerprint"],
                    seed=seed,
                    **tracking,
                ),
                "prepare_data",
                DATA,
            )
        ).outputs
        common = {"data": prepared["data"], "task_config": settings["task_config"], **tracking}
        tuned = retried(
            settle(
                teacher_sft(
                    teacher=base,
                    config=settings["teacher_sft_config"],
                    checkpoint_root=checkpoint_root,
                    seed=seed,
                    **common,
                ),
                "teacher_sft",
                GPU,
            )
        ).outputs["tuned_teacher"]
        measured = _evaluated(model=tuned, role="teacher", config=settings["evaluation_config"], seed=seed, **common)

        with dsl.ParallelFor(trials, name="runs") as trial:
            own = settle(compare_variant(trial=trial, config=settings["run_config"]), "compare_variant", SMALL).outputs
            # No checkpoints: in a cluster runs that differ later make the same initial student at the same time.
            initial = retried(
                settle(
                    student_init(
                        student=own["student"],
                        teacher=tuned,
                        config=own["student_init_config"],
                        seed=own["seed"],
                        checkpoint_root="",
                        label=own["init_label"],
                        **common,
                    ),
                    "student_init",
                    GPU,
                )
            ).outputs["initial_student"]
            distilled = retried(
                settle(
                    distill(
                        student=initial,
                        teacher=tuned,
                        config=own["distill_config"],
                        seed=own["seed"],
                        checkpoint_root=checkpoint_root,
                        label=own["label"],
                        **common,
                    ),
                    "distill",
                    GPU,
                )
            ).outputs
            answered = _evaluated(
                model=distilled["distilled_student"],
                role="student_after",
                config=settings["evaluation_config"],
                seed=seed,
                label=own["label"],
                **common,
            )
            measured_draft = specdec_benchmark(
                teacher=tuned,
                draft_before=initial,
                draft_after=distilled["distilled_student"],
                config=settings["specdec_config"],
                seed=seed,
                label=own["label"],
                wanted=drafts,
                **common,
            )
            drafted = settle(measured_draft, "specdec_benchmark", GPU).outputs

        settle(
            compare_table(
                run_name=run_name,
                trials=trials,
                scores=dsl.Collected(answered["scores"]),
                drafts=dsl.Collected(drafted["after"]),
                courses=dsl.Collected(distilled["course"]),
                predictions=dsl.Collected(answered["predictions"]),
                figures=dsl.Collected(distilled["metrics"]),
                failed=failed,
                teacher=measured["scores"],
                reference=reference,
                config=settings["evaluation_config"],
                task_config=settings["task_config"],
                seed=seed,
                **tracking,
            ),
            "compare_table",
            SMALL,
            cache=False,
        )
