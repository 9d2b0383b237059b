"""KFP component `compare_variant`."""

from skd_kfp.components.build import component
from skd_lib.steps.compare_variant import main

compare_variant = component(
    main,
    results={
        "student_init": (str, "The `config` of `student_init`, with the student, the seed and the label of the trial."),
        "distill": (str, "The `config` of `distill`, likewise."),
        "evaluate": (str, "The `config` of `evaluate`, with the label of the trial."),
        "specdec_benchmark": (str, "The `config` of `specdec_benchmark`, likewise."),
    },
)
