"""Samplers as data: a configuration and a number of steps give a `SamplerTable`, which the row loop applies."""

from fastldm.sampling.config import SchedulerConfig, scheduler_config
from fastldm.sampling.names import named
from fastldm.sampling.samplers import sampler_table
from fastldm.sampling.table import SamplerTable

__all__ = ["SamplerTable", "SchedulerConfig", "named", "sampler_table", "scheduler_config"]
