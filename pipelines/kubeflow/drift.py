"""Tell how far the champion, a draft, has fallen behind on new traffic: accepted shares of its drafts, then and now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from skd_lib import storage
from skd_lib.config import RunConfig, Section, parse_section
from skd_lib.errors import SkdError
from skd_lib.steps.evaluate_champion import check_weights, fetch
from skd_lib.tracking.registry import Champion, champion


class Seen(Section):
    """A measurement of one champion on one state of the data."""

    version: str
    acceptance_rate: float


@dataclass(frozen=True)
class Drift:
    """Decides whether a draft needs to be made again.

    `config` reads from the new data, whose held-out prompts are the sample; `max_drop` is the share of its registered
    acceptance that the champion may lose; `memory`, a file or object, remembers the measurement of these data.
    """

    config: RunConfig
    tracking_uri: str
    max_drop: float
    memory: str = ""

    def decide(self) -> tuple[bool, str]:
        """Return whether acceptance has fallen by more than the share, and why in one sentence.

        Measures with the teacher and the champion on this machine, unless the memory has it. Without a champion, or
        with one of which nothing was ever accepted, a run is needed.
        """
        if self.config.teacher_sft.enabled:
            what = "the run trains its teacher, so there is none yet to measure the champion with"
            raise SkdError(what, where="--max-drop", hint="set `teacher_sft.enabled: false`, or leave the option out")
        name = self.config.registry.model_name
        found = champion(tracking_uri=self.tracking_uri, model_name=name)
        if found is None:
            return True, f"{name} has no champion yet"
        if found.acceptance_rate is None:
            what = "the champion's version does not say what share of its drafts the teacher accepted"
            raise SkdError(what, where=f"{name} version {found.version}", hint="start a run by `skd submit`")
        if not found.acceptance_rate:
            return True, f"the teacher accepted none of the champion's drafts (version {found.version})"
        now = self._remembered(found)
        if now is None:
            now = self._measure(found)
        drop = 1 - now / found.acceptance_rate
        shown = f"the teacher accepts {now:.1%} of the champion's drafts (version {found.version})"
        change = f"{abs(drop):.1%} {'less' if drop > 0 else 'more'} than the {found.acceptance_rate:.1%} it had"
        limit = f"{'' if drop > self.max_drop else 'not '}beyond the {100 * self.max_drop:g} % of --max-drop"
        return drop > self.max_drop, f"{shown}, {change}: {limit}"

    def _remembered(self, found: Champion) -> float | None:
        if not self.memory or not storage.exists(self.memory):
            return None
        seen = parse_section(Seen, storage.read_bytes(self.memory).decode(), where=self.memory)
        return seen.acceptance_rate if seen.version == found.version else None

    def _measure(self, found: Champion) -> float:
        from skd_lib._core.events import Progress
        from skd_lib.specdec.benchmark import measure_references
        from skd_lib.specdec.prompts import prompts_of_run

        config, specdec = self.config, self.config.specdec.headline()
        folder = fetch(found)
        check_weights(found, folder)
        measured = measure_references(
            config.teacher,
            {"champion": str(folder)},
            prompts_of_run(config, limit=specdec.examples),
            task=config.task,
            config=specdec,
            seed=config.seed,
            on_progress=Progress("the champion on new prompts").update_of,
        )["champion"]
        if found.drafted and measured.setting != found.drafted:
            what = f"the champion was registered with other settings than `specdec` has here ({measured.setting})"
            raise SkdError(what, where=f"version {found.version}: {found.drafted}", hint="measure with the same ones")
        if self.memory:
            seen = Seen(version=found.version, acceptance_rate=measured.acceptance_rate)
            with TemporaryDirectory() as made:
                file = Path(made) / "seen.json"
                file.write_text(seen.model_dump_json(), encoding="utf-8")
                storage.upload(file, self.memory)
        return measured.acceptance_rate
