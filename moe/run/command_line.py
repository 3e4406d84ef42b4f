"""Command lines: those that a person can paste, quoted for the shell and inside for Hydra's grammar; and what is wrong
with one that has options, in a sentence.
"""

import argparse
import difflib
import re
import shlex
import sys
from typing import Any, NoReturn

# What Hydra takes for text as it stands; a word without a slash must not be one of its numbers or constants either.
PLAIN = re.compile(r"(?!(?:null|true|false|inf|nan)\Z)[A-Za-z_][A-Za-z0-9_.-]*|[A-Za-z0-9_.-]*/[A-Za-z0-9_./-]*", re.I)


def quoted(value: str) -> str:
    """Any text as Hydra's quoted value, which is that text and nothing else."""
    # A backslash is special before an interpolation (OmegaConf), and in quotes before a quote or the end (Hydra).
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    value = re.sub(r"(\\*)('|\Z)", lambda end: end[1] * 2 + (r"\'" if end[2] else ""), value)
    return f"'{value}'"


def override(key: str, value: Any) -> str:
    """`key=value` for Hydra. A text is quoted only where its grammar would read it as something else."""
    if isinstance(value, str):
        return f"{key}={value if PLAIN.fullmatch(value) else quoted(value)}"
    return f"{key}={shown(value)}"


def shown(value: Any) -> str:
    """A value as a command line takes it; of text, only the empty one is quoted."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return '""' if value == "" else str(value)


def command_line(name: str, *words: str) -> str:
    """What to type to run `experiments.<name>` with these words."""
    return shlex.join(["python", "-m", f"experiments.{name}", *words])


class Options(argparse.ArgumentParser):
    """The options of a command that Hydra does not read. What they cannot be is one sentence on stderr, and exit status
    2."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """In place of the usage, which is what --help is for."""
        print(f"error: {self.sentence(message)}", file=sys.stderr)
        raise SystemExit(2)

    def sentence(self, message: str) -> str:
        """What argparse's `message` means, with what would be accepted."""
        # Which options there are, and whether this is one.
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        names = [name for action in shown for name in action.option_strings if name.startswith("--")]
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            name, bare = unknown[1].partition("=")[0], [option.lstrip("-") for option in names]
            kind = "option" if name.startswith("-") else "word of this command, which takes options alone"
            close = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.5)
            meant = f"did you mean --{close[0]}" if close and name.startswith("-") else ""
            return f"{name} is no {kind}; {meant or 'accepted: ' + ', '.join(sorted(names))}."

        # What one of them takes.
        if missing := re.match(r"the following arguments are required: ([^\s,]+)", message):
            says = next((action.help for action in shown if missing[1] in action.option_strings), "")
            return f"{missing[1]} is needed: {says}."
        if choice := re.match(r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", message):
            valid = ", ".join(re.findall(r"[^\s',]+", choice[3]))
            return f"{choice[1]} {choice[2].strip(chr(39))} is not one of {valid}."
        if wrong := re.match(r"argument (\S+): invalid (\w+) value: '(.*)'", message):
            wanted = {"int": "a whole number", "float": "a number"}.get(wrong[2], wrong[2])
            return f"{wrong[1]} {wrong[3]} must be {wanted}."
        if lacking := re.match(r"argument (\S+): expected (?:one|at least one) argument", message):
            return f"{lacking[1]} needs a value."
        return f"{message.rstrip('.')}."
