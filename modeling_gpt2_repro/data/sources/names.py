"""Names of the datasets that this package knows; without what it takes to read them, which loads slowly."""

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
DEFAULT_CONFIGS = {FINEWEB_EDU: "sample-10BT"}
# The built-in offline corpus.
DOCSTRINGS = "docstrings"
