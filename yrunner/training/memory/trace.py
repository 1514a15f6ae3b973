"""Estimate the memory of an update: run it on fake tensors and add up the bytes of all live ones.

Weights and activations are fake tensors with shapes and no values. The micro-batch is real, because
code that reads its values (padding, columns with targets) must take the branch of the training.

A deep model is extrapolated from two shallow ones with the same layers: memory grows by the same
amount per layer, and tracing 80 layers would take minutes. The two must predict the weights of the
whole model, or it is traced whole.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel

from yrunner.errors import ModelError
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.losses.log_probs import LogProbRequest, measure_log_probs
from yrunner.losses.score_head import critic_weights
from yrunner.models.errors import silence_libraries
from yrunner.models.layers.llama_layers import shorten_layers
from yrunner.models.meta import fake_mode_of
from yrunner.models.scratch import BUILD_ERRORS
from yrunner.models.size import state_bytes
from yrunner.training.arguments import OF_BITSANDBYTES, make_optimizer

Kind = Literal["weights", "gradients", "optimizer", "activations", "copies"]
"""Copies: weights that autocast casts to another dtype; they count as activations."""

VALUES_NEEDED = (DataDependentOutputException, DynamicOutputShapeException)
"""What an operation on fake tensors raises when its result depends on their values."""

REAL_UP_TO = 2**20
"""Elements of the largest real result. Ids and positions are smaller; masks of every token
against every other, and the identity matrix of DoRA, need no values."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live bytes. Inside the block a new tensor is an activation until it is assigned."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake_mode = fake_mode
        self._storages: dict[int, tuple[Kind, int]] = {}
        self.alive: Counter[Kind] = Counter()
        """Bytes of each kind right now."""
        self._most_activations: dict[int, int] = {}
        self._most_without_copies: dict[int, int] = {}

    def assign(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Count these tensors, whether known or new, as `kind`."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) in self._storages:
                self._forget(id(storage))
            else:
                weakref.finalize(storage, self._forget, id(storage)).atexit = False
            self._storages[id(storage)] = (kind, storage.nbytes())
            self.alive[kind] += storage.nbytes()

    def take_peaks(self) -> list[tuple[int, int]]:
        """Pairs of gradient bytes and the peak activations at them, since the last call."""
        peaks = list(self._most_activations.items())
        self._most_activations, self._most_without_copies = {}, {}
        return peaks

    def peaks_without_copies(self) -> list[tuple[int, int]]:
        """What `take_peaks` would return without copies of weights; resets nothing."""
        return list(self._most_without_copies.items())

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and count its results."""
        result = self._run(operation, FakeTensor in types, args, kwargs or {})
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.assign(
            (made for made in tensors if id(made.untyped_storage()) not in self._storages),
            "copies" if self._copies_a_weight(operation, args) else "activations",
        )
        gradients, activations = self.alive["gradients"], self.alive["activations"]
        for most, now in (
            (self._most_activations, activations + self.alive["copies"]),
            (self._most_without_copies, activations),
        ):
            most[gradients] = max(now, most.get(gradients, 0))
        return result

    def _copies_a_weight(self, operation: Any, args: Any) -> bool:
        if operation is not torch.ops.aten._to_copy.default:
            return False
        kind, _ = self._storages.get(id(args[0].untyped_storage()), (None, 0))
        return kind == "weights"

    def _run(self, operation: Any, has_fakes: bool, args: Any, kwargs: Any) -> Any:
        if has_fakes:
            return STAND_INS.get(operation, operation)(*args, **kwargs)
        # Fake the arguments too: the fake mode alone would compute on real ones.
        fakes = tree_map_only(Tensor, self._fake_mode.from_tensor, (args, kwargs))
        try:
            with self._fake_mode:
                fake_result = operation(*fakes[0], **fakes[1])
        except VALUES_NEEDED:
            return operation(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(fake_result) if isinstance(leaf, Tensor)]
        is_small = all(tensor.numel() <= REAL_UP_TO for tensor in tensors)
        return operation(*args, **kwargs) if is_small else fake_result

    def _forget(self, storage_id: int) -> None:
        kind, num_bytes = self._storages.pop(storage_id)
        self.alive[kind] -= num_bytes


@contextmanager
def quiet_failures() -> Iterator[None]:
    """Silence the traceback that torch logs for an operation that needs values."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def _select(values: Tensor, indices: list[Tensor | None]) -> Tensor:
    """`values[indices]`, a real mask as positions: how many it picks is known only then."""
    positions: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            positions.append(index)
        else:
            positions += index.nonzero().unbind(1)
    return torch.ops.aten.index.Tensor(values, positions)


def _norm(values: Tensor, order: float = 2) -> Tensor:
    return torch.linalg.vector_norm(values, order)


def _grouped_matmul(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run in bfloat16, the only dtype that fake tensors support for it, and cast back."""
    halves = (left.bfloat16(), right.bfloat16())
    return torch.ops.aten._grouped_mm.default(*halves, *args, **kwargs).to(left.dtype)


STAND_INS: dict[Any, Any] = {
    torch.ops.aten.index.Tensor: _select,
    torch.ops.aten.norm.Scalar: _norm,
    torch.ops.aten._grouped_mm.default: _grouped_matmul,
}
"""Operations that fake tensors refuse, with replacements of the same shape (torch 2.13)."""


METHOD = (
    "Estimated by running one update on tensors that have shapes and no values, adding up after "
    "every operation what is alive; several GPUs share it out as docs/results/scaling.md says."
)
NOT_COUNTED = (
    "Not in it: the CUDA context (about 0.5 GB), scratch memory inside kernels, and what the "
    "allocator keeps unused (on a CPU sometimes twice the estimate)."
)


@dataclass(frozen=True)
class StepTrace:
    """Memory of one update by phase, in bytes on a single device."""

    weights: int
    """Parameters and buffers, trained and frozen."""
    optimizer: int
    """Optimizer state."""
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
        """Gradients and activations at the peak, if only a share of the gradients is held.

        `copies`: with those that autocast makes of trained weights.
        """
        moments = self.while_computing if copies else self.without_copies
        return max(moments, key=lambda it: gradient_share * it[0] + it[1])

    @property
    def updating(self) -> int:
        """Peak working memory of the optimizer's step."""
        return max(activations for _, activations in self.while_updating)

    @property
    def peak(self) -> int:
        """Peak of a single device."""
        moments = map(sum, self.while_computing + self.while_updating)
        return self.weights + self.optimizer + max(moments)


@dataclass(frozen=True)
class Untraceable:
    """A model that cannot be traced without values."""

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
    """Trace one steady-state update of a fake model on a micro-batch as `collate` makes it.

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
    updater = weightless_optimizer(optimizer, trained, foreach=foreach)
    live = LiveBytes(fake_mode_of(model))
    live.assign([*parameters, *model.buffers()], "weights")
    try:
        with live, silence_libraries(), quiet_failures():
            _remember_an_update(trained, updater, live)
            if accumulation == 1:
                updater.zero_grad()
            live.take_peaks()
            # Token weights are left out: one number per target, tiny beside its logits.
            attach(model)
            shorten_layers(model)
            _loss_of(model, mixed_precision(model, dtype), micro_batch).backward()
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


def _loss_of(model: Any, called: Any, micro_batch: Mapping[str, Tensor]) -> Any:
    if not critic_weights(model):
        return measure_targets(called, micro_batch).weighted
    found = measure_log_probs(called, micro_batch, LogProbRequest(values=True))
    assert found.value_N is not None
    return found.value_N.sum() - found.log_prob_N.sum()


def weightless_optimizer(
    name: str, parameters: list[nn.Parameter], *, foreach: bool
) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer`; for one of bitsandbytes, a torch one no smaller."""
    name = "adamw_torch" if name in OF_BITSANDBYTES else name
    return make_optimizer(name, parameters, rate=1e-3, foreach=foreach)


def optimizer_bytes(name: str, trained: Iterable[nn.Parameter]) -> int:
    """Bytes of optimizer state of these weights, from steps on fake tensors.

    Weights of one shape have states of one size, and a deep model has only a few shapes.
    """
    kinds = Counter((each.shape, each.dtype) for each in trained)
    return sum(number * _state_bytes_of_one(name, *kind) for kind, number in kinds.items())


def _state_bytes_of_one(name: str, shape: torch.Size, dtype: torch.dtype) -> int:
    with FakeTensorMode():
        twin = nn.Parameter(torch.empty(shape, dtype=dtype))
        twin.grad = torch.zeros_like(twin)
        optimizer = weightless_optimizer(name, [twin], foreach=False)
        optimizer.step()
    return state_bytes(optimizer)


def mixed_precision(model: nn.Module, dtype: torch.dtype) -> Any:
    """`model` as accelerate runs it: autocast to `dtype`, outputs in float32."""
    if dtype == torch.float32:
        return model
    return convert_outputs_to_fp32(torch.autocast("cpu", dtype=dtype)(model.__call__))


def _remember_an_update(
    trained: list[nn.Parameter], updater: torch.optim.Optimizer, live: LiveBytes
) -> None:
    """Put optimizer and gradients in the state after an earlier update."""

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


FEW = 0.1
"""Share of trained weights up to which memory grows from layer to layer until backward begins."""
WORTH_IT = 8
"""A model with fewer layers is traced whole."""
ALIKE = 0.01
"""Allowed error of the predicted weights, as a share of the real ones."""


@dataclass(frozen=True)
class GrownTrace:
    """One update of a deep model, extrapolated; the same properties as `StepTrace`."""

    short: StepTrace
    longer: StepTrace
    """Of a model with twice as many layers."""
    short_layers: int
    layers: int

    @property
    def weights(self) -> int:
        """Parameters and buffers, in bytes."""
        return self._grown(self.short.weights, self.longer.weights)

    @property
    def optimizer(self) -> int:
        """Optimizer state in bytes."""
        return self._grown(self.short.optimizer, self.longer.optimizer)

    @property
    def updating(self) -> int:
        """Peak working memory of the optimizer's step, in bytes."""
        return self._grown(self.short.updating, self.longer.updating)

    def busiest_compute(
        self, gradient_share: float = 1.0, *, copies: bool = True
    ) -> tuple[int, int]:
        """Gradients and activations at the peak, if only a share of the gradients is held."""
        shorts = self.short.busiest_compute(gradient_share, copies=copies)
        longs = self.longer.busiest_compute(gradient_share, copies=copies)
        gradients, activations = map(self._grown, shorts, longs)
        return gradients, activations

    def _grown(self, short: int, longer: int) -> int:
        return short + (longer - short) * (self.layers - self.short_layers) // self.short_layers


def trace_update(
    whole: Any,
    build: Callable[[PreTrainedConfig], Any],
    micro_batch: Mapping[str, Tensor],
    **options: Any,
) -> StepTrace | GrownTrace | Untraceable:
    """One update of a fake model that is ready to train.

    `build` makes such a model of a config; `options` are those of `trace_step`.
    """
    grown = _trace_short_ones(whole, build, micro_batch, options)
    return trace_step(whole, micro_batch, **options) if grown is None else grown


def _trace_short_ones(
    whole: Any,
    build: Callable[[PreTrainedConfig], Any],
    micro_batch: Mapping[str, Tensor],
    options: dict[str, Any],
) -> GrownTrace | None:
    """None if the shallow models cannot be built or do not predict the whole."""
    text = whole.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    number = 2 if set(kinds[:1]) != set(kinds) or not _only_grows(whole, options) else 1
    if text.num_hidden_layers < WORTH_IT or set(kinds[:number]) != set(kinds):
        return None
    try:
        models = [build(shortened(whole.config, layers)) for layers in (number, 2 * number)]
    except (ModelError, *BUILD_ERRORS):
        return None
    short, longer = (trace_step(model, micro_batch, **options) for model in models)
    if isinstance(short, Untraceable) or isinstance(longer, Untraceable):
        return None
    grown = GrownTrace(short, longer, number, text.num_hidden_layers)
    real = sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers()))
    return grown if abs(grown.weights - real) <= ALIKE * real else None


def _only_grows(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether the peak is where backward begins, however many layers there are.

    Then one layer more shows what each needs. Otherwise the peak may be in a layer, and the first
    one needs less than others: nothing before it is trained.
    """
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    is_adapter = trained <= FEW * sum(size for size, _ in sizes)
    return is_adapter and not options.get("gradient_checkpointing")


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config of the model with only its first layers."""
    short = deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short
