"""Constants shared by all modules."""

from jinja2 import TemplateError

IGNORE_INDEX = -100
"""Label of a token that is only context and not a target; PyTorch's default."""
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    AttributeError,
    ValueError,
    LookupError,
    ArithmeticError,
    RecursionError,
)
"""What rendering a chat template may raise: Jinja passes on errors of the functions it calls."""
