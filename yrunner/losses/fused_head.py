"""A model's forward that returns targets instead of logits, so that all logits never exist.

Logits of a large vocabulary take more memory and time than the rest of a small model. Inside the
model's own forward the head is where ZeRO-3 and DDP expect it to be used. For transformers 5, whose
causal models are `head(base_model(...).last_hidden_state)`, scaled or capped; whether that is true
is tried out on the model itself. Models that were never attached are not patched.
"""

# B = rows, T = tokens, D = hidden size, V = vocabulary, K = columns, N = targets

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from yrunner.console import warn
from yrunner.losses.chunked_loss import chunk_rows, linear_targets, logit_targets, module_targets
from yrunner.losses.head_call import Space, gather_as_one
from yrunner.losses.kl import BaseHead, Held, answer_hidden, answer_logits
from yrunner.losses.targets import (
    PLAIN,
    Targets,
    TokenWeight,
    at_least_float32,
    predicting_columns,
    target_places,
)
from yrunner.losses.vocab_sweep import LogitForm

PROBE_LENGTH = 8
"""Tokens of the first batch on which the fused head is compared with the model's own logits."""


def attach(model: Any, rows: int | None = None) -> None:
    """Let `model` answer `token_weight=...` beside `labels` with `Targets`. Safe to call twice.

    Any other call goes to the model's own forward. `rows`: targets per chunk; None chooses.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(getattr(causal, "fused_head", None), _FusedHead):
        return
    original = causal.forward
    fused = causal.fused_head = _FusedHead(causal, original, rows)
    gather_as_one(active_head(causal))

    @wraps(original)
    def forward(
        *args: Any,
        token_weight: TokenWeight | None = None,
        wants_top: bool = False,
        held: Held | None = None,
        **kwargs: Any,
    ) -> Any:
        if token_weight is None and held is None:
            return original(*args, **kwargs)
        assert not args, "targets are asked for by measure_targets, divergences by held.py"
        if held is not None:
            return fused.hold(held, kwargs)
        assert token_weight is not None, "one of the two was asked for"
        # As a dictionary: DeepSpeed looks for tensors in these alone.
        return vars(fused.targets(token_weight, wants_top, kwargs))

    causal.forward = forward


def measure_targets(
    model: Any,
    inputs: Mapping[str, Tensor],
    weight: TokenWeight = PLAIN,
    *,
    wants_top: bool = False,
) -> Targets:
    """The targets of a batch as `collate` makes it; `model`, or what it wraps, is attached.

    `wants_top`: with the likeliest token of each, which costs a tenth more.
    """
    options = {"token_weight": weight, "wants_top": wants_top, "use_cache": False}
    return Targets(**model(**inputs, **options))


class _FusedHead:
    """How the targets of one model are found; decided at the first batch."""

    def __init__(self, model: Any, original: Any, rows: int | None) -> None:
        self.model = model
        self.original = original
        self.rows = rows
        self.form = _logit_form(model.config.get_text_config())
        self.space = Space()
        self.fits: bool | None = None

    def targets(self, weight: TokenWeight, wants_top: bool, kwargs: dict[str, Any]) -> Targets:
        """The targets of `kwargs`, a batch with labels."""
        labels_BT = kwargs["labels"]
        inputs = self._settle(kwargs)
        if not self.fits:
            return self._from_full_logits(inputs, labels_BT, weight, wants_top)
        hidden_BTD = self.model.base_model(**inputs).last_hidden_state
        return self._from_hidden(hidden_BTD, labels_BT, weight, wants_top)

    def hold(self, held: Held, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """The model's side of the targets of `kwargs`, or how far they are from another side."""
        labels_BT = kwargs["labels"]
        inputs = self._settle(kwargs)
        if self.fits:
            hidden_BTD = self.model.base_model(**inputs).last_hidden_state
            return self._hold_hidden(hidden_BTD, labels_BT, held)
        columns_K = predicting_columns(labels_BT)
        logits_BKV = self.original(**inputs, logits_to_keep=columns_K).logits
        is_target_BK, _ = target_places(labels_BT, columns_K)
        return answer_logits(at_least_float32(logits_BKV[is_target_BK]), self._base_head(), held)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _hold_hidden(self, hidden_BTD: Tensor, labels_BT: Tensor, held: Held) -> dict[str, Tensor]:
        hidden_ND = hidden_BTD[:, :-1][target_places(labels_BT)[0]]
        head = active_head(self.model)
        rows = self._rows(hidden_ND.device.type)
        return answer_hidden(hidden_ND, head, self._base_head(), held, rows, is_plain(head))

    def _base_head(self) -> BaseHead:
        return BaseHead.of(untrained_head(self.model), self.form)

    def _rows(self, device_type: str) -> int:
        vocabulary_size = self.model.config.get_text_config().vocab_size
        return self.rows or chunk_rows(vocabulary_size, device_type)

    def _settle(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the model itself is given; at the first batch, whether its logits are ours."""
        # PEFT passes on every argument of its own forward, given or not.
        inputs = {
            name: value for name, value in kwargs.items() if name != "labels" and value is not None
        }
        if self.fits is None:
            self.fits = self._try_out(inputs)
        return inputs

    # torch.compile leaves alone what is written by hand, or depends on the number of targets.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _from_hidden(
        self, hidden_BTD: Tensor, labels_BT: Tensor, weight: TokenWeight, wants_top: bool
    ) -> Targets:
        is_target_BT, labels_N = target_places(labels_BT)
        hidden_ND = hidden_BTD[:, :-1][is_target_BT]
        head = active_head(self.model)
        rows = self._rows(hidden_ND.device.type)
        call = (hidden_ND, head, labels_N, weight, self.form, rows, wants_top)
        return linear_targets(*call, self.space) if is_plain(head) else module_targets(*call)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _from_full_logits(
        self, inputs: dict[str, Any], labels_BT: Tensor, weight: TokenWeight, wants_top: bool
    ) -> Targets:
        columns_K = predicting_columns(labels_BT)
        logits_BKV = self.original(**inputs, logits_to_keep=columns_K).logits
        is_target_BK, labels_N = target_places(labels_BT, columns_K)
        return logit_targets(
            at_least_float32(logits_BKV[is_target_BK]), labels_N, weight, wants_top
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _try_out(self, inputs: dict[str, Any]) -> bool:
        """Whether our logits of a few tokens are the model's own; says so where they are not."""
        base, head = self.model.base_model, self.model.get_output_embeddings()
        if base is self.model or head is None:
            return self._refuse()
        if isinstance(next(self.model.parameters()), FakeTensor):
            return True  # memory is estimated without values; there is nothing to compare
        few = {
            name: value[:1, :PROBE_LENGTH] if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        try:
            # Neither the mode nor the random state is touched: dropout draws the same for both.
            with torch.no_grad(), _own_random_state():
                theirs = self.original(**few).logits
            with torch.no_grad(), _own_random_state():
                hidden = base(**few).last_hidden_state
                ours = self.form.apply(at_least_float32(active_head(self.model)(hidden)))
        except (AttributeError, TypeError, RuntimeError):
            # A base model of another kind; what is wrong with the batch itself is raised again by
            # the model's own forward.
            return self._refuse()
        return _are_equal(ours, theirs, hidden) or self._refuse()

    def _refuse(self) -> bool:
        warn(
            f"{type(self.model).__name__} makes its logits in a way of its own: they are computed "
            "in full, which takes more memory"
        )
        return False


def active_head(model: Any) -> Any:
    """The module that computes logits; of a head in `modules_to_save`, the copy that is trained."""
    head = model.get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    active = head.active_adapters
    if head.disable_adapters or not active or active[0] not in head.modules_to_save:
        return head.original_module
    return head.modules_to_save[active[0]]


def untrained_head(model: Any) -> Any:
    """The module that computed logits before anything was trained: beneath adapters and copies."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        return head.original_module
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


def is_plain(head: Any) -> bool:
    """Whether weight and bias are all there is. Accelerate's hooks fetch weights from elsewhere."""
    return type(head) is nn.Linear and not hasattr(head, "_hf_hook")


def _own_random_state() -> AbstractContextManager[None]:
    """Begin with the present state of every device, and leave it as it was."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _logit_form(config: Any) -> LogitForm:
    """Scale (Cohere multiplies, Granite divides) and cap (Gemma 2), as the config names them."""
    multiplied = getattr(config, "logit_scale", None) or 1.0
    divided = getattr(config, "logits_scaling", None) or 1.0
    return LogitForm(multiplied / divided, getattr(config, "final_logit_softcapping", None))


def _are_equal(ours: Tensor, theirs: Tensor, hidden: Tensor) -> bool:
    """Equal up to the rounding of the coarsest dtype on the way."""
    if ours.shape != theirs.shape:
        return False
    precision = max(torch.finfo(tensor.dtype).eps for tensor in (theirs, hidden))
    difference = (ours.double() - theirs.double()).norm()
    return bool(difference <= 8 * precision * theirs.double().norm())
