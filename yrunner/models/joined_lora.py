"""Compute the LoRA layers that read the same input together, in fewer passes over memory.

Queries, keys and values read one input, and so do gate and up projection. peft drops out, copies
and multiplies that input for each of them, and adds each product to the output in a pass of its
own. Here a group has one dropout mask (as in Microsoft's loralib), one product with all its A
matrices, and products that are added where they are computed. Without dropout the result is that of
peft, up to rounding.

For float32 on the CPU. Whatever differs from a plain LoRA layer is left to peft: autocast,
quantized bases, DoRA, biases of LoRA, several adapters, sharded weights.
"""

# T = tokens, D = input features, F = output features, R = ranks of all layers of a group

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of a module that read the same input, in the order in which they are called."""
FRACTIONS = 2**16
"""A dropout probability is rounded to such a part."""


def join_lora(model: Any) -> None:
    """Patch `forward` of the LoRA layers of a model, on a device of its own. Idempotent."""
    if not isinstance(model, PeftModel):
        return
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in GROUPS:
            layers = [children[name] for name in names if name in children]
            if len(layers) == len(names) and all(map(_is_plain, layers)):
                _Group(layers)
        for layer in children.values():
            if _is_plain(layer):
                _Group([layer])


def _is_plain(layer: Any) -> bool:
    """Whether it is LoRA on a linear layer, in the form that is computed here, and not yet so."""
    if type(layer) is not Linear or isinstance(layer.forward, _Member):
        return False
    names = layer.active_adapters
    return (
        type(layer.base_layer) is nn.Linear
        and len(names) == 1
        and names == list(layer.lora_A)
        and not layer.lora_variant
        and not layer.lora_bias[names[0]]
        and not any(weight.requires_grad for weight in layer.base_layer.parameters())
        and not hasattr(layer.base_layer.weight, "ds_id")
    )


class _Group:
    """LoRA layers that are called one after the other, with the same input."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.originals: list[Callable[..., Tensor]] = [layer.forward for layer in layers]
        self.input: Tensor | None = None
        """The input of the call under way, whose later outputs wait."""
        self.waiting: dict[int, Tensor] = {}
        self.is_together = True
        """Until a layer is called with another input than the one before it."""
        for index, layer in enumerate(layers):
            layer.forward = _Member(self, index)

    def output(self, index: int, input_: Tensor) -> Tensor:
        if input_ is self.input and index in self.waiting:
            output = self.waiting.pop(index)
            if not self.waiting:
                self.input = None
            return output
        self.is_together = self.is_together and index == 0
        self.input, self.waiting = None, {}
        if not self.is_together:
            return _compute([self.layers[index]], input_)[0]
        first, *rest = _compute(self.layers, input_)
        self.waiting = dict(enumerate(rest, start=1))
        self.input = input_ if rest else None
        return first


class _Member:
    """The forward of one layer of a group."""

    def __init__(self, group: _Group, index: int) -> None:
        self.group, self.index = group, index

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.group.layers[self.index]
        if args or kwargs or layer.disable_adapters or layer.merged or not _is_float32(layer, x):
            return self.group.originals[self.index](x, *args, **kwargs)
        return self.group.output(self.index, x)


def _is_float32(layer: Any, x: Tensor) -> bool:
    weights = (x, layer.base_layer.weight, *layer.lora_A.parameters(), *layer.lora_B.parameters())
    return not torch.is_autocast_enabled("cpu") and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in weights
    )


def _compute(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """The outputs of LoRA layers with the same input."""
    (name,) = layers[0].active_adapters
    dropout = layers[0].lora_dropout[name]
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    x_TD = x.reshape(-1, x.shape[-1])
    dropped_TD, kept_share = None, 1.0
    if share:
        dropped_TD, kept_share = _draw_dropped(x_TD.shape, share)
    weights = [
        weight
        for layer in layers
        for weight in (
            layer.base_layer.weight,
            layer.base_layer.bias,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
        )
    ]
    scales = [layer.scaling[name] / kept_share for layer in layers]
    outputs: Sequence[Tensor] = _joined_lora(x_TD, dropped_TD, scales, *weights)
    return [output_TF.view(*x.shape[:-1], -1) for output_TF in outputs]


def _draw_dropped(shape: Sequence[int], share: float) -> tuple[Tensor, float]:
    """Where inputs are dropped, and the share that is kept.

    The seed comes from torch's generator, so a restored random state draws the same. torch itself
    takes five times as long on a CPU.
    """
    limit = round(share * FRACTIONS)
    seed = int(torch.randint(2**63 - 1, ()).item())
    draw = np.random.Generator(np.random.SFC64(seed)).integers(
        0, FRACTIONS, size=tuple(shape), dtype=np.uint16
    )
    return torch.from_numpy(draw < limit), 1 - limit / FRACTIONS


class _JoinedLora(torch.autograd.Function):
    """Outputs x W' + b + s (x * kept) A' B' of every layer, of shape [T, F]; gradients of x, A, B.

    W and b are frozen. The dropout's factor 1 / kept share is in s.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, dropped_TD: Tensor | None, scales: list[float], *weights: Any
    ) -> tuple[Tensor, ...]:
        """`weights`: W, b (or None), A and B of each layer."""
        a_RD = torch.cat(weights[2::4])
        ranks = [a.shape[0] for a in weights[2::4]]
        kept_TD = x_TD if dropped_TD is None else x_TD.masked_fill(dropped_TD, 0)
        low_TR = kept_TD @ a_RD.T
        outputs = []
        lows = torch.split(low_TR, ranks, 1)
        for weight, bias, b_FR, scale, low in zip(
            weights[0::4], weights[1::4], weights[3::4], scales, lows, strict=True
        ):
            output_TF = nn.functional.linear(x_TD, weight, bias)
            outputs.append(output_TF.addmm_(low, b_FR.T, alpha=scale))
        ctx.scales, ctx.ranks = scales, ranks
        saved = (kept_TD, dropped_TD, low_TR, a_RD, *weights[0::4], *weights[3::4])
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """The gradients of the inputs of `forward`."""
        kept_TD, dropped_TD, low_TR, a_RD, *weights = ctx.saved_tensors
        number = len(gradients)
        low_gradient_TR = torch.empty_like(low_TR)
        x_gradient_TD = None
        b_gradients = []
        parts = zip(
            gradients,
            weights[:number],
            weights[number:],
            ctx.scales,
            torch.split(low_TR, ctx.ranks, 1),
            torch.split(low_gradient_TR, ctx.ranks, 1),
            strict=True,
        )
        for gradient_TF, weight_FD, b_FR, scale, low, low_gradient in parts:
            low_gradient.copy_(gradient_TF @ b_FR).mul_(scale)
            b_gradients.append((gradient_TF.T @ low).mul_(scale))
            if not ctx.needs_input_grad[0]:
                continue
            if x_gradient_TD is None:
                x_gradient_TD = gradient_TF @ weight_FD
            else:
                x_gradient_TD.addmm_(gradient_TF, weight_FD)
        a_gradients = torch.split(low_gradient_TR.T @ kept_TD, ctx.ranks)
        if x_gradient_TD is not None and dropped_TD is None:
            x_gradient_TD.addmm_(low_gradient_TR, a_RD)
        elif x_gradient_TD is not None:
            x_gradient_TD.add_((low_gradient_TR @ a_RD).masked_fill_(dropped_TD, 0))
        of_weights = [
            gradient
            for a_gradient, b_gradient in zip(a_gradients, b_gradients, strict=True)
            for gradient in (None, None, a_gradient, b_gradient)
        ]
        return x_gradient_TD, None, None, *of_weights


_joined_lora: Any = _JoinedLora.apply
