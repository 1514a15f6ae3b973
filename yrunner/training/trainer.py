"""The one subclass of transformers' Trainer: weighted targets, exact sums, whole checkpoints."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
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
from yrunner.run_dir import RunDir, whole_folder
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.compilation import compiled_layers
from yrunner.training.drift import DriftGauge
from yrunner.training.keeping import Keeping, Micro
from yrunner.training.meter import SignalMeter


class SignalTrainer(Trainer):
    """Trains along a `Plan`; every target's gradient is weighed by its loss and entropy.

    The loss of an update is the sum of weight times loss over its targets, divided once by their
    number, or by their weights, over all micro-steps: accumulation cannot change a result.
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
        self.keeping: Keeping | None = None
        """What holds the model to its base, see keeping.py."""
        self.gauge: DriftGauge | None = None

    def use_layout(self, layout: Layout) -> None:
        """Lay out micro-batches so. Without a call, every example has a row of its own."""
        self.layout = layout
        self.data_collator = partial(collate, pad_token_id=self.pad_token_id, layout=layout)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the layers compiled where that is wanted."""
        with compiled_layers(self.model) if self.torch_compile else nullcontext():
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[TokenizedExample]:
        """Micro-batches in the order of the plan, all epochs in one sequence."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.plan,
            collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one update, and its number of targets."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        counts = [(batch["labels"] != IGNORE_INDEX).sum() for batch in batches]
        return batches, torch.stack(counts).sum().to(device)

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
            weights = torch.stack(self.weights_of_update).sum()
            self.weights_of_update.clear()
            if self.normalize == "weights":
                assert num_items_in_batch is not None
                self._divide_by(weights, num_items_in_batch)
        return loss

    def _divide_by(self, weights: Tensor, num_targets: Tensor | int) -> None:
        """Make gradients that were divided by targets those of a division by weights.

        The weights of an update are known when its last micro-batch has been seen, not before.
        """
        factor = torch.where(weights > 0, num_targets / weights, torch.ones_like(weights))
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
        loss = targets.weighted / num_items_in_batch
        held = self._held_back(model)
        return loss if held is None else loss + held

    def _held_back(self, model: nn.Module) -> Tensor | None:
        """What keeping adds to the loss of the micro-batch whose targets were seen last."""
        if self.keeping is None:
            return None
        number = len(self.weights_of_update) - 1
        micro = Micro(self.state.global_step, number, self.plan.micro_batch_size)
        return self.keeping.loss(self.model, model, micro)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Plain loss per target over all validation examples, whatever the batches."""
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_train_batch_size
        rows = [((index, 0),) for index in range(len(examples))]
        loader = DataLoader(
            examples,
            batch_sampler=[rows[start : start + size] for start in range(0, len(rows), size)],
            collate_fn=self.data_collator,
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
        if self.gauge is not None:
            metrics[f"{metric_key_prefix}_drift"] = self.gauge.measure(self.model)
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
            logs |= {} if self.keeping is None else self.keeping.drain()
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
        with whole_folder(self.run_dir.checkpoint(self.state.global_step)) as folder:
            with quiet_libraries():
                self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self._remove_old_checkpoints()

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
