"""KFP component `evaluate_student`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.evaluate_student import main

evaluate_student = component(main, {"evaluations": dsl.Artifact})
