"""KFP component `comet_score`."""

from skd_kfp.components.build import component
from skd_kfp.components.images import COMET
from skd_lib.steps.comet_score import main

comet_score = component(
    main,
    results={"scores": (str, "Scores and intervals by model, paired tests, and what is missing, as JSON.")},
    image=COMET,
)
