"""The comparison: methods, settings, student inits and seeds on one prepared data set and one teacher.

    preflight -> import_model, prepare_data -> teacher_sft -> evaluate (teacher)
        -> for each run: compare_variant -> student_init -> distill -> evaluate, specdec_benchmark
            -> compare_result
        -> compare_table
    exit handler: finish

Compiled by `skd compile` into `pipelines/compiled/compare_methods.yaml`; `skd compare` runs the same definition on this
machine, one run after another.
"""

from pathlib import Path
from typing import Any

from kfp import dsl

from components.compare_result.component import compare_result
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
from pipelines.profiles import Profile
from pipelines.tasks import Settler
from skd_lib.compare.config import load_compare
from skd_lib.compare.plan import to_parameters

# The page in Kubeflow opens with the example filled in.
_EXAMPLE = Path(__file__).parent / "configs" / "compare-demo.yaml"
DEMO = to_parameters(*load_compare(_EXAMPLE), where=_EXAMPLE.name)


def compare_methods(profile: Profile) -> Any:
    """The pipeline.

    Args:
        profile: What the steps ask of the cluster.
    """
    pool_labels, pool_taints = profile.shared_pool

    @dsl.pipeline(
        name="skd-compare-methods",
        description="Train students by several methods, settings and seeds under one teacher, and compare them: means, "
        "intervals, paired tests, and what each cost.",
    )
    def pipeline(
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
        node_selector: dict[str, str] = pool_labels,
        tolerations: list[dict] = pool_taints,  # type: ignore[type-arg]
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
            trials: The runs: variant, seed, student init, and by dotted field what differs. `skd compare CONFIG
                --dry-run --json` prints this list for a comparison's YAML file.
            reference: The variant that the others are tested against.
            drafts: Measure every student as a draft of the teacher too, as section `specdec` of `config` says.
            failed: Runs that are left out, each with a `reason`: they stand in the table as failed.
            tracking_uri: MLflow tracking server, e.g. `http://mlflow.mlflow:5000`. Empty turns tracking off.
            experiment: MLflow experiment.
            checkpoint_root: Where training keeps checkpoints: a gs:// URI, or a folder on a volume that outlives the
                pods.
            node_selector: Labels that nodes must have on which models are loaded, e.g. a GPU pool's; {} for any node.
            tolerations: Taints that those nodes may have, as Kubernetes spells them:
                `[{"key": "nvidia.com/gpu", "operator": "Exists"}]`.
            config: The rest of the configuration that all runs start from, field by field as in a run's YAML file.
        """
        tracking = {"tracking_uri": tracking_uri, "experiment": experiment}
        settle = Settler(profile, node_selector, tolerations).settle
        end = settle(finish(run_name=run_name, **tracking), "finish", cache=False)
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
                cache=False,
            )
            settings = checked.outputs
            base = settle(
                import_model(
                    reference=teacher,
                    fingerprint=settings["teacher_fingerprint"],
                    trust_remote_code=settings["trust_remote_code"],
                    **tracking,
                ),
                "import_model",
            ).outputs["model"]
            prepared = settle(
                prepare_data(
                    data_config=settings["data_config"],
                    data_fingerprint=settings["data_fingerprint"],
                    seed=seed,
                    **tracking,
                ),
                "prepare_data",
            ).outputs
            common = {"data": prepared["data"], "task_config": settings["task_config"], **tracking}
            tuned = settle(
                teacher_sft(
                    teacher=base,
                    config=settings["teacher_sft_config"],
                    checkpoint_root=checkpoint_root,
                    seed=seed,
                    **common,
                ),
                "teacher_sft",
            ).outputs["tuned_teacher"]
            evaluation = {**common, "config": settings["evaluation_config"], "seed": seed}
            measured = settle(evaluate(model=tuned, role="teacher", label="", **evaluation), "evaluate-teacher").outputs

            with dsl.ParallelFor(trials, name="runs") as trial:
                chosen = compare_variant(
                    trial=trial, config=settings["run_config"], model_fingerprints=settings["model_fingerprints"]
                )
                own = settle(chosen, "compare_variant").outputs
                # No checkpoints: in a cluster runs that differ later make the same initial student at the same time.
                initial = settle(
                    student_init(
                        student=own["student"],
                        fingerprint=own["student_fingerprint"],
                        teacher=tuned,
                        config=own["student_init_config"],
                        seed=own["seed"],
                        checkpoint_root="",
                        label=own["init_label"],
                        **common,
                    ),
                    "student_init",
                ).outputs["initial_student"]
                distilled = settle(
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
                ).outputs
                answered = settle(
                    evaluate(
                        model=distilled["distilled_student"],
                        role="student_after",
                        label=own["label"],
                        **evaluation,
                    ),
                    "evaluate-student_after",
                ).outputs
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
                drafted = settle(measured_draft, "specdec_benchmark").outputs
                result = settle(
                    compare_result(
                        trial=trial,
                        scores=answered["scores"],
                        course=distilled["course"],
                        draft=drafted["after"],
                        predictions=answered["predictions"],
                        figures=distilled["metrics"],
                    ),
                    "compare_result",
                ).outputs["result"]

            settle(
                compare_table(
                    run_name=run_name,
                    results=dsl.Collected(result),
                    failed=failed,
                    teacher=measured["scores"],
                    reference=reference,
                    config=settings["evaluation_config"],
                    task_config=settings["task_config"],
                    seed=seed,
                    **tracking,
                ),
                "compare_table",
                cache=False,
            )

    return pipeline
