"""Documents that cannot be read: why, how many, and where the first of them are.

A reader raises `BadDocument` for one document, and the others are read all the same. The tally says at the end what
`data.on_error` makes of it: all are counted, and then either the corpus is refused or it goes on without them.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from moe.errors import BadInput

PLACES = 5  # of so many documents it is said where they are


class BadDocument(Exception):
    """One document that cannot be read."""

    def __init__(self, where: str, what: str, reason: str) -> None:
        """`where` (a file, or a file and a line) and `what` make a sentence without its full stop; `reason` is the kind
        that it is counted as."""
        super().__init__(f"{where}{what if what[0] in ':,' else f' {what}'}")
        self.reason = reason


def check_unicode(text: str, where: str, what: str) -> None:
    """Raise `BadDocument` for a string that no file can have: `what` is the part of the document at `where`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        told = f"{what} holds half a surrogate pair at character {error.start}"
        raise BadDocument(where, told.lstrip(), "with half a surrogate pair") from error


class Unreadable:
    """The documents that could not be read.

    counts  documents by reason
    places  sentences, without full stops, about the first `PLACES` of them
    """

    def __init__(self, on_error: str) -> None:
        """`on_error`: refuse or skip, as `data.on_error` says."""
        self.on_error = on_error
        self.counts: Counter[str] = Counter()
        self.places: list[str] = []

    def add(self, fault: BadDocument) -> None:
        """Count one more."""
        self.counts[fault.reason] += 1
        if len(self.places) < PLACES:
            self.places.append(str(fault))

    def check(self) -> None:
        """Raises `BadInput`, with all counts, for a corpus that must not go on without the documents counted here."""
        if self.counts and self.on_error == "refuse":
            raise BadInput(f"data: {self}: mend what is named, or go on without it with data.on_error=skip.")

    def say(self, say: Callable[[str], None]) -> None:
        """Tell what was left out, if anything was."""
        if self.counts:
            say(f"data: left out (data.on_error=skip): {self}")

    def record(self) -> dict[str, Any]:
        """For a manifest: plain JSON values, nothing where nothing was left out."""
        return {"unreadable": {"counts": dict(self.counts), "places": self.places}} if self.counts else {}

    @classmethod
    def of(cls, manifest: dict[str, Any], on_error: str) -> "Unreadable":
        """The inverse of `record`, out of a whole manifest."""
        tally = cls(on_error)
        tally.counts.update(manifest.get("unreadable", {}).get("counts", {}))
        tally.places += manifest.get("unreadable", {}).get("places", [])
        return tally

    def __str__(self) -> str:
        total = self.counts.total()
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())
        more = f"; and {total - len(self.places):,} more" if total > len(self.places) else ""
        plural = "document" if total == 1 else "documents"
        return f"{total:,} {plural} cannot be read ({reasons}): {'; '.join(self.places)}{more}"
