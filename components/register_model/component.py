"""KFP component `register_model`."""

from skd_kfp.components.build import component
from skd_lib.steps.register_model import main

register_model = component(main)
