"""KFP component `teacher_sft`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.teacher_sft import main

teacher_sft = component(
    main,
    {"data": dsl.Input[dsl.Dataset], "tuned_teacher": dsl.Output[dsl.Model]},
    by_hand=("fetched",),
)
