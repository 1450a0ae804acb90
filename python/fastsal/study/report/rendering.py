"""Render the templates of pages."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from fastsal.errors import FastsalError


def rendered(template: str, **values: Any) -> str:
    """Return a page: a template of the folder `templates` with its values, which are escaped.

    Raises:
        FastsalError: jinja2 is not installed.
    """
    if find_spec("jinja2") is None:
        raise FastsalError(
            "an HTML report requires jinja2: pip install 'fastsal[report]', or use --format md"
        )
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastsal.study.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)
