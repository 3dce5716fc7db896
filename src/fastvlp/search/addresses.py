"""Addresses of index servers, shown without what is secret in them."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

from fastvlp.errors import UserError


def shown(uri: str) -> str:
    """Returns an address as it may be printed: without a password before the host or among its options."""
    without = re.sub(r"//([^/@:]*):[^/@]*@", r"//\1@", uri)
    return re.sub(r"([?&]password=)[^&#]*", r"\1...", without)


def options_of(uri: str, known: tuple[str, ...]) -> dict[str, str]:
    """Returns the options at the end of an address, `?tenant=a&database=b`.

    Raises:
        UserError: One of them is not `known`, or has no value.
    """
    query = urlsplit(uri).query
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in options.items():
        if name not in known or not value:
            raise UserError(
                f"{shown(uri)}: ?{name}= is no option of this address; it takes {', '.join(known) or 'none'}"
            )
    return options
