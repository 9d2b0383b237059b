"""KFP component `evaluate`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.evaluate import main

evaluate = component(main, {"evaluation": dsl.Artifact})
