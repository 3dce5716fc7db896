"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message names the file, the field or record, and the remedy."""


def install(extra: str) -> str:
    """The remedy where an optional package is missing."""
    return f"pip install -e '.[{extra}]'"
