"""Command lines as a shell understands them, without being run."""

import re
import subprocess
import tempfile
from pathlib import Path

# In a shell that finds no program, every command is one that is not found.
NOTING = """
PATH=/nowhere
command_not_found_handle() { printf '%s\\0' "$@" '' >&3; }
source() { command_not_found_handle source "$@"; }
"""
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read_commands(script: str) -> list[list[str]]:
    """Return the arguments of each command in a shell script, as its program would get them."""
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "noted"
        subprocess.run(
            ["bash", "--norc", "-euc", f"exec 3>{noted}\n{NOTING}\n{script}"],
            check=True,
            cwd=tempfile.gettempdir(),
            env={"LC_ALL": "C.UTF-8"},
        )
        fields = noted.read_text().split("\0")
    commands: list[list[str]] = [[]]
    for field in fields[:-1]:
        if field:
            commands[-1].append(field)
        else:
            commands.append([])
    return commands[:-1]


def list_blocks(text: str) -> list[str]:
    """Return the shell scripts in a text in Markdown."""
    return BLOCK.findall(text)
