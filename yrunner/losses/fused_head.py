"""Patch a model's forward to return `Targets`, log-probabilities or KL instead of logits.

Full logits of a large vocabulary take more memory and time than the rest of a small model. The head
runs inside the model's own forward, where ZeRO-3 and DDP expect it. For transformers 5, whose
causal models are `head(base_model(...).last_hidden_state)`, scaled or capped; the first batch
checks that on the model itself.
"""

# B = rows, T = tokens, D = hidden size, V = vocabulary, K = columns, N = targets

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses import FakeTensor

from yrunner.console import warn
from yrunner.losses.chunked_loss import (
    BufferPool,
    chunk_rows,
    linear_targets,
    logit_targets,
    module_targets,
)
from yrunner.losses.distillation import Lesson, taught_logit_targets, taught_targets
from yrunner.losses.head_call import gather_as_one
from yrunner.losses.kl import BaseHead, KlRequest, answer_from_hidden, answer_from_logits
from yrunner.losses.log_probs import (
    LogProbRequest,
    TargetLogProbs,
    linear_log_probs,
    logit_log_probs,
    module_log_probs,
)
from yrunner.losses.score_head import target_values
from yrunner.losses.targets import (
    PLAIN,
    Targets,
    TokenWeight,
    at_least_float32,
    predicting_columns,
    target_places,
)
from yrunner.losses.vocab_sweep import LogitForm
from yrunner.losses.vocabulary_layers import active_head, base_head, is_plain

PROBE_LENGTH = 8
"""Tokens of the first batch on which fused and full logits are compared."""


def attach(model: Any, rows: int | None = None) -> None:
    """Patch `forward` to return `Targets` for `token_weight=...`, KL for `kl=...`. Idempotent.

    With `log_probs=...` it returns `TargetLogProbs`; other calls go to the model's own forward.
    `rows`: targets per chunk; None: automatic.
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
        lesson: Lesson | None = None,
        kl: KlRequest | None = None,
        log_probs: LogProbRequest | None = None,
        **kwargs: Any,
    ) -> Any:
        if kl is None and token_weight is None and log_probs is None:
            return original(*args, **kwargs)
        assert not args, "pass the inputs by name"
        # Dictionaries: DeepSpeed looks for tensors in these alone.
        if kl is not None:
            return fused.kl(kl, **kwargs)
        if log_probs is not None:
            found = vars(fused.log_probs(log_probs, **kwargs))
            return {name: value for name, value in found.items() if value is not None}
        assert token_weight is not None
        return vars(fused.targets(token_weight, wants_top, lesson, **kwargs))

    causal.forward = forward


def measure_targets(
    model: Any,
    inputs: Mapping[str, Tensor],
    weight: TokenWeight = PLAIN,
    *,
    wants_top: bool = False,
    lesson: Lesson | None = None,
) -> Targets:
    """The targets of a batch made by `collate`; call `attach` on the model first.

    `wants_top`: with the likeliest token of each, which takes a tenth longer. `lesson`: with the
    divergence from a teacher, which the loss includes.
    """
    options: dict[str, Any] = {"token_weight": weight, "wants_top": wants_top, "use_cache": False}
    if lesson is not None:
        options["lesson"] = lesson
    return Targets(**model(**inputs, **options))


class _FusedHead:
    """The patched forward of one model."""

    def __init__(self, model: Any, original: Any, rows: int | None) -> None:
        self.model = model
        self.original = original
        self.rows = rows
        self.form = _logit_form(model.config.get_text_config())
        self.pool = BufferPool()
        self.fits: bool | None = None
        """Whether head and hidden states give the model's logits; None before the first batch."""

    def targets(
        self,
        weight: TokenWeight,
        wants_top: bool,
        lesson: Lesson | None = None,
        *,
        labels: Tensor,
        **kwargs: Any,
    ) -> Targets:
        """The targets of a batch."""
        inputs = self._settle(kwargs)
        if not self.fits:
            return self._targets_from_logits(inputs, labels, weight, wants_top, lesson)
        hidden_BTD = self.model.base_model(**inputs).last_hidden_state
        return self._targets_from_hidden(hidden_BTD, labels, weight, wants_top, lesson)

    def kl(self, request: KlRequest, *, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """The model's own prediction of a batch's targets, or its divergence from the base's."""
        inputs = self._settle(kwargs)
        if not self.fits:
            logits_NV, _ = self._target_logits(inputs, labels)
            return answer_from_logits(logits_NV, self.base_head(), request)
        hidden_BTD = self.model.base_model(**inputs).last_hidden_state
        return self._kl_from_hidden(hidden_BTD, labels, request)

    def log_probs(
        self, request: LogProbRequest, *, labels: Tensor, **kwargs: Any
    ) -> TargetLogProbs:
        """The log-probabilities of a batch's targets, and what a critic expects at each."""
        inputs = self._settle(kwargs)
        hidden_BTD = None
        if not self.fits:
            logits_NV, labels_N = self._target_logits(inputs, labels)
            found = logit_log_probs(logits_NV / request.temperature, labels_N)
        else:
            hidden_BTD = self.model.base_model(**inputs).last_hidden_state
            found = self._log_probs_from_hidden(hidden_BTD, labels, request)
        if request.values:
            value_N = target_values(self.model, inputs, labels, hidden_BTD)
            found = replace(found, value_N=value_N)
        return found

    def _settle(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the model's own forward; at the first batch, set `fits`."""
        # PEFT passes every argument of its own forward, given or not.
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        if self.fits is None:
            self.fits = self._try_out(inputs)
        return inputs

    # torch.compile leaves out what is differentiated by hand or depends on the number of targets.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _targets_from_hidden(
        self,
        hidden_BTD: Tensor,
        labels_BT: Tensor,
        weight: TokenWeight,
        wants_top: bool,
        lesson: Lesson | None,
    ) -> Targets:
        is_target_BT, labels_N = target_places(labels_BT)
        hidden_ND = hidden_BTD[:, :-1][is_target_BT]
        head = active_head(self.model)
        if lesson is not None:
            student = (hidden_ND, head, labels_N, weight, self.form, self._rows(hidden_ND))
            return taught_targets(*student, lesson, plain=is_plain(head), pool=self.pool)
        call = (hidden_ND, head, labels_N, weight, self.form, self._rows(hidden_ND), wants_top)
        return linear_targets(*call, self.pool) if is_plain(head) else module_targets(*call)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _log_probs_from_hidden(
        self, hidden_BTD: Tensor, labels_BT: Tensor, request: LogProbRequest
    ) -> TargetLogProbs:
        is_target_BT, labels_N = target_places(labels_BT)
        hidden_ND = hidden_BTD[:, :-1][is_target_BT]
        head, form = active_head(self.model), self.form.at_temperature(request.temperature)
        rows = self._rows(hidden_ND)
        if is_plain(head):
            return linear_log_probs(hidden_ND, head, labels_N, form, rows, self.pool)
        return module_log_probs(hidden_ND, head, labels_N, form, rows)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _kl_from_hidden(
        self, hidden_BTD: Tensor, labels_BT: Tensor, request: KlRequest
    ) -> dict[str, Tensor]:
        hidden_ND = hidden_BTD[:, :-1][target_places(labels_BT)[0]]
        head, rows = active_head(self.model), self._rows(hidden_ND)
        return answer_from_hidden(hidden_ND, head, self.base_head(), request, rows, is_plain(head))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _targets_from_logits(
        self,
        inputs: dict[str, Any],
        labels_BT: Tensor,
        weight: TokenWeight,
        wants_top: bool,
        lesson: Lesson | None,
    ) -> Targets:
        logits_NV, labels_N = self._target_logits(inputs, labels_BT)
        if lesson is not None:
            everything = slice(0, len(labels_N))
            return taught_logit_targets(logits_NV, labels_N, weight, lesson, everything)
        return logit_targets(logits_NV, labels_N, weight, wants_top)

    def _target_logits(self, inputs: dict[str, Any], labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own logits of the targets, shape [N, V], and their labels."""
        columns_K = predicting_columns(labels_BT)
        logits_BKV = self.original(**inputs, logits_to_keep=columns_K).logits
        is_target_BK, labels_N = target_places(labels_BT, columns_K)
        return at_least_float32(logits_BKV[is_target_BK]), labels_N

    def base_head(self) -> BaseHead:
        """The head of the base, for hidden states that it gave as its prediction."""
        return BaseHead.of(base_head(self.model), self.form)

    def _rows(self, hidden_ND: Tensor) -> int:
        vocabulary_size = self.model.config.get_text_config().vocab_size
        return self.rows or chunk_rows(vocabulary_size, hidden_ND.device.type)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _try_out(self, inputs: dict[str, Any]) -> bool:
        """Whether fused and full logits of a few tokens agree; warns if not."""
        base, head = self.model.base_model, self.model.get_output_embeddings()
        if base is self.model or head is None:
            return self._refuse()
        if isinstance(next(self.model.parameters()), FakeTensor):
            return True  # fake tensors have no values to compare
        few = {
            name: _first_tokens(value) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        try:
            # Mode and random state stay: dropout draws the same for both.
            with torch.no_grad(), _forked_random_state():
                theirs = self.original(**few).logits
            with torch.no_grad(), _forked_random_state():
                hidden = base(**few).last_hidden_state
                ours = self.form.apply(at_least_float32(active_head(self.model)(hidden)))
        except (AttributeError, TypeError, RuntimeError):
            # A base model of another kind. If the batch is at fault, the model's own forward
            # raises again.
            return self._refuse()
        return _are_equal(ours, theirs, hidden) or self._refuse()

    def _refuse(self) -> bool:
        warn(
            f"{type(self.model).__name__} computes its logits in an unusual way: "
            "the loss uses full logits, which takes more memory"
        )
        return False


def _first_tokens(input_: Tensor) -> Tensor:
    """Of the first row; `input_`: of shape [B, T], or a mask of shape [B, 1, T, T]."""
    few = input_[:1, ..., :PROBE_LENGTH]
    return few[..., :PROBE_LENGTH, :] if few.ndim == 4 else few


def _forked_random_state() -> AbstractContextManager[None]:
    """Restore the random state of every device afterwards."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _logit_form(config: Any) -> LogitForm:
    """Scale (Cohere multiplies, Granite divides) and cap (Gemma 2), as the config names them."""
    multiplied = getattr(config, "logit_scale", None) or 1.0
    divided = getattr(config, "logits_scaling", None) or 1.0
    return LogitForm(multiplied / divided, getattr(config, "final_logit_softcapping", None))


def _are_equal(ours: Tensor, theirs: Tensor, hidden: Tensor) -> bool:
    """Equal up to the rounding of the coarsest dtype involved."""
    if ours.shape != theirs.shape:
        return False
    precision = max(torch.finfo(tensor.dtype).eps for tensor in (theirs, hidden))
    difference = (ours.double() - theirs.double()).norm()
    return bool(difference <= 8 * precision * theirs.double().norm())
