"""A comparison as the parameters of its pipeline."""

from __future__ import annotations

from skd_lib import parameters
from skd_lib.compare.config import CompareConfig
from skd_lib.compare.trials import expand, reference_of
from skd_lib.config import RunConfig
from skd_lib.parameters import Parameters, to_struct

OWN_PARAMETERS = ("trials", "reference", "drafts", "failed")
"""What the pipeline takes beside a run's parameters."""


def to_parameters(compare: CompareConfig, base: RunConfig, *, where: str) -> Parameters:
    """The base configuration's parameters, the list of runs, and the variant that the others are tested against.

    Raises:
        SkdError: a variant that cannot be run, or two of one name.
    """
    trials = expand(compare, base, where=where)
    return {
        **parameters.to_parameters(base),
        "trials": [to_struct(trial) for trial in trials],
        "reference": reference_of(compare, trials, base, where=where),
        "drafts": compare.drafts,
        "failed": [],
    }
