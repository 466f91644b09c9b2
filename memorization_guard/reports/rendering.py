"""What fills in the templates in ``templates/``. Needs Jinja2, which the hosts may not have."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def printable(value: Any) -> Any:
    """``value``; in a text, control characters, which HTML cannot hold, become replacement characters."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", value) if type(value) is str else value


#: Every value is escaped, and a name that does not exist is an error.
ENVIRONMENT = Environment(
    loader=PackageLoader(__package__),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=printable,
)
ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}


def render(template: str, /, **values: Any) -> str:
    """The text of a template with its values."""
    return ENVIRONMENT.get_template(template).render(values)
