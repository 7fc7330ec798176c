"""Command lines as a shell parses them, without running them."""

import re
import subprocess
import tempfile
from pathlib import Path

# With an empty PATH, bash calls its handler for every command.
RECORDING = """
PATH=/nowhere
command_not_found_handle() { printf '%s\\0' "$@" '' >&3; }
source() { command_not_found_handle source "$@"; }
"""
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read_commands(script: str) -> list[list[str]]:
    """Return each command's arguments in a shell script, as its program would get them."""
    with tempfile.TemporaryDirectory() as folder:
        recorded = Path(folder) / "recorded"
        subprocess.run(
            ["bash", "--norc", "-euc", f"exec 3>{recorded}\n{RECORDING}\n{script}"],
            check=True,
            cwd=tempfile.gettempdir(),
            env={"LC_ALL": "C.UTF-8"},
        )
        fields = recorded.read_text().split("\0")
    commands: list[list[str]] = [[]]
    for field in fields[:-1]:
        if field:
            commands[-1].append(field)
        else:
            commands.append([])
    return commands[:-1]


def list_blocks(text: str) -> list[str]:
    """Return the bash blocks of a Markdown text."""
    return BLOCK.findall(text)
