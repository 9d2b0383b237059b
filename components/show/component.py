"""KFP component `show`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.show import main

show = component(main, {"artifact": dsl.Input[dsl.Artifact]})
