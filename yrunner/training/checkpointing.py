"""Write, verify and load checkpoints: everything that makes a resumed run equal an undisturbed one.

A checkpoint is written beside its place, flushed and renamed, so that it is complete or absent,
also where all ranks write into it. Rank 0 writes the manifest last, over all files.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_pt_utils import safe_globals

from yrunner.console import warn
from yrunner.distributed.collectives import num_ranks, this_rank, wait_for_ranks
from yrunner.errors import RunError
from yrunner.losses.score_head import critic_apart, critic_weights, same_weights_trained
from yrunner.models.errors import silence_libraries
from yrunner.models.size import SMALL_FILES, saved_weight_bytes, state_bytes
from yrunner.storage.ownership import remove
from yrunner.storage.run_dir import RunDir, partial_folder, read_json, whole_folder, write_json
from yrunner.training.deepspeed.state import ZeroRun
from yrunner.training.metrics import best_step
from yrunner.training.rng_snapshot import Stateful, random_states, set_random_states

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Threads help: hashing large files releases the GIL.
    with ThreadPoolExecutor() as threads:
        entries = threads.map(_describe, files)
        names = [path.relative_to(folder).as_posix() for path in files]
        write_json(folder / MANIFEST, dict(zip(names, entries, strict=True)))


def find_damage(folder: Path, *, read_all: bool = True) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was written.

    Without `read_all` only sizes are compared, which costs nothing however large it is.
    """
    try:
        manifest: dict[str, dict[str, Any]] = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or cannot be read"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size:,} bytes and should have {entry['size']:,}"
    if not read_all:
        return None
    with ThreadPoolExecutor() as threads:
        found = threads.map(_describe, [folder / name for name in manifest])
        pairs = zip(manifest.items(), found, strict=True)
        changed = next((name for (name, entry), now in pairs if now != entry), None)
    return None if changed is None else f"{changed} is not as it was written (another SHA-256)"


def newest_whole_step(run_dir: RunDir) -> int | None:
    """The update of the newest complete checkpoint; None if there is no checkpoint.

    Damaged ones after it are named, and put aside as `.step-N.damaged`: they must not count among
    the newest that are kept. Raises `RunError` where all are damaged.
    """
    steps = run_dir.saved_steps()
    for step in reversed(steps):
        folder = run_dir.checkpoint(step)
        damage = find_damage(folder)
        if damage is None:
            return step
        warn(f"the checkpoint {folder} is damaged: {damage}; the one before it is used")
        _put_aside(folder)
    if steps:
        raise RunError(
            f"no checkpoint in {run_dir.checkpoints} is complete",
            remedy="restore one from a backup, or start again with --overwrite",
        )
    return None


def remove_old(run_dir: RunDir, *, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the newest `keep` of full size and the one after update `best`.

    The last that is whole is never removed: one of another size does not count as kept.
    """
    steps = run_dir.saved_steps()
    whole = [step for step in steps if not find_damage(run_dir.checkpoint(step), read_all=False)]
    for step in set(steps) - {*whole[-keep:], best}:
        if whole:
            remove(run_dir.checkpoint(step))


def remove_unfinished(run_dir: RunDir) -> None:
    """Remove half-written checkpoints of a killed process."""
    for pattern in (".*.partial", ".*.previous", ".rehearsal"):
        for folder in run_dir.checkpoints.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _put_aside(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    # Another process of the same run may have done so.
    with suppress(FileNotFoundError):
        folder.rename(aside)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


@contextmanager
def shared_folder(final: Path, needed: int | None = None) -> Iterator[Path]:
    """As `whole_folder`, made and named by rank 0, when every process has written its part.

    On several machines it has to lie on a disk that they share.
    """
    if this_rank() == 0:
        with whole_folder(final, needed) as folder:
            wait_for_ranks()
            yield folder
            wait_for_ranks()
    else:
        wait_for_ranks()
        yield partial_folder(final)
        wait_for_ranks()
    # Named now; the others may look for it.
    wait_for_ranks()


STATE, OPTIMIZER, SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"
SCALER = "scaler.pt"
OF_CRITIC = "critic.safetensors"


@dataclass
class Checkpointer:
    """Saves and loads everything that training changes."""

    model: PreTrainedModel | PeftModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    """Of float16."""
    zero: ZeroRun | None
    """DeepSpeed's state; None without it."""
    state: TrainerState
    sums: Mapping[str, Stateful]
    saved_step: int | None = None

    def save(self, run_dir: RunDir, *, keep: int) -> None:
        """Write a checkpoint of the last update, complete or not at all, unless this process has.

        Older ones than the newest `keep` and the best are removed.
        """
        step, best = self.state.global_step, best_step(self.state.log_history)
        if step == self.saved_step:
            return
        with shared_folder(run_dir.checkpoint(step), self._bytes()) as folder:
            self.write(folder)
            wait_for_ranks()
            if this_rank() == 0:
                write_manifest(folder)
        if this_rank() == 0:
            remove_old(run_dir, keep=keep, best=best)
        self.saved_step = step

    def write(self, folder: Path) -> None:
        """Write everything that a resumed run needs. All processes call it."""
        # The optimizer's own weights, which are not rounded, where DeepSpeed has them.
        weights = None if self.zero is None else self.zero.whole_weights()
        if self.zero is not None:
            self.zero.save(folder, self.state.global_step)
        torch.save(random_states(), folder / _generators())
        if this_rank() != 0:
            return
        of_critic = {
            name: weight if weights is None else weights.pop(name)
            for name, weight in critic_weights(self.model).items()
        }
        with silence_libraries(), critic_apart(self.model):
            if isinstance(self.model, PeftModel):
                own = [self.model.active_adapter]
                self.model.save_pretrained(str(folder), selected_adapters=own, state_dict=weights)
            else:
                self.model.save_pretrained(str(folder), state_dict=weights)
        if of_critic:
            whole = {name: weight.detach().contiguous() for name, weight in of_critic.items()}
            save_file(whole, folder / OF_CRITIC)
        if self.zero is None:
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
        torch.save(self.scheduler.state_dict(), folder / SCHEDULER)
        if self.scaler is not None:
            torch.save(self.scaler.state_dict(), folder / SCALER)
        sums: Any = {name: each.state_dict() for name, each in self.sums.items()}
        self.state.stateful_callbacks = sums
        self.state.save_to_json(str(folder / STATE))

    def load(self, folder: Path) -> None:
        """Load a checkpoint, except for the random states."""
        saved = TrainerState.load_from_json(str(folder / STATE))
        sums: Any = saved.stateful_callbacks
        if "meter" not in sums:
            raise RunError(
                f"{folder} was saved by another version of yrunner",
                remedy="resume with that version, or start again with --overwrite",
            )
        for name in self.sums.keys() & sums.keys():
            self.sums[name].load_state_dict(sums[name])
        for name in ("global_step", "epoch", "log_history"):
            setattr(self.state, name, getattr(saved, name))
        self.scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
        if self.zero is None:
            load_weights(self.model, folder)
            optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(optimizer)
        else:
            self.zero.load(folder)
            # The scheduler sets the rate only when it steps; until then it is that of the start.
            rates = self.scheduler.get_last_lr()
            for group, rate in zip(self.zero.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        if self.scaler is not None:
            self.scaler.load_state_dict(torch.load(folder / SCALER, weights_only=True))

    def load_best(self, run_dir: RunDir) -> int:
        """Load the weights of the best validation, if there was one; return the update they are of.

        Where that checkpoint is damaged, the weights stay those of the last update.
        """
        step = best_step(self.state.log_history)
        if step is None:
            return self.state.global_step
        folder = run_dir.checkpoint(step)
        damage = find_damage(folder)
        if damage is not None:
            warn(
                f"the best checkpoint {folder} is damaged: {damage}; "
                "the model is that of the last update instead"
            )
            return self.state.global_step
        if self.zero is None:
            load_weights(self.model, folder)
        else:
            self.zero.load(folder, with_moments=False)
        return step

    def _bytes(self) -> int | None:
        """Estimated bytes of a checkpoint; None if each rank writes a part of it."""
        if self.zero is not None:
            return None
        return saved_weight_bytes(self.model) + state_bytes(self.optimizer) + SMALL_FILES


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read what `Checkpointer.write` has written of a model, or of its adapter, and its critic."""
    if critic := critic_weights(model):
        saved = load_file(folder / OF_CRITIC)
        with torch.no_grad():
            for name, weight in critic.items():
                weight.copy_(saved[name])
    if isinstance(model, PeftModel):
        with same_weights_trained(model):
            model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
        return
    files = sorted(set(folder.glob("*.safetensors")) - {folder / OF_CRITIC})
    assert files, f"{folder} holds no weights"
    for file in files:
        # Tied weights are saved once.
        model.load_state_dict(load_file(file), strict=False)


def load_random_states(folder: Path) -> None:
    """Restore the random states, unless another number of ranks wrote the checkpoint."""
    file = folder / _generators()
    if file.exists():
        with safe_globals():
            set_random_states(torch.load(file, weights_only=True))


def _generators() -> str:
    return "rng_state.pth" if num_ranks() == 1 else f"rng_state_{this_rank()}.pth"
