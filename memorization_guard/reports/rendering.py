"""The templates of our pages, in ``templates/``. Every value in them is escaped unless it is ``Markup``."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .charts import count, line, short


def render(template: str, **values: Any) -> Markup:
    """A template with ``values`` as HTML. A name in the template that has no value is an error."""
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("memorization_guard.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters |= {
        "count": count,
        "line": lambda number, path: Markup(line(number, path)),
        "number": "{:,}".format,
        "numeric": "#{}".format,
        "short": short,
    }
    return environment


def _printable(value: Any) -> Any:
    """``value`` without control characters, which HTML cannot hold."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", value) if type(value) is str else value
