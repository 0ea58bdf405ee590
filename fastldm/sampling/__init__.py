"""Samplers as data: a configuration and a number of steps give a `SamplerTable`, which the row loop applies."""

from fastldm.sampling.config import SchedulerConfig, scheduler_config
from fastldm.sampling.samplers import SamplerTable, sampler_table

__all__ = ["SamplerTable", "SchedulerConfig", "sampler_table", "scheduler_config"]
