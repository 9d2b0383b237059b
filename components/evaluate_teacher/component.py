"""KFP component `evaluate_teacher`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.evaluate_teacher import main

evaluate_teacher = component(
    main,
    {
        "teacher": dsl.Input[dsl.Model],
        "data": dsl.Input[dsl.Dataset],
        "evaluations": dsl.Output[dsl.Artifact],
    },
)
