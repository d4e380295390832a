"""Invariant: an output that the files hold nothing for does no harm until it is used, and then says what to choose."""

from __future__ import annotations

from typing import Any, NoReturn


class MissingPartError(AttributeError):
    """A part that no file holds was used. An AttributeError, since hosts ask objects for what they have."""


class Missing:
    """Stands for a CLIP or VAE that is not there; whatever is asked of it raises MissingPartError with the remedy.

    None in its place, as the stock loaders give it, would end in "'NoneType' object has no attribute 'decode'".
    """

    def __init__(self, message: str) -> None:
        self.message = message

    def __getattr__(self, name: str) -> NoReturn:
        raise MissingPartError(self.__dict__.get("message", name))

    def __bool__(self) -> bool:
        return False


def message_of(obj: Any) -> str | None:
    """The remedy of a missing part, None for anything else."""
    return obj.message if isinstance(obj, Missing) else None
