"""KFP component `evaluate`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.evaluate import main

evaluate = component(
    main,
    {
        "model": dsl.Input[dsl.Model],
        "data": dsl.Input[dsl.Dataset],
        "evaluation": dsl.Output[dsl.Artifact],
    },
)
