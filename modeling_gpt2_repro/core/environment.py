"""What libraries read in the environment when they are imported: a command of ours says so where one fails for it.

No code of ours could say it then, and the traceback would be of a library's inside.
"""

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
SCRIPTS = ("train.py", "prepare_data.py", "eval_hellaswag.py")
# Of folders that cannot be made torch does not even load, whether anything is to be compiled or not.
CACHES = ("TORCHINDUCTOR_CACHE_DIR",)
# What they ask for where nothing is set.
MISSING = {
    "No usable temporary directory": "set TMPDIR to a folder that you may write to",
    "MPLCONFIGDIR": "set MPLCONFIGDIR to a folder that you may write to",
}


def is_command() -> bool:
    """Tell whether this process was started to run a script or a module of ours, and not one that imports us."""
    if sys.argv[0] == "-m":  # as long as the module itself is looked for
        return any(PACKAGE_FOLDER.name in argument for argument in sys.orig_argv)
    script = Path(sys.argv[0])
    return (
        script.name in SCRIPTS and script.resolve().parent == PACKAGE_FOLDER.parent
    )  # other people have a train.py, too


def drop_caches_that_cannot_be() -> None:
    """Let a library keep its cache where it does by default, and say so, where a folder that is set cannot be made."""
    for name in CACHES:
        try:
            os.makedirs(os.environ.get(name) or os.curdir, exist_ok=True)
        except OSError as error:
            folder = os.environ.pop(name)
            message = f"warning: {name}={folder} cannot be made ({error.strerror}): the cache is where it is else"
            print(f"{name_command()}: {message}", file=sys.stderr, flush=True)


def name_command() -> str:
    """Return what to call this process in a message."""
    name = Path(sys.argv[0]).name
    return PACKAGE_FOLDER.name if name in ("-m", "__main__.py") else name


def check_working_folder() -> None:
    """End the process where the folder that it was started in is gone: libraries ask for it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        end("the working folder does not exist any more: change to another one")


def end(message: str) -> NoReturn:
    """End the process as a command whose user made a mistake."""
    print(f"{name_command()}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def list_suspects(message: str) -> list[str]:
    """Return, as NAME=value, the variables that the message of an exception names or whose values it repeats."""
    given = {name: value for name, value in os.environ.items() if value and name not in ("PWD", "OLDPWD")}
    return sorted(
        f"{name}={value}" for name, value in given.items() if name in message.split() or repr(value) in message
    )


def exit_for_environment(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End the process with one line and exit code 2 where an import failed for what the environment says.

    As `sys.excepthook`: any other exception gets its traceback.
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
    end(f"a library does not load in this environment ({kind.__name__}: {reason}): {advice}")


if is_command():
    # Ours draw into files, and matplotlib does not load with a backend that it does not have.
    os.environ.pop("MPLBACKEND", None)
    check_working_folder()
    drop_caches_that_cannot_be()
    sys.excepthook = exit_for_environment
