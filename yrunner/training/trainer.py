"""Our Trainer: weighted targets and exact sums; saving.py has its checkpoints."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DefaultFlowCallback, PrinterCallback

from yrunner.data.batching.collate import BatchLayout, SlicedExamples, collate, one_per_row
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.token_batches import SlicedRow
from yrunner.data.conversation import TokenizedExample
from yrunner.distributed.collectives import num_ranks, sum_over_ranks, this_rank
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.losses.targets import Targets, TokenWeight, sum_targets
from yrunner.recipe.schema.recipe import Spikes
from yrunner.storage.run_dir import RunDir
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.checkpointing import SavingTrainer
from yrunner.training.compile import compiled_layers
from yrunner.training.deepspeed.state import AtBegin, ZeroRun
from yrunner.training.drift import DriftGauge
from yrunner.training.metrics import SignalMeter
from yrunner.training.oom_probe import is_worth_it, rehearse
from yrunner.training.replay_loss import MicroBatch, Regulariser
from yrunner.training.rng_snapshot import Snapshot
from yrunner.training.spike_guard import SpikeGuard


class Watcher(Protocol):
    """Whoever wants to see the targets; see standing.py for what its attributes may do."""

    def add(self, targets: Targets) -> None:
        """Take in the targets of one micro-batch."""


class SignalTrainer(SavingTrainer):
    """Trains along a `Plan`; every target's gradient is weighed by its loss and entropy.

    The loss of an update is the sum of weight times loss over its targets, divided once by their
    number, or by their weights, over all micro-steps and processes: neither can change a result.
    `watchers` are shown the targets of every micro-batch.
    """

    # compute_loss divides by the targets of the whole update; Trainer must not divide again.
    loss_is_scaled_for_ga = True

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
        spikes: Spikes,
        watchers: Sequence[Watcher] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            train_dataset=SlicedExamples(train_examples, token_batch),
            eval_dataset=SlicedExamples(validation_examples) if validation_examples else None,
            **kwargs,
        )
        attach(self.model)
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
        self.run_dir = run_dir
        self.keep_checkpoints = keep_checkpoints
        self.torch_compile = torch_compile
        self.meter = SignalMeter()
        self.guard = SpikeGuard(spikes)
        self.watchers = watchers
        self.sums = [self.meter, self.guard, *watchers]
        self.weights_of_update: list[Tensor] = []
        self.keeping: Regulariser | None = None
        self.gauge: DriftGauge | None = None

    def add_regulariser(self, keeping: Regulariser) -> None:
        """Add what holds the model to its base to the loss, and to the figures that are logged."""
        self.keeping = keeping
        self.sums.append(keeping.mean)

    def use_layout(self, layout: BatchLayout) -> None:
        """Lay out micro-batches so. Without a call, every example has a row of its own."""
        self.layout = layout
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
        if self.before_update is None:
            self.before_update = Snapshot(self.sums)
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
        held = self._held_back(model)
        targets = measure_targets(model, inputs, self.weight)
        for watcher in self.watchers:
            watcher.add(targets)
        record_R = sum_targets(targets, self.loss_deadline)
        self.meter.add(record_R)
        self.guard.add(record_R)
        self.weights_of_update.append(targets.weight_N.sum())
        loss = targets.weighted / num_items_in_batch
        # DDP and DeepSpeed take the mean of the gradients over the processes; the sum is wanted.
        loss = (loss if held is None else loss + held) * num_ranks()
        if self.zero is not None and self.normalize == "weights":
            is_last = self.accelerator.sync_gradients
            factor = self._weight_factor(num_items_in_batch).item() if is_last else 1.0
            return self.zero.multiplied_when_stepping(loss, factor)
        return loss

    def _held_back(self, model: nn.Module) -> Tensor | None:
        """What keeping adds to the loss of the micro-batch that is about to be seen."""
        if self.keeping is None:
            return None
        number = len(self.weights_of_update) * num_ranks() + this_rank()
        micro = MicroBatch(self.state.global_step, number, self.plan.micro_batch_size, num_ranks())
        loss = self.keeping.loss(self.model, model, micro)
        if loss is None or self.zero is None or not self.keeping.runs_model:
            return loss
        self.zero.run_backward(loss * num_ranks())
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's, and the last look at the update before the optimizer moves."""
        norm = super()._get_grad_norm(model, grad_norm)
        # Of all processes: they have to stop together. float() waits for the device, once.
        sums_R = sum_over_ranks(self.guard.take())
        is_scaled = self.accelerator.scaler is not None
        seen_norm = None if is_scaled or norm is None else float(norm)
        self.guard.judge(self.state.global_step + 1, sums_R.tolist(), seen_norm)
        self.before_update = None
        return norm

    def abort_update(self) -> None:
        """Forget the update that is under way; weights and optimizer have not moved yet."""
        super().abort_update()
        self.weights_of_update.clear()

    def validation_batches(self, examples: Any) -> list[list[SlicedRow]]:
        """The rows of each batch of a validation."""
        size = self.args.per_device_train_batch_size
        rows: list[SlicedRow] = [((index, 0),) for index in range(len(examples))]
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Plain loss per target over all validation examples, whatever the batches.

        The processes share the batches; one that has none left takes part with an empty one.
        """
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = self.validation_batches(examples)
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
            if self.keeping is not None:
                logs[self.keeping.logged_as] = self.keeping.mean.take(sum_over_ranks)
        super().log(logs)

    def _prepare_for_training(self, *args: Any) -> Any:
        """Trainer's, and a try whether everything fits into the memory."""
        model, loader = super()._prepare_for_training(*args)
        if is_worth_it(self):
            rehearse(self, model)
        return model, loader
