"""What each kind of step asks of the cluster."""

from dataclasses import dataclass

from kfp import dsl, kubernetes


@dataclass(frozen=True)
class Resources:
    """Requests and limits of one step's container.

    Attributes:
        cpu: Cores requested; there is no CPU limit, which would only throttle.
        memory: Memory requested and allowed.
        gpus: Accelerators.
        gpu_type: Kubernetes resource name of the accelerator.
        shared_memory: Size of /dev/shm, which torch's data loaders and collectives use; empty: the container's default.
    """

    cpu: str
    memory: str
    gpus: int = 0
    gpu_type: str = "nvidia.com/gpu"
    shared_memory: str = ""

    def apply(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """Set them on a task."""
        task.set_cpu_request(self.cpu).set_memory_request(self.memory).set_memory_limit(self.memory)
        if self.gpus:
            task.set_accelerator_type(self.gpu_type).set_accelerator_limit(self.gpus)
        if self.shared_memory:
            kubernetes.empty_dir_mount(
                task,
                "shared-memory",
                "/dev/shm",  # noqa: S108 - a mount point in the container
                medium="Memory",
                size_limit=self.shared_memory,
            )
        return task


SMALL = Resources(cpu="1", memory="4Gi")
DATA = Resources(cpu="2", memory="16Gi")
GPU = Resources(cpu="8", memory="64Gi", gpus=1, shared_memory="8Gi")
