"""Explains imports that fail because of the environment, for the commands of this package.

Libraries read environment variables when they are imported. Without this, a bad value ends in a traceback from inside
a library, before any code of the command runs.
"""

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
SCRIPTS = ("train.py", "prepare_data.py", "eval_hellaswag.py")
# torch cannot be imported if this folder cannot be created, even if nothing is compiled.
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# What to set, by what a library's message contains.
MISSING = {
    "No usable temporary directory": "set TMPDIR to a folder that you may write to",
    "MPLCONFIGDIR": "set MPLCONFIGDIR to a folder that you may write to",
}


def is_command() -> bool:
    """Return whether this process runs a script or a module of this package, and does not just import it."""
    if sys.argv[0] == "-m":  # until Python has found the module
        return any(PACKAGE_FOLDER.name in argument for argument in sys.orig_argv)
    script = Path(sys.argv[0])
    # Other projects have a train.py, too.
    return script.name in SCRIPTS and script.resolve().parent == PACKAGE_FOLDER.parent


def check_folders() -> None:
    """Exit if the working folder is gone, which libraries ask for, and ignore a cache that cannot be created."""
    try:
        os.getcwd()
    except FileNotFoundError:
        report("error: the working folder does not exist any more: change to another one")
        sys.exit(2)
    try:
        os.makedirs(os.environ.get(CACHE_VARIABLE) or os.curdir, exist_ok=True)
    except OSError as error:
        folder = os.environ.pop(CACHE_VARIABLE)
        report(f"warning: {CACHE_VARIABLE}={folder} cannot be made ({error.strerror}): using the default cache")


def name_command() -> str:
    """Return what to call this process in a message."""
    name = Path(sys.argv[0]).name
    return PACKAGE_FOLDER.name if name in ("-m", "__main__.py") else name


def report(message: str) -> None:
    """Print a line about this command to stderr."""
    print(f"{name_command()}: {message}", file=sys.stderr, flush=True)


def list_suspects(message: str) -> list[str]:
    """Return, as NAME=value, the variables that an error message names or whose values it repeats."""
    given = {name: value for name, value in os.environ.items() if value and name not in ("PWD", "OLDPWD")}
    return sorted(
        f"{name}={value}" for name, value in given.items() if name in message.split() or repr(value) in message
    )


def exit_for_environment(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line, instead of a traceback, for an import that failed because of the environment, and exit with 2.

    To be installed as `sys.excepthook`; any other exception gets its traceback.
    """
    frames = [frame for frame, _ in traceback.walk_tb(trace) if frame.f_code.co_name == "<module>"]
    is_of_import = any(frame.f_globals["__name__"] != "__main__" for frame in frames) and isinstance(error, Exception)
    suspects = list_suspects(str(error))
    missing = next((advice for sign, advice in MISSING.items() if sign in str(error)), None)
    if not is_of_import or not (suspects or missing):
        sys.__excepthook__(kind, error, trace)
        return
    reason = " ".join(str(error).split())[:500]
    advice = missing or f"unset {', '.join(suspects)}, or give it another value"
    report(f"error: a library does not load in this environment ({kind.__name__}: {reason}): {advice}")
    sys.exit(2)


if is_command():
    # All figures are drawn to files, and matplotlib cannot be imported with a backend that is not installed.
    os.environ.pop("MPLBACKEND", None)
    check_folders()
    sys.excepthook = exit_for_environment
