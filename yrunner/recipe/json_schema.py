"""The recipe as JSON Schema: for editors, and for the sentences about what a key may hold."""

from copy import deepcopy
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from yrunner.recipe.schema import Recipe

Schema = dict[str, Any]

# What YAML 1.1 parsers, such as `yaml.safe_load`, hand over as text although it is a number: 1e-4.
_NUMBER_AS_TEXT = r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"


class _WithoutFieldTitles(GenerateJsonSchema):
    """Pydantic's schema without a title per field: editors would show "Max Lr" above max_lr."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def strict_schema() -> Schema:
    """The schema of the values that `load.py` hands to Pydantic; do not change the result."""
    schema = Recipe.model_json_schema(schema_generator=_WithoutFieldTitles)
    for union in [part for part in _parts(schema) if "discriminator" in part]:
        for reference in union["discriminator"]["mapping"].values():
            variant = schema["$defs"][reference.rsplit("/", 1)[1]]
            # Pydantic needs the kind to choose a variant, also where the variant has a default.
            variant["required"] = sorted({*variant.get("required", []), "kind"})
    return schema


def recipe_json_schema() -> Schema:
    """JSON Schema (draft 2020-12) of a recipe, for YAML language servers (`yrun schema`)."""
    schema = deepcopy(strict_schema())
    for part in _parts(schema):
        part.pop("discriminator", None)  # OpenAPI's word, unknown to JSON Schema
        if part.get("type") == "number":
            part["type"] = ["number", "string"]
            part["pattern"] = _NUMBER_AS_TEXT
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "yrunner recipe",
    }


def resolve(schema: Schema) -> Schema:
    """Follow references, and look through "or null", until the schema says what is wanted."""
    while True:
        options = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
        if "$ref" in schema:
            target = strict_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        elif len(options) == 1:
            target = options[0]
        else:
            return schema
        beside = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf")}
        schema = {**target, **beside}


def variants(schema: Schema) -> dict[str, Schema]:
    """The members of a union that is told apart by `kind`, by that kind; else nothing."""
    mapping = schema.get("discriminator", {}).get("mapping", {})
    return {kind: resolve({"$ref": reference}) for kind, reference in mapping.items()}


def _parts(schema: Any) -> list[Schema]:
    """Every schema inside a schema, itself first."""
    if isinstance(schema, list):
        return [part for item in schema for part in _parts(item)]
    if not isinstance(schema, dict):
        return []
    inner = [part for key, item in schema.items() if key != "default" for part in _parts(item)]
    return [schema, *inner]
