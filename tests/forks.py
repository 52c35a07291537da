"""Scripts in processes of their own that need not import torch again: forks of a server that has done nothing else.

Importing torch and tracer takes two seconds, and tests of several processes start dozens. Tests of how a process begins
or ends start a real one.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
SECONDS = 240.0
PRELOADED = (
    "conftest",  # which tells torch to use one thread
    "store_cases",
    "torch._dynamo",  # each optimizer imports it
    "torch.distributed.fsdp",
    "tracer.api.attribution",
)


@dataclass
class Forked:
    """A running script; `wait` returns its exit status, and `output` what it has printed."""

    pid: int
    file: Path

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for the end; a process that hangs is killed, and its status is -9."""
        deadline = time.monotonic() + seconds
        while (status := _asked({"wait": self.pid})) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, 9)
                deadline = float("inf")
            time.sleep(0.01)
        return status

    @property
    def output(self) -> str:
        return self.file.read_text(errors="replace")


def fork(script: Path, *arguments: str, cwd: Path, imports: str = "", **environment: str) -> Forked:
    """Begin to run a script with arguments and variables, in a folder that also gets what it prints.

    The server first imports the module that ``imports`` names, which processes then share.
    """
    file = cwd / f".printed-{time.monotonic_ns()}"
    job = {"argv": [str(script), *arguments], "cwd": str(cwd), "environment": environment, "file": str(file)}
    return Forked(_asked({**job, "imports": imports}), file)


def ranks(count: int, script: Path, *arguments: str, cwd: Path, imports: str = "") -> list[Forked]:
    """Begin processes with the variables that torchrun gives to its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [fork(script, *arguments, cwd=cwd, imports=imports, **shared, **number) for number in numbers]


def _asked(question: dict[str, Any]) -> Any:
    server = _server()
    server.stdin.write(json.dumps(question) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the server of forks has ended"
    return json.loads(answer)


@functools.cache
def _server() -> Any:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True, env=env)
    atexit.register(server.communicate)  # it ends with its input
    return server


def _serve() -> None:
    """Answer questions: a job with the number of its process, and a wait with an exit status or None."""
    gc.disable()
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            pid, status = os.waitpid(question["wait"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        if question["imports"]:
            importlib.import_module(question["imports"])
        gc.freeze()  # else a collection in a fork would copy the pages of all that it looks at
        pid = os.fork()
        if not pid:
            _run(question)
        print(pid, flush=True)


def _run(job: dict[str, Any]) -> None:
    """Run a script as its own process would, and end."""
    gc.enable()
    printed, nothing = os.open(job["file"], os.O_WRONLY | os.O_CREAT), os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(descriptor, target)
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    sys.argv[:] = job["argv"]
    status = 0
    try:
        runpy.run_path(job["argv"][0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.stdout.flush()  # what was printed comes first, though it waits in a buffer
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
