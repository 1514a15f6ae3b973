"""Save a trained model, completely or not at all, in the format of transformers and peft."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from yrunner.errors import ModelError
from yrunner.losses.score_head import critic_apart, critic_weights
from yrunner.models.errors import silence_libraries
from yrunner.models.export.serving import serving_lines
from yrunner.models.load import find_stop_ids
from yrunner.storage.run_dir import whole_folder


@dataclass(frozen=True)
class ModelCard:
    """Contents of the model card."""

    name: str
    base: str | None
    """A Hub id or a folder; None for a model from scratch."""
    tuning: str
    """The kind of tuning: full, freeze, lora."""
    recipe: str
    """The recipe, as text."""
    figures: list[tuple[str, str]]
    """Label and value of each result, in order."""
    dataset_files: list[str]
    license: str | None = None
    """A licence id of the Hub, such as apache-2.0; None leaves it out."""
    base_key: str | None = None
    """A hash of the base, see assembly/model.py."""
    data_hashes: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the training files, by name."""
    is_reward: bool = False
    """Whether it scores answers instead of writing them."""
    rank: int | None = None
    """The rank of an adapter."""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, which are its defaults in the saved folder."""


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: ModelCard,
    *,
    weights: Mapping[str, Tensor] | None = None,
    beside: Path | None = None,
) -> None:
    """Write weights, tokenizer, chat template, generation config and model card to `folder`.

    `weights`: all weights by name, if the model itself does not hold them (ZeRO-3). `beside`: a
    folder to copy into it.

    Of a peft model only its own adapter is saved, otherwise all weights but those of a critic, as
    safetensors in their dtypes. `folder` appears, or is replaced, only when it is complete. The
    generation config gets the tokenizer's stop and pad ids; a reward model has none.

    Raises ModelError for an adapter whose base was never saved, or would be overwritten by it.
    """
    folder = folder.absolute()
    base = _adapter_base(model, folder) if isinstance(model, PeftModel) else None
    whole_model = model.get_base_model() if isinstance(model, PeftModel) else model
    with whole_folder(folder) as partial:
        if beside is not None:
            shutil.copytree(beside, partial / beside.name)
        with silence_libraries():
            if not card.is_reward:
                whole_model.generation_config = _generation_config(
                    whole_model.generation_config, tokenizer
                )
            if isinstance(model, PeftModel):
                _save_adapter(model, partial, base=str(base), weights=weights)
            else:
                own_weights: dict[str, Tensor] | None = None
                if weights is not None:
                    others = critic_weights(model)
                    own_weights = {name: it for name, it in weights.items() if name not in others}
                with critic_apart(model):
                    model.save_pretrained(partial, state_dict=own_weights)
        # peft leaves it out.
        generation_config = None if card.is_reward else whole_model.generation_config
        _save_beside(partial, generation_config, tokenizer, card, isinstance(model, PeftModel))


def complete_folder(
    folder: Path,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
) -> None:
    """Add to a folder of full weights everything else that `save_model` writes."""
    _save_beside(folder, _generation_config(generation_config, tokenizer), tokenizer, card, False)


def loading_lines(folder: str, *, is_adapter: bool, is_reward: bool = False) -> str:
    """Three lines of Python that load a folder of `save_model`."""
    path = json.dumps(folder, ensure_ascii=False)
    if is_adapter:
        return (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n"
            f"model, tokenizer = AutoPeftModelForCausalLM.from_pretrained({path}), "
            f"AutoTokenizer.from_pretrained({path})\n"
        )
    kind = "AutoModelForSequenceClassification" if is_reward else "AutoModelForCausalLM"
    return (
        f"from transformers import {kind}, AutoTokenizer\n"
        f"model = {kind}.from_pretrained({path})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({path})\n"
    )


def render_card(card: ModelCard, *, is_adapter: bool) -> str:
    """The model card: front matter for the Hub, then Markdown."""
    base_on_hub = card.base is not None and _is_hub_id(card.base)
    front: dict[str, object] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-classification" if card.is_reward else "text-generation",
        "tags": ["yrunner", card.tuning],
    }
    if base_on_hub:
        # The Hub rejects local folders.
        front["base_model"] = card.base
        front["base_model_relation"] = "adapter" if is_adapter else "finetune"
    if card.license is not None:
        front["license"] = card.license
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    base = card.base or "none, trained from scratch"
    key = f" (hash `{card.base_key}`)" if card.base_key else ""
    lines = loading_lines(".", is_adapter=is_adapter, is_reward=card.is_reward)
    sections = [
        f"---\n{header}---\n\n# {card.name}\n",
        f"Trained with yrunner. Base: `{base}`{key}. Tuning: {card.tuning}.\n",
        "## Load it\n\nFrom this folder; elsewhere, replace the dot with its path.\n\n"
        f"```python\n{lines}```\n\n{_use_of(card, is_adapter=is_adapter)}\n",
    ]
    if not card.is_reward:
        sections.append(
            "## Serve it\n\n```sh\n"
            + serving_lines(card.name, adapter_on=card.base if is_adapter else None, rank=card.rank)
            + "```\n"
        )
    if card.template_args:
        listed = json.dumps(dict(card.template_args), ensure_ascii=False)
        sections.append(
            f"Its chat template has the defaults `{listed}`, as in training; a caller may pass "
            "others.\n"
        )
    if card.figures:
        rows = "".join(f"| {_cell(label)} | {_cell(value)} |\n" for label, value in card.figures)
        sections.append(f"## Results\n\n| measure | value |\n|---|---|\n{rows}")
    if card.dataset_files:
        listed = "".join(f"- `{file}`\n" for file in card.dataset_files)
        hashes = "".join(f"- `{file}` {sha}\n" for file, sha in card.data_hashes.items())
        listed += f"\nSHA-256 of the files:\n\n{hashes}" if hashes else ""
        sections.append(f"## Data\n\n{listed}")
    sections.append(f"## Recipe\n\n{_fenced(card.recipe, 'yaml')}")
    return "\n".join(sections)


def _use_of(card: ModelCard, *, is_adapter: bool) -> str:
    """What to know before the loaded model is used."""
    if card.is_reward:
        return (
            "Its only logit is the score of a conversation that ends with the answer: the higher, "
            "the better. Scores of answers to one prompt can be compared."
        )
    ends = "`generation_config.json` holds the ids that end an answer"
    if not is_adapter:
        return f"{ends}."
    return (
        f"{ends}; pass it as `generation_config=GenerationConfig.from_pretrained(...)`, because "
        "peft uses the base's."
    )


def _save_beside(
    folder: Path,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    is_adapter: bool,
) -> None:
    with silence_libraries():
        if generation_config is not None:
            generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(render_card(card, is_adapter=is_adapter), "utf-8")
    _open_to_readers(folder)


def _adapter_base(model: PeftModel, folder: Path) -> str:
    """The location of the adapter's base, an absolute path or a Hub id."""
    base = model.get_base_model().name_or_path
    if not base:
        raise ModelError(
            "an adapter on a model from scratch cannot be loaded again: its base was never saved",
            remedy="use tuning.kind: full for a model from scratch",
        )
    path = Path(base)
    if not path.exists():
        return str(base)
    if path.resolve() == folder.resolve():
        raise ModelError(
            f"{folder} is the base of this adapter and would be overwritten by it",
            remedy="choose another output folder",
        )
    return str(path.resolve())


def _save_adapter(
    model: PeftModel, folder: Path, *, base: str, weights: Mapping[str, Tensor] | None
) -> None:
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    # Never the embeddings: they are frozen, and peft would query the Hub about them.
    options: dict[str, Any] = {} if weights is None else {"state_dict": dict(weights)}
    options["selected_adapters"] = [model.active_adapter]
    model.save_pretrained(str(folder), save_embedding_layers=False, **options)


def _generation_config(
    own: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """The model's settings with all stop ids and the pad id."""
    config = GenerationConfig.from_dict((own or GenerationConfig()).to_dict())
    own_ids = config.eos_token_id if config.eos_token_id is not None else []
    own_ids = own_ids if isinstance(own_ids, list) else [own_ids]
    stop_ids = list(dict.fromkeys([*find_stop_ids(tokenizer), *own_ids]))
    config.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else stop_ids or None
    config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        # Some published models have contradictory sampling settings, which transformers reads but
        # refuses to save. Losing a trained model would be worse.
        return GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    return config


def _open_to_readers(folder: Path) -> None:
    """Give every file the card's permissions: safetensors files are readable by the owner only."""
    mode = (folder / "README.md").stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _is_hub_id(base: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) is not None and not Path(base).exists()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fenced(text: str, language: str) -> str:
    """A code block with a fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"
