"""How much memory one update of a training takes, found by running it without any values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel
from transformers.optimization import Adafactor

from yrunner.losses.fused import attach, measure_targets
from yrunner.models.disk import state_bytes
from yrunner.models.live_bytes import VALUES_NEEDED, LiveBytes, quiet_failures
from yrunner.models.quiet import quiet_libraries
from yrunner.models.scratch import BUILD_ERRORS
from yrunner.models.weightless import fake_mode_of

METHOD = (
    "Estimated by running one update on tensors that have shapes and no values, adding up after "
    "every operation what is alive; several GPUs share it out as docs/results/scaling.md says."
)
NOT_COUNTED = (
    "Not in it: the CUDA context (about 0.5 GB), scratch memory inside kernels, and what the "
    "allocator keeps unused (on a CPU sometimes twice the estimate)."
)

OF_BITSANDBYTES = frozenset({"adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"})
"""Optimizers that compute on real values only."""


@dataclass(frozen=True)
class StepTrace:
    """One update, moment by moment, in bytes on a single device."""

    weights: int
    """Parameters and buffers, trained and frozen."""
    optimizer: int
    """What the optimizer remembers from update to update."""
    while_computing: tuple[tuple[int, int], ...]
    """Gradients and activations at the busiest moments of forward and backward. Activations are
    everything that is not listed here: what backward needs, logits, working memory."""
    while_updating: tuple[tuple[int, int], ...]
    """The same of the optimizer's step."""
    without_copies: tuple[tuple[int, int], ...]
    """The same as `while_computing` where trained weights are kept in the dtype of the computation,
    as DeepSpeed does, so that autocast has nothing to copy."""

    def busiest_compute(
        self, gradient_share: float = 1.0, *, copies: bool = True
    ) -> tuple[int, int]:
        """Gradients and activations where most is held, of the gradients only that share.

        `copies`: with those that autocast makes of trained weights.
        """
        moments = self.while_computing if copies else self.without_copies
        return max(moments, key=lambda it: gradient_share * it[0] + it[1])

    @property
    def updating(self) -> int:
        """The optimizer's working memory at most."""
        return max(activations for _, activations in self.while_updating)

    @property
    def peak(self) -> int:
        """All that a device holds at the busiest moment of training alone."""
        moments = map(sum, self.while_computing + self.while_updating)
        return self.weights + self.optimizer + max(moments)


@dataclass(frozen=True)
class Untraceable:
    """A model whose memory cannot be found without computing values."""

    reason: str


def trace_step(
    model: PreTrainedModel | PeftModel,
    micro_batch: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    optimizer: str,
    accumulation: int = 1,
    gradient_checkpointing: bool = False,
    foreach: bool = False,
) -> StepTrace | Untraceable:
    """Run one update of a weightless model, not the first, on a micro-batch as `collate` makes it.

    `dtype` is that of the computation, `optimizer` transformers' name of it, `accumulation` the
    micro-steps per update. `foreach`: the optimizer updates all weights at once and not one after
    the other, which is torch's way on a GPU and needs working memory for all of them.
    """
    model.train()
    if gradient_checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    updater = make_optimizer(optimizer, trained, foreach=foreach)
    live = LiveBytes(fake_mode_of(model))
    live.assign([*parameters, *model.buffers()], "weights")
    try:
        with live, quiet_libraries(), quiet_failures():
            _remember_an_update(trained, updater, live)
            if accumulation == 1:
                updater.zero_grad()
            live.take_peaks()
            # The recipe's loss would weigh each target: a few numbers beside a row of logits.
            attach(model)
            loss = measure_targets(mixed_precision(model, dtype), micro_batch).weighted
            loss.backward()  # type: ignore[no-untyped-call]
            without_copies = live.peaks_without_copies()
            while_computing = live.take_peaks()
            updater.step()
            while_updating = live.take_peaks()
    except BUILD_ERRORS as error:
        return Untraceable(_reason(error))
    return StepTrace(
        weights=live.alive["weights"],
        optimizer=live.alive["optimizer"],
        while_computing=tuple(while_computing),
        while_updating=tuple(while_updating),
        without_copies=tuple(without_copies),
    )


def make_optimizer(
    name: str, parameters: list[nn.Parameter], *, foreach: bool
) -> torch.optim.Optimizer:
    """The optimizer that Trainer makes for `train.optimizer`."""
    match name:
        case "adamw_torch" | "adamw_8bit" | "paged_adamw_8bit" | "paged_adamw_32bit":
            # For those of bitsandbytes: no less than they need.
            return torch.optim.AdamW(parameters, foreach=foreach)
        case "adamw_torch_fused":
            return torch.optim.AdamW(parameters, fused=True)
        case "sgd":
            return torch.optim.SGD(parameters, foreach=foreach)
        case "adafactor":
            return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)
    raise AssertionError(f"no such optimizer in the recipe's schema: {name}")


def optimizer_bytes(name: str, trained: Iterable[nn.Parameter]) -> int:
    """What the optimizer of these weights will remember, found by a step without any values."""
    with FakeTensorMode():
        twins = [nn.Parameter(torch.empty(each.shape, dtype=each.dtype)) for each in trained]
        for twin in twins:
            twin.grad = torch.zeros_like(twin)
        optimizer = make_optimizer(name, twins, foreach=False)
        optimizer.step()
    return state_bytes(optimizer)


def mixed_precision(model: nn.Module, dtype: torch.dtype) -> Any:
    """`model` as accelerate calls it: computed in `dtype`, its logits handed on in float32."""
    if dtype == torch.float32:
        return model
    return convert_outputs_to_fp32(torch.autocast("cpu", dtype=dtype)(model.__call__))


def _remember_an_update(
    trained: list[nn.Parameter], updater: torch.optim.Optimizer, live: LiveBytes
) -> None:
    """Bring optimizer and gradients to where they stand after an earlier update."""

    def assign_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.assign([parameter.grad], "gradients")

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(assign_gradient)  # type: ignore[no-untyped-call]
        parameter.grad = torch.zeros_like(parameter)
        assign_gradient(parameter)
    updater.step()
    for state in updater.state.values():
        live.assign((value for value in state.values() if isinstance(value, Tensor)), "optimizer")


def _reason(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, VALUES_NEEDED):
        return f"what it computes depends on computed values ({first_line})"
    return first_line
