"""KFP component `specdec_benchmark`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.specdec_benchmark import main

specdec_benchmark = component(
    main,
    {
        "teacher": dsl.Input[dsl.Model],
        "draft_before": dsl.Input[dsl.Model],
        "draft_after": dsl.Input[dsl.Model],
        "data": dsl.Input[dsl.Dataset],
        "drafts": dsl.Output[dsl.Artifact],
    },
)
