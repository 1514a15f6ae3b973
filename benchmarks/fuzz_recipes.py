"""Does any recipe end a command in a traceback? Fuzzes recipes, data, templates and model folders.

    python -m benchmarks.fuzz_recipes --recipes 300
    python -m benchmarks.fuzz_recipes --seed 1234 --recipes 1 --keep /tmp/case

Builds recipes from a seeded grammar around a model of 20,000 weights, and runs every command on
each. Reports exit codes other than 0, 2 and 3, tracebacks, commands that hang, and recipes that
`yrun check` accepts and `yrun train` refuses.
"""

import argparse
import codecs
import csv
import gzip
import io
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import yaml

from benchmarks.faults.child import Ending, import_everything, run
from benchmarks.faults.project import SCRATCH, row

ACCEPTED_CODES = (0, 2, 3)
TIMEOUT_SECONDS = 120
TYPED_LINES = "Capital of Aru?\n/params temperature=0\n/params top_k=x\n/base\n/save\n/what\n"
"""Standard input of every command; `yrun chat` answers it."""
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
COMMANDS: dict[str, tuple[str, ...]] = {
    "check": ("check", "{recipe}", "--sample", "4"),
    "inspect": ("inspect", "{recipe}", "-n", "1"),
    "heat map": ("inspect", "{recipe}", "--html", "-n", "1"),
    "sort": ("sort", "{recipe}"),
    "replay": ("replay", "{recipe}"),
    "train": ("train", "{recipe}"),
    "resume": ("train", "{recipe}", "--resume"),
    "eval": ("eval", "{recipe}"),
    "merge": ("merge", "{recipe}"),
    "chat": ("chat", "{recipe}", "--max-new-tokens", "4"),
    "compare": ("compare", "{recipe}", "--vary", "train.rate=1,2"),
    "init": ("init", "{folder}/outputs"),
}
QUICK = ("check", "inspect", "compare")
"""Commands that take a second or less for most recipes."""

Recipe = dict[str, Any]
Mutation = Callable[[random.Random, Path, Recipe], None]


@dataclass(frozen=True)
class Finding:
    """A command that ended as no command should."""

    seed: int
    command: str
    what: str
    output: str


def main() -> None:
    """Fuzz; exit with 1 if a command ended as it should not."""
    options = _options()
    commands = [name for name in COMMANDS if options.only is None or name in options.only]
    import_everything()
    started, counts = time.monotonic(), Counter[str]()
    findings = []
    with TemporaryDirectory() as folder:
        world = build_world(Path(folder).resolve() / "world")
        for seed in range(options.seed, options.seed + options.recipes):
            for finding in fuzz(world, seed, commands, counts, options.keep):
                findings.append(finding)
                print(f"seed {seed}, {finding.command}: {finding.what}\n{finding.output[-3000:]}")
                sys.stdout.flush()
            if time.monotonic() - started > options.minutes * 60:
                break
    endings = ", ".join(f"{code} {number:,} times" for code, number in sorted(counts.items()))
    print(f"{sum(counts.values()):,} commands on {seed - options.seed + 1:,} recipes: {endings}")
    print(f"{len(findings):,} findings, {time.monotonic() - started:.0f} seconds")
    sys.exit(1 if findings else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first recipe")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--only", action="append", choices=COMMANDS, help="repeatable")
    parser.add_argument("--keep", type=Path, help="copy the projects of findings to this folder")
    return parser.parse_args()


def fuzz(
    world: Path, seed: int, commands: list[str], counts: Counter[str], keep: Path | None = None
) -> Iterator[Finding]:
    """Run the commands on the recipe of a seed; yield what is wrong."""
    project = world.with_name(f"case {seed}")
    shutil.copytree(world, project)
    recipe = write_case(random.Random(seed), project)
    is_checked = False
    for name in commands:
        filled = [part.format(recipe=recipe, folder=".") for part in COMMANDS[name]]
        ending = run(filled, project, killed_after=TIMEOUT_SECONDS, prepare=_type_lines)
        counts[f"exit code {ending.code}"] += 1
        is_checked = is_checked or (name == "check" and ending.code == 0)
        what = fault_of(ending)
        if what is None and name == "train" and is_checked and ending.code:
            what = "refused, although check accepted it"
        if what is not None:
            text = (project / recipe).read_text("utf-8", "replace")
            yield Finding(seed, name, what, f"{text}\n{ending.output}")
            if keep is not None:
                shutil.copytree(project, keep / project.name, dirs_exist_ok=True)
    shutil.rmtree(project)


def fault_of(ending: Ending) -> str | None:
    """What is wrong with the ending of a command; None if nothing is."""
    if ending.code is None:
        return "did not end"
    if ending.code not in ACCEPTED_CODES:
        return f"exit code {ending.code}"
    if "Traceback (most recent call last)" in ending.output:
        return "a traceback"
    if ending.code and not ending.output.strip():
        return "no message"
    return None


def _type_lines() -> None:
    """Give a child its own process group and the typed lines."""
    os.setpgid(0, 0)
    with TemporaryFile() as typed:
        typed.write(TYPED_LINES.encode())
        typed.seek(0)
        os.dup2(typed.fileno(), 0)


def build_world(folder: Path) -> Path:
    """Models and data that recipes refer to, made once and copied for each case."""
    from peft import LoraConfig, get_peft_model

    from yrunner.models.scratch import build_model, train_tokenizer

    folder.mkdir(parents=True)
    rows = [row(number) for number in range(40)]
    _write_rows(folder / "train.jsonl", rows[:12])
    _write_rows(folder / "validation.jsonl", rows[12:16])
    _write_rows(folder / "test.jsonl", rows[16:19])
    _write_rows(folder / "texts.jsonl", [{"text": one["output"]} for one in rows[:12]])
    tokenizer = train_tokenizer([text for one in rows for text in one.values()], 320)
    model = build_model(SCRATCH["config"], tokenizer, 0)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "tiny")
    model.config.name_or_path = model.name_or_path = "tiny"
    tuned: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(folder / "adapter")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    mixture = SCRATCH["config"] | experts | {"model_type": "qwen3_moe"}
    for part in (build_model(mixture, tokenizer, 0), tokenizer):
        part.save_pretrained(folder / "mixture")
    return folder


def write_case(chance: random.Random, project: Path) -> str:
    """Write the recipe of a case, with its files, and return its path."""
    recipe = chance.choice(BASES)()
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3))):
        chance.choice(MUTATIONS)(chance, project, recipe)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    content = text.encode("utf-8", "replace")
    if chance.random() < 0.08:
        content = spoil_text(chance, text)
    name = chance.choice(("recipe.yaml", "recipe.yaml", "a recipe.yml", "配方.yaml", "sub/r.yaml"))
    path = project / name
    if name == "sub/r.yaml":
        shutil.copytree(project, project / "sub")
    path.write_bytes(content)
    return name


def lora() -> Recipe:
    """A valid recipe of two updates, which the others are made from."""
    return {
        "name": "tuned",
        "model": {"base": "./tiny"},
        "tuning": {"kind": "lora", "rank": 2, "alpha": 4},
        "data": {"train": [{"file": "train.jsonl"}], "max_length": 128},
        "train": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-3},
        "drift": {"rows": 0},
        "eval": {"tasks": [], "batch_size": 4},
    }


def _full() -> Recipe:
    return lora() | {"tuning": {"kind": "full"}}


def _frozen() -> Recipe:
    return lora() | {"tuning": {"kind": "freeze", "train_top": 0.5}}


def _scratch() -> Recipe:
    recipe = _full() | {"model": {"scratch": SCRATCH}}
    recipe["train"] |= {"stage": "pretrain"}
    return recipe


def _texts() -> Recipe:
    recipe = lora()
    recipe["data"]["train"] = [{"file": "texts.jsonl"}]
    recipe["train"] |= {"stage": "cpt"}
    return recipe


def _validated() -> Recipe:
    recipe = lora()
    recipe["data"]["validation"] = [{"file": "validation.jsonl"}]
    recipe["eval"]["tasks"] = [_task("answer")]
    recipe["train"]["checkpoint"] = {"every": 1}
    return recipe


BASES = (lora, lora, _full, _frozen, _scratch, _texts, _validated, _validated)
JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3.5,
        1e308,
        -0.0,
        10**12,
        10**30,
        "",
        " ",
        "\n",
        "a/b",
        "../x",
    ),
    *(
        "中文 名",
        "\x1b[31m",
        "${HOME}",
        "1e-4",
        "auto",
        "none",
        "all",
        [],
        {},
        [[]],
        [None],
        [1, "a"],
    ),
    *(
        {"kind": "none"},
        {"kind": "no"},
        {"a": {"b": {"c": 1}}},
        "x" * 5000,
        "é" * 300,
        "-",
        ".",
        "~",
    ),
    *(float("nan"), float("inf"), "train.jsonl", "tiny", "./tiny", "missing.jsonl", "/dev/null"),
)
NUMBERS: tuple[Any, ...] = (0, 1, 2, 3, 7, 1000, 10**6, 10**9, 2**31, 1e-30, 0.01, 0.5, 0.99, 1e10)


def change_a_value(chance: random.Random, project: Path, recipe: Recipe) -> None:
    """Put junk at a key that the recipe has."""
    section, key = chance.choice(list(_places(recipe)))
    section[key] = chance.choice(JUNK)


def remove_a_key(chance: random.Random, project: Path, recipe: Recipe) -> None:
    """Remove a key or an item."""
    section, key = chance.choice(list(_places(recipe)))
    del section[key]


def set_a_key_of_the_schema(chance: random.Random, project: Path, recipe: Recipe) -> None:
    """Give any key of the schema a value that its type allows, or a number."""
    from yrunner.recipe.messages import recipe_json_schema

    whole = recipe_json_schema()
    schema, section = whole, recipe
    for _ in range(5):
        schema = _settled(chance, schema, whole)
        keys = schema.get("properties")
        if not keys:
            return
        key = chance.choice(sorted(keys))
        child = _settled(chance, keys[key], whole)
        if child.get("properties") and chance.random() < 0.9:
            inner = section.get(key)
            section[key] = inner if isinstance(inner, dict) else {}
            kind = child["properties"].get("kind", {})
            if "const" in kind:
                section[key] = section[key] | {"kind": kind["const"]}
            schema, section = child, section[key]
            continue
        section[key] = _value_for(chance, child)
        return


def _settled(chance: random.Random, schema: Any, whole: Any) -> Any:
    """Follow references, and choose a member of each union."""
    while True:
        options = schema.get("anyOf") or schema.get("oneOf")
        if options:
            schema = chance.choice(options)
        elif "$ref" in schema:
            schema = whole["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        else:
            return schema


def _value_for(chance: random.Random, schema: Any) -> Any:
    if "enum" in schema:
        return chance.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = "number"
    match kind:
        case "boolean":
            return chance.random() < 0.5
        case "integer" | "number":
            bounds = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
            edges = [schema[key] for key in bounds if key in schema]
            return chance.choice([*edges, *NUMBERS])
        case "array":
            return [chance.choice((*JUNK, "loss", "entropy", "q_proj", "tensorboard", "wandb"))]
        case "object":
            return {chance.choice(("a", "instruction", "")): chance.choice(JUNK)}
    return chance.choice((*JUNK, "train.jsonl", "./adapter", "adapter", "test.jsonl"))


def combine_settings(chance: random.Random, project: Path, recipe: Recipe) -> None:
    """Combine settings that each are valid, and may not be together."""
    for change in chance.sample(SETTINGS, chance.choice((1, 2, 3))):
        for dotted, value in change.items():
            section = recipe
            *parents, last = dotted.split(".")
            for parent in parents:
                inner = section.get(parent)
                section[parent] = inner if isinstance(inner, dict) else {}
                section = section[parent]
            section[last] = value


SETTINGS: tuple[dict[str, Any], ...] = (
    {"train.early_stopping": {"patience": 1}},
    {"train.early_stopping": {"metric": "drift"}, "drift.rows": 2},
    {"data.validation_share": 0.001},
    {"data.validation_share": 0.5, "train.checkpoint": {"every": 1}},
    {"data.packing": True},
    {"data.packing": True, "model.attention": "eager"},
    {"model.attention": "flash_attention_2"},
    {"model.dtype": "float16"},
    {"model.dtype": "bfloat16"},
    {"data.max_length": 2},
    {"data.max_length": 8, "data.too_long": "drop"},
    {"data.max_length": 16, "data.too_long": "cut"},
    {"data.max_length": 10**6},
    {"data.targets": "all"},
    {"data.targets": "last_assistant", "data.invalid": "drop"},
    {"train.token_batch": 1},
    {"train.token_batch": 3, "train.order": "as_written"},
    {"train.batch_size": 1000},
    {"train.gradient_accumulation_steps": 50},
    {"train.max_steps": 1, "train.warmup_ratio": 0.99},
    {"train.max_steps": None, "train.epochs": 1},
    {"train.checkpoint": {"every": 1000, "keep": 1}},
    {"train.learning_rate": 1e30},
    {"train.learning_rate": 1e-300},
    {"train.optimizer": "adafactor"},
    {"train.optimizer": "adamw_8bit"},
    {"train.optimizer": "sgd", "train.weight_decay": 1e9},
    {"train.lr_scheduler": "polynomial"},
    {"train.lr_scheduler": "inverse_sqrt", "train.warmup_ratio": 0},
    {"train.lr_scheduler": "polynomial", "train.learning_rate": 1e-8},
    {"train.gradient_checkpointing": True},
    {"train.trackers": ["wandb"]},
    {"train.trackers": ["tensorboard", "tensorboard"]},
    {"train.spikes": {"action": "stop", "deviations": 1e-9, "window": 10}},
    {"train.max_grad_norm": 0},
    {"tuning": {"kind": "lora", "targets": ["nothing"]}},
    {"tuning": {"kind": "lora", "targets": []}},
    {"tuning": {"kind": "lora", "targets": ["embed_tokens", "lm_head"]}},
    {"tuning": {"kind": "lora", "rank": 1_000_000}},
    {"tuning": {"kind": "lora", "targets": ["q_proj", "lm_head"]}},
    {"tuning": {"kind": "lora", "targets": [".*("]}},
    {"tuning": {"kind": "lora", "variant": "dora"}},
    {"tuning": {"kind": "lora", "variant": "rslora", "dropout": 0.99}},
    {"tuning": {"kind": "lora", "adapter": "./adapter"}},
    {"tuning": {"kind": "lora", "adapter": "./tiny"}},
    {"tuning": {"kind": "qlora"}},
    {"tuning": {"kind": "qlora", "adapter": "./adapter", "quant_type": "int8"}},
    {"tuning": {"kind": "freeze", "train_top": 0.001}},
    {"tuning": {"kind": "freeze", "train_top": 1, "embeddings": True}},
    {"loss": {"kind": "nlirg", "loss_deadline": 3.1, "hard_slope": 1e9}},
    {"loss": {"kind": "nlirg", "loss_deadline": 1e-6, "loss_threshold": 1e-9}},
    {"loss": {"kind": "nlirg_entropy", "normalize": "weights"}},
    {"loss": {"kind": "eaft", "alpha": 1e9}},
    {"loss": {"kind": "dft", "normalize": "weights"}},
    {"keep": {"kind": "rows", "file": "validation.jsonl"}},
    {"keep": {"kind": "rows", "file": "test.jsonl", "by": "text", "share": 0.99}},
    {"keep": {"kind": "self_replay", "rows": 2, "max_new_tokens": 4}},
    {"keep": {"kind": "ewc", "file": "validation.jsonl"}},
    {"keep": {"kind": "ewc", "rows": 1, "max_new_tokens": 4}},
    {"drift.rows": 1, "data.validation": [{"file": "validation.jsonl"}]},
    {"sort": {"cross_fit": 3, "cross_fit_steps": 1}},
    {"sort": {"cross_fit": 1000, "cross_fit_steps": 1}},
    {"sort": {"score": "similarity", "order": "blocks", "blocks": 1000}},
    {"sort": {"drop_share": 0.999}},
    {"sort": {"drop_above": -1e9}},
    {"sort": {"keep": 1, "also": []}},
    {"sort": {"processes": 2}},
    {"merge": {"dtype": "float16", "shard_size": "1KB"}},
    {"merge": {"weight": 0.0}},
    {"merge": {"weight": 1e30}},
    {"merge": {"gguf": "q4_0"}},
    {"merge": {"gguf": "f16", "verify": False}},
    {"merge": {"adapters": [{"adapter": "./adapter"}]}},
    {"merge": {"adapters": [{"adapter": "./tiny", "weight": -1}]}},
    {"merge": {"as_trained": {"quant_type": "nf4"}}},
    {"merge": {"push": "owner/name"}},
    {"distributed": {"processes": 0}},
    {"distributed": {"deepspeed": {"stage": 3}}, "tuning": {"kind": "qlora"}},
    {"distributed": {"machines": {"kind": "slurm"}}},
    {"distributed": {"machines": {"kind": "hostfile", "file": "train.jsonl"}}},
    {"distributed": {"deepspeed": {"config": "train.jsonl"}}},
    {"distributed": {"deepspeed": {"config": "tiny/config.json"}}},
    {"eval.generation": {"kind": "beams", "num_beams": 4}},
    {"eval.generation": {"kind": "sample", "temperature": 1e-9, "top_p": 1e-9}},
    {"eval.generation": {"kind": "sample", "temperature": 1e30, "top_k": 10**6}},
    {"eval.generation": {"kind": "dynamic"}},
    {"eval.generation": {"kind": "greedy", "repetition_penalty": 1e-30}},
    {"eval.faults": {"data": "train.jsonl", "list": "test.jsonl"}},
    {"output": "outputs/train.jsonl/inside"},
    {"output": "train.jsonl"},
    {"output": "train.jsonl/run"},
    {"output": "/dev/null/run"},
    {"output": "/proc/run"},
    {"output": "tiny"},
    {"output": "."},
    {"output": "a folder/多 words/run"},
    {"output": "x" * 300},
    {"name": "a/b"},
    {"name": "a\nb"},
    {"name": "x" * 300},
    {"name": ".."},
    {"model.base": "./mixture"},
    {"model.base": "./mixture", "tuning": {"kind": "lora", "dropout": 0}},
    {"model.base": "recipe.yaml"},
    {"model.base": "nobody/no-such-model"},
    {"model.base": "./adapter"},
    {"model.base": "train.jsonl"},
    {"model.base": "."},
    {"model": {"base": "./tiny", "scratch": SCRATCH}},
    {"seed": 2**32},
    {"compare": {"arms": {"a": {"train.rate": 1}, "b": {}}}},
    {"compare": {"arms": {"a": {"nothing.at.all": {}}, "b c": {}}}},
)


def add_tasks(chance: random.Random, project: Path, recipe: Recipe) -> None:
    """Add eval tasks of any kind on any data."""
    kinds = ("answer", "classify", "choice", "perplexity", "format", "judge_by_rule", "quality")
    tasks = [_task(chance.choice((*kinds, "harness"))) for _ in range(chance.choice((1, 1, 2)))]
    for number, task in enumerate(tasks):
        task["name"] = chance.choice(("a", f"task {number}", "中 / 文", "../x"))
        if chance.random() < 0.5 and "data" in task:
            write_odd_data(chance, project / "odd.jsonl")
            task["data"] = "odd.jsonl"
    recipe["eval"] = {"tasks": tasks, "batch_size": chance.choice((1, 4))}


def _task(kind: str) -> dict[str, Any]:
    task: dict[str, Any] = {
        "name": "capitals",
        "kind": kind,
        "side": "domain",
        "data": "test.jsonl",
    }
    if kind in ("answer", "classify", "format", "judge_by_rule", "quality"):
        task["max_new_tokens"] = 4
    match kind:
        case "format":
            task["form"] = {"kind": "json"}
        case "judge_by_rule":
            task["rules"] = [{"name": "r", "must_match": "a"}]
        case "classify":
            task["by"] = "likelihood"
        case "harness":
            del task["data"]
            task |= {"tasks": ["no_such_task"], "limit": 1}
    return task


def use_odd_data(chance: random.Random, project: Path, recipe: Recipe) -> None:
    """Train or validate on an odd file."""
    name = chance.choice(("odd.jsonl", "odd.json", "odd.csv", "odd.txt", "odd.parquet", "odd.tsv"))
    name = chance.choice((name, name, f"a folder/{name}", f"数据-{name}", f"{name}.gz"))
    path = project / name
    path.parent.mkdir(exist_ok=True)
    write_odd_data(chance, path)
    entry: dict[str, Any] = {"file": name}
    if chance.random() < 0.3:
        entry["format"] = chance.choice(
            ("alpaca", "messages", "sharegpt", "text", "prompt_response")
        )
    if chance.random() < 0.2:
        entry |= chance.choice(
            ({"take": 1}, {"take": 1000}, {"share": 0.01}, {"columns": {"a": "b"}})
        )
    data = recipe.get("data")
    recipe["data"] = data = data if isinstance(data, dict) else {}
    data[chance.choice(("train", "train", "validation"))] = [entry]
    if chance.random() < 0.4:
        data["invalid"] = "drop"


def write_odd_data(chance: random.Random, path: Path) -> None:
    """Write a data file that a stranger might have."""
    content = chance.choice(ODD_CONTENTS)(chance)
    path.write_bytes(
        gzip.compress(content) if path.suffix == ".gz" and chance.random() < 0.7 else content
    )


def _odd_rows(chance: random.Random) -> bytes:
    rows = [chance.choice(ODD_ROWS) if chance.random() < 0.5 else row(n) for n in range(6)]
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows).encode(
        "utf-8", "replace"
    )


def _same_odd_rows(chance: random.Random) -> bytes:
    return (json.dumps(chance.choice(ODD_ROWS)) + "\n").encode() * chance.choice((1, 2, 12))


def _table(chance: random.Random) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=chance.choice(",;\t|"))
    writer.writerow(
        chance.choice((("instruction", "output"), ("question", "answer", ""), ("a", "a")))
    )
    for number in range(5):
        writer.writerow([*row(number).values(), *chance.choice(((), ("x",), ("", "", "")))])
    return text.getvalue().encode(chance.choice(("utf-8", "utf-8-sig", "utf-16", "latin-1")))


ODD_CONTENTS: tuple[Callable[[random.Random], bytes], ...] = (
    _odd_rows,
    _odd_rows,
    _same_odd_rows,
    _same_odd_rows,
    _table,
    lambda chance: b"",
    lambda chance: b"\n\n  \n",
    lambda chance: POINTER.encode(),
    lambda chance: codecs.BOM_UTF8 + _odd_rows(chance),
    lambda chance: _odd_rows(chance).decode().encode("utf-16"),
    lambda chance: _odd_rows(chance)[:-7],
    lambda chance: b"[" + _odd_rows(chance).strip().replace(b"\n", b",") + b"]",
    lambda chance: b'{"data": [' + _odd_rows(chance).strip().replace(b"\n", b",") + b"]}",
    lambda chance: bytes(chance.randrange(256) for _ in range(300)),
    lambda chance: b"PAR1" + bytes(50) + b"PAR1",
    lambda chance: "第一条\n\n第二条\x00\u2028\n".encode() * 3,
    lambda chance: b"[" * 3000,
    lambda chance: b'{"instruction": "a", "output": "b"}',
)
ODD_ROWS: tuple[Any, ...] = (
    *({}, [], None, 1, "text", {"instruction": "a"}, {"output": "b"}, {"text": ""}, {"text": None}),
    {"instruction": "", "output": ""},
    {"instruction": "a", "output": None},
    {"instruction": ["a"], "output": {"b": 1}},
    {"instruction": "a", "input": 5, "output": True},
    {"instruction": "<|im_end|>", "output": "<|im_start|>assistant\n<|im_end|>"},
    {"instruction": "a\x00\ud83d", "output": "😀" * 50},
    {"instruction": "long", "output": "word " * 2000},
    {"instruction": "q", "output": "a", "history": [["x"]]},
    {"messages": []},
    {"messages": "hello"},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
    {"messages": [{"role": "bot", "content": "q"}, {"role": 7, "content": "a"}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 3},
    {"messages": [{"role": "system", "content": "s"}, {"role": "system", "content": "s"}]},
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": 1}}]},
            {"role": "tool", "content": "r"},
        ]
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversations": [{"from": "gpt", "value": 3}]},
    {"question": "q", "choices": ["a", "b"], "answer": 1},
    {"question": "q", "choices": [], "answer": 9},
    {"question": "q", "A": "1", "B": "2", "answer": "B"},
    {"prompt": "q", "response": "a", "completion": "b"},
    {"row": 1, "right": "x"},
    {"row": 99},
)


def use_odd_template(chance: random.Random, project: Path, recipe: Recipe) -> None:
    """Replace the chat template."""
    content = chance.choice(TEMPLATES)
    name = chance.choice(("odd.jinja", "vor lage.jinja"))
    (project / name).write_bytes(content)
    model = recipe.get("model")
    recipe["model"] = (model if isinstance(model, dict) else {}) | {"chat_template": name}


TEMPLATES = (
    b"",
    b"{{",
    b"{% for m in messages %}{{ m.content }}",
    b"{% for m in messages %}{{ m.content }}{% endfor %}",
    b"{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    b"{{ raise_exception('no') }}",
    b"{{ messages[0].nothing.at.all }}",
    b"{{ messages[99].content }}",
    b"{{ 1 / 0 }}",
    b"{{ 'a' + 1 }}",
    b"{% include 'x' %}",
    b"{{ messages | nofilter }}",
    b"{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
    b"{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    b"{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    b"{% while true %}{% endwhile %}",
    "{% for m in messages %}用户{{ m.content }}{% endfor %}".encode("gbk"),
    b"\xef\xbb\xbf{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
    b"{{ messages[0].__class__.__mro__ }}",
    b"{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
)


def spoil_the_base(chance: random.Random, project: Path, recipe: Recipe) -> None:
    """Damage a file of the model's folder."""
    folder = project / chance.choice(("tiny", "tiny", "tiny", "adapter", "mixture"))
    file = chance.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    damage = chance.choice(("remove", "pointer", "cut", "empty", "junk", "json", "key"))
    content = file.read_bytes()
    match damage:
        case "remove":
            file.unlink()
        case "pointer":
            file.write_text(POINTER)
        case "cut":
            file.write_bytes(content[: chance.randrange(len(content))])
        case "empty":
            file.write_bytes(b"")
        case "junk":
            file.write_bytes(bytes(chance.randrange(256) for _ in range(200)))
        case "json":
            file.write_text(chance.choice(("[]", "{}", "null", '"a"', '{"a": ')))
        case "key" if file.suffix == ".json":
            values = json.loads(content)
            section, key = chance.choice(list(_places(values)))
            section[key] = chance.choice(JUNK[:-2])
            file.write_text(json.dumps(values))
    if folder.name == "adapter" and chance.random() < 0.7:
        recipe["tuning"] = {"kind": "lora", "adapter": "./adapter"}
    elif folder.name != "tiny" and isinstance(recipe.get("model"), dict):
        recipe["model"]["base"] = f"./{folder.name}"


def mix_in_foreign_keys(chance: random.Random, project: Path, recipe: Recipe) -> None:
    """Add keys of other tools, or write the whole recipe in them."""
    if chance.random() < 0.4:
        recipe.clear()
    recipe |= dict(chance.sample(sorted(FOREIGN.items()), chance.choice((1, 2, 8))))


FOREIGN: dict[str, Any] = {
    "model_name_or_path": "./tiny",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "cutoff_len": 128,
    "per_device_train_batch_size": 1,
    "num_train_epochs": 1.0,
    "dataset": "identity,alpaca_en_demo",
    "template": "qwen",
    "output_dir": "out",
    "base_model": "./tiny",
    "datasets": [{"path": "train.jsonl", "type": "alpaca"}],
    "sequence_len": 128,
    "micro_batch_size": 1,
    "sample_packing": True,
    "adapter": "lora",
    "lora_r": 8,
    "val_set_size": 0.1,
    "load_in_4bit": True,
    "learning_rate": 1e-4,
    "num_epochs": 1,
    "max_seq_length": 128,
    "fsdp": "full_shard",
    "neftune_noise_alpha": 5,
    "train_type": "lora",
    "--model": "x",
}


def spoil_text(chance: random.Random, text: str) -> bytes:
    """Break the YAML itself."""
    lines = text.splitlines(keepends=True)
    number = chance.randrange(len(lines))
    match chance.choice(("drop", "double", "indent", "byte", "word", "cut")):
        case "drop":
            del lines[number]
        case "double":
            lines.insert(number, lines[number])
        case "indent":
            lines[number] = f"\t {lines[number]}"
        case "word":
            lines[number] = chance.choice(("*x\n", "<<: 1\n", "? a\n", "- b\n", "%\n", "'\n"))
        case "cut":
            lines[number:] = []
        case "byte":
            content = bytearray(text.encode("utf-8", "replace"))
            content[chance.randrange(len(content))] = chance.randrange(256)
            return bytes(content)
    return "".join(lines).encode("utf-8", "replace")


MUTATIONS: tuple[Mutation, ...] = (
    change_a_value,
    remove_a_key,
    set_a_key_of_the_schema,
    set_a_key_of_the_schema,
    combine_settings,
    combine_settings,
    combine_settings,
    add_tasks,
    use_odd_data,
    use_odd_data,
    use_odd_template,
    spoil_the_base,
    spoil_the_base,
    mix_in_foreign_keys,
)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside with each of its keys or indices."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys:
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")


if __name__ == "__main__":
    main()
