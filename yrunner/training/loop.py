"""The training loop: run one `Plan`, update by update. It reads from top to bottom.

accelerate handles devices, mixed precision, DDP and DeepSpeed; batches.py makes the micro-batches,
objective.py the loss, callbacks.py the timing of logs and saves, checkpointing.py the checkpoints.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)

from yrunner.data.batching.batches import Batch, Batches
from yrunner.data.batching.plan import epoch_after
from yrunner.distributed.collectives import num_ranks, sum_over_ranks, this_rank
from yrunner.losses.fused_head import attach
from yrunner.losses.score_head import critic_weights, same_adapter_again
from yrunner.machine import look_around
from yrunner.models.layers.llama_layers import shorten_layers
from yrunner.scoring.base_predictions import to_device
from yrunner.storage.run_dir import RunDir
from yrunner.training.arguments import make_accelerator, optimizer_for
from yrunner.training.callbacks import Cadence, StopRequest
from yrunner.training.checkpointing import Checkpointer, load_random_states
from yrunner.training.compile import compiled_layers
from yrunner.training.deepspeed.state import zero_run
from yrunner.training.metrics import best_step
from yrunner.training.objective import Objective
from yrunner.training.replay_loss import MicroBatch
from yrunner.training.rng_snapshot import Snapshot


class Trainer:
    """Trains a model along the plan of its batches; `callbacks` only observe."""

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        batches: Batches,
        objective: Objective,
        cadence: Cadence,
        run_dir: RunDir,
        *,
        torch_compile: bool = False,
        lora_plus_ratio: float = 1.0,
        critic_rate: float | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        set_seed(arguments.seed)
        self.arguments = arguments
        self.batches, self.plan = batches, batches.plan
        self.objective = objective
        self.cadence = cadence
        self.run_dir = run_dir
        self.torch_compile = torch_compile
        self.lora_plus_ratio, self.critic_rate = lora_plus_ratio, critic_rate
        self.callbacks = list(callbacks)
        self.accelerator = make_accelerator(arguments)
        self.device = self.accelerator.device
        self.zero = zero_run(self.accelerator, arguments, model)
        self._is_partitioned = self.zero is not None and self.zero.is_partitioned
        self.model = self.called = model
        """The bare model, and the one wrapped by DDP or DeepSpeed, which runs the forward pass."""
        model.config.use_cache = False
        if not (self._is_partitioned or getattr(model, "quantization_method", None)):
            model.to(self.device)
        attach(model)
        if not (self._is_partitioned or torch_compile):
            shorten_layers(model)
        self.state = TrainerState(max_steps=self.plan.num_updates)
        self.state.is_world_process_zero = this_rank() == 0
        self.stop = StopRequest()
        self.is_over = False
        self.result_step = 0
        """The update that the weights are of, at the end of `train`."""
        self.before_training: list[Callable[[], None]] = []
        self.before_update: Snapshot | None = None
        """State to restore when an update is aborted; None between updates."""

    def when_model_runs(self, action: Callable[[], None]) -> None:
        """Run it now; under ZeRO-3 when training begins, because weights are sharded until then."""
        if self._is_partitioned:
            self.before_training.append(action)
        else:
            action()

    def train(self, checkpoint: Path | None = None) -> None:
        """Run the plan from its beginning, or from a checkpoint."""
        with compiled_layers(self.model) if self.torch_compile else nullcontext():
            self._prepare(checkpoint)
            for action in self.before_training:
                action()
            self._tell("on_train_begin")
            batches = self.batches.of_updates(self.state.global_step)
            if checkpoint is not None:
                load_random_states(checkpoint)
                if self.batches.validates and self.cadence.misses_validation(self.state):
                    self._validate_and_save()
            while not self.is_over and self.state.global_step < self.plan.num_updates:
                look_around()
                micro_batches = list(islice(batches, self.batches.per_update))
                if len(micro_batches) < self.batches.per_update:
                    # A signal came while answers were being written.
                    self.save()
                    break
                self._update(micro_batches)
            self.result_step = self.state.global_step
            if self.cadence.loads_best and self.stop.signal is None:
                self.result_step = self.checkpointer.load_best(self.run_dir)
            self._tell("on_train_end")

    def _prepare(self, checkpoint: Path | None) -> None:
        """Make optimizer and schedule, let accelerate wrap them, and load a checkpoint."""
        if self.arguments.activation_checkpointing:
            again: dict[str, Any] = {"use_reentrant": False}
            if critic_weights(self.model):
                again["context_fn"] = same_adapter_again(self.model)
            self.model.activation_checkpointing_enable(again)
        rates = (self.lora_plus_ratio, self.critic_rate)
        optimizer = optimizer_for(self.model, self.arguments, *rates)
        ids = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        self.trained = [weight for weight in self.model.parameters() if id(weight) in ids]
        self.called, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        kind, warmup = self.arguments.lr_scheduler_type, int(self.arguments.warmup_steps)
        self.schedule = get_scheduler(kind, self.optimizer, warmup, self.plan.num_updates)
        if self.zero is not None:
            self.zero.engine = self.called
        scaler, sums = self.accelerator.scaler, self.objective.sums
        self.checkpointer = Checkpointer(
            self.model, self.optimizer, self.schedule, scaler, self.zero, self.state, sums
        )
        if checkpoint is not None:
            self.checkpointer.load(checkpoint)
            self.is_over = self.cadence.stops_early(self.state.log_history)

    def _update(self, batches: list[Batch]) -> None:
        """One optimizer update on this rank's micro-batches."""
        self.before_update = Snapshot(self.objective.sums.values())
        if not (self.called.training and self.model.training):
            self.called.train()  # goes through every module, which takes a percent of an update
        self.objective.begin_update(self.model, batches, self.device)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            self.learn(batch, number, is_last=is_last)
            # The first update is always finished: there is nothing to go back to.
            if not is_last and self.state.global_step and self.stop.cuts_off:
                self.is_over = True
                return self.save()
        if self.objective.by_weights and self.zero is None:
            self._multiply_gradients(self.objective.gradient_factor())
        norm = self._clip_and_judge()
        self.optimizer.step()
        rate = self.schedule.get_last_lr()[0]
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad()
        self.before_update = None
        self.state.global_step += 1
        self._after_update({"grad_norm": norm, "learning_rate": rate})

    def learn(self, batch: Batch, number: int, *, is_last: bool) -> None:
        """Forward and backward of micro-batch `number` (from 0); gradients add up."""
        self.accelerator.sync_gradients = is_last
        # DDP reduces gradients once, with the last; DeepSpeed reads `sync_gradients`.
        waits = self.zero is None and not is_last
        with self.accelerator.no_sync(self.called) if waits else nullcontext():
            penalty = self._penalty(number)
            loss = self.objective.loss(self.model, self.called, to_device(batch, self.device))
            # DDP and DeepSpeed average gradients over ranks; the sum is wanted.
            loss = (loss if penalty is None else loss + penalty) * num_ranks()
            if self.zero is None:
                self.accelerator.backward(loss)
                return
            if self.objective.by_weights:
                factor = float(self.objective.gradient_factor()) if is_last else 1.0
                loss = self.zero.multiplied_when_stepping(loss, factor)
            self.accelerator.backward(loss, scale_wrt_gas=False)

    def _multiply_gradients(self, factor: Tensor) -> None:
        for weight in self.trained:
            if weight.grad is not None:
                weight.grad.mul_(factor)

    def _penalty(self, number: int) -> Tensor | None:
        """The regulariser's part of the loss of the next micro-batch."""
        regulariser = self.objective.regulariser
        if regulariser is None:
            return None
        place, size = number * num_ranks() + this_rank(), self.plan.micro_batch_size
        micro = MicroBatch(self.state.global_step, place, size, num_ranks())
        loss = regulariser.loss(self.model, self.called, micro)
        if loss is None or self.zero is None or not regulariser.runs_model:
            return loss
        self.zero.run_backward(loss * num_ranks())
        return None

    def _clip_and_judge(self) -> float:
        """Clip the gradient, and let the spike guard judge the update before the step."""
        longest = self.arguments.max_grad_norm or inf
        norm = float(self.accelerator.clip_grad_norm_(self.trained, longest))
        # Summed over ranks: they have to stop together.
        sums_R = sum_over_ranks(self.objective.guard.take())
        # float16: the gradient scaler handles gradients that are not finite.
        seen = None if self.accelerator.scaler is not None else norm
        self.objective.guard.judge(self.state.global_step + 1, sums_R.tolist(), seen)
        return norm

    def _after_update(self, figures: dict[str, float]) -> None:
        """Log, validate, save and stop as due."""
        step = self.state.global_step
        self.state.epoch = epoch_after(step, self.plan.epoch_ends)
        self._tell("on_step_end")
        is_asked, saves = self.stop.is_agreed(), self.cadence.saves_after(step)
        validates = self.cadence.validates_after(step)
        # Sums of several ranks are not part of a checkpoint: log them first.
        if saves or validates or step in self.cadence.log_at or (is_asked and num_ranks() > 1):
            self._log(self.objective.drain() | figures)
        if validates:
            self._validate_and_save(saves=saves or is_asked)
        elif saves or is_asked:
            self.save()

    def _validate_and_save(self, *, saves: bool = True) -> None:
        """Validate, and save: where asked to, the best so far, and before the run ends."""
        before = Snapshot()
        if self.batches.validates and self.validate() is None:
            # The resumed run validates instead.
            before.restore()
            saves = True
        self.is_over |= self.cadence.stops_early(self.state.log_history)
        if saves or self.is_over or best_step(self.state.log_history) == self.state.global_step:
            self.save()

    def validate(self) -> dict[str, float] | None:
        """The figures of all validation rows; None if a signal interrupts it."""
        metrics = self.objective.validate(self.model, self._validation_batches())
        if self.stop.cuts_off:
            return None
        if self.objective.gauge is not None:
            metrics["eval_drift"] = self.objective.gauge.measure(self.model)
        self._log(metrics)
        return metrics

    def _validation_batches(self) -> Iterator[Batch]:
        for batch in self.batches.of_validation():
            yield to_device(batch, self.device)
            self._tell("on_prediction_step")
            if self.stop.cuts_off:
                return

    def save(self) -> None:
        """Save a checkpoint of the last complete update; abort the one in progress."""
        if self.before_update is not None:
            # Weights and optimizer have not changed yet.
            self.before_update.restore()
            self.before_update = None
        self.checkpointer.save(self.run_dir, keep=self.cadence.keep)
        self.is_over |= self.stop.is_agreed()

    def _log(self, figures: dict[str, float]) -> None:
        figures = {**figures, "epoch": self.state.epoch}
        self.state.log_history.append({**figures, "step": self.state.global_step})
        self._tell("on_log", logs=figures)

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            tell = getattr(callback, event)
            tell(self.arguments, self.state, TrainerControl(), model=self.model, **more)
