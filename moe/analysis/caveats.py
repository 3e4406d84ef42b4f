"""What each metric of specialisation cannot tell, and whether it may be drawn as one.

A metric is drawn if, on planted routers, it ranks those that do what it is asked about above those that do not, and a
name if it is seldom false. `python -m experiments.trust` tries that; what stands here is held to its results.
"""

from typing import NamedTuple


class Caveat(NamedTuple):
    """What to know of a metric before believing it."""

    asks: str  # what experts go by: domain | read | predicted; "": another question, and no answer to these
    drawn: bool  # it answers what it is asked; for another question it says nothing of
    cannot_tell: str  # one sentence, for whoever reads the figure


CAVEATS = {
    "share of a domain": Caveat(
        "domain", False, "An expert that takes much of everything has a large share of every domain: read the lift."
    ),
    "lift of a domain": Caveat(
        "domain",
        True,
        "It does not say why, an expert that goes by words has it too, and of few documents it is chance.",
    ),
    "bits of domain": Caveat(
        "domain", True, "It is above 0 by chance, more so for few documents, and does not say which expert."
    ),
    "bits over dealt labels": Caveat(
        "domain", True, "It says that experts and domains hang together, not why: words that domains have suffice."
    ),
    "names": Caveat(
        "domain", False, "An expert that goes by words takes after the domain that has them: ask for more than tokens."
    ),
    "names beyond tokens": Caveat(
        "domain", True, "A format, a source or a length that goes with a domain cannot be told from the domain."
    ),
    "names beyond tokens and formats": Caveat(
        "domain", True, "Formats have to be known, and one that is always the domain's leaves nothing to tell."
    ),
    "share of a token read": Caveat(
        "read", False, "An expert that takes much of everything has a large share of every token: read the lift."
    ),
    "lift of a token read": Caveat(
        "read", True, "An expert of a domain has the words of the domain too, whether or not it goes by words."
    ),
    "share of a token predicted": Caveat(
        "predicted", False, "An expert that takes much of everything has a large share of every token: read the lift."
    ),
    "lift of a token predicted": Caveat(
        "predicted", True, "What follows a token depends on the token: an expert of either has a lift of both."
    ),
    "co-activation": Caveat("", True, "Experts go together for any reason, a skewed load included, or for none."),
    "router information": Caveat("", True, "A router that is sure and balanced may be sure about anything."),
    "MaxVio": Caveat("", True, "How even a load is says nothing of what the experts are for."),
    "load entropy": Caveat("", True, "How even a load is says nothing of what the experts are for."),
}
