"""Where mypy finds the folder that is installed as `fastldm.kernels`. Nothing imports this at run time."""
