"""What a fork does in `test_forking.py`: `python3 -m tests.pipelines.forked BEHAVIOUR`."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time

import torch

from skd_lib._core import events


def main(behaviour: str) -> None:
    match behaviour:
        case "look":
            seen = {"argv": sys.argv[1:], "env": dict(os.environ), "modules": sorted(sys.modules)}
            seen |= {"session": os.getsid(0), "pid": os.getpid(), "left": getattr(torch, "left_by_a_fork", None)}
            torch.left_by_a_fork = True
            print("to standard error", file=sys.stderr)
            print(json.dumps(seen))
        case "leave":
            sys.exit(7)
        case "complain":
            sys.exit("the data has a hole")
        case "crash":
            raise RuntimeError("boom")
        case "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "linger":
            atexit.register(lambda: print("and the end"))
            threading.Thread(target=lambda: (time.sleep(0.3), print("first the thread"))).start()
        case "compute":
            torch.set_num_threads(2)
            matrix = torch.ones(700, 700)
            print(int((matrix @ matrix).max()))
        case "hang":
            child = os.fork()
            if child:
                events.emit("pids", pids=[os.getpid(), child])
            time.sleep(120)


if __name__ == "__main__":
    main(sys.argv[1])
