"""KFP component `finish`: clean up, close the run's records, whether it succeeded or failed, and notify."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def finish(
    status: dsl.PipelineTaskFinalStatus,
    run_name: str,
) -> dsl.ContainerSpec:
    """Clean up, close the run's records, whether it succeeded or failed, and notify a chat channel.

    Runs as the exit handler: KFP hands it the final status of everything before it. Cleaning up is to delete the run's
    TrainJobs that go on although the steps that made them are dead. The channel's webhook is in a Secret; without one
    no message is sent.

    Args:
        status: KFP's final status of the run.
        run_name: Name of the run.
    """
    return run_step(
        "finish",
        TRAIN,
        {
            "status": status,
            "run_name": run_name,
        },
        {},
    )
