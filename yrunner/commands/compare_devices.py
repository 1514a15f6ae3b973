"""What the processes of an experiment get of the machine: a GPU each, or a share of the threads."""

import os
from itertools import cycle, islice

import torch


def environments_for(jobs_at_once: int) -> list[dict[str, str]]:
    """What each of so many processes is told of the machine: its GPU, or its share of the threads.

    One process alone is told nothing, and is what `yrun train` is.
    """
    if jobs_at_once == 1:
        return [{}]
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
        return [{"CUDA_VISIBLE_DEVICES": name} for name in islice(cycle(devices), jobs_at_once)]
    threads = max(1, torch.get_num_threads() // jobs_at_once)
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(jobs_at_once)]
