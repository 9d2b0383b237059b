"""Numbers from TRL's `GKDTrainer.generalized_jsd_loss`, to which `jsd` is compared.

TRL is no dependency: the numbers are kept in `tests/support/trl_jsd.json`. To make them again, in an environment of
its own:

    python3 -m venv trl-env && trl-env/bin/pip install trl==1.16.0 -c constraints/main.txt
    trl-env/bin/python tests/support/trl_jsd.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_suffix(".json")
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (0.5, 1.0, 2.0)


def logits() -> tuple[Tensor, Tensor, Tensor]:
    """(2, 4, 11) logits of teacher and student, and labels that leave out three of the eight positions.

    Written out as a formula, since random numbers may differ between versions of PyTorch.
    """
    positions = torch.arange(2 * 4 * 11, dtype=torch.float64).reshape(2, 4, 11)
    teacher, student = 4 * torch.sin(1.7 * positions), 3 * torch.cos(2.3 * positions + 0.5)
    labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, 8, 9]])
    return teacher, student, labels


def main() -> None:
    """Compute the table with TRL and write it."""
    import trl
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    teacher, student, labels = logits()
    rows: list[dict[str, Any]] = []
    for beta in BETAS:
        for temperature in TEMPERATURES:
            inputs = student.clone().requires_grad_()
            # "batchmean" divides by the number of positions that have a label.
            loss = GKDTrainer.generalized_jsd_loss(
                inputs, teacher, labels=labels, beta=beta, temperature=temperature, reduction="batchmean"
            )
            loss.backward()
            rows.append(
                {"beta": beta, "temperature": temperature, "loss": loss.item(), "gradient": inputs.grad[1, 2].tolist()}
            )
    TABLE.write_text(json.dumps({"trl": trl.__version__, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
