"""Wrong settings name the key, the value and what is allowed."""

import pytest

from control.scheduler.core import Scheduler
from control.scheduler.settings import SettingError, Settings
from control.scheduler.times.profile import Profile

from .driving import FLUX_CSV


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"policy": "best"}, "policy"),
        ({"policy": "fixed-3"}, "policy"),
        ({"policy": "fixed-2", "policy_settings": {"overtake": 1}}, "fixed-2.overtake"),
        ({"policy": "fixed-2", "policy_settings": {"width": 1}}, "fixed-2.width"),
        ({"policy_settings": {"patience_us": -1}}, "tetriserve.patience_us"),
        ({"policy_settings": {"fill": "yes"}}, "tetriserve.fill"),
        ({"policy_settings": {"scale_up_gain": "none"}}, "tetriserve.scale_up_gain"),
        ({"policy_settings": {"patience_us": 1.5}}, "tetriserve.patience_us"),
        ({"round_us": -1}, "round_us"),
        ({"straddle": 1.5}, "straddle"),
        ({"step_granularity": 0}, "step_granularity"),
    ],
)
def test_a_wrong_setting_is_named(given, key):
    with pytest.raises(SettingError) as error:
        Scheduler(Settings(**given), Profile.from_csv(FLUX_CSV))
    assert error.value.key == key
    assert key in str(error.value) and repr(error.value.value) in str(error.value)
    assert error.value.allowed


def test_whole_floats_are_integers():
    settings = Settings(policy_settings={"patience_us": 4.0})
    assert Scheduler(settings, Profile.from_csv(FLUX_CSV)).jobs() == ()
