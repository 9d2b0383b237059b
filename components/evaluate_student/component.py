"""KFP component `evaluate_student`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.evaluate_student import main

evaluate_student = component(
    main,
    {
        "before": dsl.Input[dsl.Model],
        "after": dsl.Input[dsl.Model],
        "data": dsl.Input[dsl.Dataset],
        "evaluations": dsl.Output[dsl.Artifact],
    },
)
