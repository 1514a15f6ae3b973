"""Compute the LoRA layers that read the same input together, in fewer passes over memory.

Queries, keys and values read one input, and so do gate and up projection. peft drops out, copies
and multiplies that input for each of them, and adds each product to the output in a pass of its
own. Here a group has one dropout mask (as in Microsoft's loralib), one product with all its A
matrices, and products that are added where they are computed. Without dropout the result is that of
peft, up to rounding.

In half precision base and adapter are added before the sum is rounded. peft adds the adapter to an
output that is rounded already, and what a young adapter adds is less than half a step of 8 bits:
most of it is lost (`benchmarks/precision.py`).

For float32 on the CPU, and where autocast computes in the dtype of the frozen weights. Whatever
differs from a plain LoRA layer is left to peft: quantized bases, DoRA, biases of LoRA, several
active adapters, sharded weights.
"""

# T = tokens, D = input features, F = output features, R = ranks of all layers of a group

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
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
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Those with as many bytes as a number of x."""
COMPUTED_IN: ContextVar[torch.dtype | None] = ContextVar("COMPUTED_IN", default=None)
"""The half precision of layers that are asked for float32 outputs; None elsewhere."""


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
        linear = [it for it in children.values() if isinstance(it, Linear | nn.Linear)]
        is_attention = GROUPS[0][0] in children and not isinstance(parent.forward, _Attention)
        if is_attention and all(isinstance(it.forward, _Member) for it in linear):
            parent.forward = _Attention(parent.forward, children[GROUPS[0][0]])


def _is_plain(layer: Any) -> bool:
    """Whether it is LoRA on a linear layer, in the form that is computed here, and not yet so."""
    if type(layer) is not Linear or isinstance(layer.forward, _Member):
        return False
    return (
        type(layer.base_layer) is nn.Linear
        and len(layer.active_adapters) == 1
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
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
        is_other = layer.merged or len(layer.active_adapters) > 1
        if args or kwargs or is_other or not _is_computed_here(layer, x):
            return self.group.originals[self.index](x, *args, **kwargs)
        if layer.disable_adapters or not _has_active(layer):
            return _base_output(layer.base_layer, x)
        if not all(map(_has_active, self.group.layers)):
            return _compute([layer], x)[0]
        return self.group.output(self.index, x)


def _has_active(layer: Any) -> bool:
    """An adapter that was added later may leave some layers out."""
    return any(name in layer.lora_A for name in layer.active_adapters)


class _Attention:
    """The forward of attention whose layers are all computed here, on the CPU without autocast.

    Queries, keys and values are float32 until they are turned by their positions. torch's attention
    takes less than half of the time with them too, for short rows.
    """

    def __init__(self, original: Callable[..., Any], layer: Any) -> None:
        self.original, self.layer = original, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        weight = self.layer.base_layer.weight
        if weight.device.type != "cpu" or not _is_dtype_of_autocast(weight):
            return self.original(*args, **kwargs)
        before = COMPUTED_IN.set(weight.dtype)
        try:
            with torch.autocast("cpu", enabled=False):
                return self.original(*args, **kwargs)
        finally:
            COMPUTED_IN.reset(before)


def _is_computed_here(layer: Any, x: Tensor) -> bool:
    """Whether dtypes and device are those that the module's docstring names."""
    weight = layer.base_layer.weight
    adapter = (*layer.lora_A.parameters(), *layer.lora_B.parameters())
    if any(it.dtype != torch.float32 or it.device != x.device for it in adapter):
        return False
    if _is_dtype_of_autocast(weight) or COMPUTED_IN.get() is not None:
        return True
    is_float32 = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    return is_float32 and not torch.is_autocast_enabled("cpu")


def _is_dtype_of_autocast(weight: Tensor) -> bool:
    device = weight.device.type
    return torch.is_autocast_enabled(device) and weight.dtype == torch.get_autocast_dtype(device)


def _base_output(base: nn.Linear, x: Tensor) -> Tensor:
    """The output without an adapter; bit for bit that with an adapter of zeros."""
    if base.weight.dtype == torch.float32:
        return nn.functional.linear(x, base.weight, base.bias)
    x_TD = x.reshape(-1, x.shape[-1]).to(base.weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        zeros_TF = x_TD.new_zeros(len(x_TD), len(base.weight))
        output_TF = torch.addmm(zeros_TF, x_TD, base.weight.T)
        if base.bias is not None:
            output_TF = output_TF + base.bias
    return _as_asked(output_TF).view(*x.shape[:-1], -1)


def _as_asked(output_TF: Tensor) -> Tensor:
    return output_TF if COMPUTED_IN.get() is None else output_TF.float()


def _compute(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """The outputs of LoRA layers with the same input."""
    x_TD = x.reshape(-1, x.shape[-1])
    mask_TD, kept_share = draw_mask(layers[0], x_TD.shape, x.device)
    scales, weights = _weights_of(layers)
    scales = [scale / kept_share for scale in scales]
    outputs: Sequence[Tensor] = _joined_lora(x_TD, mask_TD, scales, *weights)
    return [output_TF.view(*x.shape[:-1], -1) for output_TF in outputs]


def joined_weights(layers: Sequence[Any], x: Tensor) -> tuple[list[float], list[Any]] | None:
    """Scale, and W, b (or None), A and B of each layer, where these are all that they compute.

    None for layers that are left to peft or have no active adapter. Dropout is left to the caller
    (`draw_mask`). Call `join_lora` first.
    """
    for layer in layers:
        if not isinstance(layer.forward, _Member) or layer.merged or layer.disable_adapters:
            return None
        if len(layer.active_adapters) > 1 or not _has_active(layer):
            return None
        if not _is_computed_here(layer, x):
            return None
    return _weights_of(layers)


def _weights_of(layers: Sequence[Any]) -> tuple[list[float], list[Any]]:
    """Scales, and W, b (or None), A and B of each layer."""
    (name,) = layers[0].active_adapters
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
    return [layer.scaling[name] for layer in layers], weights


def draw_mask(
    layer: Any, shape: Sequence[int], device: torch.device
) -> tuple[Tensor | None, float]:
    """1 where a layer keeps its inputs, of this shape, else 0, and the share kept; None, 1: all.

    On a CPU the seed comes from torch's generator, so a restored random state draws the same. torch
    itself takes six times as long there.
    """
    dropout = layer.lora_dropout[layer.active_adapters[0]]
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if not share:
        return None, 1.0
    if device.type != "cpu":
        return (torch.rand(tuple(shape), device=device) >= share).view(torch.uint8), 1 - share
    limit = round(share * FRACTIONS)
    seed = int(torch.randint(2**63 - 1, ()).item())
    count = math.prod(shape)
    draws = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)
    kept = (draws[:count] >= limit).reshape(shape)
    return torch.from_numpy(kept.view(np.uint8)), 1 - limit / FRACTIONS


def mask_(x_TD: Tensor, mask_TD: Tensor | None) -> Tensor:
    """Set x to zero where the mask is 0, in place; the same tensor.

    The bits of x are multiplied: on a CPU torch's `masked_fill_` takes ten times as long.
    """
    if mask_TD is not None:
        x_TD.view(INTEGERS[x_TD.itemsize]).mul_(mask_TD)
    return x_TD


class _JoinedLora(torch.autograd.Function):
    """Outputs x W' + b + s (x * kept) A' B' of every layer, of shape [T, F]; gradients of x, A, B.

    W and b are frozen. The dropout's factor 1 / kept share is in s. Computed in the dtype of W.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, mask_TD: Tensor | None, scales: list[float], *weights: Any
    ) -> tuple[Tensor, ...]:
        """`weights`: W, b (or None), A and B of each layer."""
        with torch.autocast(x_TD.device.type, enabled=False):
            group = GroupWeights.of(weights, scales)
            outputs, kept_TD, low_TR = group.forward(x_TD, mask_TD)
        ctx.x_dtype, ctx.scales = x_TD.dtype, scales
        ctx.save_for_backward(kept_TD, mask_TD, low_TR, *group.tensors())
        return tuple(map(_as_asked, outputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """The gradients of the inputs of `forward`."""
        kept_TD, mask_TD, low_TR, *tensors = ctx.saved_tensors
        with torch.autocast(gradients[0].device.type, enabled=False):
            group = GroupWeights.from_tensors(tensors, ctx.scales)
            gradients = tuple(gradient_TF.to(kept_TD.dtype) for gradient_TF in gradients)
            low_gradient_TR, of_weights = group.weight_gradients(gradients, kept_TD, low_TR)
            x_gradient_TD = None
            if ctx.needs_input_grad[0]:
                x_gradient_TD = group.input_gradient(gradients, low_gradient_TR, mask_TD)
                x_gradient_TD = x_gradient_TD.to(ctx.x_dtype)
        return x_gradient_TD, None, None, *of_weights


@dataclass(frozen=True)
class GroupWeights:
    """What LoRA layers with the same input multiply it with, in the dtype of the frozen weights."""

    frozen: Sequence[Tensor]
    """W of each layer, of shape [F, D]."""
    biases: Sequence[Tensor | None]
    a_RD: Tensor
    """A of all layers, one below the other."""
    b_matrices: Sequence[Tensor]
    """s B of each layer, of shape [F, its rank]."""
    scales: Sequence[float]

    @classmethod
    def of(cls, weights: Sequence[Any], scales: Sequence[float]) -> "GroupWeights":
        """From W, b (or None), A and B of each layer."""
        dtype = weights[0].dtype
        scaled = zip(weights[3::4], scales, strict=True)
        return cls(
            weights[0::4],
            weights[1::4],
            torch.cat(list(weights[2::4])).to(dtype),
            [(b_FR * scale).to(dtype) for b_FR, scale in scaled],
            scales,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """What the backward pass needs of it."""
        return (self.a_RD, *self.frozen, *self.b_matrices)

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor], scales: Sequence[float]) -> "GroupWeights":
        """From what `tensors` returned."""
        a_RD, *rest = tensors
        number = len(scales)
        return cls(rest[:number], [None] * number, a_RD, rest[number:], scales)

    def split(self, low_TR: Tensor) -> Sequence[Tensor]:
        """The columns of each layer."""
        return torch.split(low_TR, [b_FR.shape[1] for b_FR in self.b_matrices], 1)

    def forward(
        self, x_TD: Tensor, mask_TD: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The outputs, the input that is not dropped, and its product with A."""
        x_TD = x_TD.to(self.a_RD.dtype)
        kept_TD = x_TD if mask_TD is None else mask_(x_TD.clone(), mask_TD)
        low_TR = kept_TD @ self.a_RD.T
        lows = self.split(low_TR)
        parts = zip(self.frozen, self.biases, lows, self.b_matrices, strict=True)
        return [_output(x_TD, *part) for part in parts], kept_TD, low_TR

    def weight_gradients(
        self, gradients: Sequence[Tensor], kept_TD: Tensor, low_TR: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient of `low_TR`, and those of W, b, A and B of each layer."""
        low_gradient_TR = torch.empty_like(low_TR)
        b_gradients = []
        for gradient_TF, b_FR, scale, low, low_gradient in zip(
            gradients,
            self.b_matrices,
            self.scales,
            self.split(low_TR),
            self.split(low_gradient_TR),
            strict=True,
        ):
            torch.mm(gradient_TF, b_FR, out=low_gradient)
            # This order: with F rows and few columns, the same product takes twice as long.
            b_gradient_RF = (low.T @ gradient_TF).float().mul_(scale)
            b_gradients.append(b_gradient_RF.T.contiguous())
        a_gradient_RD = (low_gradient_TR.T @ kept_TD).float()
        a_gradients = torch.split(a_gradient_RD, [b_FR.shape[1] for b_FR in self.b_matrices])
        of_weights = [
            gradient
            for a_gradient, b_gradient in zip(a_gradients, b_gradients, strict=True)
            for gradient in (None, None, a_gradient, b_gradient)
        ]
        return low_gradient_TR, of_weights

    def input_gradient(
        self,
        gradients: Sequence[Tensor],
        low_gradient_TR: Tensor,
        mask_TD: Tensor | None = None,
    ) -> Tensor:
        """The gradient of the input."""
        x_gradient_TD = mask_(low_gradient_TR @ self.a_RD, mask_TD)
        for gradient_TF, weight_FD in zip(gradients, self.frozen, strict=True):
            x_gradient_TD.addmm_(gradient_TF, weight_FD)
        return x_gradient_TD


def _output(
    x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, low: Tensor, b_FR: Tensor
) -> Tensor:
    if weight_FD.dtype == torch.float32:
        return nn.functional.linear(x_TD, weight_FD, bias_F).addmm_(low, b_FR.T)
    # The small summand first: `addmm_` adds it to the large product before it rounds.
    output_TF = (low @ b_FR.T).addmm_(x_TD, weight_FD.T)
    return output_TF if bias_F is None else output_TF.add_(bias_F)


_joined_lora: Any = _JoinedLora.apply
