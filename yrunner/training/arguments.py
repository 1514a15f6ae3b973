"""From recipe sections to the objects of transformers, accelerate and torch."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, assert_never

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import nn
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
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of weights without weight decay, as everywhere in transformers."""


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
    return TrainingArguments(
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
        optim=train.optimizer,
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
    if str(arguments.optim.value).endswith("8bit"):
        # Embedding rows get rare and uneven gradients, which 8 bits would round to zero.
        manager: Any = import_module("bitsandbytes.optim").GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    options: dict[str, Any] = {}
    if arguments.optim.value == "adamw_torch" and arguments.deepspeed is None:
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
