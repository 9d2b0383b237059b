"""KFP component `teacher_sft`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.teacher_sft import main

teacher_sft = component(main, {"tuned_teacher": dsl.Model}, by_hand=("fetched",))
