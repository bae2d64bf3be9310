"""What a user can mend: the message names the place, what was expected and got, and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A fault in the recipe, the data or the machine; the command line prints its message without a traceback."""


def nearest(name: object, choices: Iterable[str]) -> str:
    """` Did you mean ...?` for a misspelt name, or the list of choices."""
    choices = list(choices)
    close = difflib.get_close_matches(str(name), choices, n=1)
    return f" Did you mean `{close[0]}`?" if close else f" Choices: {', '.join(choices)}."
