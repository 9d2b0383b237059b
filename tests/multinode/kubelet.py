"""A kubelet for pods of vLLM servers: containers are processes of this machine, each with an address of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

from tests.multinode.fake_kubernetes import FakeKubernetes

VLLM = """
import http.server, json, os, sys
print("served with", json.dumps(sys.argv[1:]), flush=True)
if "BROKEN" in os.environ:
    sys.exit("ValueError: no memory")

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_): ...

words = dict(zip(sys.argv[1:-1], sys.argv[2:]))
http.server.ThreadingHTTPServer((words["--host"], int(words["--port"])), Health).serve_forever()
"""
"""What answers in vLLM's place."""


class Kubelet:
    """Starts the container of each pod.

    Args:
        fake: The API server, whose `on_pod` this is.
        folder: For the pods' own disks and logs.
        python: An interpreter with vLLM; without it one whose vLLM says no more than that it is there.
        variables: Further variables of the containers.
    """

    def __init__(self, fake: FakeKubernetes, folder: Path, python: Path | None = None, **variables: str) -> None:
        self.fake, self.folder, self.python, self.variables = fake, folder, python, variables
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._addresses = itertools.count(2)
        self._ending: list[threading.Thread] = []
        if python is None:
            module = folder / "packages/vllm/entrypoints/cli/main.py"
            module.parent.mkdir(parents=True)
            module.write_text(VLLM)
            self.variables["PYTHONPATH"] = os.pathsep.join([str(folder / "packages"), os.getcwd()])  # noqa: PTH109

    def on_pod(self, pod: dict[str, Any]) -> None:
        """Start a pod that was made, and end one that is gone."""
        name = pod["metadata"]["name"]
        if "status" not in pod:
            self.end(name)
            return
        pod["status"]["podIP"] = f"127.{os.getpid() % 250 + 1}.{os.getpid() // 250 % 250}.{next(self._addresses)}"
        self.start(pod)

    def start(self, pod: dict[str, Any], restarts: int = 0) -> None:
        """Start a pod's container, also again."""
        name = pod["metadata"]["name"]
        (container,) = pod["spec"]["containers"]
        disk = self.folder / name
        disk.mkdir(exist_ok=True)
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("SKD_", "KFP_"))}
        environ |= {"TMPDIR": str(disk), **self.variables}
        environ |= {each["name"]: self._value(pod, each["valueFrom"]) for each in container["env"]}
        python, *words = container["command"]
        assert python == "python3"
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [self.python or sys.executable, *words], env=environ, stdout=log, stderr=log, start_new_session=True
            )
        state = {"running": {}}
        pod["status"] |= {"phase": "Running", "containerStatuses": [{"state": state, "restartCount": restarts}]}

    def log(self, name: str) -> str:
        """Return what a container has said."""
        return (self.folder / f"{name}.log").read_text()

    def end(self, name: str) -> None:
        """End a pod's process, as the kubelet does: Kubernetes has answered before it is gone."""
        if process := self.processes.pop(name, None):
            process.terminate()
            self._ending.append(threading.Thread(target=process.wait, args=(60,), daemon=True))
            self._ending[-1].start()

    def kill(self, name: str) -> None:
        """Kill all of a container's processes at once."""
        process = self.processes.pop(name)
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        process.wait()

    def close(self) -> None:
        """End all."""
        for name in list(self.processes):
            self.end(name)
        for each in self._ending:
            each.join()

    def _value(self, pod: dict[str, Any], source: dict[str, Any]) -> str:
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == "status.podIP"
            return str(pod["status"]["podIP"])
        reference = source["secretKeyRef"]
        return str(self.fake.secrets[reference["name"]]["stringData"][reference["key"]])
