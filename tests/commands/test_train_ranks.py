"""`yrun train` in several processes: started, stopped, killed, gone on with; two machines."""

import ctypes
import fcntl
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.yrun_process import HANGS_AFTER
from yrunner.assembly import sharing
from yrunner.assembly.probes import missing
from yrunner.assembly.run import Run
from yrunner.assembly.sharing import check_sharing, updates_shared
from yrunner.commands.train import train
from yrunner.distributed.topology import topology_of
from yrunner.errors import MissingError, RunError
from yrunner.storage.run_dir import RunDir, write_json
from yrunner.training.deepspeed.config import deepspeed_settings, disk_folder

YRUN = [sys.executable, "-m", "yrunner.cli"]
LONG = {"train__epochs": 30, "train__batch_size": 4, "train__log_every": 1}
"""60 updates of two micro-batches, of one in each of two processes."""
TOGETHER = ["distributed.processes=2"]
CTRL_C = "\x03"
CLONE_NEWNET = 0x40000000
"""What a namespace is of, in Linux."""
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def started(
    *arguments: str, before: Callable[[], object] | None = None, **environment: str
) -> subprocess.Popen:
    return subprocess.Popen(
        [*YRUN, "train", "base.yaml", *arguments],
        preexec_fn=before,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


class OnTerminal:
    """The same on a terminal of its own, whose every byte is kept; keys can be pressed on it."""

    def __init__(self, *arguments: str) -> None:
        self.terminal, its_end = pty.openpty()
        self.process = subprocess.Popen(
            [*YRUN, "train", "base.yaml", *arguments],
            stdin=its_end,
            stdout=its_end,
            stderr=its_end,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "1000"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(its_end)
        self.shown = b""
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def press(self, key: str) -> None:
        os.write(self.terminal, key.encode())

    def ended(self) -> str:
        """All that was shown, when it has ended."""
        self.process.wait(HANGS_AFTER)
        self._reader.join(HANGS_AFTER)
        os.close(self.terminal)
        return self.shown.decode()

    def _read(self) -> None:
        while True:
            try:
                self.shown += os.read(self.terminal, 4096)
            except OSError:  # so a terminal says that nobody has it open any more
                return


def wait_for_updates(process: subprocess.Popen, number: int, name: str = "base") -> None:
    """Wait until so many updates are logged."""
    metrics = Path("outputs", name, "metrics.jsonl")
    while not metrics.exists() or f'"step": {number},' not in metrics.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def rank(number: int) -> psutil.Process:
    """One of the processes of the only run that is there, by what it has told the run."""
    (told,) = Path(os.environ["TMPDIR"]).glob(f"yrunner-*/{number}.pid")
    return psutil.Process(int(told.read_text()))


def weights(name: str) -> torch.Tensor:
    found = load_file(f"outputs/{name}/model/model.safetensors")
    return torch.cat([found[key].double().flatten() for key in sorted(found)])


def gap(one: str, other: str) -> float:
    mine, theirs = weights(one), weights(other)
    return float((mine - theirs).norm() / mine.norm())


def test_two_processes_are_stopped_killed_and_gone_on_with_by_one_and_nothing_is_lost(
    project, change, forks, monkeypatch
):
    """The weights are those of one process that nobody disturbed."""
    (project / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(project / "temporary"))
    change("base.yaml", **LONG, train__checkpoint={"every": 2})
    alone = ["train.gradient_accumulation_steps=2", "name=alone", "output=outputs/alone"]
    train(Path("base.yaml"), alone, resume=False, overwrite=False)
    others = set(psutil.Process().children(recursive=True))  # a browser of another test, say

    watched = OnTerminal(*TOGETHER)
    wait_for_updates(watched.process, 2)
    watched.press(CTRL_C)
    shown = watched.ended()
    assert watched.process.returncode == 130, shown
    drawn = (shown.count(HIDE_CURSOR), shown.count(SHOW_CURSOR))
    assert drawn == (3, 3), "two bars of measuring, and one view, of one process; all put away"
    assert re.search(r"step 2/60 .*weighted loss", shown, re.DOTALL)
    stopped = r"stopped; update \d+ is saved in .*outputs/base\. Continue with: yrun train"
    in_red = r"base\.yaml distributed.processes=2 --resume\x1b\[0m\s*\Z"
    assert re.search(rf"{stopped} {in_red}", shown)
    assert "Traceback" not in shown

    last = max(RunDir(Path("outputs/base")).saved_steps())
    running = started(*TOGETHER, "--resume")
    wait_for_updates(running, last + 2)
    every = [rank(0), rank(1)]
    every[1].kill()
    _, left = psutil.wait_procs(every, timeout=HANGS_AFTER)
    assert not left
    said, errors = running.communicate(timeout=HANGS_AFTER)
    assert running.returncode == 2
    assert said.count(f"step {last + 1}/60 ") == 1, "only one process speaks"
    assert "process 1 of the run was killed" in errors
    assert "Traceback" not in errors
    assert set(psutil.Process().children(recursive=True)) <= others

    train(Path("base.yaml"), [], resume=True, overwrite=False)
    assert gap("alone", "base") < 1e-4
    assert {path.name for path in Path("outputs/base").iterdir()} == {
        path.name for path in Path("outputs/alone").iterdir()
    }


def test_the_launch_is_shown_and_nothing_is_started(project, capfd):
    machines = "distributed.machines={kind: rendezvous, number: 2, this: 1, address: node0:29500}"
    train(Path("base.yaml"), [*TOGETHER, machines], resume=False, overwrite=True, print_launch=True)
    (line,) = capfd.readouterr().out.splitlines()
    command = shlex.split(line)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--node-rank=1" in command and "--nproc-per-node=2" in command
    expected = ["-m", "yrunner.cli", "train", "base.yaml", *TOGETHER, machines, "--overwrite"]
    assert command[-len(expected) :] == expected
    assert not Path("outputs").exists()


def begun(processes: int, *overrides: str, resume: bool = True) -> Run:
    """A run of base.yaml with a checkpoint."""
    run = Run.load(Path("base.yaml"), overrides, resume=resume)
    run.folder.checkpoint(1).mkdir(parents=True, exist_ok=True)
    write_json(run.folder.environment, {"processes": processes})
    return run


@pytest.mark.parametrize(
    ("begun_by", "now", "expected"),
    [(1, 1, (1, 4)), (2, 1, (2, 8)), (2, 8, (2, 1)), (4, 8, (4, 2))],
)
def test_a_resumed_run_keeps_what_its_updates_learn_from(project, change, begun_by, now, expected):
    change("base.yaml", train__gradient_accumulation_steps=4)
    assert updates_shared(begun(begun_by), now) == expected
    assert updates_shared(begun(begun_by, resume=False), now) == (now, 4)


def test_an_update_that_cannot_be_shared_evenly_is_refused(project):
    with pytest.raises(RunError, match=r"4 micro-batches, which 3 processes cannot share evenly"):
        updates_shared(begun(4), 3)


def test_a_checkpoint_of_deepspeed_and_a_run_without_it_do_not_meet(project):
    plain, shared = begun(1), begun(1, "distributed.deepspeed={stage: 2}")
    with pytest.raises(RunError, match=r"saved without DeepSpeed. Resume without distributed"):
        updates_shared(shared, 1)
    zero = plain.folder.checkpoint(1) / "zero"
    zero.mkdir()
    write_json(zero / "step.json", {"step": 1})
    assert updates_shared(shared, 1) == (1, 1)
    with pytest.raises(RunError, match=r"saved under DeepSpeed. Resume with distributed"):
        updates_shared(plain, 1)


@pytest.mark.parametrize("keys", ["keep={kind: ewc}", "tuning.kind=qlora"])
def test_what_needs_whole_weights_is_refused_where_a_file_says_stage_3(project, keys):
    (project / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    shared = Run.load(Path("tuned.yaml"), ["distributed.deepspeed={config: zero3.json}", keys])
    topology = topology_of(shared.recipe.distributed, 0)
    with pytest.raises(RunError, match=r"zero3.json: .*shard.*\. Use deepspeed.stage 2 or 1"):
        check_sharing(shared, topology)


@pytest.mark.parametrize("written", ["recipe", "file"])
def test_a_disk_that_deepspeed_cannot_reach_is_named_before_anything_starts(
    project, monkeypatch, written
):
    """DeepSpeed itself would say so in every process, when the model is loaded."""
    shipped = Path(__file__).parents[2] / "deepspeed_configs/zero3_nvme.json"
    file = project / "mine.json"
    file.write_text(shipped.read_text().replace("/nvme", str(project / "disk")))
    section = {
        "recipe": "{stage: 3, offload: nvme, nvme_folder: disk}",
        "file": f"{{config: {file}}}",
    }[written]
    lacking = missing("deepspeed", "async_io", "cannot be built here", remedy="apt-get install it")
    monkeypatch.setattr(sharing, "ask", lambda probe: [lacking])
    overrides = [*TOGETHER, f"distributed.deepspeed={section}"]
    with pytest.raises(MissingError, match=r"needs DeepSpeed's async_io.* Run apt-get install it"):
        train(Path("base.yaml"), overrides, resume=False, overwrite=False)
    assert not list(Path("outputs").glob("*/metrics.jsonl"))


def test_a_file_that_names_no_folder_on_the_disk_is_refused(project):
    offload = '{"stage": 3, "offload_optimizer": {"device": "nvme"}}'
    (project / "mine.json").write_text(f'{{"zero_optimization": {offload}}}')
    run = Run.load(Path("base.yaml"), ["distributed.deepspeed={config: mine.json}"])
    topology = topology_of(run.recipe.distributed, 0)
    with pytest.raises(RunError, match=r'but no folder\. Add "nvme_path"'):
        check_sharing(run, topology)


def test_a_run_that_ends_leaves_nothing_on_the_disk_and_others_their_own(project, monkeypatch):
    def fail(command, environment):
        settings = deepspeed_settings(run.recipe.distributed.deepspeed)
        left = disk_folder(settings, run.folder.folder)
        (left / "rank0").mkdir(parents=True)
        raise RunError("a process has failed")

    section = "{stage: 3, offload: nvme, nvme_folder: disk}"
    run = Run.load(Path("base.yaml"), [*TOGETHER, f"distributed.deepspeed={section}"])
    others = project / "disk/yours-0123"
    others.mkdir(parents=True)
    monkeypatch.setattr(sharing, "ask", lambda probe: [])
    monkeypatch.setattr(sharing, "run_ranks", fail)
    with pytest.raises(RunError, match="a process has failed"):
        sharing.launch(run, topology_of(run.recipe.distributed, 0))
    assert list((project / "disk").iterdir()) == [others]


def test_a_disk_that_cannot_be_written_is_named_before_anything_starts(project, monkeypatch):
    (project / "disk").write_text("no folder")
    monkeypatch.setattr(sharing, "ask", lambda probe: [])
    section = "{stage: 3, offload: nvme, nvme_folder: disk/mine}"
    with pytest.raises(RunError, match=r"to disk/mine, which is not writable\. Choose"):
        train(
            Path("base.yaml"),
            [*TOGETHER, f"distributed.deepspeed={section}"],
            resume=False,
            overwrite=False,
        )
    assert not list(Path("outputs").glob("*/metrics.jsonl"))


@contextmanager
def two_machines() -> Iterator[list[Callable[[], object]]]:
    """Two network namespaces joined by a cable: what takes a process into each."""
    names = [f"yrun-{os.getpid()}-{number}" for number in (0, 1)]
    script = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add eth1 netns {names[0]} type veth peer name eth1 netns {names[1]}",
        *(f"ip -n {name} link set lo up" for name in names),
        *(f"ip -n {name} addr add 10.73.0.{n}/24 dev eth1" for n, name in enumerate(names, 1)),
        *(f"ip -n {name} link set eth1 up" for name in names),
    ]
    try:
        for line in script:
            try:
                done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("there is no ip command, which makes network namespaces")
            if done.returncode:
                pytest.skip(f"this machine allows no network namespaces: {done.stderr.strip()}")
        yield [partial(enter, name) for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def enter(namespace: str) -> None:
    with open(f"/run/netns/{namespace}") as file:
        assert ctypes.CDLL(None).setns(file.fileno(), CLONE_NEWNET) == 0


def test_two_machines_learn_what_one_does(project, change, forks):
    """They share a disk and a cable, and nothing else of the network."""
    change("base.yaml", train__epochs=2, train__batch_size=4, train__log_every=1)
    with two_machines() as machines:
        running = [
            started(
                "distributed.machines={kind: rendezvous, number: 2, "
                f"this: {number}, address: 10.73.0.1:29500}}",
                before=machine,
                GLOO_SOCKET_IFNAME="eth1",
            )
            for number, machine in enumerate(machines)
        ]
        ended = [process.communicate(timeout=HANGS_AFTER) for process in running]
        assert [process.returncode for process in running] == [0, 0], ended
    alone = ["train.gradient_accumulation_steps=2", "name=alone", "output=outputs/alone"]
    train(Path("base.yaml"), alone, resume=False, overwrite=False)
    assert gap("alone", "base") < 1e-4
    environment = json.loads(Path("outputs/base/environment.json").read_text())
    assert environment["processes"] == 2
