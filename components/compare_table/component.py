"""KFP component `compare_table`."""

from kfp import dsl

from skd_kfp.components.build import component
from skd_lib.steps.compare_table import main

compare_table = component(
    main, {"report": dsl.Markdown, "page": dsl.HTML, "figures": dsl.Metrics, "comparison": dsl.Artifact}
)
