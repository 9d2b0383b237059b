"""KFP component `student_init`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.student_init import main

student_init = component(
    main,
    {
        "teacher": dsl.Input[dsl.Model],
        "data": dsl.Input[dsl.Dataset],
        "initial_student": dsl.Output[dsl.Model],
    },
)
