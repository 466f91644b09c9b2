"""Pages and charts from the templates in ``templates/``. Needs Jinja2, which the hosts may not have."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .series import line
from .words import count, short


def render(template: str, **values: Any) -> Markup:
    """A template with its values. Every value is escaped, unless it is ``Markup``. A name without a value is an error."""
    return Markup(_ENVIRONMENT.get_template(template).render(values))


def _printable(value: Any) -> Any:
    """``value``; in a text, control characters, which HTML cannot hold, become replacement characters."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", value) if type(value) is str else value


_ENVIRONMENT = Environment(
    loader=PackageLoader(__package__),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_printable,
)
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
_ENVIRONMENT.filters |= {
    "count": count,
    "line": lambda number, path: Markup(line(number, path)),
    "number": "{:,}".format,
    "numeric": "#{}".format,
    "short": short,
}
