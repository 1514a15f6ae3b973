"""One sweep over the vocabulary: a chunk's logits to figures of its targets and their pull.

The pull of a target at its logits is softmax minus one-hot, the gradient of its plain loss. A
weight multiplies what comes of it later, where there are few numbers.
"""

# N = targets of a chunk, V = vocabulary

from dataclasses import dataclass

import torch
from torch import Tensor

from yrunner.losses.targets import at_least_float32

TILE_ELEMENTS = 2**17
"""Numbers that the cache of one core holds beside others."""


@dataclass(frozen=True)
class LogitForm:
    """What a model does with the product of hidden states and head."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits_NV: Tensor) -> Tensor:
        """Scaled and capped logits, in place."""
        if self.scale != 1.0:
            logits_NV.mul_(self.scale)
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def apply(self, logits_NV: Tensor) -> Tensor:
        """The same for a tensor that autograd watches."""
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def pass_cap_(self, pull_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """The pull at the logits before the cap, from that at the capped ones. Both are used up."""
        if self.softcap is not None:
            pull_NV.mul_(logits_NV.div_(self.softcap).square_().neg_().add_(1))
        return pull_NV


FINAL = LogitForm()
"""Of logits that are final already."""


@dataclass(frozen=True)
class Sweep:
    """What one sweep finds out about the targets of a chunk, each of shape [N]."""

    loss_N: Tensor
    label_logit_N: Tensor
    top_logit_N: Tensor
    log_sum_N: Tensor
    """Logarithm of the sum of exp(logit - top logit) over the vocabulary."""
    is_top_N: Tensor
    """1 where no token is likelier than the target, else 0."""
    pull_norm_N: Tensor
    """Norm of softmax minus one-hot, at the final logits."""
    mean_logit_N: Tensor | None
    """Mean of the logits under the softmax, if it was asked for."""

    def entropy(self, mean_logit_N: Tensor) -> Tensor:
        """Entropy of the prediction in nats, from the mean of the logits under the softmax."""
        return (self.log_sum_N + (self.top_logit_N - mean_logit_N)).clamp(min=0)


def sweep(
    logits_NV: Tensor,
    labels_N: Tensor,
    form: LogitForm,
    *,
    out: Tensor | None = None,
    wants_mean: bool = True,
) -> tuple[Sweep, Tensor]:
    """Figures of raw logits, and softmax minus one-hot, passed back through the cap.

    The logits are used up where there is a form. `out`: where the second is written to; it may be
    the logits themselves where there is no cap and no mean is wanted.
    """
    form.apply_(logits_NV)
    top_N = logits_NV.amax(dim=1)
    label_logit_N = logits_NV.gather(1, labels_N[:, None]).squeeze(1)
    pull_NV = torch.softmax(logits_NV, dim=1, out=out)
    # Of the likeliest token, which never underflows: the label's own probability can.
    log_sum_N = -pull_NV.amax(dim=1).log()
    pull_NV.scatter_add_(1, labels_N[:, None], pull_NV.new_full((len(labels_N), 1), -1.0))
    found = Sweep(
        loss_N=(top_N - label_logit_N) + log_sum_N,
        label_logit_N=label_logit_N,
        top_logit_N=top_N,
        log_sum_N=log_sum_N,
        is_top_N=(label_logit_N >= top_N).to(logits_NV.dtype),
        pull_norm_N=torch.linalg.vector_norm(pull_NV, dim=1),
        mean_logit_N=_dot(pull_NV, logits_NV) + label_logit_N if wants_mean else None,
    )
    return found, form.pass_cap_(pull_NV, logits_NV)


def entropy_of_top(logits_NV: Tensor, top: int, form: LogitForm) -> Tensor:
    """Entropy of the likeliest tokens, their probabilities scaled to a sum of 1, shape [N].

    Scale and cap keep the order of raw logits.
    """
    likeliest_NK = logits_NV.topk(min(top, logits_NV.shape[1]), dim=1).values
    logs_NK = form.apply(at_least_float32(likeliest_NK)).log_softmax(dim=1)
    return -(logs_NK.exp() * logs_NK).sum(dim=1)


def _dot(left_NV: Tensor, right_NV: Tensor) -> Tensor:
    """Row times row, shape [N], in tiles: on a CPU the products never leave the cache."""
    num_rows, vocabulary_size = left_NV.shape
    columns = vocabulary_size
    if left_NV.device.type == "cpu":
        columns = max(256, TILE_ELEMENTS // max(1, num_rows))
    tiles = zip(torch.split(left_NV, columns, 1), torch.split(right_NV, columns, 1), strict=True)
    return torch.stack([(left * right).sum(dim=1) for left, right in tiles]).sum(dim=0)
