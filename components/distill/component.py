"""KFP component `distill`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.distill import main

distill = component(
    main,
    {
        "student": dsl.Input[dsl.Model],
        "teacher": dsl.Input[dsl.Model],
        "data": dsl.Input[dsl.Dataset],
        "distilled_student": dsl.Output[dsl.Model],
    },
)
