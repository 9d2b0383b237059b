"""KFP component `specdec_benchmark`: measure the student as draft model for the teacher, before and after."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def specdec_benchmark(
    teacher: dsl.Input[dsl.Model],
    draft_before: dsl.Input[dsl.Model],
    draft_after: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    config: str,
    drafts: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Measure the student as draft model for the teacher, before and after distillation.

    Acceptance rate by position, tokens per teacher call, latencies and wall-clock speed-up over decoding with the
    teacher alone, beside the theoretical one, for several draft lengths, batch sizes and temperatures. The teacher
    alone and both students take turns in one process.

    Args:
        teacher: The fine-tuned teacher.
        draft_before: The student before distillation.
        draft_after: The student after distillation.
        data: Prepared data, as `prepare_data` wrote it.
        config: The run's settings that this step depends on, as JSON: `specdec`, `task`, `seed`, `label`, and whether
            to measure at all: `drafts`.

    Returns:
        drafts: Folder with `before.json` and `after.json` (`skd_lib/specdec/result.py` describes them).
    """
    return run_step(
        "specdec_benchmark",
        TRAIN,
        {
            "teacher": teacher.path,
            "draft_before": draft_before.path,
            "draft_after": draft_after.path,
            "data": data.path,
            "config": config,
            "drafts_out": drafts.path,
        },
        {"drafts": drafts},
    )
