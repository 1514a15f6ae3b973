"""A run: a recipe with its options and its folder, and what is made of them, each part once.

Every command works on a `Run`. What costs time (files, tokenizer, tokenized rows, the key of the
base) is made when it is first asked for, and kept.
"""

import copy
import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from yrunner.assembly.dataset import (
    BYTES_WORTH_A_BAR,
    find_sources,
    keep_sources,
    print_left_out,
    print_rows,
    rules_of,
    texts_of,
)
from yrunner.assembly.identity import changes_since
from yrunner.console import progress
from yrunner.data.batching.plan import Plan, make_plan
from yrunner.data.conversation import Conversation
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.examples import Examples
from yrunner.data.dataset.prepare import Rules, Source, check_conversations, prepare
from yrunner.data.dataset.splits import Prepared
from yrunner.data.formats.formats import read_conversations
from yrunner.data.readers.text import State, check_unchanged, states_of
from yrunner.distributed.topology import topology_of
from yrunner.errors import MissingError, RunError
from yrunner.evaluation.memorised_faults import KnownFault, read_faults
from yrunner.evaluation.questions import Question, question_of
from yrunner.evaluation.tasks import read_task
from yrunner.models.load import choose_dtype, load_model, load_tokenizer, set_chat_template
from yrunner.models.meta import read_config
from yrunner.models.model_key import model_key
from yrunner.models.scratch import make_config, train_tokenizer
from yrunner.recipe.load import base_recipe_path, load_recipe
from yrunner.recipe.schema.eval import AnswerTask, Task
from yrunner.recipe.schema.keep import HeldToRows
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir

FIRST_ROWS = 10
"""Questions to ask where a recipe has no task."""
OF_THE_BASE = ("stale_base", "base_key", "tokenizer", "config")
"""Parts that change when the base is trained."""
OF_EVERY_VARIANT = ("base", "sources", "tasks", "known_faults", *OF_THE_BASE)
"""Parts that do not depend on how a recipe trains."""


@dataclass(frozen=True)
class RunOptions:
    """How the command was called."""

    arguments: str = ""
    """Recipe and overrides as typed, for commands that are printed for the user."""
    resume: bool = False
    overwrite: bool = False
    is_base: bool = False
    """Trained only because another recipe starts from it."""
    from_step: int | None = None
    """The update whose checkpoint a resumed run continues from."""

    @property
    def flags(self) -> list[str]:
        """The options of `yrun train`."""
        given = {"--resume": self.resume, "--overwrite": self.overwrite, "--is-base": self.is_base}
        return [flag for flag, is_given in given.items() if is_given]

    @property
    def how_to_resume(self) -> str:
        """What to run after an interruption."""
        if self.is_base:
            return "run the same command again to continue"
        return f"continue with: yrun train {self.arguments} --resume"


class Run:
    """A recipe at work. See the module's docstring."""

    def __init__(self, recipe: Recipe, options: RunOptions | None = None) -> None:
        self.recipe = recipe
        self.options = options or RunOptions()
        self.folder = RunDir(recipe.run_folder)

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = (), **options: bool) -> "Run":
        """The run of a recipe file; `options` are those of `RunOptions`.

        Raises `RecipeError` for a recipe that is wrong.
        """
        arguments = shlex.join([str(path), *overrides])
        return cls(load_recipe(path, list(overrides)), RunOptions(arguments, **options))

    def variant(self, recipe: Recipe) -> "Run":
        """The run of a recipe that differs only in how it trains."""
        other = Run(recipe, self.options)
        other.__dict__ |= {
            part: self.__dict__[part] for part in OF_EVERY_VARIANT if part in self.__dict__
        }
        return other

    # The base

    @cached_property
    def base(self) -> "Run | None":
        """The run whose result this one starts from; None for a folder, a Hub id or a new model."""
        path = base_recipe_path(self.recipe)
        return None if path is None else Run.load(path, is_base=True)

    @property
    def base_source(self) -> str:
        """Folder or Hub id of the base."""
        if self.base is not None:
            return str(self.base.folder.model)
        assert self.recipe.model.base is not None, "a model from scratch has no base"
        return self.recipe.model.base

    @cached_property
    def stale_base(self) -> str | None:
        """Why the base has to be trained first; None where it does not."""
        base = self.base
        if base is None:
            return None
        name = f"{base.recipe.name} is the base and"
        if not base.folder.is_used():
            return f"{name} has not been trained yet: training it first"
        if not base.folder.fingerprint.exists():
            return f"{name} was not finished: training it first"
        changes = changes_since(base.folder, base.recipe)
        if changes:
            return f"{name} has changed ({', '.join(changes)}): training it again"
        if not base.folder.is_finished():
            return f"{name} was not finished: resuming it"
        return None

    def can_resume(self) -> bool:
        """Whether the folder holds checkpoints of this run with the same settings."""
        there = self.folder.fingerprint.exists() and self.folder.saved_steps()
        return bool(there) and not changes_since(self.folder, self.recipe)

    def forget_base(self) -> None:
        """Look at the base anew: it has been trained."""
        for part in OF_THE_BASE:
            self.__dict__.pop(part, None)

    @cached_property
    def base_key(self) -> str:
        """The `model_key` of the base."""
        return model_key(self.base_source)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that the run trains with.

        That of a new model is trained on its texts, which takes seconds and has one result, so a
        recipe can be checked before its base has been trained.
        """
        model = self.recipe.model
        if model.scratch is not None:
            return train_tokenizer(self._texts(), model.scratch.vocab_size)
        if self.base is not None and self.stale_base is not None:
            tokenizer = copy.deepcopy(self.base.tokenizer)
            if model.chat_template is not None:
                set_chat_template(tokenizer, model.chat_template)
            return tokenizer
        return self.load_tokenizer(self.base_source)

    @cached_property
    def config(self) -> Any:
        """The config of the model, also before its base has been trained."""
        model = self.recipe.model
        if model.scratch is not None:
            return make_config(model.scratch.config, self.tokenizer)
        if self.base is not None and self.stale_base is not None:
            return self.base.config
        return read_config(self.base_source, trust_remote_code=model.trust_remote_code)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision to train in. Raises `MissingError` where this machine does not have it."""
        dtype = choose_dtype(self.recipe.model.dtype)
        if dtype == torch.float16 and not torch.cuda.is_available():
            raise MissingError(
                "model.dtype float16 needs a GPU", remedy="use float32 or bfloat16 on a CPU"
            )
        return dtype

    @property
    def max_tokens(self) -> int:
        """Tokens to compute at once: no more than training may meet in a micro-batch."""
        return self.recipe.train.batch_size * self.recipe.data.max_length

    # The rows

    @cached_property
    def sources(self) -> list[Source]:
        """Training and validation files. Raises `DataError` where there is no data file."""
        return find_sources(self.recipe.data)

    @cached_property
    def keep_sources(self) -> list[Source]:
        """The file of rows for `keep`, where the recipe names one."""
        return keep_sources(self.recipe)

    @property
    def files(self) -> Iterator[Path]:
        """Every data file."""
        return (file for source in self.sources for file in source.files)

    @property
    def rules(self) -> Rules:
        """What the recipe makes of a row."""
        return rules_of(self.recipe)

    @cached_property
    def dataset(self) -> Prepared:
        """All rows, tokenized now or earlier; what is wrong with them is counted, not refused."""
        _ = self.file_states
        size = sum(file.stat().st_size for file in self.files)
        bar: AbstractContextManager[Any] = (
            progress("reading data, bytes", size) if size > BYTES_WORTH_A_BAR else nullcontext()
        )
        with bar as advance:
            return self.prepare(self.sources, self.rules, advance)

    def prepare(self, sources: Sequence[Source], rules: Rules, advance: Any = None) -> Prepared:
        """Tokenize files, or find them prepared by this run or another beside it."""
        cache = Cache(self.folder.prepared)
        return prepare(
            sources, self.tokenizer, rules, cache, seed=self.recipe.seed, advance=advance
        )

    def refuse_faulty_rows(self) -> None:
        """Refuse the rows that the recipe refuses, and set the validation rows aside."""
        data = self.recipe.data
        self.dataset.check(too_long=data.too_long, invalid=data.invalid)
        if data.validation_share is not None:
            self.dataset.set_validation_aside(data.validation_share, self.recipe.seed)

    def accept_rows(self) -> None:
        """Print the fate of every row, and refuse those that the recipe refuses."""
        print_rows(self.dataset, self.folder.prepared)
        self.refuse_faulty_rows()
        print_left_out(self.dataset)

    @cached_property
    def file_states(self) -> dict[Path, State]:
        """Size and time of every data file before it was read."""
        return states_of(self.files)

    def refuse_changed_files(self) -> None:
        """Raise `DataError` where a data file has changed since it was read."""
        check_unchanged(self.file_states)

    def refuse_unreadable_rows(self) -> None:
        """Refuse the faulty rows that are seen without a tokenizer."""
        check_conversations([*self.sources, *self.keep_sources], self.rules)

    def _texts(self) -> Iterator[str]:
        return texts_of(source for source in self.sources if source.purpose == "train")

    def plan(self, *, num_ranks: int | None = None) -> Plan:
        """What the run learns from at which update, exactly.

        `num_ranks` processes start it; None: as many as the recipe asks for.
        """
        if num_ranks is None:
            num_ranks = topology_of(self.recipe.distributed, torch.cuda.device_count()).num_ranks
        return self.plan_for(self.dataset.train, num_ranks=num_ranks)

    def plan_for(self, examples: Examples, *, num_ranks: int) -> Plan:
        """The plan of a run that learns from these examples."""
        recipe = self.recipe
        return make_plan(
            examples.num_targets,
            lengths=examples.lengths,
            pack_to=recipe.data.max_length if recipe.data.packing else None,
            token_batch=recipe.train.token_batch,
            batch_size=recipe.train.batch_size,
            accumulation=recipe.train.gradient_accumulation_steps * num_ranks,
            epochs=recipe.train.num_epochs,
            max_updates=recipe.train.max_steps,
            order=recipe.train.order,
            seed=recipe.seed,
            kept_share=recipe.keep.share if isinstance(recipe.keep, HeldToRows) else 0.0,
        )

    # The evaluation

    @cached_property
    def tasks(self) -> list[tuple[Task, list[Question]]]:
        """The tasks with their questions. Raises `DataError` for a faulty file.

        A recipe without tasks gets one of its first rows, so that there are answers to look at.
        """
        if self.recipe.eval.tasks:
            return [(task, read_task(task)) for task in self.recipe.eval.tasks]
        data = self.recipe.data
        source = self.sources[len(data.train) if data.validation else 0]
        file = source.files[0]
        rows = read_conversations(file, source.reading).rows
        talks = (row for row in rows if isinstance(row, Conversation) and not row.is_text)
        questions = [question_of(row) for row in islice(talks, FIRST_ROWS)]
        name = f"first rows of {file.name}"
        task = AnswerTask(kind="answer", name=name, side="domain", data=file)
        return [(task, questions)] if questions else []

    @cached_property
    def known_faults(self) -> list[KnownFault]:
        """The faulty rows that the recipe lists. Raises `DataError` for a list that is wrong."""
        listed = self.recipe.eval.faults
        return [] if listed is None else read_faults(listed.data, listed.list)

    # The result

    def require_result(self) -> None:
        """Raise `RunError` where there is no trained model yet."""
        if not self.folder.is_finished():
            raise RunError(
                f"{self.recipe.name} has no result in {self.folder.folder}",
                remedy="train it first: yrun train",
            )

    @cached_property
    def result_tokenizer(self) -> Any:
        """The tokenizer that was saved with the trained model, chat template included."""
        return load_tokenizer(str(self.folder.model))

    def load_base(self) -> Any:
        """The model as it was before training."""
        return self.load_model(self.base_source)

    def load_result(self) -> Any:
        """The trained model; an adapter is merged into its base, in memory."""
        return self.load_model(str(self.folder.model))

    def load_model(self, source: str | Path) -> Any:
        """The model in a folder or on the Hub, as the recipe wants it loaded, on the device."""
        model = self.recipe.model
        loaded = load_model(
            str(source),
            dtype=choose_dtype(model.dtype),
            attention=model.attention,
            trust_remote_code=model.trust_remote_code,
        )
        return loaded.to("cuda" if torch.cuda.is_available() else "cpu")

    def load_tokenizer(self, source: str) -> Any:
        """The tokenizer in a folder or on the Hub, with the recipe's chat template."""
        model = self.recipe.model
        return load_tokenizer(
            source,
            chat_template=model.chat_template,
            trust_remote_code=model.trust_remote_code,
        )
