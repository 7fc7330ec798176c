"""The earlier name of `python -m modeling_gpt2_repro summary`, which README and model cards gave."""

import sys

from ..__main__ import main

if __name__ == "__main__":
    sys.exit(main(["summary", *sys.argv[1:]]))
