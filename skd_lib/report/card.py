"""The model card of a run's student: its record, the run's configuration and the figures that were measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from skd_lib.config import GettextSource, HubSource, RunConfig, load_config
from skd_lib.errors import SkdError
from skd_lib.models.card import THIS_FOLDER, Lineage, model_card
from skd_lib.models.files import check_model_folder
from skd_lib.report.render import result_tables
from skd_lib.report.sources import SUMMARY
from skd_lib.report.summary import Summary

STUDENT, TEACHER, CONFIG = "student", "teacher", "config.yaml"


@dataclass(frozen=True)
class Trained:
    """A model that this project trained.

    `config` is the run that trained it, None where that is not known; `summary` has its figures, if this is its
    student.
    """

    folder: Path
    lineage: Lineage
    config: RunConfig | None = None
    summary: Summary | None = None

    @property
    def title(self) -> str:
        """The model's name, for a reader."""
        if self.config is None:
            return "Student" if self.lineage.teacher else "Fine-tuned model"
        return f"{self.config.name}, {'student' if self.summary is not None else 'teacher'}"

    def card(self, *, reference: str = "", teacher: str = "", licence: str = "", for_others: bool = False) -> str:
        """Return the text of the model's card.

        Readers find the model at `reference`, by default its folder; `for_others` leaves out folders and buckets.
        """
        lineage = self.lineage.for_others() if for_others else self.lineage
        return model_card(
            reference.rpartition("/")[2] or self.title,
            lineage,
            results=[] if self.summary is None else result_tables(self.summary),
            data={} if self.config is None else _data(self.config, for_others=for_others),
            dataset=_dataset(self.config),
            prompt="..." if self.config is None else self.config.task.prompt.replace("{source}", "..."),
            chat=self.config is None or self.config.task.chat_template,
            reference=reference or (THIS_FOLDER if for_others else str(self.folder)),
            teacher=teacher,
            licence=licence,
        )


def find_trained(name: str, runs: Path) -> Trained:
    """Find the student of a finished run, or the model in a folder.

    `name` is a run's folder, its name under `runs`, or the folder of a model.
    """
    folder = next((path for path in (Path(name), runs / name) if name and path.is_dir()), None)
    if folder is None:
        hint = "name a run's folder, its name under --runs-dir, or a model's folder"
        raise SkdError(f"there is no folder {name} or {runs / name}", where=name or "(empty)", hint=hint)
    if (folder / "config.json").is_file():
        return _model(folder)
    if not (folder / SUMMARY).is_file() or not (folder / STUDENT).is_dir():
        if (folder / "comparison.json").is_file():
            hint = "name the folder of one student: `skd runs` and the comparison's runs.csv list them"
            raise SkdError("a comparison has many students", where=str(folder), hint=hint)
        missing = SUMMARY if not (folder / SUMMARY).is_file() else STUDENT
        hint = "`skd run CONFIG` goes on with a run that has not finished; `skd runs` lists the runs and their states"
        raise SkdError(f"the run has not finished: there is no {missing} in it", where=str(folder), hint=hint)
    return _model(folder / STUDENT)


def config_of(model: Path) -> Path | None:
    """Return the configuration of the run whose model is in a folder, RUN/student or RUN/teacher; None without one."""
    file = model.absolute().parent / CONFIG  # of the link, not of the folder where it leads
    return file if model.name in (STUDENT, TEACHER) and model.is_dir() and file.is_file() else None


def run_of(model: Path) -> RunConfig | None:
    """Return the run whose model is in a folder, see `config_of`."""
    file = config_of(model)
    return None if file is None else load_config(file)


def _model(folder: Path) -> Trained:
    check_model_folder(folder)
    lineage = Lineage.read(folder)
    config = run_of(folder)
    figures = folder.absolute().parent / SUMMARY
    if config is None or folder.name == TEACHER or not figures.is_file():
        return Trained(folder, lineage, config)
    training = config.distill.training
    settings = {name: getattr(training, name) for name in ("max_steps", "batch_size", "learning_rate")}
    summary = Summary.read(figures)
    measured = summary.specdec.get("after")
    whole = replace(
        lineage,
        draft_length=measured.draft_length if measured else None,
        teacher_tuned=config.teacher_sft.enabled,
        settings={**lineage.settings, **{name: value for name, value in settings.items() if value is not None}},
    )
    return Trained(folder, whole, config, summary)


def _data(config: RunConfig, *, for_others: bool) -> dict[str, object]:
    source = config.data.source
    if isinstance(source, HubSource):
        place = source.dataset + (f", {source.subset}" if source.subset else "")
    elif isinstance(source, GettextSource):
        place = f"gettext catalogs ({source.language}) of " + ", ".join(wheel.requirement for wheel in source.train)
    else:
        place = ", ".join(Path(file).name if for_others else file for file in source.train)
    return {"Task": config.task.name, "Source": place, "Prompt": json.dumps(config.task.prompt, ensure_ascii=False)}


def _dataset(config: RunConfig | None) -> str:
    source = config.data.source if config is not None else None
    return source.dataset if isinstance(source, HubSource) else ""
