"""The one sentence for an object that is not there, the same for every noun."""

from oscloudd.errors import NotFoundError

# A key comes from the caller and may be of any length; this much of it is enough to be known by.
_SHOWN_CHARACTERS = 80

# What the original called our templates.
_WORDS = {"template": "disk template"}


def missing(noun: str, key: int | str) -> NotFoundError:
    """Give the error for a `vm`, `disk`, `network` or `template` that is not there."""
    shown = str(key)[:_SHOWN_CHARACTERS]
    return NotFoundError(
        f"{_WORDS.get(noun, noun)} {shown!r} not found",
        hint=f"see: oscloudctl {noun}-list",
        object=noun,
        name=shown,
    )
