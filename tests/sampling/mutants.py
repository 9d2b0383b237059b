"""Prove that the tests of the sampler can fail: run them against seeded mistakes in its code (`make mutants`).

Each mistake is made in a copy of the package. A mistake that no test notices is an error, as is one whose place in the
code is gone. Options: names of mistakes, or parts of names, to run these alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SAMPLING = "skd_lib/sampling"
TESTS = [f"tests/sampling/test_{name}.py" for name in ("acceptance", "engine", "distributions")]
COPIED = ("skd_lib", "tests/sampling", "tests/conftest.py", "tests/__init__.py", "pyproject.toml")


class Mutant(NamedTuple):
    """A mistake: `old`, which is in the module once, becomes `new`."""

    name: str
    module: str
    old: str
    new: str


MUTANTS = [
    Mutant("top-K accepts K + 1 tokens", "acceptance", "drafted).sum(-1) < k", "drafted).sum(-1) <= k"),
    Mutant("min_prob refuses its bound", "acceptance", ".squeeze(-1) >= a", ".squeeze(-1) > a"),
    Mutant("mixture mixed the wrong way", "acceptance", "(1 - g) * q_BG + g * p_BG", "g * q_BG + (1 - g) * p_BG"),
    Mutant("lossless accepts by p alone", "acceptance", "block.uniforms_BG * q_BG < p_BG", "block.uniforms_BG < p_BG"),
    Mutant("no residual", "acceptance", "(p_BV - q_BV).clamp_min(0)", "p_BV.clone()"),
    Mutant("accepted behind a rejected draft", "round", ".long().cumprod(-1).sum(-1)", ".long().sum(-1)"),
    Mutant("the rejected draft stands", "round", "torch.where(is_own_BS,", "torch.where(is_own_BS & (drafts_BS < 0),"),
    Mutant(
        "the replacement is drawn as the student draws",
        "round",
        "warp(logits_BSV[batch, own_B], self.teacher_params)",
        "warp(logits_BSV[batch, own_B], self.student_params)",
    ),
    Mutant("one number for two decisions", "round", "REPLACE = range(CHANNELS)", "REPLACE = 0, 0, 2"),
    Mutant("no bonus token", "round", "scored = drafts_BG if self.rule.bonus else", "scored ="),
    Mutant("the token before a bonus is not fed", "round", "rows.last_two_B2 if self.rule.bonus else", ""),
    Mutant("drafts one position too far", "round", "length_B + step, token_B", "length_B + step + 1, token_B"),
    Mutant("the block one position too far", "round", "start_B = rows.length_B - 1\n", "start_B = rows.length_B\n"),
    Mutant("no rewind of the caches", "round", "length_B=rows.length_B + kept_B,", "length_B=rows.length_B + width,"),
    Mutant("tokens after the end", "round", " & ~ended_before_BS", ""),
    Mutant("one end token of several", "round", "== self.eos_ids)", "== self.eos_ids[:1])"),
    Mutant("one token over the limit", "round", "offsets_S < self.max", "offsets_S <= self.max"),
    Mutant("padded vocabulary", "round", "states_BSH)[..., : self.vocabulary]", "states_BSH)"),
    Mutant("no top-p", "distributions", "if params.top_p >= 1:", "if params.top_p > 0:"),
    Mutant("top-p without its last token", "distributions", "probs >= least", "probs > least"),
    Mutant("no temperature", "distributions", "logits.float() / params.temperature", "logits.float()"),
    Mutant("weights not normalised", "distributions", ".unsqueeze(-1) * mass.sum(-1, keepdim=True)", ".unsqueeze(-1)"),
    Mutant("a token of probability 0", "distributions", "target, right=True)", "target)"),
    Mutant("one seed for all rows", "engine", "row_uniforms(seed, width", "row_uniforms(seeds[0], width"),
    Mutant("dropout while sampling", "engine", "with evaluating(*self.models):", "with evaluating():"),
    Mutant("a refilled row in another's place", "engine", "[task.index for task in tasks]", "list(range(len(tasks)))"),
    Mutant("states of the token before", "engine", "verdict.states_BSH.to(", "verdict.states_BSH.roll(1, 1).to("),
    Mutant("rows with each other's caches", "samples", "cache.select(keep)", "cache.select(keep.flip(0))"),
    Mutant("a query sees the next key", "cache", "keys <= queries.clamp_min(0)", "keys <= queries.clamp_min(0) + 1"),
    Mutant("a window one key too wide", "cache", "(keys > queries - window)", "(keys >= queries - window)"),
    Mutant("all queries at one position", "cache", "position_ids=positions_BT,", "position_ids=positions_BT[:, :1],"),
]  # fmt: skip


def text_of(mutant: Mutant, root: Path = ROOT) -> str:
    """Read the module of a mistake."""
    return (root / SAMPLING / f"{mutant.module}.py").read_text(encoding="utf-8")


def judge(mutant: Mutant | None) -> str:
    """Run the tests on a copy with one mistake, or with none; return the test that failed, empty if all passed."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for each in COPIED:
            target = Path(folder) / each
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / each).is_dir():
                shutil.copytree(ROOT / each, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / each, target)
        if mutant is not None:
            text = text_of(mutant)
            (Path(folder) / SAMPLING / f"{mutant.module}.py").write_text(
                text.replace(mutant.old, mutant.new), encoding="utf-8"
            )
        # The folder comes first, so that the copy is imported and not the installed package.
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--timeout=120"]
        done = subprocess.run(
            [*command, "--tb=line", *TESTS], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    failed = re.search(r"^(?:FAILED|ERROR) tests/sampling/(\S+)", done.stdout, flags=re.MULTILINE)
    if failed:
        return failed[1]
    return "" if done.returncode == 0 else f"exit code {done.returncode}: {(done.stdout + done.stderr)[-500:]}"


def main(*names: str) -> int:
    """Judge the mistakes, and print a line for each; return 1 unless all are caught."""
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    lost = [mutant.name for mutant in chosen if text_of(mutant).count(mutant.old) != 1]
    for name in lost:
        print(f"NOT FOUND   {name}: its text is not in the module, or more than once")
    if problem := judge(None):
        print(f"the tests fail without a mistake: {problem}")
        return 1
    survived = 0
    chosen = [mutant for mutant in chosen if mutant.name not in lost]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, test in zip(chosen, pool.map(judge, chosen), strict=True):
            survived += not test
            print(f"{'caught' if test else 'SURVIVED':<12}{mutant.name}{test and f': by {test}'}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mistakes are caught")
    return int(bool(survived or lost))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
