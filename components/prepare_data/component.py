"""KFP component `prepare_data`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.prepare_data import main

prepare_data = component(main, {"data": dsl.Dataset})
