"""One-line errors for imports that fail because of the environment, for this package's commands.

Libraries read environment variables at import. A bad value would otherwise end in a traceback from inside a library,
before any code of the command runs.
"""

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
SCRIPTS = ("train.py", "prepare_data.py", "eval_hellaswag.py")
# Importing torch fails if this folder cannot be created, even if nothing is compiled.
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# The remedy, by a phrase in a library's message.
MISSING = {
    "No usable temporary directory": "set TMPDIR to a folder that you may write to",
    "MPLCONFIGDIR": "set MPLCONFIGDIR to a folder that you may write to",
}


def is_command() -> bool:
    """Return whether this process runs a script or module of this package, rather than importing it."""
    if sys.argv[0] == "-m":  # until Python has found the module
        return any(PACKAGE_FOLDER.name in argument for argument in sys.orig_argv)
    script = Path(sys.argv[0])
    # Other projects have a train.py too.
    return script.name in SCRIPTS and script.resolve().parent == PACKAGE_FOLDER.parent


def check_folders() -> None:
    """Exit if the working folder was deleted; unset a cache folder that cannot be created."""
    try:
        os.getcwd()  # libraries call this at import
    except FileNotFoundError:
        report("error: the working folder no longer exists: change to another one")
        sys.exit(2)
    try:
        os.makedirs(os.environ.get(CACHE_VARIABLE) or os.curdir, exist_ok=True)
    except OSError as error:
        folder = os.environ.pop(CACHE_VARIABLE)
        report(f"warning: cannot create {CACHE_VARIABLE}={folder} ({error.strerror}): using the default cache")


def name_command() -> str:
    """Return the name of this command for messages."""
    name = Path(sys.argv[0]).name
    return PACKAGE_FOLDER.name if name in ("-m", "__main__.py") else name


def report(message: str) -> None:
    """Print a line to stderr, prefixed with the command's name."""
    print(f"{name_command()}: {message}", file=sys.stderr, flush=True)


def list_suspects(message: str) -> list[str]:
    """Return, as NAME=value, the environment variables whose name or value an error message contains."""
    given = {name: value for name, value in os.environ.items() if value and name not in ("PWD", "OLDPWD")}
    return sorted(
        f"{name}={value}" for name, value in given.items() if name in message.split() or repr(value) in message
    )


def exit_for_environment(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line and exit with code 2 if an import failed because of the environment.

    For `sys.excepthook`. Any other exception keeps its traceback.
    """
    frames = [frame for frame, _ in traceback.walk_tb(trace) if frame.f_code.co_name == "<module>"]
    is_of_import = any(frame.f_globals["__name__"] != "__main__" for frame in frames) and isinstance(error, Exception)
    suspects = list_suspects(str(error))
    missing = next((advice for sign, advice in MISSING.items() if sign in str(error)), None)
    if not is_of_import or not (suspects or missing):
        sys.__excepthook__(kind, error, trace)
        return
    reason = " ".join(str(error).split())[:500]
    advice = missing or f"unset {', '.join(suspects)}, or set another value"
    report(f"error: importing a library failed in this environment ({kind.__name__}: {reason}): {advice}")
    sys.exit(2)


if is_command():
    # Figures are only written to files, and importing matplotlib fails if its backend is not installed.
    os.environ.pop("MPLBACKEND", None)
    check_folders()
    sys.excepthook = exit_for_environment
