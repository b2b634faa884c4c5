"""A Python that has MONAI imported: what it starts is forked from a process that waits, in place of 12 CPU-seconds.

:func:`start` makes a program that takes the arguments of ``python`` (``-m MODULE``, ``-c CODE`` or a script), its
environment, folder and standard streams, and ends as the program does. Programs that this one starts by
``sys.executable``, such as the ranks of ``torch.distributed.run``, are forked, too; those of ``multiprocessing`` start
anew. Variables that an interpreter reads at its start (``PYTHONWARNINGS``, ``PYTHONHASHSEED``) do nothing. What needs a
start from nothing, or other versions of what is imported here, takes the real one; only this package is imported anew
where another checkout or a bundle's own copy comes first in the path. A killed program ends a little later than the
process that stands for it.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.machinery
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path

IMPORTED = (
    "monai.bundle",
    "monai.apps",
    "monai.engines",
    "monai.handlers",
    "torch.distributed.run",
    "maisi_tools.bundles.stage",
    "maisi_tools.networks",
)

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

WAITS = 180.0
"""Seconds for the imports, and for what a process of its own makes, on a busy machine."""


def start(folder: Path) -> tuple[Path, subprocess.Popen]:
    """Start the process that waits; returns the program, and the process, to be killed at the end."""
    address, program = folder / "socket", folder / "python"
    program.write_text(f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n")
    with open(program, "a") as file:
        file.write(f"import preloaded\npreloaded.ask({str(address)!r}, {sys.executable!r})\n")
    program.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, str(address), str(program), str(os.getpid())]
    process = subprocess.Popen(command, env=environment)
    return program, process


def ask(address: str, real: str) -> None:
    """The program: hands everything over, waits, and ends as what was started ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        until = time.monotonic() + WAITS
        while True:
            try:
                connection.connect(address)
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        request = json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), "real": real})
        content = request.encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "little")], [0, 1, 2])
        connection.sendall(content)
        pid = int.from_bytes(_receive(connection, 8), "little")
        for number in FORWARDED:
            signal.signal(number, lambda got, _: os.kill(pid, got))
        code = int.from_bytes(_receive(connection, 8), "little", signed=True)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _receive(connection: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count:
        part = connection.recv(count - len(content))
        if not part:
            raise EOFError("the process that was asked has gone")
        content += part
    return content


def serve(address: str, program: str, parent: str) -> None:
    """Import, then fork for each request, until the process that started this one has gone."""
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        listening.settimeout(5)
        while os.getppid() == int(parent):
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            connection.setblocking(True)
            if os.fork() == 0:
                listening.close()
                _answer(connection, program)
            connection.close()


def _answer(connection: socket.socket, program: str) -> None:
    """In a fork: start what is asked for in another one, tell how it ends; it ends when who asked has gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(_receive(connection, int.from_bytes(head, "little")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(request, streams, program)
    for stream in streams:
        os.close(stream)
    connection.sendall(pid.to_bytes(8, "little"))
    ended = os.pidfd_open(pid)
    if connection in select.select([ended, connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    try:
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))
    except OSError:
        pass
    os._exit(0)


def _become(request: dict, streams: list[int], program: str) -> None:
    """Run the program in this process, which is its own."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    argv = request["argv"]
    while argv and argv[0] in ("-u", "-B"):
        argv = argv[1:]
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-m", "-c")):
        os.execve(request["real"], [request["real"], *argv], request["env"])
    sys.executable = program
    given = [part for part in request["env"].get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[0] = request["cwd"] if argv[0].startswith("-") else str(Path(argv[0]).resolve().parent)
    sys.path[1:1] = given
    _forget_another("maisi_tools")
    import torch

    torch.set_num_threads(int(request["env"].get("OMP_NUM_THREADS", torch.get_num_threads())))
    code = 0
    try:
        if argv[0] == "-m":
            sys.argv = [argv[1], *argv[2:]]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(argv[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    finally:
        _finish(code)


def _forget_another(package: str) -> None:
    """Let a package be imported anew, unless it is the one that the path finds."""
    found = importlib.machinery.PathFinder.find_spec(package, sys.path)
    loaded = sys.modules.get(package)
    if found is not None and loaded is not None and found.origin != loaded.__file__:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


def _finish(code: int) -> None:
    """End as an interpreter does: what was registered for the end, then what is still to be written."""
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 1
    os._exit(code)


if __name__ == "__main__":
    serve(*sys.argv[1:])
