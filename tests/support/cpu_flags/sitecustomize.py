"""Lets PyTorch report a CPU with all of bf16's instructions (SKD_TEST_BF16=on) or with none (=off).

Python imports a module of this name in every process that has this folder on its path; `tests/conftest.py` sees to it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PRESENT = {"on": True, "off": False}[os.environ["SKD_TEST_BF16"]]


class _WhenImported(MetaPathFinder):
    """Changes `torch.cpu` when it is imported: to import it here would cost every process seconds."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        load: Any = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            capabilities = module.get_capabilities
            flags = {"avx512_bf16": _PRESENT, "amx_bf16": _PRESENT}
            module.get_capabilities = lambda: {**capabilities(), **flags}  # type: ignore[attr-defined]

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _WhenImported())
