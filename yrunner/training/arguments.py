"""From recipe sections to the objects of transformers, accelerate and torch; the optimizer Muon."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, assert_never

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments, get_scheduler
from transformers.optimization import Adafactor
from transformers.trainer_pt_utils import get_parameter_names

from yrunner.distributed.collectives import is_joined
from yrunner.losses.nlirg import HARD_UP_TO, nlirg_weight
from yrunner.losses.score_head import critic_weights
from yrunner.losses.targets import PLAIN, TokenWeight
from yrunner.losses.token_weights import EAFT_TOP, dft_weight, eaft_weight, nlirg_entropy_weight
from yrunner.recipe.schema.recipe import (
    DftLoss,
    EaftLoss,
    NlirgEntropyLoss,
    NlirgLoss,
    PlainLoss,
    TokenLoss,
    TrainSection,
)

IN_BITSANDBYTES = {"adamw": "AdamW", "lion": "Lion", "ademamix": "AdEMAMix"}
OF_BITSANDBYTES = frozenset(
    {
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_32bit",
        "lion_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "ademamix_8bit",
    }
)
"""Optimizers of bitsandbytes: they need real values, not fake tensors."""
MUON_MOMENTUM = 0.95
MUON_BETAS = (0.9, 0.99)
"""Of other weights; a run with Muon is often too short for AdamW's memory of 1,000 updates."""
MUON_STEPS = 5
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x -> a x + b x^3 + c x^5, which takes every singular value from 0.01 to 1 to about 1 (0.7 to
1.2) in five steps; from https://kellerjordan.github.io/posts/muon."""
MUON_TOGETHER = 2**22
"""Weights in matrices of one shape that are turned in one product: small ones gain by it, and large
ones would need working memory for all."""
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of weights without weight decay, as everywhere in transformers."""


class OwnOptimizer(Enum):
    """Optimizers that transformers does not name."""

    MUON = "muon"


def make_arguments(
    train: TrainSection,
    *,
    folder: Path,
    name: str,
    num_updates: int,
    seed: int,
    dtype: torch.dtype,
    micro_steps: int | None = None,
    deepspeed: Mapping[str, Any] | None = None,
) -> TrainingArguments:
    """The arguments that optimizer, schedule, DeepSpeed and trackers read.

    `micro_steps`: those of an update in each process, if they are not the recipe's. `deepspeed`:
    its configuration; see `join_ranks`, which comes before.
    """
    is_ours = train.optimizer == OwnOptimizer.MUON.value
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=name,
        max_steps=num_updates,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=micro_steps or train.gradient_accumulation_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler,
        warmup_steps=count_warmup(train, num_updates),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch" if is_ours else train.optimizer,
        activation_checkpointing=train.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        report_to=train.trackers,
        deepspeed=None if deepspeed is None else dict(deepspeed),
        # Processes that have joined a group must not initialise it again.
        accelerator_config={"use_configured_state": is_joined()},
    )
    if is_ours:
        arguments.optim = OwnOptimizer.MUON
    return arguments


def make_accelerator(arguments: TrainingArguments) -> Accelerator:
    """accelerate for these arguments. The loop itself counts the micro-batches of an update."""
    # Every trained weight gets a gradient from every micro-batch, the empty ones too; looking for
    # others, and copying what never changes, would only cost time.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=False, broadcast_buffers=False)
    return Accelerator(
        mixed_precision=arguments.mixed_precision,
        deepspeed_plugin=arguments.deepspeed_plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[ddp],
    )


def optimizer_for(
    model: nn.Module,
    arguments: TrainingArguments,
    lora_plus_ratio: float = 1.0,
    critic_rate: float | None = None,
) -> Optimizer:
    """The optimizer of a model's trained weights; biases and norms are not decayed.

    `critic_rate`: the learning rate of a critic, if it has another. That of LoRA's matrices B is
    `lora_plus_ratio` times that of the others.
    """
    names = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    of_critic = critic_weights(model)
    trained: dict[float, list[tuple[str, nn.Parameter]]] = {arguments.learning_rate: []}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        rate = critic_rate if critic_rate and name in of_critic else arguments.learning_rate
        factor = lora_plus_ratio if ".lora_B." in name else 1.0
        trained.setdefault(rate * factor, []).append((name, weight))
    groups = [
        {
            "params": [weight for name, weight in named if (name in names) is is_decayed],
            "weight_decay": arguments.weight_decay if is_decayed else 0.0,
            "lr": rate,
        }
        for rate, named in trained.items()
        for is_decayed in (True, False)
    ]
    if arguments.optim is OwnOptimizer.MUON:
        groups = [part for group in groups for part in matrices_apart(model, group)]
    if str(arguments.optim.value).endswith("8bit"):
        # Embedding rows get rare and uneven gradients, which 8 bits would round to zero.
        manager: Any = import_module("bitsandbytes.optim").GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    options: dict[str, Any] = {}
    if arguments.optim.value in ("adamw_torch", "muon") and arguments.deepspeed is None:
        # On a CPU torch would otherwise start a dozen operations for each of LoRA's many weights.
        devices = {weight.device.type for named in trained.values() for _, weight in named}
        options["fused"] = devices == {"cpu"} or None
    return make_optimizer(
        str(arguments.optim.value), groups, rate=arguments.learning_rate, **options
    )


def make_optimizer(
    name: str, parameters: Sequence[Any], *, rate: float, **options: Any
) -> Optimizer:
    """The optimizer that `train.optimizer` names, for weights or groups of them.

    `options` are torch's own, such as `foreach`, for optimizers that have a choice.
    """
    match name:
        case "adamw_torch":
            return torch.optim.AdamW(parameters, lr=rate, **options)
        case "adamw_torch_fused":
            return torch.optim.AdamW(parameters, lr=rate, fused=True)
        case "muon":
            return Muon(parameters, lr=rate, betas=MUON_BETAS, **options)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, **options)
        case "adafactor":
            return Adafactor(parameters, lr=rate, scale_parameter=False, relative_step=False)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=rate, **options)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=rate, **options)
        case _ if name in OF_BITSANDBYTES:
            bits, is_paged = 8 if name.endswith("8bit") else 32, name.startswith("paged")
            algorithm = IN_BITSANDBYTES[name.removeprefix("paged_").partition("_")[0]]
            kind: Any = getattr(import_module("bitsandbytes.optim"), algorithm)
            made: Optimizer = kind(parameters, lr=rate, optim_bits=bits, is_paged=is_paged)
            return made
    raise AssertionError(f"no such optimizer in the recipe's schema: {name}")


def matrices_apart(model: nn.Module, group: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A group of weights as two: the rest, and the matrices that Muon turns.

    Not the embeddings and the head: of their rows, an update moves only those of its tokens.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding)]
    kept = {id(it) for table in (*tables, head) if table is not None for it in table.parameters()}
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for weight in group["params"]:
        is_matrix = weight.ndim == 2 and min(weight.shape) > 1 and id(weight) not in kept
        parts[is_matrix].append(weight)
    for is_matrix, weights in parts.items():
        yield {**group, "params": weights, "is_turned": is_matrix}


class Muon(torch.optim.AdamW):
    """Steps that move a matrix by the same length in every direction of its gradient.

    The step of a matrix is its momentum with all singular values near 1, as long as a step of AdamW
    (0.2 per weight), so AdamW's learning rates fit: https://arxiv.org/abs/2502.16982. Groups that
    do not say `is_turned` step as AdamW does.
    """

    def __init__(self, parameters: Iterable[Any], **options: Any) -> None:
        super().__init__(parameters, **options)
        for group in self.param_groups:
            group.setdefault("is_turned", False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["is_turned"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["is_turned"]:
                self._turn(group)

    def _turn(self, group: Mapping[str, Any]) -> None:
        alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                alike[weight.shape].append(weight)
        for shape, weights in alike.items():
            number = max(1, MUON_TOGETHER // shape.numel())
            for start in range(0, len(weights), number):
                some = weights[start : start + number]
                turned = orthogonal(torch.stack([self._ahead(weight) for weight in some]))
                for weight, step_RC in zip(some, turned, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step_RC, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _ahead(self, weight: nn.Parameter) -> Tensor:
        """The momentum of a matrix, moved on once more by its gradient (Nesterov)."""
        state = self.state[weight]
        if not state:
            # AdamW looks for a number of steps when it loads a state.
            state["step"] = torch.zeros(())
            state["momentum"] = torch.zeros_like(weight)
        state["step"] += 1
        assert weight.grad is not None
        state["momentum"].lerp_(weight.grad, 1 - MUON_MOMENTUM)
        return weight.grad.lerp(state["momentum"], MUON_MOMENTUM)


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """Matrices with the singular vectors of these, and singular values near 1, of the same shape.

    By Newton and Schulz's iteration, which needs products alone; on a GPU in bfloat16.
    """
    x_NRC = matrices_NRC.bfloat16() if matrices_NRC.is_cuda else matrices_NRC.float()
    is_tall = x_NRC.shape[1] > x_NRC.shape[2]
    if is_tall:
        x_NRC = x_NRC.mT
    x_NRC = x_NRC / (x_NRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = MUON_COEFFICIENTS
    for _ in range(MUON_STEPS):
        square_NRR = x_NRC @ x_NRC.mT
        factor_NRR = torch.baddbmm(square_NRR, square_NRR, square_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=a)
    return (x_NRC.mT if is_tall else x_NRC).to(matrices_NRC.dtype)


def learning_rates(train: TrainSection, num_updates: int, at: Sequence[int]) -> list[float]:
    """The learning rate of some updates of a run, counted from 0, as the schedule sets it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    warmup = count_warmup(train, num_updates)
    scheduler = get_scheduler(train.lr_scheduler, optimizer, warmup, num_updates)
    return [train.learning_rate * scheduler.lr_lambdas[0](update) for update in at]


def count_warmup(train: TrainSection, num_updates: int) -> int:
    """Updates over which the learning rate rises to its peak; the last one is none of them."""
    return min(math.ceil(train.warmup_ratio * num_updates), num_updates - 1)


def token_weight(loss: TokenLoss) -> tuple[TokenWeight, float]:
    """The token weight of a loss section, and the loss at which the refused zone begins."""
    numbers = loss.model_dump(exclude={"kind", "normalize"})
    match loss:
        case PlainLoss():
            return PLAIN, HARD_UP_TO
        case NlirgLoss():
            nlirg = TokenWeight(lambda loss_N, _: nlirg_weight(loss_N, **numbers))
            return nlirg, loss.loss_deadline
        case NlirgEntropyLoss():
            return TokenWeight(partial(nlirg_entropy_weight, **numbers)), loss.loss_deadline
        case DftLoss():
            return TokenWeight(lambda loss_N, _: dft_weight(loss_N)), HARD_UP_TO
        case EaftLoss():
            return TokenWeight(partial(eaft_weight, **numbers), top=EAFT_TOP), HARD_UP_TO
        case _:
            assert_never(loss)
