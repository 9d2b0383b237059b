"""What differs between the versions of Kubeflow Pipelines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Version:
    """One version's rules; each field names its source in kubeflow/pipelines.

    Attributes:
        name: Its tag.
        driver_fills_arguments: The driver puts parameters into a step's arguments and does not know the defaults of
            its component: a parameter that is not passed fails the driver. backend/src/v2/driver/util.go at 2.17.0,
            `resolveContainerArgs`; seen. Until 2.16.1 the launcher does so and knows them
            (component/launcher_v2.go, `addDefaultParams`; seen).
        states_climb: A DAG's new state is told to the DAG above. metadata/client.go, `UpdateDAGExecutionsState`:
            since 2.17.0, for all DAGs (seen); before, a nested DAG's end is not passed on (2.16.1: seen).
        loops_counted: A loop is complete when as many iterations are (same function, since 2.17.0); before, it waits
            for as many as its body has tasks.
        one_of_artifacts: `dsl.OneOf` of artifacts takes the branch that ran. driver/resolve.go, `GetProducerTask`:
            since 2.17.0 (read); before, the last branch.
        metadata: Executions are kept in ML Metadata. Without it (branch of pull request 13986; read) the states have
            other words, a cached step counts for its DAG (driver/container.go, `UpdateStatuses`), an output artifact
            without a file fails its step, and `finish` gets the error's message.
    """

    name: str
    driver_fills_arguments: bool = True
    states_climb: bool = True
    loops_counted: bool = True
    one_of_artifacts: bool = True
    metadata: bool = True

    @property
    def complete(self) -> str:
        """Return the word for a step or DAG that has gone well."""
        return "COMPLETE" if self.metadata else "SUCCEEDED"

    @property
    def skipped(self) -> str:
        """Return the word for a branch that was not taken (`GenerateExecutionConfig`: CANCELED means not triggered)."""
        return "CANCELED" if self.metadata else "SKIPPED"


_OLD = {"driver_fills_arguments": False, "states_climb": False, "loops_counted": False, "one_of_artifacts": False}
V2_15 = Version("2.15.0", **_OLD)
V2_16 = Version("2.16.1", **_OLD)
V2_17 = Version("2.17.0")
NEXT = Version("without ML Metadata", driver_fills_arguments=False, metadata=False)
VERSIONS = (V2_15, V2_16, V2_17, NEXT)
