"""KFP component `register_model`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.register_model import main

register_model = component(main, {"student": dsl.Input[dsl.Model]})
