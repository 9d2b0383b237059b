"""KFP component `evaluate_champion`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.evaluate_champion import main

evaluate_champion = component(
    main,
    {
        "student": dsl.Input[dsl.Model],
        "teacher": dsl.Input[dsl.Model],
        "data": dsl.Input[dsl.Dataset],
        "champion": dsl.Output[dsl.Artifact],
    },
)
