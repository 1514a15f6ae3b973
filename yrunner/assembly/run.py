"""A run: a recipe with its options and its folder, and everything made from them, each part once.

Every command works on a `Run`. Slow parts (files, tokenizer, tokenized rows, the key of the base)
are made on first use and cached.
"""

import copy
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from yrunner.assembly.dataset import (
    BYTES_WORTH_A_BAR,
    conversations_of,
    find_sources,
    keep_sources,
    print_left_out,
    print_rows,
    rules_of,
    texts_of,
)
from yrunner.assembly.identity import changes_since, sort_changes
from yrunner.console import counted, progress
from yrunner.data.batching.plan import Plan, make_plan
from yrunner.data.batching.rollouts import make_rollout_plan
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.examples import Pairs, RatedExamples, StoredRows
from yrunner.data.dataset.prepare import Rules, Source, check_conversations, prepare
from yrunner.data.dataset.prompts import Prompts
from yrunner.data.dataset.splits import Prepared
from yrunner.data.readers.text import State, check_unchanged, states_of
from yrunner.distributed.collectives import num_ranks
from yrunner.distributed.topology import topology_of
from yrunner.errors import MissingError, ModelError, RunError
from yrunner.evaluation.memorised_faults import KnownFault, read_faults
from yrunner.evaluation.questions import Question, question_of
from yrunner.evaluation.tasks import read_task
from yrunner.models.hub import modelscope_folder
from yrunner.models.load import (
    DTYPES,
    NARROWEST,
    WORTH_IT,
    choose_dtype,
    load_model,
    load_tokenizer,
    time_in_bfloat16,
)
from yrunner.models.local import find_gguf
from yrunner.models.merge.extend import extended_folder
from yrunner.models.meta import read_config
from yrunner.models.model_key import model_key
from yrunner.models.quantization import StoredQuantization
from yrunner.models.scratch import make_config, train_tokenizer
from yrunner.models.templates.choose import choose_template
from yrunner.models.tuning import check_quantized_base
from yrunner.recipe.load import (
    base_recipe_path,
    judge_recipe_paths,
    load_recipe,
    sorted_recipe_paths,
    teacher_recipe_path,
)
from yrunner.recipe.schema.eval import AnswerTask, Task
from yrunner.recipe.schema.keep import HeldToRows
from yrunner.recipe.schema.model import AdapterTuning, QloraTuning
from yrunner.recipe.schema.recipe import Recipe
from yrunner.recipe.schema.section import MODELSCOPE
from yrunner.rewards.completion import Reward
from yrunner.rewards.make import make_rewards
from yrunner.rewards.reward_model import check_makes_reward_model
from yrunner.scoring.half_products import DESCRIPTION, halve_products
from yrunner.scoring.reward_model import AdapterScores
from yrunner.storage.run_dir import RunDir, SortDir, read_json

FIRST_ROWS = 10
"""Questions of a recipe without tasks."""
BASE_PARTS = ("base", "stale_base", "base_key", "tokenizer", "config")
"""Parts that change when the base is trained."""
TEACHER_PARTS = ("teacher", "stale_teacher")
"""The same of the teacher."""
ROW_PARTS = ("sources", "file_states", "dataset", "tasks", "tokenizer")
"""Parts that change when the rows are sorted: a new model's tokenizer is trained on them."""
SHARED_PARTS = ("sources", "tasks", "known_faults", *BASE_PARTS)
"""Parts that do not depend on how a recipe trains."""


@dataclass(frozen=True)
class RunOptions:
    """The options of the command."""

    arguments: str = ""
    """Recipe and overrides as typed, for printed commands."""
    resume: bool = False
    overwrite: bool = False
    is_base: bool = False
    """Trained only because it is the base of another recipe."""
    trust_code: bool = False
    """Whether Python functions among the rewards may run."""
    from_step: int | None = None
    """The update of the checkpoint to resume from."""

    @property
    def flags(self) -> list[str]:
        """The options of `yrun train`."""
        flags = {
            "--resume": self.resume,
            "--overwrite": self.overwrite,
            "--is-base": self.is_base,
            "--trust-code": self.trust_code,
        }
        return [flag for flag, is_set in flags.items() if is_set]

    @property
    def how_to_resume(self) -> str:
        """What to run after an interruption."""
        if self.is_base:
            return "run the same command again to continue"
        trust = " --trust-code" if self.trust_code else ""
        return f"continue with: yrun train {self.arguments} --resume{trust}"


@dataclass(frozen=True)
class Precision:
    """The dtype of a training, and why it was chosen."""

    dtype: torch.dtype
    why: str

    @property
    def name(self) -> str:
        """As in a recipe."""
        return str(self.dtype).removeprefix("torch.")


class Run:
    """See the docstring of the module."""

    def __init__(self, recipe: Recipe, options: RunOptions | None = None) -> None:
        self.recipe = recipe
        self.options = options or RunOptions()
        self.folder = RunDir(recipe.run_folder)

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = (), **options: bool) -> "Run":
        """The run of a recipe file; `options` are those of `RunOptions`.

        Raises `RecipeError` for an invalid recipe, and `ModelError` for a quantized base that it
        cannot use.
        """
        arguments = shlex.join([str(path), *overrides])
        run = cls(load_recipe(path, list(overrides)), RunOptions(arguments, **options))
        _ = run.stored_quantization
        return run

    def variant(self, recipe: Recipe) -> "Run":
        """The run of a recipe that differs only in how it trains."""
        other = Run(recipe, self.options)
        other.__dict__ |= {
            part: self.__dict__[part] for part in SHARED_PARTS if part in self.__dict__
        }
        return other

    # The base

    @cached_property
    def base(self) -> "Run | None":
        """The run whose result this one starts from; None for a folder, Hub id or new model."""
        path = base_recipe_path(self.recipe)
        return None if path is None else Run.load(path, is_base=True)

    @property
    def base_source(self) -> str:
        """Folder or Hub id of the base."""
        if self.base is not None:
            return str(self.base.folder.model)
        assert self.recipe.model.base is not None, "a model from scratch has no base"
        return self._base_model

    @cached_property
    def _base_model(self) -> str:
        model = self.recipe.model
        source = self.in_hugging_face_format(str(model.base))
        if model.rope is None and not model.new_tokens:
            return source
        return str(extended_folder(source, self.folder.bases, model.rope, model.new_tokens))

    def in_hugging_face_format(self, source: str) -> str:
        """The folder of a model of ModelScope or of a GGUF file, unpacked; others unchanged.

        Raises `ModelError` if it cannot be downloaded or read, `MissingError` without its package.
        """
        if source.startswith(MODELSCOPE):
            return modelscope_folder(source)
        file = find_gguf(source)
        if file is None:
            return source
        if find_spec("gguf") is None:
            raise MissingError(
                f"{file.name} needs the package gguf", remedy="run pip install 'yrunner[gguf]'"
            )
        from yrunner.models.gguf.read import unpacked_folder

        return str(unpacked_folder(file, self.folder.bases, choose_dtype(self.recipe.model.dtype)))

    @cached_property
    def stale_base(self) -> str | None:
        """Why the base must be trained first; None if it is up to date."""
        return None if self.base is None else self.base.reason_to_train("base")

    def reason_to_train(self, role: str) -> str | None:
        """Why this run, the base or teacher of another, must be trained; None if up to date."""
        name = f"the {role} {self.recipe.name}"
        if not self.folder.is_used():
            return f"{name} has not been trained yet: training it first"
        if not self.folder.fingerprint.exists():
            return f"{name} was not finished: training it first"
        changes = changes_since(self.folder, self.recipe)
        if changes:
            return f"{name} has changed ({', '.join(changes)}): training it again"
        for sorting in self.sorts:
            if sorting.stale_sort() is not None:
                return f"{name} learns from other rows ({sorting.recipe.name}): training it again"
        if not self.folder.is_finished():
            return f"{name} was not finished: resuming it"
        return None

    @property
    def untrained_base(self) -> "Run | None":
        """The base if it must be trained first."""
        return None if self.stale_base is None else self.base

    # The teacher

    @cached_property
    def teacher(self) -> "Run | None":
        """The run whose result teaches this one; None for a folder, Hub id or no teacher."""
        path = teacher_recipe_path(self.recipe)
        return None if path is None else Run.load(path, is_base=True)

    @cached_property
    def stale_teacher(self) -> str | None:
        """Why the teacher must be trained first; None if it is up to date."""
        return None if self.teacher is None else self.teacher.reason_to_train("teacher")

    @property
    def untrained_teacher(self) -> "Run | None":
        """The teacher if it must be trained first."""
        return None if self.stale_teacher is None else self.teacher

    @cached_property
    def teacher_source(self) -> str:
        """Folder or Hub id of the teacher."""
        if self.teacher is not None:
            return str(self.teacher.folder.model)
        assert self.recipe.teacher is not None
        return self.in_hugging_face_format(self.recipe.teacher.model)

    @property
    def trusts_teacher(self) -> bool:
        """Code of a teacher runs only where its own recipe trusts it."""
        return self.teacher is not None and self.teacher.recipe.model.trust_remote_code

    @property
    def teacher_config(self) -> Any:
        """The config of the teacher, also before it is trained."""
        if self.untrained_teacher is not None:
            return self.untrained_teacher.config
        return read_config(self.teacher_source, trust_remote_code=self.trusts_teacher)

    @property
    def teacher_tokenizer(self) -> Any:
        """The tokenizer of the teacher, also before it is trained."""
        if self.untrained_teacher is not None:
            return self.untrained_teacher.tokenizer
        return load_tokenizer(self.teacher_source, trust_remote_code=self.trusts_teacher)

    @cached_property
    def judges(self) -> "list[Run]":
        """The runs whose results judge the answers of this one, or start its critic.

        Raises `RunError` for a recipe that makes neither.
        """
        found = [Run.load(path, is_base=True) for path in judge_recipe_paths(self.recipe)]
        critic = getattr(self.recipe.loss, "critic", None)
        for path, judge in zip(judge_recipe_paths(self.recipe), found, strict=True):
            if path != critic or judge.recipe.loss.kind != "ppo":
                check_makes_reward_model(judge.recipe, path)
            if path == critic and not isinstance(judge.recipe.tuning, AdapterTuning):
                raise RunError(
                    f"loss.critic: {path} has tuning.kind {judge.recipe.tuning.kind}, whose result "
                    "is no adapter on a base",
                    remedy="name a recipe with tuning.kind lora or qlora",
                )
        return found

    @property
    def untrained_judges(self) -> "list[tuple[Run, str]]":
        """Those that must be trained first, and why."""
        reasons = [(judge, judge.reason_to_train("reward model")) for judge in self.judges]
        return [(judge, reason) for judge, reason in reasons if reason is not None]

    @cached_property
    def sorts(self) -> "list[Run]":
        """The runs whose sorted rows this one learns from."""
        return [Run.load(path) for path in sorted_recipe_paths(self.recipe)]

    def stale_sort(self) -> str | None:
        """Why the rows of this run must be sorted first; None if they are and nothing changed."""
        name = f"the rows of {self.recipe.name}"
        done = SortDir.finished(self.folder.sort)
        if done is None:
            return f"{name} have not been sorted yet: sorting them first"
        if not done.fingerprint.exists():
            return f"{name} were sorted by an earlier version: sorting them again"
        changes = sort_changes(done, self.recipe)
        if changes or any(below.stale_sort() for below in self.sorts):
            what = ", ".join(changes or [below.recipe.name for below in self.sorts])
            return f"{name} or how to sort them has changed ({what}): sorting them again"
        return None

    @cached_property
    def stored_quantization(self) -> StoredQuantization | None:
        """How the files of the base are quantized; None for plain weights and for a recipe's.

        Raises `ModelError` if the recipe cannot use such a base.
        """
        recipe = self.recipe
        if recipe.model.base is None or base_recipe_path(recipe) is not None:
            return None
        from_modelscope = recipe.model.base.startswith(MODELSCOPE)
        source = self.base_source if from_modelscope else recipe.model.base
        stored = check_quantized_base(source, recipe.tuning)
        if stored is None:
            return None
        if recipe.merge.as_trained is not None:
            raise ModelError(
                f"merge.as_trained: the base {recipe.model.base} is stored quantized ({stored}), "
                "and an adapter on it is always merged as it was trained",
                remedy="remove merge.as_trained",
            )
        conflict = recipe.distributed.conflict(
            tuning="qlora",
            optimizer=recipe.train.optimizer,
            torch_compile=recipe.train.torch_compile,
            keep=recipe.keep.kind,
        )
        if conflict is not None:
            raise ModelError(
                f"the base {recipe.model.base} is stored quantized ({stored}): {conflict}"
            )
        return stored

    def can_resume(self) -> bool:
        """Whether the folder holds checkpoints of this run with the same settings."""
        has_checkpoint = self.folder.fingerprint.exists() and self.folder.saved_steps()
        return bool(has_checkpoint) and not changes_since(self.folder, self.recipe)

    def forget_base(self) -> None:
        """Drop what is cached of base and teacher, one of which has been trained."""
        for part in (*BASE_PARTS, *TEACHER_PARTS):
            self.__dict__.pop(part, None)

    def forget_rows(self) -> None:
        """Drop what is cached of the rows, which have been sorted."""
        for part in ROW_PARTS:
            self.__dict__.pop(part, None)

    @cached_property
    def base_key(self) -> str:
        """The `model_key` of the base."""
        return model_key(self.base_source)

    @property
    def origin(self) -> dict[str, Any]:
        """The base and how it is held in memory: an adapter elsewhere would score differently."""
        tuning, held = self.recipe.tuning, str(self.dtype).removeprefix("torch.")
        if self.stored_quantization is not None:
            held += f", {self.stored_quantization}"
        elif isinstance(tuning, QloraTuning):
            held += f", {tuning.quant_type}" + ", double_quant" * tuning.double_quant
        return {"base": self.base_key, "held": held}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that the run trains with.

        A new model's tokenizer is trained on its texts. That takes seconds and is deterministic, so
        a recipe can be checked before its base is trained.
        """
        model = self.recipe.model
        if model.scratch is not None:
            tokenizer = train_tokenizer(self._texts(), model.scratch.vocab_size)
            choose_template(tokenizer, None, model.template_args)
            return tokenizer
        if self.base is not None and self.stale_base is not None:
            tokenizer = copy.deepcopy(self.base.tokenizer)
            choose_template(tokenizer, model.chat_template, model.template_args)
            return tokenizer
        return self.load_tokenizer(self.base_source)

    @cached_property
    def config(self) -> Any:
        """The config of the model, also before its base is trained."""
        model = self.recipe.model
        if model.scratch is not None:
            return make_config(model.scratch.config, self.tokenizer)
        if self.base is not None and self.stale_base is not None:
            return self.base.config
        return read_config(self.base_source, trust_remote_code=model.trust_remote_code)

    @property
    def dtype(self) -> torch.dtype:
        """The training precision. Raises `MissingError` if this machine does not support it."""
        return self.precision.dtype

    @cached_property
    def precision(self) -> "Precision":
        """The training precision, and why it is that; see `dtype`."""
        self.check_precision()
        name = self.recipe.model.dtype
        dtype = choose_dtype(name)
        if name != "auto":
            return Precision(dtype, "model.dtype")
        if self.options.resume and self.folder.environment.is_file():
            # From before there was a choice on a CPU: what `choose_dtype` says.
            begun = read_json(self.folder.environment).get("dtype")
            return Precision(dtype if begun is None else DTYPES[begun], "as the run began")
        if torch.cuda.is_available():
            return Precision(dtype, "what this GPU computes natively")
        share = self._time_in_bfloat16()
        if share is None or share > WORTH_IT:
            return Precision(dtype, "the default on a CPU")
        why = f"products with frozen weights take {share:.2f} of float32's time on this CPU"
        return Precision(torch.bfloat16, why)

    def check_precision(self) -> None:
        """Raise `MissingError` if this machine does not support `model.dtype`."""
        if self.recipe.model.dtype == "float16" and not torch.cuda.is_available():
            raise MissingError(
                "model.dtype float16 needs a GPU", remedy="use float32 or bfloat16 on a CPU"
            )

    def _time_in_bfloat16(self) -> float | None:
        """Beside float32; None where `model.dtype: auto` does not consider it on a CPU.

        It does where a training was measured to lose nothing: with plain LoRA on tokens, as
        `models/layers/joined_lora.py` computes it.
        """
        recipe, tuning = self.recipe, self.recipe.tuning
        is_measured = (
            tuning.kind == "lora"
            and tuning.variant != "dora"
            and recipe.train.stage in ("pretrain", "cpt", "sft")
            and recipe.teacher is None
            and recipe.model.scratch is None
            and not recipe.train.torch_compile
            and self.stored_quantization is None
        )
        # Ranks must agree, and each of them would look for itself.
        if not is_measured or recipe.distributed.processes != 1 or recipe.distributed.deepspeed:
            return None
        return self._time_of_products()

    def _time_of_products(self) -> float | None:
        """In bfloat16, beside float32; None where the model is narrow or the CPU cannot."""
        config = self.config.get_text_config()
        width, inner = (getattr(config, key, None) for key in ("hidden_size", "intermediate_size"))
        if not isinstance(width, int) or not isinstance(inner, int) or width < NARROWEST:
            return None
        return time_in_bfloat16(width, inner)

    @cached_property
    def halves_products(self) -> bool:
        """Whether models that only look at data or write compute products in bfloat16.

        `model.dtype: auto` does where that is faster; see `scoring/half_products.py`.
        """
        recipe = self.recipe
        is_possible = (
            recipe.model.dtype == "auto"
            and recipe.model.base is not None
            and not torch.cuda.is_available()
            and self.stored_quantization is None
            # Which scores rows with the adapter on top, on whole layers.
            and getattr(recipe.tuning, "adapter", None) is None
            # Processes must agree, and each of them would look for itself.
            and num_ranks() == 1
            and recipe.sort.processes in (1, "auto")
        )
        share = self._time_of_products() if is_possible else None
        return share is not None and share <= WORTH_IT

    @property
    def looks_in(self) -> str:
        """The precision of models that only look at data or write, as the key of what they say."""
        return DESCRIPTION if self.halves_products else str(choose_dtype(self.recipe.model.dtype))

    @property
    def max_tokens(self) -> int:
        """Tokens to compute at once: the most that a micro-batch can have."""
        return self.recipe.train.batch_size * self.recipe.data.max_length

    # The rows

    @cached_property
    def sources(self) -> list[Source]:
        """Training and validation files. Raises `DataError` if there are none."""
        return find_sources(self.recipe.data)

    @cached_property
    def keep_sources(self) -> list[Source]:
        """The file of `keep`, if the recipe names one."""
        return keep_sources(self.recipe)

    @property
    def files(self) -> Iterator[Path]:
        """Every data file."""
        return (file for source in self.sources for file in source.files)

    @property
    def rules(self) -> Rules:
        """The recipe's rules for rows."""
        return rules_of(self.recipe)

    @property
    def keep_rules(self) -> Rules:
        """The rules for rows of `keep`, which are conversations or texts in every stage."""
        return replace(self.rules, rows="examples", needs=(), answer_length=0)

    @cached_property
    def dataset(self) -> Prepared[Any]:
        """All rows, tokenized now or cached; faults are counted, not refused.

        Of `Examples`, or of what `pairs` returns.
        """
        _ = self.file_states
        size = sum(file.stat().st_size for file in self.files)
        bar: AbstractContextManager[Any] = (
            progress("reading data, bytes", size) if size > BYTES_WORTH_A_BAR else nullcontext()
        )
        with bar as advance:
            return self.prepare(self.sources, self.rules, advance)

    @property
    def pairs(self) -> Prepared[Pairs] | Prepared[RatedExamples]:
        """All rows of a recipe that learns from better and worse answers; rated ones for KTO."""
        assert self.recipe.learns_from_pairs, "other stages learn from examples"
        return self.dataset

    @property
    def prompts(self) -> Prepared[Prompts]:
        """All rows of a recipe that learns from rewards."""
        assert self.recipe.train.stage == "rl", "other stages learn from examples"
        return self.dataset

    def prepare(
        self, sources: Sequence[Source], rules: Rules, advance: Any = None
    ) -> Prepared[Any]:
        """Tokenize files, or find them in the cache that runs in one folder share."""
        cache = Cache(self.folder.prepared)
        return prepare(
            sources, self.tokenizer, rules, cache, seed=self.recipe.seed, advance=advance
        )

    def refuse_faulty_rows(self) -> None:
        """Refuse faulty rows as the recipe says, and split off the validation rows."""
        data = self.recipe.data
        self.dataset.check(too_long=data.too_long, invalid=data.invalid, altered=data.altered)
        self.split_off_validation()

    def split_off_validation(self) -> None:
        """Set the rows of `data.validation_share` aside, if the recipe has it."""
        share = self.recipe.data.validation_share
        if share is not None:
            self.dataset.set_validation_aside(share, self.recipe.seed)

    def accept_rows(self) -> None:
        """Print row counts, and refuse faulty rows as the recipe says."""
        print_rows(self.dataset, self.folder.prepared)
        self.refuse_faulty_rows()
        print_left_out(self.dataset)

    @cached_property
    def file_states(self) -> dict[Path, State]:
        """Size and time of every data file before it was read."""
        return states_of(self.files)

    def refuse_changed_files(self) -> None:
        """Raise `DataError` if a data file has changed since it was read."""
        check_unchanged(self.file_states)

    def refuse_unreadable_rows(self) -> None:
        """Refuse rows whose faults show without a tokenizer."""
        check_conversations(self.sources, self.rules)
        check_conversations(self.keep_sources, self.keep_rules)

    def _texts(self) -> Iterator[str]:
        sources = (source for source in self.sources if source.purpose == "train")
        return texts_of(sources, self.rules)

    def plan(self, *, num_ranks: int | None = None) -> Plan:
        """Which rows the run trains on at which update.

        `num_ranks`: the world size at its start; None: that of the recipe.
        """
        if num_ranks is None:
            num_ranks = topology_of(self.recipe.distributed, torch.cuda.device_count()).num_ranks
        return self.plan_for(self.dataset.train, num_ranks=num_ranks)

    def plan_for(self, rows: StoredRows[Any], *, num_ranks: int) -> Plan:
        """The plan of a run on these examples, pairs or prompts.

        Raises `RunError` if an update cannot hold whole groups of answers to a prompt.
        """
        recipe = self.recipe
        accumulation = recipe.train.gradient_accumulation_steps * num_ranks
        if recipe.train.stage == "rl":
            return self._rollout_plan(rows, accumulation)
        return make_plan(
            rows.num_targets,
            lengths=rows.lengths,
            pack_to=self.row_length if recipe.data.packing else None,
            token_batch=recipe.train.token_batch,
            batch_size=recipe.train.batch_size,
            accumulation=accumulation,
            epochs=recipe.train.num_epochs,
            max_updates=recipe.train.max_steps,
            order=recipe.train.order,
            seed=recipe.seed,
            kept_share=_kept_share(recipe),
        )

    def _rollout_plan(self, prompts: StoredRows[Any], accumulation: int) -> Plan:
        train, rollout = self.recipe.train, self.recipe.rollout
        answers = train.batch_size * accumulation
        kept_share = _kept_share(self.recipe)
        if kept_share and answers <= rollout.generations:
            raise RunError(
                f"an update has {counted(answers, 'row')}, and a group of rollout.generations "
                f"{rollout.generations:,} answers leaves none of them to "
                f"keep.kind {self.recipe.keep.kind}",
                remedy="raise train.gradient_accumulation_steps or train.batch_size",
            )
        if answers % rollout.generations and not kept_share:
            whole = math.lcm(train.batch_size, rollout.generations) // train.batch_size
            raise RunError(
                f"an update has {counted(answers, 'answer')} "
                f"({counted(accumulation, 'micro-batch', 'micro-batches')} of "
                f"train.batch_size {train.batch_size:,}), which is no multiple of "
                f"rollout.generations {rollout.generations:,}: groups are compared as a whole",
                remedy="set train.gradient_accumulation_steps (times the number of processes) to "
                f"{-(-accumulation // whole) * whole:,}, for example",
            )
        return make_rollout_plan(
            prompts.lengths,
            generations=rollout.generations,
            max_new_tokens=rollout.max_new_tokens,
            passes=rollout.updates_per_rollout,
            kept_share=kept_share,
            micro_batch_size=train.batch_size,
            num_micro_batches=accumulation,
            epochs=train.num_epochs,
            max_updates=train.max_steps,
            order=train.order,
            seed=self.recipe.seed,
        )

    @property
    def row_length(self) -> int:
        """Tokens of a packed row: both answers of a pair always fit into one."""
        return self.recipe.data.max_length * self.dataset.train.EXAMPLES_EACH

    # The evaluation

    @cached_property
    def tasks(self) -> list[tuple[Task, list[Question]]]:
        """The tasks with their questions. Raises `DataError` for a faulty file.

        A recipe without tasks gets one from its first rows, so that the report has answers.
        """
        if self.recipe.eval.tasks:
            apart = self.recipe.eval.thinking == "apart"
            return [
                (task, read_task(task, thinking_apart=apart)) for task in self.recipe.eval.tasks
            ]
        questions, name, file = self._own_questions()
        if self.recipe.eval.thinking == "apart":
            questions = [question.behind_thinking() for question in questions]
        task = AnswerTask(kind="answer", name=name, side="domain", data=file)
        return [(task, questions)] if questions else []

    @property
    def eval_tasks(self) -> list[tuple[Task, list[Question]]]:
        """What `yrun eval` measures: none of its own if the recipe only lists faults."""
        has_own = self.recipe.eval.tasks or self.recipe.eval.faults is None
        return self.tasks if has_own else []

    def _own_questions(self) -> tuple[list[Question], str, Path]:
        """A few questions of the run's own rows, what they are, and their file.

        Of rows that are not learned, if there are any.
        """
        data = self.recipe.data
        purpose = "validation" if data.validation else "train"
        source = next(source for source in self.sources if source.purpose == purpose)
        file = source.files[0]
        rows = conversations_of([replace(source, files=(file,))], self.rules)
        name = f"first rows of {file.name}"
        if purpose == "train" and data.validation_share and self.recipe.train.stage == "sft":
            examples = self.dataset.rows_aside(data.validation_share, self.recipe.seed).examples
            aside = {examples.origin(number) for number in range(len(examples))}
            rows = (row for row in conversations_of([source], self.rules) if row.origin in aside)
            name = "rows set aside"
        found = [question_of(row) for row in islice(rows, FIRST_ROWS) if not row.is_text]
        return [question for question in found if question.reference], name, file

    @cached_property
    def known_faults(self) -> list[KnownFault]:
        """The faulty rows that the recipe lists. Raises `DataError` for an invalid list."""
        listed = self.recipe.eval.faults
        apart = self.recipe.eval.thinking == "apart"
        if listed is None:
            return []
        return read_faults(listed.data, listed.list, thinking_apart=apart)

    def check_questions(self) -> None:
        """Read tasks and listed faults, so that a faulty file is found before a model is loaded."""
        _ = self.tasks, self.known_faults

    def load_rewards(self, beside: Mapping[Path, AdapterScores] | None = None) -> list[Reward]:
        """What judges answers; the models and functions of the rewards are loaded.

        `beside`: reward models that are adapters on a model in memory, by the recipe's name.
        """
        trust = self.options.trust_code
        return make_rewards(self.recipe.rewards, trust_code=trust, beside=beside)

    # The result

    def require_result(self) -> None:
        """Raise `RunError` if there is no trained model yet, or one that writes nothing."""
        if self.recipe.train.stage == "reward":
            raise RunError(
                f"{self.recipe.name} is a reward model, which scores answers and writes none",
                remedy=f"load {self.folder.model} with AutoModelForSequenceClassification",
            )
        if not self.folder.is_finished():
            raise RunError(
                f"{self.recipe.name} has no result in {self.folder.folder}",
                remedy=f"train it first: yrun train {self.options.arguments}",
            )

    @cached_property
    def result_tokenizer(self) -> Any:
        """The tokenizer that was saved with the trained model, chat template included."""
        return load_tokenizer(str(self.folder.model))

    def load_base(self) -> Any:
        """The model before training."""
        return self.load_model(self.base_source)

    def load_result(self) -> Any:
        """The trained model; an adapter is merged in memory."""
        if self.recipe.model.base is not None:
            _ = self.base_source  # an adapter names its unpacked base, which may have been removed
        return self.load_model(str(self.folder.model))

    def load_model(self, source: str | Path) -> Any:
        """The model in a folder or on the Hub, loaded as the recipe says, to look or to write."""
        model = self.recipe.model
        loaded = load_model(
            str(source),
            dtype=choose_dtype(model.dtype),
            attention=model.attention,
            trust_remote_code=model.trust_remote_code,
        )
        if self.halves_products:
            halve_products(loaded)
        return loaded.to("cuda" if torch.cuda.is_available() else "cpu")

    def load_tokenizer(self, source: str) -> Any:
        """The tokenizer in a folder or on the Hub, with the recipe's chat template.

        The template of a model other than the base need not read the recipe's arguments.
        """
        model = self.recipe.model
        return load_tokenizer(
            source,
            chat_template=model.chat_template,
            template_args=model.template_args,
            strict=source == self.base_source,
            trust_remote_code=model.trust_remote_code,
        )


def _kept_share(recipe: Recipe) -> float:
    """The share of the rows of an update that are replay rows."""
    return recipe.keep.share if isinstance(recipe.keep, HeldToRows) else 0.0
