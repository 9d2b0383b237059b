"""KFP component `distill`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.distill import main

distill = component(main, {"distilled_student": dsl.Model})
