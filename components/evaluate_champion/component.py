"""KFP component `evaluate_champion`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.evaluate_champion import main

evaluate_champion = component(main, {"champion": dsl.Artifact})
