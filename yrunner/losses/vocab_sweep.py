"""One sweep over the vocabulary: logits to statistics of the targets and their gradient.

The gradient at the logits is that of the unweighted loss, softmax minus one-hot. The weight
multiplies what follows from it, where there are fewer numbers.
"""

# N = targets of a chunk, V = vocabulary, B = blocks, K = likeliest tokens, or those of a block

from dataclasses import dataclass

import torch
from torch import Tensor

from yrunner.losses.targets import at_least_float32

TILE_ELEMENTS = 2**17
"""Numbers that fit into the cache of one core."""
BLOCK = 64
"""Logits of which the maximum is found together."""


@dataclass(frozen=True)
class LogitForm:
    """How a model scales and caps the product of hidden states and head."""

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
        """Scaled and capped logits; differentiable."""
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def at_temperature(self, temperature: float) -> "LogitForm":
        """The form whose final logits are these divided by `temperature`."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return LogitForm(self.scale / temperature, softcap)

    def cap_backward_(self, grad_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """From the gradient at the capped logits to that before the cap. Overwrites both."""
        if self.softcap is not None:
            grad_NV.mul_(logits_NV.div_(self.softcap).square_().neg_().add_(1))
        return grad_NV


FINAL = LogitForm()
"""For logits that are scaled and capped already."""


@dataclass(frozen=True)
class VocabStats:
    """Statistics of the targets of a chunk, each of shape [N]."""

    loss_N: Tensor
    label_logit_N: Tensor
    top_logit_N: Tensor
    log_sum_N: Tensor
    """Logarithm of the sum of exp(logit - top logit) over the vocabulary."""
    is_top_N: Tensor
    """1 where no token is likelier than the target, else 0."""
    gradient_norm_N: Tensor
    """Norm of softmax minus one-hot, at the final logits."""
    mean_logit_N: Tensor | None
    """Mean of the logits under the softmax, if requested."""

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
) -> tuple[VocabStats, Tensor]:
    """Statistics of raw logits, and the gradient before the cap.

    Overwrites the logits unless `form` is the identity. `out` receives the gradient; it may be the
    logits themselves if there is no cap and no mean is requested.
    """
    form.apply_(logits_NV)
    top_N = logits_NV.amax(dim=1)
    label_logit_N = logits_NV.gather(1, labels_N[:, None]).squeeze(1)
    grad_NV = torch.softmax(logits_NV, dim=1, out=out)
    # From the likeliest token, which never underflows: the label's own probability can.
    log_sum_N = -grad_NV.amax(dim=1).log()
    grad_NV.scatter_add_(1, labels_N[:, None], grad_NV.new_full((len(labels_N), 1), -1.0))
    stats = VocabStats(
        loss_N=(top_N - label_logit_N) + log_sum_N,
        label_logit_N=label_logit_N,
        top_logit_N=top_N,
        log_sum_N=log_sum_N,
        is_top_N=(label_logit_N >= top_N).to(logits_NV.dtype),
        gradient_norm_N=torch.linalg.vector_norm(grad_NV, dim=1),
        mean_logit_N=_dot(grad_NV, logits_NV) + label_logit_N if wants_mean else None,
    )
    return stats, form.cap_backward_(grad_NV, logits_NV)


def likeliest(logits_NV: Tensor) -> Tensor:
    """The token with the largest logit of each row, shape [N]; of equal ones the first.

    On a CPU torch finds a maximum twenty times as fast as its place: so the block with the maximum
    is found first, and then the place in it.
    """
    if logits_NV.device.type != "cpu" or logits_NV.shape[1] % BLOCK:
        return logits_NV.argmax(dim=1)
    logits_NBK = logits_NV.view(len(logits_NV), -1, BLOCK)
    block_N = logits_NBK.amax(dim=2).argmax(dim=1)
    inside_NK = logits_NBK[torch.arange(len(block_N)), block_N]
    return block_N * BLOCK + inside_NK.argmax(dim=1)


def entropy_of_top(logits_NV: Tensor, top: int, form: LogitForm) -> Tensor:
    """Entropy over the `top` likeliest tokens, their probabilities rescaled to sum to 1, shape [N].

    Takes raw logits: scale and cap keep their order.
    """
    likeliest_NK = logits_NV.topk(min(top, logits_NV.shape[1]), dim=1).values
    logs_NK = form.apply(at_least_float32(likeliest_NK)).log_softmax(dim=1)
    return -(logs_NK.exp() * logs_NK).sum(dim=1)


def _dot(left_NV: Tensor, right_NV: Tensor) -> Tensor:
    """Row times row, shape [N], in tiles: on a CPU the products never leave the cache."""
    num_rows, columns = left_NV.shape
    if left_NV.device.type == "cpu":
        columns = max(256, TILE_ELEMENTS // max(1, num_rows))
    tiles = zip(torch.split(left_NV, columns, 1), torch.split(right_NV, columns, 1), strict=True)
    return torch.stack([(left * right).sum(dim=1) for left, right in tiles]).sum(dim=0)
