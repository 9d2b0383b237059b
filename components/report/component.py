"""KFP component `report`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.report import main

report = component(
    main,
    {"report": dsl.HTML, "figures": dsl.Metrics},
    results={"measured": (str, "Figures that the registry needs to decide, as JSON.")},
)
