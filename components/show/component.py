"""KFP component `show`."""

from skd_kfp.components.build import component
from skd_lib.steps.show import main

show = component(main)
