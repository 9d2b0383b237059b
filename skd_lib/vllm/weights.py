"""A transport for vLLM's weight updates that reads safetensors files: for CPUs, and trainers that share a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

BACKEND = "skd_files"
"""Name of the transport in `--weight-transfer-config`."""


@dataclass
class NoInfo:
    """Nothing has to be set up."""


@dataclass
class WeightFolder:
    """A folder with all weights of a model as safetensors files."""

    folder: str

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight with its name."""
        for file in sorted(Path(self.folder).glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    yield name, opened.get_tensor(name)


class FileWeights(WeightTransferEngine[NoInfo, WeightFolder]):
    """vLLM's interface of a transport."""

    init_info_cls, update_info_cls = NoInfo, WeightFolder

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Prepare the model for new weights."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: WeightFolder) -> None:
        """Load the weights of a folder."""
        self.model.load_weights(update_info.tensors())

    def finish_weight_update(self) -> None:
        """Put the new weights into the form that the kernels read."""
        finalize_layerwise_reload(self.model, self.model_config)
        if not current_platform.is_cpu():
            return
        # A head that is tied to the embedding has a packed copy of its own, which vLLM 0.32 leaves as it was.
        for head in (module for module in self.model.modules() if isinstance(module, ParallelLMHead)):
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Do nothing."""


def register() -> None:
    """Make the transport known to vLLM, once in a process."""
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeights)
    except ValueError:  # it is known already
        return
