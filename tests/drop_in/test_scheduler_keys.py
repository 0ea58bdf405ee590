"""`pipe.scheduler.config` is read as diffusers' is: by item or by name, defaults too."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pytest

from fastldm.sampling.config import CLASSES, scheduler_config

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
}


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_key_of_the_class(name: str) -> None:
    theirs = getattr(diffusers, name)().config
    config = scheduler_config({"_class_name": name, **theirs}).config
    for key in CLASSES[name][1]:
        assert getattr(config, key) == config[key] == config.get(key, "absent") == theirs[key], key


def test_absent_keys_are_not_handed_to_another_class() -> None:
    config = scheduler_config(SD15).config
    assert config == SD15
    assert (config.prediction_type, config["prediction_type"]) == ("epsilon", "epsilon")
    assert "prediction_type" not in dict(config)
    assert diffusers.EulerDiscreteScheduler.from_config(config).config.timestep_spacing == "linspace"
    assert config.timestep_spacing == "leading"


@pytest.mark.parametrize("key", ["use_lu_lambdas", "no_such_key", "__deepcopy__"])
def test_keys_of_no_or_another_class(key: str) -> None:
    config = scheduler_config(SD15).config
    assert not hasattr(config, key)
    assert config.get(key, 7) == 7
    with pytest.raises(KeyError):
        config[key]


def test_it_can_be_copied_and_no_attribute_is_set_in_vain() -> None:
    config = scheduler_config(SD15).config
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert other.prediction_type == "epsilon"
    with pytest.raises(AttributeError):
        config.prediction_type = "v_prediction"
