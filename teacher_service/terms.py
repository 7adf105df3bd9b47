"""The terms of an account: which answers it is sold, and how much it may ask for at a time."""

import json
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

from protos.codec import MOST_DECIMALS

MOST_COUNT = 2**31 - 1


class TermsError(ValueError):
    """Terms that cannot be meant, in one line: where, expected, got."""

    def __init__(self, field: str, expected: str, got: object) -> None:
        super().__init__(f"{field}: expected {expected}, got {got!r}")
        self.field = field
        self.expected = expected
        self.got = got


@dataclass(frozen=True, kw_only=True)
class Terms:
    """None, everywhere: as the server has it, or no limit."""

    answers: str | None = None
    """"soft": probabilities; "hard": the index of the most probable class."""
    top_k: int | None = None
    """Of soft answers: only the most probable classes, this many."""
    decimals: int | None = None
    """Of soft answers: probabilities rounded to so many decimals."""
    pictures_per_second: float | None = None
    """Rate of pictures asked for, replays included; a burst may be one second's worth, or one batch."""
    max_streams: int | None = None
    """Most streams open at once on one server."""
    max_outstanding_pictures: int | None = None
    """Most pictures asked for and not yet answered on one server."""
    suspended: bool | None = None
    """Whether its customers are refused, whatever they show."""

    def __post_init__(self) -> None:
        if self.answers not in (None, "soft", "hard"):
            raise TermsError("answers", "soft or hard", self.answers)
        if not _whole(self.decimals, MOST_DECIMALS):
            raise TermsError("decimals", f"a whole number, 1 to {MOST_DECIMALS}", self.decimals)
        if not _positive(self.pictures_per_second):
            raise TermsError("pictures_per_second", "a number above 0 and below 1e9", self.pictures_per_second)
        for name in ("top_k", "max_streams", "max_outstanding_pictures"):
            if not _whole(getattr(self, name), MOST_COUNT):
                raise TermsError(name, f"a whole number, 1 to {MOST_COUNT}", getattr(self, name))
        if type(self.suspended) not in (bool, type(None)):
            raise TermsError("suspended", "true or false", self.suspended)

    def over(self, default: "Terms") -> "Terms":
        """These terms, with another's where they say nothing."""
        return Terms(**(default.said() | self.said()))

    def changed(self, said: "Terms", unset: Collection[str] = ()) -> "Terms":
        """These terms with what ``said`` says, and without the fields that ``unset`` names.

        Raises TermsError for a name that is no field's, and for one that is set and unset at once.
        """
        for name in unset:
            if name not in FIELDS:
                raise TermsError("unset", f"some of {', '.join(FIELDS)}", name)
            if getattr(said, name) is not None:
                raise TermsError(name, "to be set or unset", "both")
        return replace(said.over(self), **dict.fromkeys(unset))

    def said(self) -> dict[str, Any]:
        """Name -> value of what is said, in the order of the fields."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to_json(self) -> str:
        """Only what is said, in a fixed order; "{}" for no terms of its own."""
        return json.dumps(self.said(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Terms":
        """Raises TermsError."""
        try:
            said = json.loads(text)
        except ValueError:
            raise TermsError("terms", "a JSON object", text[:80]) from None
        if not isinstance(said, dict) or not said.keys() <= set(FIELDS):
            raise TermsError("terms", f"a JSON object with some of {', '.join(FIELDS)}", text[:80])
        return cls(**said)


FIELDS = tuple(field.name for field in fields(Terms))


def _whole(value: object, most: int) -> bool:
    return value is None or (type(value) is int and 1 <= value <= most)


def _positive(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < 1e9)  # type: ignore[operator]
