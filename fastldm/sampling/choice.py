"""What people assign to `pipe.scheduler`, as a `SchedulerConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastldm.errors import ArgumentError
from fastldm.sampling.config import SchedulerConfig, scheduler_config
from fastldm.sampling.names import named

WHERE = "scheduler"


def chosen(value: object, base: SchedulerConfig) -> SchedulerConfig:
    """value: a name of `samplers()`, a `SchedulerConfig`, a hub configuration with `_class_name`, a scheduler object of
    diffusers, or a pair of its class (or the class's name) and a configuration. base: the model's present one.

    Raises `ArgumentError` for what is none of these, `ConfigError` for a value that the sampler cannot have.
    """
    if isinstance(value, SchedulerConfig):
        return value
    if isinstance(value, str):
        return named(value, base)
    if isinstance(value, tuple) and len(value) == 2:
        kind, config = value
        return _from_hub(kind if isinstance(kind, str) else getattr(kind, "__name__", ""), config)
    if isinstance(value, Mapping):
        return scheduler_config(value, WHERE)
    if isinstance(config := getattr(value, "config", None), Mapping):
        return _from_hub(type(value).__name__, config)
    raise ArgumentError(
        f"scheduler: must be a name such as 'dpmpp_2m_karras', a scheduler of diffusers, or (class, configuration), "
        f"not {type(value).__name__}",
        field="scheduler",
    )


def _from_hub(name: str, config: Any) -> SchedulerConfig:
    if isinstance(config, SchedulerConfig):
        config = config.config
    if not isinstance(config, Mapping):
        raise ArgumentError(f"scheduler: the configuration is a {type(config).__name__}", field="scheduler")
    return scheduler_config({**config, "_class_name": name}, WHERE)
