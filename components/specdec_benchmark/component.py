"""KFP component `specdec_benchmark`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.specdec_benchmark import main

specdec_benchmark = component(main, {"drafts": dsl.Artifact})
