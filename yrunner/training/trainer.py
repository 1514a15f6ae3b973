"""The one subclass of transformers' Trainer: weighted targets, exact sums, whole checkpoints."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DefaultFlowCallback, PrinterCallback, Trainer, TrainerControl

from yrunner.data.collate import SlicedExamples, collate
from yrunner.data.conversation import TokenizedExample
from yrunner.data.layouts import Layout, one_per_row
from yrunner.data.plan import Plan
from yrunner.losses.fused import attach, measure_targets
from yrunner.losses.per_token import Targets, TokenWeight, sum_targets
from yrunner.models.quiet import quiet_libraries
from yrunner.ranks import num_ranks, sum_over_ranks, this_rank
from yrunner.run_dir import RunDir
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.compilation import compiled_layers
from yrunner.training.meter import SignalMeter
from yrunner.training.shared_folder import shared_folder
from yrunner.training.zero import AtBegin, ZeroRun

SCHEDULER = "scheduler.pt"
"""Trainer's name of the file that says where the learning rate stands."""


class SignalTrainer(Trainer):
    """Trains along a `Plan`; every target's gradient is weighed by its loss and entropy.

    The loss of an update is the sum of weight times loss over its targets, divided once by their
    number, or by their weights, over all micro-steps and processes: neither can change a result.
    `watchers` are shown the targets of every micro-batch.
    """

    # compute_loss divides by the targets of the whole update; Trainer must not divide again.
    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        *,
        train_examples: Sequence[TokenizedExample],
        validation_examples: Sequence[TokenizedExample],
        plan: Plan,
        token_batch: int,
        weight: TokenWeight,
        loss_deadline: float,
        normalize: Literal["targets", "weights"],
        pad_token_id: int,
        run_dir: RunDir,
        keep_checkpoints: int,
        torch_compile: bool = False,
        watchers: Sequence[Callable[[Targets], None]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            train_dataset=SlicedExamples(train_examples, token_batch),
            eval_dataset=SlicedExamples(validation_examples) if validation_examples else None,
            **kwargs,
        )
        attach(self.model)
        # Where DeepSpeed shares memory out; None without it.
        self.zero = ZeroRun(self) if self.is_deepspeed_enabled else None
        self.pad_token_id = pad_token_id
        self.use_layout(one_per_row)
        # cadence.py and progress.py take their places.
        self.remove_callback(DefaultFlowCallback)
        self.remove_callback(PrinterCallback)
        self.plan = plan
        self.weight = weight
        self.loss_deadline = loss_deadline
        self.normalize = normalize
        self.weights_of_update: list[Tensor] = []
        self.run_dir = run_dir
        self.keep_checkpoints = keep_checkpoints
        self.torch_compile = torch_compile
        self.watchers = watchers
        self.meter = SignalMeter()

    def use_layout(self, layout: Layout) -> None:
        """Lay out micro-batches so. Without a call, every example has a row of its own."""
        self.data_collator = partial(collate, pad_token_id=self.pad_token_id, layout=layout)

    def when_model_runs(self, action: Callable[[], None]) -> None:
        """Do it now; under ZeRO-3 when training begins, for before that no weight is whole."""
        if self.zero is not None and self.zero.is_partitioned:
            self.add_callback(AtBegin(action))
        else:
            action()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the layers compiled where that is wanted."""
        with compiled_layers(self.model) if self.torch_compile else nullcontext():
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[TokenizedExample]:
        """This process's micro-batches in the order of the plan, all epochs in one sequence.

        Not prepared by accelerate, which would share out once more what is shared out here.
        """
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.plan.share(this_rank(), num_ranks()),
            collate_fn=self._collate,
            pin_memory=self.args.device.type == "cuda",
        )

    def _collate(self, examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        """By the layout of this moment: under ZeRO-3 it is chosen when training has begun."""
        return self.data_collator(examples)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """This process's micro-batches of one update, and the targets of all processes in it."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        counts = [(batch["labels"] != IGNORE_INDEX).sum() for batch in batches]
        return batches, sum_over_ranks(torch.stack(counts).sum().to(device))

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Trainer's, with the clock running and, at the end of an update, the division."""
        self.meter.start()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.normalize == "weights" and self.zero is None:
                assert num_items_in_batch is not None
                self._multiply_gradients(self._weight_factor(num_items_in_batch))
            self.weights_of_update.clear()
        return loss

    def _weight_factor(self, num_targets: Tensor | int) -> Tensor:
        """What makes of gradients divided by the targets of an update those divided by its weights.

        The weights of an update are known when its last micro-batch has been seen, not before.
        """
        weights = sum_over_ranks(torch.stack(self.weights_of_update).sum())
        return torch.where(weights > 0, num_targets / weights, torch.ones_like(weights))

    def _multiply_gradients(self, factor: Tensor) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The micro-batch's part of the update's loss. `num_items_in_batch`: targets of it all."""
        assert num_items_in_batch is not None, "get_batch_samples counts the targets"
        targets = measure_targets(model, inputs, self.weight)
        for watch in self.watchers:
            watch(targets)
        self.meter.add(sum_targets(targets, self.loss_deadline))
        self.weights_of_update.append(targets.weight_N.sum())
        # DDP and DeepSpeed take the mean of the gradients over the processes; the sum is wanted.
        loss = targets.weighted / num_items_in_batch * num_ranks()
        if self.zero is not None and self.normalize == "weights":
            is_last = self.accelerator.sync_gradients
            factor = self._weight_factor(num_items_in_batch).item() if is_last else 1.0
            return self.zero.multiplied_when_stepping(loss, factor)
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Plain loss per target over all validation examples, whatever the batches.

        The processes share the batches; one that has none left takes part with an empty one.
        """
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_train_batch_size
        rows = [((index, 0),) for index in range(len(examples))]
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        batches += [[]] * (-len(batches) % num_ranks())
        loader = DataLoader(
            examples,
            batch_sampler=batches[this_rank() :: num_ranks()],
            collate_fn=self._collate,
        )
        was_training = self.model.training
        self.model.eval()
        meter = SignalMeter()
        with torch.no_grad():
            for batch in loader:
                targets = measure_targets(self.model, self._prepare_inputs(batch))
                meter.add(sum_targets(targets, self.loss_deadline))
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        self.model.train(was_training)
        record = meter.drain()
        metrics = {f"{metric_key_prefix}_loss": record["loss"]}
        metrics[f"{metric_key_prefix}_targets"] = record["targets"]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the sums over targets in the place of Trainer's loss, which is the weighted one."""
        if "train_runtime" in logs:
            return  # Trainer's summary of the run: its mean of means is none of our figures
        if "loss" in logs:
            logs |= self.meter.drain()
        super().log(logs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its final place and rename it: it is there whole or not at all.

        Replaces Trainer's method of the same name, whose files it writes, for another name of the
        folder and for that order.
        """
        if self.state.best_global_step:
            best = self.run_dir.checkpoint(self.state.best_global_step)
            self.state.best_model_checkpoint = str(best)
        self._export_callback_states()
        with shared_folder(self.run_dir.checkpoint(self.state.global_step)) as folder:
            with quiet_libraries():
                self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.args.should_save:
            self._remove_old_checkpoints()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; under DeepSpeed with the optimizer's own weights, which are not rounded."""
        if self.zero is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, state_dict=self.zero.whole_weights())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.zero is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.zero.save(Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if self.zero is None or resume_from_checkpoint is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.zero.load(Path(resume_from_checkpoint))
        scheduler = torch.load(Path(resume_from_checkpoint) / SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
        return prepared

    def _load_best_model(self) -> None:
        if self.zero is None:
            super()._load_best_model()
        else:
            best = Path(self.state.best_model_checkpoint or "")
            self.zero.load(best, with_moments=False)

    def _export_callback_states(self) -> None:
        from transformers.trainer_callback import ExportableState

        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _remove_old_checkpoints(self) -> None:
        steps = self.run_dir.saved_steps()
        kept = {*steps[-self.keep_checkpoints :], self.state.best_global_step}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.run_dir.checkpoint(step))
