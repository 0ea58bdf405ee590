"""Triton kernels, one op per file; installed as `fastldm.kernels`."""
