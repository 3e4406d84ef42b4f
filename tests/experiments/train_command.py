"""Settings of a small run as words of a command line."""

from tests.small_runs import overrides


def words(corpus, run, changes=None) -> list[str]:
    """`small_runs.overrides` as a command line."""
    groups = {"data.name": "data=text", "tokenizer.name": "tokenizer=byte"}
    pairs = {key: value for key, value in overrides(corpus, run, changes).items() if key not in groups}
    return [*groups.values(), *(f"{key}={value}" for key, value in pairs.items())]
