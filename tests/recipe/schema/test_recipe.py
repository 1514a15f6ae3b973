"""What a key may hold: a sentence for each wrong value, and the JSON Schema that agrees."""

import jsonschema
import pytest
import yaml

from yrunner.recipe.messages import recipe_json_schema

KINDS = '"freeze", "full", "lora", "qlora"'
TUNING = f"must be a section with a kind ({KINDS.replace(chr(34), '')})"
SEED = "must be a whole number of at least 0 and below 4294967296"


@pytest.fixture(scope="module")
def validator():
    schema = recipe_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        ('seed: "3.5"\n', f'7:7: seed: {SEED}, got "3.5"'),
        ("seed: 3.5\n", f"7:7: seed: {SEED}, got 3.5"),
        ("seed: 7.0\n", f"7:7: seed: {SEED}, got 7.0; write 7"),
        ('seed: "7"\n', f'7:7: seed: {SEED}, got "7"; remove the quotes'),
        ("seed: yes\n", f"7:7: seed: {SEED}, got yes (which YAML reads as true)"),
        ("seed: -1\n", f"7:7: seed: {SEED}, got -1"),
        ("seed:\n", f"7:1: seed: {SEED}, got nothing"),
        ("seed: [1]\n", f"7:7: seed: {SEED}, got a list"),
        (
            "train: {learning_rate: .nan}\n",
            "7:24: train.learning_rate: must be a number above 0, got .nan; it must be finite",
        ),
        (
            "train: {max_grad_norm: .inf}\n",
            "7:24: train.max_grad_norm: must be a number of at least 0, got .inf; "
            "it must be finite",
        ),
        (
            'train: {learning_rate: "1e-4"}\n',
            '7:24: train.learning_rate: must be a number above 0, got "1e-4"; remove the quotes',
        ),
        (
            "train: {warmup_ratio: 1}\n",
            "7:23: train.warmup_ratio: must be a number of at least 0 and below 1, got 1",
        ),
        (
            'train: {gradient_checkpointing: "yes"}\n',
            '7:33: train.gradient_checkpointing: must be true or false, got "yes"; '
            "remove the quotes",
        ),
        (
            "train: {order: Shufle}\n",
            '7:16: train.order: must be one of "shuffle", "as_written", got "Shufle", '
            'did you mean "shuffle"?',
        ),
        (
            "train: {order: alphabetical}\n",
            '7:16: train.order: must be one of "shuffle", "as_written", got "alphabetical"',
        ),
        (
            "train: {checkpoint: {every: 0}}\n",
            '7:29: train.checkpoint.every: must be "epoch" or a whole number of at least 1, got 0',
        ),
        (
            "train: {checkpoint: {every: sometimes}}\n",
            '7:29: train.checkpoint.every: must be "epoch" or a whole number of at least 1, '
            'got "sometimes"',
        ),
        (
            "train: {checkpoint: {evry: 1}}\n",
            '7:22: train.checkpoint.evry: unknown key, did you mean "every"?',
        ),
        (
            "train: {checkpoint: {zzz: 1}}\n",
            "7:22: train.checkpoint.zzz: unknown key; valid keys are every, keep",
        ),
        ("tuning:\n", f"7:1: tuning: {TUNING}, got nothing"),
        ("tuning: 3\n", f"7:9: tuning: {TUNING}, got 3"),
        (
            "tuning: {rank: 8}\n",
            f"7:1: tuning.kind: this key is missing; it must be one of {KINDS}",
        ),
        (
            "tuning: {kind: loar}\n",
            f'7:16: tuning.kind: must be one of {KINDS}, got "loar", did you mean "lora"?',
        ),
        ("tuning: {kind: [lora]}\n", f"7:16: tuning.kind: must be one of {KINDS}, got a list"),
        (
            "tuning: {kind: lora, targets: 3}\n",
            '7:31: tuning.targets: must be "all-linear" or a list, got 3',
        ),
        (
            "tuning: {kind: lora, targets: q_proj}\n",
            '7:31: tuning.targets: must be "all-linear" or a list, got "q_proj"; '
            "for a list of one write [q_proj]",
        ),
        (
            "tuning: {kind: lora, targets: [q_proj, 1]}\n",
            '7:40: tuning.targets.1: must be text, got 1; to make it text, put it in quotes: "1"',
        ),
        (
            "tuning: {kind: freeze, rank: 8}\n",
            "7:24: tuning.rank: only kinds lora and qlora have this key, not freeze; remove it",
        ),
        (
            "tuning: {kind: lora, adapter: ./base, rank: 4}\n",
            "7:22: tuning: the adapter already defines rank; remove it here",
        ),
        (
            "loss: {kind: nlirg, loss_deadline: 1}\n",
            "7:21: loss: loss_deadline must be above loss_threshold",
        ),
        (
            "sort: {score: exces}\n",
            '7:15: sort.score: must be one of "outlier", "knn_loss", "unexplained", "similarity", '
            '"correlation", "surprise", '
            '"loss", "perplexity", "entropy", "excess", "divergence", "margin", got "exces", '
            'did you mean "excess"?',
        ),
        (
            "sort: {cross_fit: 1}\n",
            "7:8: sort: cross_fit must be 0 or at least 2: with one part there are no other rows",
        ),
        (
            "sort: {order: blocks, cross_fit_steps: 9}\n",
            "7:23: sort: cross_fit_steps needs cross_fit; set that to 3, or remove this",
        ),
        (
            "sort: {score: unexplained}\n",
            "7:8: sort: unexplained needs cross_fit; set that to 3, or name another score",
        ),
        (
            "sort: {also: [loss, unexplained]}\n",
            "7:1: sort: unexplained needs cross_fit; set that to 3, or name another score",
        ),
        (
            "sort: {drop_above: 1, drop_below: 1.5}\n",
            "7:23: sort: drop_below must be below drop_above, or every row is dropped",
        ),
        (
            "sort: {score: loss, also: [], clusters: {keep: 0.5}}\n",
            "7:42: sort: clusters.keep needs hidden states, which are stored for outlier and "
            "knn_loss; name one of them in score or also, or remove it",
        ),
        (
            "sort: {drop_share: 1}\n",
            "7:20: sort.drop_share: must be a number of at least 0 and below 1, got 1",
        ),
        (
            "  validation_share: 0.1\n  validation: [{file: rows.jsonl}]\n",
            "8:3: data: validation and validation_share cannot be combined; remove one",
        ),
        (
            "train: {stage: pretrain}\n",
            '7:9: model.scratch and train.stage "pretrain" require each other: pretrain starts '
            "from random weights, the other stages from a base",
        ),
        ("rank: 3\n", '7:1: rank: unknown key here, did you mean "tuning.rank"?'),
        (
            "rollout: {generation: 8}\n",
            '7:11: rollout.generation: unknown key, did you mean "generations"?',
        ),
        ("train: {中文: 1, seed: 2}\n", '7:16: train.seed: unknown key here, did you mean "seed"?'),
    ],
)
def test_a_wrong_value_gives_one_sentence(addition, expected, valid, problems):
    found = [line for line in problems(valid + addition) if "中文" not in line]
    assert found == [f"recipe.yaml:{expected}"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("hub: fog/harbour", ""),
        ("hub: fog/harbour, files: 'data/*.parquet', revision: v1, share: 0.2", ""),
        ("file: rows.jsonl, take: 1000", ""),
        ("hub: a/b/c", '"a/b/c" is not a Hub id; write "organisation/name"'),
        ("take: 1", "needs file, a path; hub, the name of a dataset; or sorted, a recipe to sort"),
        (
            "file: rows.jsonl, hub: a/b",
            "file and hub cannot be combined; write two entries",
        ),
        ("file: rows.jsonl, files: '*'", "files applies only to hub, not to file; remove it"),
        ("file: rows.jsonl, revision: v1", "revision applies only to hub, not to file; remove it"),
        ("hub: a/b, take: 1, share: 0.5", "take and share cannot be combined; remove one"),
        ("file: rows.jsonl, document: file", "document: file applies only to txt files; remove it"),
        ("hub: a/b, take: 0", "must be a whole number of at least 1, got 0"),
        ("hub: a/b, share: 1", "must be a number above 0 and below 1, got 1"),
    ],
)
def test_data_comes_from_one_place_all_of_it_or_a_part(entry, expected, valid, problems, validator):
    text = valid.replace("file: rows.jsonl", f"{{{entry}}}")
    found = problems(text)
    assert [line.split(": ", 2)[2] for line in found] == [expected] * bool(expected)
    if not found:
        assert list(validator.iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "name: legal",
            "name: no",
            "1:7: name: must be text, got no (which YAML reads as false); to make it text, put it "
            'in quotes: "no"',
        ),
        (
            "name: legal",
            "name: 2026",
            '1:7: name: must be text, got 2026; to make it text, put it in quotes: "2026"',
        ),
        (
            "name: legal",
            "name: my run",
            '1:7: name: "my run" is not valid; expected: name of the run and of its folder: '
            "letters, digits, dot, dash and underscore",
        ),
        ("name: legal\n", "", "1:1: name: this key is missing; it must be text"),
        ("name: legal", "name:", "1:1: name: must be text, got nothing"),
        (
            "\n    - file: rows.jsonl",
            " [rows.jsonl]",
            '5:11: data.train.0: must be a section, got "rows.jsonl"; write {file: rows.jsonl}',
        ),
        (
            "    - file: rows.jsonl",
            "    file: rows.jsonl",
            "6:5: data.train: must be a list of at least 1, got a section; begin each item with "
            '"- "',
        ),
        (
            "\n    - file: rows.jsonl",
            " []",
            "5:10: data.train: must be a list of at least 1, got an empty list",
        ),
    ],
)
def test_a_valid_recipe_that_is_spoilt_gives_one_sentence(old, new, expected, valid, problems):
    assert old in valid
    assert problems(valid.replace(old, new)) == [f"recipe.yaml:{expected}"]


def test_a_date_is_text(valid, problems):
    assert problems(valid.replace("legal", "2026-01-01")) == []


ADDED = "  new_tokens: [<call>]\n"
LORA = "tuning: {kind: lora}\n"


@pytest.mark.parametrize(
    ("model", "rest", "expected"),
    [
        (ADDED, LORA, "model.new_tokens mean nothing to the model before they are trained"),
        (ADDED, "tuning: {kind: lora, train_tokens: [<end>]}\n", "mean nothing to the model"),
        (ADDED, "tuning: {kind: freeze}\n", "mean nothing to the model"),
        (ADDED, "tuning: {kind: freeze, embeddings: true}\n", None),
        (ADDED, "tuning: {kind: full}\n", None),
        (ADDED, "tuning: {kind: lora, train_tokens: [<call>, <end>]}\n", None),
        (ADDED, "tuning: {kind: lora, modules_to_save: [embed_tokens]}\n", None),
        ("  new_tokens: [<a>, <a>]\n", "tuning: {kind: full}\n", "new_tokens has a token twice"),
        ("  rope: {kind: yarn, factor: 4}\n", LORA, None),
        ("  rope: {kind: yarn, factor: 1}\n", LORA, "must be a number above 1"),
        ("  rope: {factor: 4}\n", LORA, "kind"),
    ],
)
def test_what_a_base_gets_is_trained(model, rest, expected, valid, problems):
    found = problems(valid.replace("  base: ./base\n", f"  base: ./base\n{model}") + rest)
    assert len(found) == (expected is not None)
    assert all(expected in problem for problem in found)


def test_the_result_of_a_recipe_is_not_extended(valid, problems, folder):
    (folder / "other.yaml").write_text(valid.replace("name: legal", "name: other"), "utf-8")
    text = valid.replace("./base", "other.yaml\n  rope: {kind: linear, factor: 2}")
    (found,) = problems(text)
    assert "rope needs a model as base; set it in the recipe of the base" in found


EVERY_SECTION = """\
name: legal
seed: 1
model: {base: ./base, dtype: float32}
tuning: {kind: lora, rank: 4, alpha: 1e1, targets: [q_proj]}
data:
  train: [{file: rows.jsonl, columns: {instruction: question}}]
  validation_share: 1e-1
loss: {kind: nlirg, min_lr: 5e-8}
train:
  max_steps: 10
  learning_rate: 1e-4
  checkpoint: {every: 5}
  early_stopping: {patience: 2}
  trackers: [wandb]
eval:
  tasks: [{name: law, kind: answer, side: domain, data: rows.jsonl}]
"""


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        (
            "train: {early_stopping: {patience: 1}}\n",
            "train.early_stopping needs validation rows; "
            "set data.validation or data.validation_share",
        ),
        (
            "train: {early_stopping: {metric: drift}}\n",
            "train.early_stopping needs validation rows; "
            "set data.validation or data.validation_share",
        ),
        (
            "train: {lr_scheduler: polynomial, learning_rate: 1e-7}\n",
            "lr_scheduler polynomial ends at 1e-07; raise learning_rate above that, or use cosine",
        ),
    ],
)
def test_settings_that_fail_only_in_a_library_are_refused(valid, problems, addition, message):
    (found,) = problems(valid + addition)
    assert found.endswith(message)


def test_what_loads_also_passes_the_json_schema(validator, valid, problems):
    for text in (valid, EVERY_SECTION):
        assert problems(text) == []
        assert list(validator.iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize(
    "addition",
    [
        "sed: 1\n",
        "train: {epochs: 0}\n",
        "train: {learning_rate: fast}\n",
        "train: {lr_scheduler: cosin}\n",
        "tuning: {rank: 8}\n",
        "tuning: {kind: full, rank: 8}\n",
        "tuning: {kind: lora, targets: 3}\n",
        "train: {checkpoint: {every: 0}}\n",
    ],
)
def test_what_does_not_load_fails_the_json_schema_too(addition, validator, valid, problems):
    assert problems(valid + addition) != []
    assert list(validator.iter_errors(yaml.safe_load(valid + addition))) != []


def test_the_json_schema_tells_editors_what_each_key_means():
    schema = recipe_json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert schema["title"] == "yrunner recipe"
    learning_rate = schema["$defs"]["TrainSection"]["properties"]["learning_rate"]
    assert learning_rate["description"] == "Peak learning rate."
    assert learning_rate["exclusiveMinimum"] == 0
    assert all(section["additionalProperties"] is False for section in schema["$defs"].values())
