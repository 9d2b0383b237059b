"""KFP component `compare_table`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.compare_table import main

compare_table = component(
    main,
    {
        "evaluations": dsl.Input[list[dsl.Artifact]],
        "drafts": dsl.Input[list[dsl.Artifact]],
        "teacher_evaluations": dsl.Input[dsl.Artifact],
        "report": dsl.Output[dsl.Markdown],
        "figures": dsl.Output[dsl.Metrics],
        "comparison": dsl.Output[dsl.Artifact],
    },
)
