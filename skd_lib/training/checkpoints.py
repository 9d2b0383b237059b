"""Checkpoints that survive a kill at any moment, and that a restarted or re-submitted step finds again.

A checkpoint is complete once it holds `MARKER`, written last; older ones are deleted only after that. What a step
trains on decides the folder its checkpoints are in, so the same work finds them and other work does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from skd_lib.storage import write_text_atomic

MARKER = "complete"
log = logging.getLogger(__name__)


def checkpoint_dir(root: Path, step: str, **inputs: Any) -> Path:
    """Folder of a step's checkpoints: `root/step/KEY`, KEY a hash of all that the result depends on.

    Args:
        root: Storage that outlives the process.
        step: Name of the pipeline step.
        **inputs: JSON values: configuration sections, seed, data fingerprint, digests of the models' weights.
    """
    canonical = json.dumps({"step": step, **inputs}, sort_keys=True)
    return root / step / hashlib.sha256(canonical.encode()).hexdigest()[:16]


def last_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, None if there is none. Half-written newer ones are removed."""
    while folder.is_dir() and (newest := get_last_checkpoint(str(folder))) is not None:
        checkpoint = Path(newest)
        if (checkpoint / MARKER).exists():
            return checkpoint
        log.warning("%s was not written to its end and is left out", checkpoint)
        if PartialState().is_main_process:
            shutil.rmtree(checkpoint)
        PartialState().wait_for_everyone()
    return None


class CheckpointKeeper(TrainerCallback):
    """Marks each checkpoint as complete when all processes have written it, then keeps it and the best one only."""

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Called by the trainer after each checkpoint."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        newest = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_text_atomic(newest / MARKER, "")
        kept = {newest.name, Path(state.best_model_checkpoint or newest).name}
        for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if checkpoint.name not in kept:
                # Without its marker first, so that a kill in between leaves nothing that looks complete.
                (checkpoint / MARKER).unlink(missing_ok=True)
                shutil.rmtree(checkpoint)
