"""Everything is declared in pyproject.toml; the CUDA extensions of csrc/ will be built here once there are any."""

from setuptools import setup

setup()
