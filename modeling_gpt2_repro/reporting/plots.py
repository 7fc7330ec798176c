"""Former name of `python -m modeling_gpt2_repro plots`, kept because published model cards mention it."""

import sys

from ..__main__ import main

if __name__ == "__main__":
    sys.exit(main(["plots", *sys.argv[1:]]))
