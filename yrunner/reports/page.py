"""A page as one HTML file, from a template: what it is given stays text, and does no harm."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from yrunner.console import format_cell, printable


def render_page(template: str, **values: Any) -> str:
    """The whole page as text; `template` is the name of a file of this folder."""
    environment = Environment(
        loader=PackageLoader("yrunner", "reports"),
        autoescape=True,
        finalize=_without_control_characters,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = format_cell
    return environment.get_template(template).render(**values)


def _without_control_characters(value: Any) -> Any:
    """Make answers of a model harmless; what the template itself wrote is left alone."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
