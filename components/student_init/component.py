"""KFP component `student_init`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.student_init import main

student_init = component(main, {"initial_student": dsl.Model})
