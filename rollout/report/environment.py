"""The templates, and how numbers and strings are shown in them."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from rollout.report.text import FILTERS, number, percent


@cache
def environment(relevance_in_percent: bool) -> Environment:
    """The templates of all pages; what is put into them is escaped, and what is missing is an error."""
    environment = Environment(
        loader=PackageLoader("rollout.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS, relevance=percent if relevance_in_percent else number)
    return environment
