"""KFP component `finish`."""

from skd_kfp.components.build import component
from skd_lib.steps.finish import main

finish = component(main)
