"""Commands for models and runs: `python -m modeling_gpt2_repro COMMAND [flags]`."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from .core.arguments import parse_arguments
from .core.errors import UserError, reports_user_errors

PROGRAM = "python -m modeling_gpt2_repro"
# Descriptions for `--help`. Command `x` is commands/x.py, where `XConfig` defines its flags and `run` executes it.
COMMANDS = {
    "sample": "Continue a prompt with a language model.",
    "plots": "Draw the curves of one run, or compare several runs in one figure.",
    "summary": "Print the results of a run and the paths of its files.",
    "publish": "Upload a finished run to the Hugging Face Hub.",
    "convert": "Convert a nanoGPT, build-nanogpt or llm.c checkpoint to a model folder that loads as GPT-2.",
}


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first element of `argv` (`None`: the arguments of this process)."""
    name, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(describe_commands())
        return 0
    if name not in COMMANDS:
        nearest_first = sorted(COMMANDS, key=lambda known: -difflib.SequenceMatcher(None, name, known).ratio())
        mistake = f"unknown command {name!r}" if name else "no command given"
        raise UserError(f"{mistake}: choose one of {', '.join(nearest_first)} ({PROGRAM} --help describes them)")
    command = importlib.import_module(f"modeling_gpt2_repro.commands.{name}")  # only the one: matplotlib is slow
    config_type = getattr(command, f"{name.capitalize()}Config")
    command.run(parse_arguments(config_type, flags, description=COMMANDS[name], prog=f"{PROGRAM} {name}"))
    return 0


def describe_commands() -> str:
    """Return the package's `--help`, with a line for each command."""
    lines = [f"  {name:10}{description}" for name, description in COMMANDS.items()]
    usage, more = f"usage: {PROGRAM} COMMAND [flags]", f"{PROGRAM} COMMAND --help lists its flags."
    return "\n".join([usage, "", *lines, "", more])


if __name__ == "__main__":
    sys.exit(main())
