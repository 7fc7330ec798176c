# All metadata is in pyproject.toml. This file is for tools that still run `python setup.py` or look for one.
from setuptools import setup

setup()
