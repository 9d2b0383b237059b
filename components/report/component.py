"""KFP component `report`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.report import main

report = component(
    main,
    {
        "teacher_evaluations": dsl.Input[dsl.Artifact],
        "student_evaluations": dsl.Input[dsl.Artifact],
        "drafts": dsl.Input[dsl.Artifact],
        "champion": dsl.Input[dsl.Artifact],
        "report": dsl.Output[dsl.HTML],
        "figures": dsl.Output[dsl.Metrics],
    },
    results={"measured": (str, "Figures that the registry needs to decide, as JSON.")},
)
