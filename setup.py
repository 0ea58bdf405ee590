"""Everything is declared in pyproject.toml; this file is where the CUDA extensions of csrc/ are built once there are any."""

from setuptools import setup

setup()
