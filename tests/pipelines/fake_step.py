"""A step for the runner's tests: real process, real KFP executor output, no models.

    fake_step.py NAME BEHAVIOUR VALUE, and KFP's own arguments

Each execution adds a line to `$FAKE_STEP_JOURNAL`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from skd_lib._core import events
from skd_lib.comparison.plan import from_parameters
from skd_lib.steps.kfp_call import Call, called, take_call
from skd_lib.steps.runtime import StepIO


def save() -> None:
    """What training does on SIGTERM, with much to say."""
    print("saving\n" * 50_000, flush=True)
    Path(os.environ["FAKE_STEP_JOURNAL"]).with_name("saved").touch()
    sys.exit(75)


def main(name: str, behaviour: str, value: str, call: Call) -> None:
    with Path(os.environ["FAKE_STEP_JOURNAL"]).open("a") as journal:
        journal.write(f"{name} {os.getpid()} {os.environ['KFP_RUN_ID']} {os.environ['OMP_NUM_THREADS']}\n")
    print(f"hello from {name}", flush=True)
    if behaviour == "error":
        events.emit("error", message="the data has an empty row\n  hint: correct row 3")
        sys.exit(2)
    if behaviour == "crash":
        raise RuntimeError("boom")
    if behaviour == "hang":
        print("hanging", flush=True)
        time.sleep(120)
    if behaviour == "save":
        signal.signal(signal.SIGTERM, lambda *_: save())
        print("hanging", flush=True)
        time.sleep(120)
    if behaviour == "refuse":
        signal.signal(signal.SIGTERM, lambda *_: print("refusing", flush=True))
        print("hanging", flush=True)
        for _ in range(1200):
            time.sleep(0.1)
    if behaviour == "note":
        events.note(f"records go to {os.environ['SKD_TRACKING_BUFFER']}")
    if behaviour == "outcome":
        events.outcome("registered as m version 2 (challenger)")
    progress = events.Progress("working", 3)
    for done in (1, 2, 3):
        progress.update(done, loss=1 / done)
    artifacts = {key: Path(uri) for key, uri in call.artifacts.items()}
    io = StepIO(artifacts)
    for path in artifacts.values():
        path.write_text(f"{name}:{value}")
    for parameter in call.parameters:
        io.parameter(parameter, {"value": value, "nested": [1, 2.5]})
    if name == "expand":  # its second argument is the configuration, its third the comparison
        form = {"data_train": "x", "model_teacher": "teacher", "model_student": "student"}
        plan = from_parameters(value, config=behaviour, **form)
        io.parameter("trials", plan.table()["trials"])
        io.parameter("failed", plan.table()["skipped"])
    if name == "choose":  # its second argument is the round's item, its third the output of the step before the loop
        assert json.loads(value)["nested"] == [1, 2.5], value
        io.parameter("behaviour", json.loads(behaviour)["overrides"]["student"])
    if name == "gather":  # its second argument are the rounds that failed
        io.parameter("summary", {"failed": json.loads(behaviour), "values": json.loads(value)})
    io.write()


if __name__ == "__main__":
    words, given = take_call(sys.argv[1:])
    with called(given):
        main(words[0], words[1], words[2], given)
