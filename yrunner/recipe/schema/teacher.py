"""The recipe's `teacher`: a model whose predictions are learned beside the labels."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import BaseSource, Section


class TeacherSection(Section):
    """Distillation: learn a larger model's predictions too; see docs/guide/distill.md."""

    model: BaseSource
    """A folder, a Hub id, a GGUF file, or another recipe, whose result is used, and trained first
    if missing. It needs the tokenizer of `model.base`."""
    weight: float = Field(0.5, gt=0, le=1)
    """Part of the teacher in the loss, (1 - weight) x loss of the labels + weight x temperature^2 x
    divergence, each a mean over targets. 1: labels do not count."""
    temperature: float = Field(1.0, gt=0)
    """What the logits of both are divided by. Above 1, unlikely tokens count for more."""
    by: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """The divergence: KL(teacher || student), KL(student || teacher), or the generalised
    Jensen-Shannon divergence (arXiv:2306.13649)."""
    beta: float | None = Field(None, gt=0, lt=1)
    """Share of the teacher in the mixture of `jsd`. Default 0.5; near 0 it resembles forward_kl,
    near 1 reverse_kl."""
    top: Literal["all"] | Annotated[int, Field(ge=1)] = 64
    """Number of the teacher's most likely tokens to keep per target. They are computed once and
    kept on disk, so training loads no teacher. `all`: compute everything, with the teacher in
    memory beside the student."""
    on_policy: float = Field(0.0, ge=0, le=1)
    """Share of the rows of each update whose last answer the student writes; only the teacher
    judges these. Needs `top: all`."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Maximum length in tokens of an answer that the student writes. Default 128."""
    weigh_teacher: bool = False
    """Multiply the divergence of a target by the weight that `loss` gives it (NLIRG and others)."""
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Load the teacher with its linear layers in 4 or 8 bits, which needs bitsandbytes."""

    @model_validator(mode="after")
    def beta_belongs_to_jsd(self) -> Self:
        if self.beta is not None and self.by != "jsd":
            raise ValueError(f"beta belongs to by: jsd, not {self.by}; remove beta, or set by: jsd")
        return self

    @model_validator(mode="after")
    def what_the_student_writes_is_not_known_beforehand(self) -> Self:
        if self.on_policy and self.top != "all":
            raise ValueError(
                f"on_policy and top: {self.top} cannot be combined; set top: all: the teacher must "
                "be in memory to judge what the student writes"
            )
        if self.max_new_tokens is not None and not self.on_policy:
            raise ValueError(
                "max_new_tokens limits what the student writes; remove it, or set on_policy"
            )
        if self.on_policy == 1 and self.weight < 1:
            raise ValueError("on_policy: 1 leaves no row with labels; set weight: 1")
        return self
