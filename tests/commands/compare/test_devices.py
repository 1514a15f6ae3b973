"""What several processes are told of one machine."""

import torch

from yrunner.commands.compare.jobs import environments_for


def test_one_process_alone_is_told_nothing_and_several_share_threads_or_devices(monkeypatch):
    assert environments_for(1) == [{}]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert environments_for(2) == [{"OMP_NUM_THREADS": "2"}] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices = [environment["CUDA_VISIBLE_DEVICES"] for environment in environments_for(3)]
    assert devices == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    devices = [environment["CUDA_VISIBLE_DEVICES"] for environment in environments_for(2)]
    assert devices == ["4", "7"]
