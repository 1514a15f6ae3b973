"""Compute the MLPs and norms that most models have in common in fewer passes over memory.

An MLP with LoRA, down(silu(gate(x)) * up(x)), is one operation here. Layer by layer, autograd keeps
four tensors of the inner size, and makes a new one in each pass over them. Here two are kept, each
pass overwrites what is no longer needed, and the product of gate and up is computed again in the
backward pass. An RMS norm with frozen weights gets its gradient from the formula, in five passes;
rotary embeddings are three passes each way, and keep nothing. The outputs are those of
transformers, up to the rounding of the rotation, with and without an adapter.

transformers repeats Llama's code for most models, under other names. So a layer is recognised by
the compiled instructions of its forward: another formula, such as that of Gemma's norm, compiles to
others. What differs in any way is left as it is.
"""

# B = rows, H = heads, T = tokens (of a norm also: of each head), D = size of the last dimension,
# F = inner size of an MLP

from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    rotate_half,
)

from yrunner.models.layers.joined_lora import (
    GroupWeights,
    draw_mask,
    join_lora,
    joined_weights,
    mask_,
)

ROTARY = apply_rotary_pos_emb.__name__
"""The function of a model's code that turns queries and keys by their positions."""


def shorten_layers(model: Any) -> None:
    """Patch `forward` of attention, LoRA layers, MLPs and norms, if LoRA is trained. Idempotent."""
    if not isinstance(model, PeftModel):
        return
    for module in model.modules():
        _shorten_rotary(module)
    join_lora(model)
    for module in model.modules():
        if _has_forward_of(module, LlamaRMSNorm):
            module.forward = _ShortNorm(module, module.forward)
        elif _has_forward_of(module, LlamaMLP) and _is_silu(module.act_fn):
            module.forward = _JoinedMlp(module, module.forward)


def _has_forward_of(module: Any, kind: type[nn.Module]) -> bool:
    """Whether its forward is the unpatched one of `kind`, instruction by instruction."""
    if "forward" in vars(module):
        return False
    return _instructions(type(module).forward) == _instructions(kind.forward)


def _instructions(function: Any) -> tuple[object, ...] | None:
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    numbers = [each for each in code.co_consts if not isinstance(each, str)]
    return code.co_code, code.co_names, code.co_varnames, numbers


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU | SiLUActivation)


def _shorten_rotary(module: Any) -> None:
    """Let attention call `_rotate`, if it calls a function of the same instructions.

    Its forward is copied, with another meaning of that name; the class and its module stay.
    """
    forward = getattr(type(module), "forward", None)
    if "forward" in vars(module) or not isinstance(forward, FunctionType) or forward.__closure__:
        return
    called = forward.__globals__.get(ROTARY)
    if ROTARY in forward.__code__.co_names and _rotates_halves(called):
        names = {**forward.__globals__, ROTARY: _rotate}
        ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
        ours.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(ours, module)


def _rotates_halves(function: Any) -> bool:
    """Whether it is Llama's rotation; other models turn neighbours, by the same outer function."""
    inner = getattr(function, "__globals__", {}).get(rotate_half.__name__)
    pairs = (function, apply_rotary_pos_emb), (inner, rotate_half)
    return all(_instructions(its) == _instructions(llamas) for its, llamas in pairs)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each of shape [B, H, T, D], turned by their positions."""
    # Converted once for both; for keys of another dtype again.
    cos, sin = (it.unsqueeze(unsqueeze_dim).to(q.dtype) for it in (cos, sin))
    return _rotation(q, cos, sin), _rotation(k, cos.to(k.dtype), sin.to(k.dtype))


class _Rotation(torch.autograd.Function):
    """x cos + (-x2, x1) sin, where x1 and x2 are the halves of the last dimension of x."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_BHTD: Tensor, sin_BHTD: Tensor) -> Tensor:
        """Of the dtype of x."""
        ctx.save_for_backward(cos_BHTD, sin_BHTD)
        half = x_BHTD.shape[-1] // 2
        turned_BHTD = x_BHTD * cos_BHTD
        first, second = x_BHTD.split(half, -1)  # type: ignore[no-untyped-call]
        turned_BHTD[..., :half].addcmul_(second, sin_BHTD[..., :half], value=-1)
        turned_BHTD[..., half:].addcmul_(first, sin_BHTD[..., half:])
        return turned_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHTD: Tensor) -> tuple[Any, ...]:
        """The same with the halves of sin exchanged, and their signs."""
        cos_BHTD, sin_BHTD = ctx.saved_tensors
        half = gradient_BHTD.shape[-1] // 2
        turned_BHTD = gradient_BHTD * cos_BHTD
        first, second = gradient_BHTD.split(half, -1)  # type: ignore[no-untyped-call]
        turned_BHTD[..., :half].addcmul_(second, sin_BHTD[..., half:])
        turned_BHTD[..., half:].addcmul_(first, sin_BHTD[..., :half], value=-1)
        return turned_BHTD, None, None


_rotation: Any = _Rotation.apply


class _JoinedMlp:
    """The forward of one MLP."""

    def __init__(self, module: Any, original: Callable[[Tensor], Tensor]) -> None:
        self.module, self.original = module, original

    def __call__(self, x: Tensor) -> Tensor:
        # Asked at each call: peft may have put other layers in their place.
        layers = (self.module.gate_proj, self.module.up_proj, self.module.down_proj)
        joined = joined_weights(layers, x) if torch.is_grad_enabled() else None
        if joined is None:
            return self.original(x)
        scales, weights = joined
        x_TD = x.reshape(-1, x.shape[-1])
        inner_size = len(layers[0].base_layer.weight)
        mask_TD, kept_share = draw_mask(layers[0], x_TD.shape, x.device)
        mask_TF, inner_share = draw_mask(layers[2], (len(x_TD), inner_size), x.device)
        shares = (kept_share, kept_share, inner_share)
        scales = [scale / share for scale, share in zip(scales, shares, strict=True)]
        output_TD: Tensor = _mlp(x_TD, mask_TD, mask_TF, scales, *weights)
        return output_TD.view(*x.shape[:-1], -1)


class _Mlp(torch.autograd.Function):
    """The output, of shape [T, D], in the dtype of the frozen weights; gradients of x, A and B.

    A dropout's factor 1 / kept share is in the scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        mask_TD: Tensor | None,
        mask_TF: Tensor | None,
        scales: list[float],
        *weights: Any,
    ) -> Tensor:
        """`weights`: W, b (or None), A and B of gate, up and down projection."""
        with torch.autocast(x_TD.device.type, enabled=False):
            wide = GroupWeights.of(weights[:8], scales[:2])
            down = GroupWeights.of(weights[8:], scales[2:])
            (gate_TF, up_TF), kept_TD, low_TR = wide.forward(x_TD, mask_TD)
            inner_TF = nn.functional.silu(gate_TF).mul_(up_TF)
            (output_TD,), _, inner_TR = down.forward(inner_TF, mask_TF)
        ctx.x_dtype, ctx.scales = x_TD.dtype, scales
        saved = (kept_TD, mask_TD, low_TR, gate_TF, up_TF, mask_TF, inner_TR)
        ctx.save_for_backward(*saved, *wide.tensors(), *down.tensors())
        return output_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Any, ...]:
        """The gradients of the inputs of `forward`."""
        kept_TD, mask_TD, low_TR, gate_TF, up_TF, mask_TF, inner_TR, *tensors = ctx.saved_tensors
        with torch.autocast(gradient_TD.device.type, enabled=False):
            wide = GroupWeights.from_tensors(tensors[:5], ctx.scales[:2])
            down = GroupWeights.from_tensors(tensors[5:], ctx.scales[2:])
            of_output = (gradient_TD.to(gate_TF.dtype),)
            active_TF = nn.functional.silu(gate_TF)
            inner_TF = mask_(active_TF * up_TF, mask_TF)
            inner_low, of_down = down.weight_gradients(of_output, inner_TF, inner_TR)
            inner_gradient_TF = down.input_gradient(of_output, inner_low, mask_TF)
            up_gradient_TF = active_TF.mul_(inner_gradient_TF)
            gate_gradient_TF = torch.ops.aten.silu_backward(inner_gradient_TF.mul_(up_TF), gate_TF)
            gradients = (gate_gradient_TF, up_gradient_TF)
            low_gradient_TR, of_wide = wide.weight_gradients(gradients, kept_TD, low_TR)
            x_gradient_TD = None
            if ctx.needs_input_grad[0]:
                x_gradient_TD = wide.input_gradient(gradients, low_gradient_TR, mask_TD)
                x_gradient_TD = x_gradient_TD.to(ctx.x_dtype)
        return x_gradient_TD, None, None, None, *of_wide, *of_down


_mlp: Any = _Mlp.apply


class _ShortNorm:
    """The forward of one norm."""

    def __init__(self, module: Any, original: Callable[[Tensor], Tensor]) -> None:
        self.module, self.original = module, original

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight_D = self.module.weight
        # Of float64, whoever asks for it wants all digits that transformers gives.
        is_double = hidden_states.dtype == torch.float64
        if weight_D.requires_grad or is_double or not hidden_states.requires_grad:
            return self.original(hidden_states)
        normed: Tensor = _norm(hidden_states, weight_D, self.module.variance_epsilon)
        return normed


class _Norm(torch.autograd.Function):
    """The norm of the last dimension, of the shape of the input."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        """Computed in float32."""
        float_TD = x_TD.float()
        mean_T1 = float_TD.square().mean(-1, keepdim=True)
        factor_T1 = mean_T1.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_TD, factor_T1, weight_D)
        return weight_D * (float_TD * factor_T1).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Any, ...]:
        """f (g w - x f^2 mean(g w x)), where f is 1 / rms and g the gradient of the output."""
        x_TD, factor_T1, weight_D = ctx.saved_tensors
        float_TD = x_TD.float()
        weighed_TD = gradient_TD.float() * weight_D
        mean_T1 = (weighed_TD * float_TD).mean(-1, keepdim=True)
        shift_T1 = mean_T1.mul_(factor_T1.square()).mul_(factor_T1)
        weighed_TD.mul_(factor_T1).addcmul_(float_TD, shift_T1, value=-1)
        return weighed_TD.to(x_TD.dtype), None, None


_norm: Any = _Norm.apply
