"""The recipe's `rollout`, and its `loss` for `train.stage: rl`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import RecipePlace, Section

SHAPES_OF_SAMPLES = (
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
)
"""Keys of generation that would change which tokens can be drawn."""


class RolloutSection(Section):
    """The answers that `train.stage: rl` lets the model write, and learns from."""

    generations: int = Field(8, ge=1)
    """Answers to each prompt: a group. Each is compared with the others of its group, but under
    `ppo`, where a critic says what to expect and 1 is enough."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer in tokens. Longer ones are cut off: see truncated."""
    temperature: float = Field(1.0, gt=0)
    """Below 1 favours likely tokens, above 1 unlikely ones. Probabilities are computed at it."""
    updates_per_rollout: int = Field(1, ge=1)
    """Updates that learn from the same answers. Above 1 saves writing, and clipping begins to
    matter."""
    truncated: Literal["mask", "penalise", "keep"] = "mask"
    """What happens to answers that are cut off. `mask`: nothing is learned from their tokens; their
    rewards still count in their group. `penalise`: `penalty` is subtracted from their reward.
    `keep`: they are learned from as they are."""
    penalty: float = Field(1.0, gt=0)
    """See truncated."""
    resample: int = Field(0, ge=0)
    """Rounds per cycle in which groups without two different rewards are replaced by the answers to
    other prompts (DAPO's dynamic sampling). 0: such groups stay, and teach nothing."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What writes the answers. `vllm`: faster on an NVIDIA GPU, for a LoRA in one process; it loads
    a second copy of the base."""
    gpu_share: float = Field(0.3, gt=0, lt=1)
    """Share of the GPU's memory that engine vllm takes, with its copy of the base."""
    batch_size: int = Field(64, ge=1)
    """Answers per process that are written at once. It changes speed and memory, no answer."""

    @model_validator(mode="before")
    @classmethod
    def only_temperature_shapes_samples(cls, given: Any) -> Any:
        found = [key for key in SHAPES_OF_SAMPLES if isinstance(given, dict) and key in given]
        if found:
            raise ValueError(
                f"{' and '.join(found)} would leave tokens out that the model finds possible: then "
                "the probabilities that are learned from are not those that the answers were drawn "
                "with; remove that, only temperature may shape what is learned from"
            )
        return given


class PolicySettings(Section):
    """How a policy gradient is computed; a preset of `GrpoLoss` in full."""

    clip_low: float
    clip_high: float
    beta: float
    scale: Literal["group", "none"]
    normalize: Literal["sequence", "tokens", "length"]
    ratio: Literal["token", "sequence"]


GRPO = PolicySettings(
    clip_low=0.2, clip_high=0.2, beta=0.04, scale="group", normalize="sequence", ratio="token"
)
PRESETS = {
    "grpo": GRPO,
    "dr_grpo": GRPO.model_copy(update={"beta": 0.0, "scale": "none", "normalize": "length"}),
    "dapo": GRPO.model_copy(update={"clip_high": 0.28, "beta": 0.0, "normalize": "tokens"}),
    "gspo": GRPO.model_copy(
        update={"clip_low": 3e-4, "clip_high": 4e-4, "beta": 0.0, "ratio": "sequence"}
    ),
}
"""The settings of the papers."""


class GrpoLoss(Section):
    """Group Relative Policy Optimization and its variants; every key overrides the preset."""

    kind: Literal["grpo"]
    preset: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    """The paper whose settings are used. `grpo`: arXiv:2402.03300. `dr_grpo`: arXiv:2503.20783.
    `dapo`: arXiv:2503.14476. `gspo`: arXiv:2507.18071."""
    clip_low: float | None = Field(None, gt=0, lt=1)
    """How far below 1 a probability ratio counts. Default 0.2; gspo: 0.0003."""
    clip_high: float | None = Field(None, gt=0)
    """How far above 1 a probability ratio counts. Default 0.2; dapo: 0.28; gspo: 0.0004."""
    beta: float | None = Field(None, ge=0)
    """Weight of the KL to the reference, the model as the run began. 0 needs no reference. Default
    0.04 for grpo, 0 for the others."""
    scale: Literal["group", "none"] | None = None
    """`group`: an advantage is divided by the standard deviation of its group's rewards. Default;
    dr_grpo: none."""
    normalize: Literal["sequence", "tokens", "length"] | None = None
    """What the loss is a mean over. `sequence`: over answers, of their means over tokens. `tokens`:
    over all tokens of the update. `length`: over answers, of their sums divided by max_new_tokens.
    Default sequence; dapo: tokens; dr_grpo: length."""
    ratio: Literal["token", "sequence"] | None = None
    """Whether a probability ratio is of a token, or the geometric mean of its answer's. Default
    token; gspo: sequence."""

    @property
    def settings(self) -> PolicySettings:
        """The preset with what is set here."""
        names = PolicySettings.model_fields
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return PRESETS[self.preset].model_copy(update=given)


class RlooLoss(Section):
    """REINFORCE Leave-One-Out (Ahmadian et al., 2024, arXiv:2402.14740).

    An answer is compared with the mean of the others, and its probability counts as a whole.
    """

    kind: Literal["rloo"]
    clip_low: float = Field(0.2, gt=0, lt=1)
    """How far below 1 the probability ratio of an answer counts."""
    clip_high: float = Field(0.2, gt=0)
    """How far above 1 the probability ratio of an answer counts."""
    beta: float = Field(0.05, ge=0)
    """Weight of the log-probability ratio to the reference, the model as the run began, which is
    subtracted from the reward. 0 needs no reference."""


class PpoLoss(Section):
    """Proximal Policy Optimization (Schulman et al., 2017, arXiv:1707.06347), with a critic.

    The critic says at each token what reward to expect. With an adapter it is a second one on the
    same frozen base; otherwise one more layer on the model's own hidden states.
    """

    kind: Literal["ppo"]
    clip_low: float = Field(0.2, gt=0, lt=1)
    """How far below 1 the probability ratio of a token counts."""
    clip_high: float = Field(0.2, gt=0)
    """How far above 1 the probability ratio of a token counts."""
    beta: float = Field(0.05, ge=0)
    """Weight of the log-probability ratio to the reference, the model as the run began, which is
    subtracted from the reward at each token. 0 needs no reference."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of a reward per token that it lies ahead."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation. 1 trusts the rewards alone, 0 the critic one
    token ahead."""
    clip_value: float = Field(0.2, gt=0)
    """How far the critic's values move within a cycle, in units of reward."""
    value_coef: float = Field(0.1, gt=0)
    """Weight of the critic's loss beside the policy's."""
    critic_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the critic, on the schedule of `train`. Default that of `train`, which
    is often too low for a critic that starts at values of 0."""
    whiten: bool = True
    """Shift and scale the advantages of an update to mean 0 and variance 1."""
    critic: RecipePlace | None = None
    """What the critic starts from: a reward model, or the critic of another run, that is an adapter
    on the same base. The recipe of that run, trained first if missing, or the folder `model` or
    `critic` in its run folder. Default: values of 0."""
