"""KFP component `evaluate_teacher`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.evaluate_teacher import main

evaluate_teacher = component(main, {"evaluations": dsl.Artifact})
