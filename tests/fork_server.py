"""A fork server: one process pays for the imports, then forks for every run of a script."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

# time.sleep is cut short in the forks, for instance for the back-off of the Hub's client.
SERVER = """
import ctypes, gc, importlib, json, os, signal, subprocess, sys, time, traceback
exec(sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)
gc.collect()
gc.freeze()  # else garbage collection in a fork copies the pages of all objects
sleep = time.sleep
def trace(options):
    ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, where only parents may trace
    tracer = subprocess.Popen(["strace", "-f", "-p", str(os.getpid()), *options], stderr=subprocess.PIPE)
    while "TracerPid:\\t0\\n" in open("/proc/self/status").read():
        if tracer.poll() is not None:
            raise RuntimeError(tracer.stderr.read().decode())
        sleep(0.001)
    signal.alarm(120)  # a run with injected faults may fail, but must not hang
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
for line in sys.stdin:
    run = json.loads(line)
    process = os.fork()
    if process == 0:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(run[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.environ.update(run["environment"])
        sys.argv[0] = run["name"] + ".py"
        code = 1
        try:
            if run["strace"]:
                trace(run["strace"])
            module = importlib.import_module(run["module"])
            code = exec(run["script"]) or 0 if run["script"] else module.main(run["argv"])
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""

# A `setup` that skips slow steps which change no file: measuring the peak, rendering figures, and the process that
# draws during the run (the run draws the same figures at its end).
QUICKER = """
import matplotlib.figure
import modeling_gpt2_repro.training.run
from modeling_gpt2_repro.plots.drawer import CurveDrawer
from modeling_gpt2_repro.training.throughput import Peak
modeling_gpt2_repro.training.run.choose_peak = lambda *_: Peak(1e12, "not measured")
CurveDrawer.request = lambda self: None
matplotlib.figure.Figure.savefig = lambda self, stream, **_: stream.write(bytes(100_000))
"""

# Does in forks what a launcher does in new processes.
LAUNCHER = """
from torch.distributed import TCPStore
store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # on a free port
os.environ |= {{"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}}
os.environ |= {{"WORLD_SIZE": "{n_processes}", "LOCAL_WORLD_SIZE": "{n_processes}"}}
for rank in range({n_processes}):
    if os.fork() == 0:
        os.environ |= {{"RANK": str(rank), "LOCAL_RANK": str(rank)}}
        code = 1
        try:
            code = exec({script!r}) or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
assert not any([os.wait()[1] for _ in range({n_processes})])
"""
CALL_MAIN = "assert module.main(run['argv']) == 0"


class ForkServer:
    """A client of the server process, which runs `main` of the modules that it imported at its start."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def run(
        self,
        module: str,
        argv: Sequence[object],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        script="",
        strace: Sequence[str] = (),
    ) -> SimpleNamespace:
        """Run `module.main(argv)`, or `script`; return `code`, `out`, `err` and `seconds`.

        Args:
            folder: where the files `stdout` and `stderr` are written.
            strace: options of strace; a traced run is killed after two minutes.
        """
        streams = {name: str(folder / name) for name in ("stdout", "stderr")}
        order = {"module": module, "name": module.rpartition(".")[2], "argv": [str(each) for each in argv]}
        started = time.monotonic()
        order |= {"environment": dict(environment or {}), "script": script, "strace": list(strace), **streams}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        out, err = ((folder / name).read_text() for name in streams)
        return SimpleNamespace(code=code, out=out, err=err, seconds=time.monotonic() - started)

    def launch(
        self, n_processes: int, module: str, argv: Sequence[object], folder: Path, script: str = CALL_MAIN
    ) -> SimpleNamespace:
        """Run a script in `n_processes` processes, as a launcher would; `code` is 0 if every process exits with 0."""
        return self.run(module, argv, folder, script=LAUNCHER.format(n_processes=n_processes, script=script))


@contextlib.contextmanager
def serve_forks(modules: Sequence[str], environment: Mapping[str, str], setup: str = "") -> Iterator[ForkServer]:
    """Start a process with only `environment`, which runs `setup` and then imports `modules`."""
    command = [sys.executable, "-c", SERVER, setup, *modules]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process, contextlib.closing(process.stdin):
        yield ForkServer(process)
