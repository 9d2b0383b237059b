"""KFP component `preflight`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.preflight import main

preflight = component(
    main,
    {"findings": dsl.Markdown},
    results={
        "prepare_data": (str, "The `config` of `prepare_data`, with the fingerprint of the data: new data re-run it."),
        "teacher_sft": (str, "The `config` of `teacher_sft`, with the fingerprint of the teacher's files."),
        "student_init": (str, "The `config` of `student_init`, likewise of the student's; empty in a comparison."),
        "distill": (str, "The `config` of `distill`; empty in a comparison."),
        "evaluate_teacher": (str, "The `config` of `evaluate_teacher`."),
        "evaluate": (str, "The `config` of `evaluate_student`; empty in a comparison."),
        "specdec_benchmark": (str, "The `config` of `specdec_benchmark`; empty in a comparison."),
        "evaluate_champion": (str, "The `config` of `evaluate_champion`; empty in a comparison."),
        "comet_score": (str, "The `config` of `comet_score`; empty in a comparison."),
        "report": (str, "The `config` of `report`; empty in a comparison."),
        "trials": (list, "The trials of a comparison, each with the fields in which it differs."),
        "compare_variant": (str, "The configuration that all trials start from; empty for a single run."),
        "model_fingerprints": (str, "Fingerprints of the teacher and all students of a comparison, by reference."),
        "compare_table": (str, "The `config` of `compare_table`; empty for a single run."),
        "plan": (str, "Reference, trials, and those left out, of a comparison, as JSON."),
        "problems": (str, "Errors that preflight found, as a JSON list; the next step fails with them."),
    },
    by_hand=("pipeline_root", "require_gpu"),
)
