from __future__ import annotations

import pytest

from pipeline.config.sweep import Sweep, TrialLimits
from pipeline.errors import ConfigError
from pipeline.sweeps.slots import sweep_slots, trial_slots, visible_devices


def devices(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def test_each_trial_has_devices_of_its_own() -> None:
    slots = trial_slots(8, TrialLimits(gpus=2), devices(5), cores=16)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0,1", "2,3"]
    assert {slot["OMP_NUM_THREADS"] for slot in slots} == {"8"}
    assert len(trial_slots(1, TrialLimits(), devices(4), cores=16)) == 1


def test_cores_are_divided_without_devices() -> None:
    assert trial_slots(3, TrialLimits(), [], cores=8) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert trial_slots(4, TrialLimits(), [], cores=2) == [{"OMP_NUM_THREADS": "1"}] * 4
    assert trial_slots(2, TrialLimits(threads=3), [], cores=2) == [{"OMP_NUM_THREADS": "3"}] * 2


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trial\.gpus: 4 devices for one trial, but this machine has 2"):
        trial_slots(1, TrialLimits(gpus=4), devices(2), cores=4)


def test_devices_are_those_that_this_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8f")
    assert visible_devices() == ["3", "GPU-8f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_devices() == ["0", "1"]


def test_engines_with_machines_of_their_own_get_no_share_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def slots(engine: object, **settings: object) -> list[dict[str, str]]:
        content = {"name": "s", "experiment": "e", "engine": engine, "concurrency": 2, **settings}
        return sweep_slots(Sweep.model_validate(content))

    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots("local")] == ["0", "1"]
    assert slots("work-pool") == slots({"kind": "dask", "address": "tcp://x:1"}) == [{}, {}]
    assert slots("work-pool", trial={"threads": 4}) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert all("CUDA_VISIBLE_DEVICES" not in slot and slot for slot in slots("ray"))
