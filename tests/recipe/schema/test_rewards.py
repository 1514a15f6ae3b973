"""Which rewards a recipe takes; what is wrong with one has a line and a column."""

import json

import pytest

from yrunner.recipe.load import load_recipe, recipe_to_yaml

RL = "train: {stage: rl}\nloss: {kind: grpo}\n"


@pytest.fixture
def found(folder, valid, problems):
    """The problems of a recipe with these rewards, a list in YAML; they begin in line 10."""
    (folder / "rewards.py").write_text("import math\ndef judge(completions): ...\nother = judge\n")
    (folder / "broken.py").write_text("def judge(:\n")
    (folder / "form.json").write_text('{"type": "object"}')
    (folder / "bad.json").write_text('{"type": "objekt"}')
    (folder / "list.json").write_text("[1]")

    def found(*rewards: str) -> list[str]:
        return problems(f"{valid}{RL}rewards:\n" + "".join(f"  - {each}\n" for each in rewards))

    return found


@pytest.mark.parametrize(
    "reward",
    [
        "{kind: exact}",
        "{kind: exact, column: solution, ignore: [case], tag: answer, weight: -0.5, name: right}",
        "{kind: pattern, pattern: '^\\d+$', match: whole}",
        "{kind: xml}",
        "{kind: xml, tags: [think, answer], grade: whole, weight: 0.2}",
        "{kind: number, tolerance: 0.01, relative_tolerance: 0.1}",
        "{kind: json_schema}",
        "{kind: json_schema, file: form.json, grade: parts}",
        "{kind: json_schema, json_schema: {type: array, items: {type: number}}}",
        "{kind: json_schema, column: form}",
        "{kind: length, unit: words, minimum: 5, maximum: 50, margin: 10}",
        "{kind: repetition, measure: windowed, size: 3}",
        "{kind: language, language: zh}",
        "{kind: reward_model, model: base, batch_size: 4}",
        "{kind: python, function: rewards.py:judge}",
        "{kind: python, function: 'rewards.py:other'}",
    ],
)
def test_every_kind_of_reward_loads_and_comes_back_from_yaml(reward, found, folder, tmp_path):
    assert found(reward) == []
    recipe = load_recipe(folder / "recipe.yaml")
    (folder / "again.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(folder / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("reward", "column", "sentence"),
    [
        ("{kind: exakt}", 12, 'got "exakt", did you mean "exact"?'),
        ("{kind: exact, colum: x}", 19, 'unknown key, did you mean "column"?'),
        ("{kind: exact, ignore: [cases]}", 28, 'did you mean "case"?'),
        ("{kind: pattern}", 5, "this key is missing"),
        ("{kind: pattern, pattern: '(a'}", 30, "is not a valid regular expression"),
        ("{kind: pattern, pattern: '*a'}", 30, "is not a valid regular expression"),
        ("{kind: xml, tags: [a, a]}", 23, '"a" is given twice; remove one of them'),
        ("{kind: xml, tags: []}", 23, "must be a list of at least 1"),
        ("{kind: xml, tags: ['<answer>']}", 24, "is not the name of a tag; write it without"),
        ("{kind: exact, tag: 'my answer'}", 24, "is not the name of a tag"),
        ("{kind: json_schema, json_schema: {type: objekt}}", 25, "this is not a JSON Schema: "),
        ("{kind: json_schema, json_schema: {$ref: '#/no'}}", 25, 'it refers to "#/no", which'),
        ("{kind: json_schema, file: bad.json}", 31, "bad.json is not a JSON Schema: 'objekt'"),
        ("{kind: json_schema, file: list.json}", 31, "it is not an object"),
        ("{kind: json_schema, file: rewards.py}", 31, "rewards.py:1:1: Expecting value"),
        ("{kind: json_schema, file: no.json}", 31, "there is no file"),
        (
            "{kind: json_schema, file: form.json, column: x}",
            25,
            "file and column cannot be combined",
        ),
        ("{kind: number, tolerance: -1}", 31, "must be a number of at least 0"),
        ("{kind: number, tolerance: .nan}", 31, "it must be finite"),
        ("{kind: exact, weight: .inf}", 27, "it must be finite"),
        ("{kind: length}", 5, "needs minimum, maximum or both"),
        ("{kind: length, minimum: 5, maximum: 3}", 32, "maximum must not be below minimum"),
        ("{kind: length, maximum: 3, tag: answer}", 32, "unit tokens counts the whole answer"),
        ("{kind: language, language: fr}", 32, 'must be one of "zh", "en"'),
        ("{kind: reward_model, model: nowhere}", 33, "there is no file"),
        ("{kind: python, function: rewards.py}", 30, "names no function; write file.py:name"),
        ("{kind: python, function: 'no.py:judge'}", 30, "there is no file"),
        ("{kind: python, function: 'rewards.py:jugde'}", 30, 'did you mean "judge"?'),
        ("{kind: python, function: 'rewards.py:x'}", 30, "it has math, judge, other"),
        ("{kind: python, function: 'broken.py:judge'}", 30, "broken.py:1:11: invalid syntax"),
    ],
)
def test_a_wrong_setting_has_its_line_and_column(reward, column, sentence, found):
    (problem,) = found(reward)
    assert problem.startswith(f"recipe.yaml:10:{column}: rewards.0"), problem
    assert sentence in problem


def test_two_rewards_of_one_kind_need_names(found):
    (problem,) = found("{kind: exact}", "{kind: exact, column: other}")
    assert problem == 'recipe.yaml:9:1: two rewards have the name "exact"; rename one'
    assert found("{kind: exact}", "{kind: exact, column: other, name: other}") == []


def test_a_tag_must_be_one_of_the_form(found):
    xml = "{kind: xml, tags: [reasoning, answer]}"
    (problem,) = found(xml, "{kind: exact, tag: anser}")
    assert problem == (
        'recipe.yaml:11:19: rewards.1.tag is "anser", but the tags of the reward xml are '
        'reasoning, answer, did you mean "answer"?'
    )
    assert found(xml, "{kind: exact, tag: answer}") == []
    assert found("{kind: exact, tag: anser}") == []


def test_the_schema_for_editors_knows_the_rewards():
    from yrunner.recipe.schema.recipe import Recipe

    assert "ExactReward" in json.dumps(Recipe.model_json_schema())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("rollout: {engine: vllm}\ntuning: {kind: full}\n", "tuning.kind full"),
        ("rollout: {engine: vllm}\ntuning: {kind: qlora}\n", "tuning.kind qlora"),
        ("rollout: {engine: vllm}\ntuning: {kind: lora, variant: dora}\n", "dora"),
        ("rollout: {engine: vllm}\ntuning: {kind: lora, rank: 600}\n", "above 512"),
        ("rollout: {engine: vllm}\ndistributed: {processes: 2}\n", "several processes"),
        ("rollout: {gpu_share: 0.5}\n", "rollout.gpu_share is for engine vllm"),
        ("rollout: {engine: sglang}\n", "engine"),
        ("rollout: {resample: -1}\n", "resample"),
    ],
)
def test_what_vllm_cannot_write_with_is_refused(more, sentence, folder, valid, problems):
    (line,) = problems(f"{valid}{RL}rewards: [{{kind: exact}}]\n{more}")
    assert sentence in line


@pytest.mark.parametrize(
    "more",
    [
        "rollout: {engine: vllm, gpu_share: 0.5}\ntuning: {kind: lora, variant: rslora}\n",
        "keep: {kind: self_replay}\n",
        "rollout: {resample: 3}\n",
        "distributed: {deepspeed: {stage: 3}}\n",
    ],
)
def test_what_goes_with_rewards(more, valid, problems):
    assert problems(f"{valid}{RL}rewards: [{{kind: exact}}]\n{more}") == []
