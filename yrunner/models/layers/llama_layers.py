"""Compute attention, MLPs and norms of the common form in fewer operations and passes over memory.

Attention with LoRA to the examples of a row, from its projections to its output, is one operation
here: autograd keeps no list of some thirty. An MLP with LoRA, down(silu(gate(x)) * up(x)), is one
too. Layer by layer, autograd keeps four tensors of the inner size, and makes a new one in each pass
over them. Here two are kept, each pass overwrites what is no longer needed, and the product of gate
and up is computed again in the backward pass. An RMS norm with frozen weights gets its gradient
from the formula, in five passes; rotary embeddings are three passes each way, and keep nothing. The
outputs are those of transformers, up to the rounding of the rotation, with and without an adapter.

transformers repeats Llama's code for most models, under other names. So a layer is recognised by
the compiled instructions of its forward: another formula, such as that of Gemma's norm, compiles to
others. What differs in any way is left as it is.
"""

# B = rows, H = heads, T = tokens (of a norm also: of each head), D = size of the last dimension,
# F = inner size of an MLP, R = ranks of LoRA

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    rotate_half,
)
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from yrunner.models.layers.example_attention import (
    BY_EXAMPLE,
    attend_backward,
    attend_forward,
    lengths_of_examples,
)
from yrunner.models.layers.joined_lora import (
    IN_FLOAT32,
    GroupWeights,
    join_lora,
    joined_weights,
)

ATTENTION = (LlamaAttention, MistralAttention, Qwen2Attention)
"""Forms of attention that are one operation; windows are excluded where it is chosen."""
ROTARY = apply_rotary_pos_emb.__name__
"""The function of a model's code that turns queries and keys by their positions."""


def shorten_layers(model: Any) -> None:
    """Patch `forward` of attention, LoRA layers, MLPs and norms, if LoRA is trained. Idempotent."""
    if not isinstance(model, PeftModel):
        return
    for module in model.modules():
        is_known = _turns_halves(module) and any(_has_forward_of(module, it) for it in ATTENTION)
        _shorten_rotary(module)
        if is_known:
            module.forward = _JoinedAttention(module, module.forward)
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
    forward = type(module).forward
    if "forward" not in vars(module) and _turns_halves(module) and not forward.__closure__:
        names = {**forward.__globals__, ROTARY: _rotate}
        ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
        ours.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(ours, module)


def _turns_halves(module: Any) -> bool:
    """Whether its class calls Llama's rotation."""
    forward = getattr(type(module), "forward", None)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return False
    return _rotates_halves(forward.__globals__.get(ROTARY))


def _rotates_halves(function: Any) -> bool:
    """Whether it is Llama's rotation; other models turn neighbours, by the same outer function."""
    inner = getattr(function, "__globals__", {}).get(rotate_half.__name__)
    pairs = (function, apply_rotary_pos_emb), (inner, rotate_half)
    return all(_instructions(its) == _instructions(llamas) for its, llamas in pairs)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each of shape [B, H, T, D], turned by their positions."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotation(q, cos.to(q.dtype), sin.to(q.dtype)), _rotation(
        k, cos.to(k.dtype), sin.to(k.dtype)
    )


class _Rotation(torch.autograd.Function):
    """x cos + (-x2, x1) sin, where x1 and x2 are the halves of the last dimension of x."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_BHTD: Tensor, sin_BHTD: Tensor) -> Tensor:
        """Of the dtype of x."""
        ctx.save_for_backward(cos_BHTD, sin_BHTD)
        return _turn(x_BHTD, cos_BHTD, sin_BHTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHTD: Tensor) -> tuple[Any, ...]:
        """The gradient of x."""
        return _turn_back(gradient_BHTD, *ctx.saved_tensors), None, None


_rotation: Any = _Rotation.apply


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def _turn_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same with the halves of sin exchanged, and their signs."""
    half = gradient.shape[-1] // 2
    turned = gradient * cos
    turned[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
    turned[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
    return turned


class _JoinedAttention:
    """The forward of attention to the examples of a row."""

    def __init__(self, module: Any, original: Callable[..., Any]) -> None:
        self.module, self.original = module, original

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        module, joined = self.module, None
        if attention_mask is None and past_key_values is None and self._is_row(hidden_states):
            layers = (module.q_proj, module.k_proj, module.v_proj, module.o_proj)
            joined = joined_weights(layers, hidden_states)
        if joined is None:
            return self.original(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        x_TD, positions = hidden_states[0], kwargs.get("position_ids")
        is_given = positions is not None and positions.ndim == 2
        lengths = lengths_of_examples(positions) if is_given else [len(x_TD)]
        cos_T1D, sin_T1D = (it[0].unsqueeze(1).float() for it in position_embeddings)
        shape = _Shape(lengths, module.head_dim, module.scaling, IN_FLOAT32.get())
        scales, weights = joined
        output_TD: Tensor = _attention(x_TD, cos_T1D, sin_T1D, shape, scales, *weights)
        return output_TD[None], None

    def _is_row(self, hidden_states: Tensor) -> bool:
        """Whether it is a row that is trained in float32, or where `IN_FLOAT32` says so."""
        module = self.module
        is_plain = not (module.training and module.attention_dropout)
        is_plain = is_plain and getattr(module, "is_causal", True)
        is_here = hidden_states.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        by_example = module.config._attn_implementation == BY_EXAMPLE
        is_trained = torch.is_grad_enabled() and len(hidden_states) == 1
        return is_plain and is_here and by_example and is_trained


@dataclass(frozen=True)
class _Shape:
    lengths: list[int]
    """Tokens of each example."""
    head_size: int
    scale: float
    """Of the scores."""
    is_half: bool
    """Whether frozen weights are in half precision; the output is float32 nevertheless."""

    def heads(self, x_TD: Tensor) -> Tensor:
        """Float32, of shape [T, heads, size of a head]."""
        return x_TD.float().view(len(x_TD), -1, self.head_size)

    def examples(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The part of each example, of shape [1, its tokens, heads, size of a head]."""
        return zip(*(torch.split(it[None], self.lengths, 1) for it in tensors), strict=True)


class _JoinedAttentionBlock(torch.autograd.Function):
    """The output, of shape [T, D]; gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        cos_T1D: Tensor,
        sin_T1D: Tensor,
        shape: _Shape,
        scales: list[float],
        *weights: Any,
    ) -> Tensor:
        """`weights`: W, b (or None), A and B of the projections to q, k, v and to the output."""
        wide = GroupWeights.of(weights[:12], scales[:3])
        last = GroupWeights.of(weights[12:], scales[3:])
        projected, kept_TD, low_TR = wide.forward(x_TD)
        q_THD, k_TKD, v_TKD = (shape.heads(it) for it in projected)
        q_THD, k_TKD = (_turn(it, cos_T1D, sin_T1D) for it in (q_THD, k_TKD))
        attended_THD, sums = torch.empty_like(q_THD), []
        for q, k, v, into in shape.examples(q_THD, k_TKD, v_TKD, attended_THD):
            inputs = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            found, needed = attend_forward(*inputs, shape.scale)
            into.copy_(found)
            sums.append(needed)
        (output_TD,), inner_TD, inner_TR = last.forward(attended_THD.flatten(1))
        ctx.x_dtype, ctx.scales, ctx.shape = x_TD.dtype, scales, shape
        ctx.counts = [len(it) for it in sums]
        saved = (kept_TD, low_TR, q_THD, k_TKD, v_TKD, cos_T1D, sin_T1D, inner_TD, inner_TR)
        needed_later = (tensor for tensors in sums for tensor in tensors)
        ctx.save_for_backward(*saved, *wide.tensors(), *last.tensors(), *needed_later)
        return output_TD.float() if shape.is_half else output_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Any, ...]:
        """The gradients of the inputs of `forward`."""
        kept_TD, low_TR, q_THD, k_TKD, v_TKD, cos_T1D, sin_T1D, inner_TD, inner_TR, *tensors = (
            ctx.saved_tensors
        )
        shape, dtype, sums = ctx.shape, kept_TD.dtype, iter(tensors[10:])
        with torch.autocast("cpu", enabled=False):
            wide = GroupWeights.from_tensors(tensors[:7], ctx.scales[:3])
            last = GroupWeights.from_tensors(tensors[7:10], ctx.scales[3:])
            of_output = (gradient_TD.to(dtype),)
            inner_low, of_last = last.weight_gradients(of_output, inner_TD, inner_TR)
            attended_gradient = shape.heads(last.input_gradient(of_output, inner_low))
            found = [torch.empty_like(it) for it in (q_THD, k_TKD, v_TKD)]
            examples = shape.examples(attended_gradient, q_THD, k_TKD, v_TKD, *found)
            for (gradient, q, k, v, *into), count in zip(examples, ctx.counts, strict=True):
                inputs = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                needed = tuple(islice(sums, count))
                parts = attend_backward(gradient, inputs, needed, shape.scale)
                for part, its in zip(parts, into, strict=True):
                    its.copy_(part.transpose(1, 2))
            for index in (0, 1):
                found[index] = _turn_back(found[index], cos_T1D, sin_T1D)
            gradients = tuple(it.flatten(1).to(dtype) for it in found)
            low_gradient_TR, of_wide = wide.weight_gradients(gradients, kept_TD, low_TR)
            x_gradient_TD = None
            if ctx.needs_input_grad[0]:
                x_gradient_TD = wide.input_gradient(gradients, low_gradient_TR).to(ctx.x_dtype)
        return x_gradient_TD, None, None, None, None, *of_wide, *of_last


_attention: Any = _JoinedAttentionBlock.apply


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
        output_TD: Tensor = _mlp(x.reshape(-1, x.shape[-1]), scales, *weights)
        return output_TD.view(*x.shape[:-1], -1)


class _Mlp(torch.autograd.Function):
    """The output, of shape [T, D], in the dtype of the frozen weights; gradients of x, A and B."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, scales: list[float], *weights: Any) -> Tensor:
        """`weights`: W, b (or None), A and B of gate, up and down projection."""
        with torch.autocast(x_TD.device.type, enabled=False):
            wide = GroupWeights.of(weights[:8], scales[:2])
            down = GroupWeights.of(weights[8:], scales[2:])
            (gate_TF, up_TF), kept_TD, low_TR = wide.forward(x_TD)
            (output_TD,), _, inner_TR = down.forward(nn.functional.silu(gate_TF).mul_(up_TF))
        ctx.x_dtype, ctx.scales = x_TD.dtype, scales
        saved = (kept_TD, low_TR, gate_TF, up_TF, inner_TR)
        ctx.save_for_backward(*saved, *wide.tensors(), *down.tensors())
        return output_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Any, ...]:
        """The gradients of the inputs of `forward`."""
        kept_TD, low_TR, gate_TF, up_TF, inner_TR, *tensors = ctx.saved_tensors
        with torch.autocast(gradient_TD.device.type, enabled=False):
            wide = GroupWeights.from_tensors(tensors[:5], ctx.scales[:2])
            down = GroupWeights.from_tensors(tensors[5:], ctx.scales[2:])
            of_output = (gradient_TD.to(gate_TF.dtype),)
            active_TF = nn.functional.silu(gate_TF)
            inner_low, of_down = down.weight_gradients(of_output, active_TF * up_TF, inner_TR)
            inner_gradient_TF = down.input_gradient(of_output, inner_low)
            up_gradient_TF = active_TF.mul_(inner_gradient_TF)
            gate_gradient_TF = torch.ops.aten.silu_backward(inner_gradient_TF.mul_(up_TF), gate_TF)
            gradients = (gate_gradient_TF, up_gradient_TF)
            low_gradient_TR, of_wide = wide.weight_gradients(gradients, kept_TD, low_TR)
            x_gradient_TD = None
            if ctx.needs_input_grad[0]:
                x_gradient_TD = wide.input_gradient(gradients, low_gradient_TR).to(ctx.x_dtype)
        return x_gradient_TD, None, *of_wide, *of_down


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
