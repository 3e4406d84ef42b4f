"""What a person sees of training: a live bar and a strip of expert load on a terminal, of which a last line stays, and
plain lines in a pipe. When nobody reads any more, training goes on all the same."""

import sys
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from moe.run import terminal
from moe.run.summary import MetricsLine

STRIP = "▁▂▃▄▅▆▇█"
STRIP_WIDTH = 64  # experts shown per layer; neighbours share a column beyond that


def load_strip(count_E: Tensor) -> Text:
    """One character per expert: its load against the fair one, from none (a red dot) over fair (the middle) to twice
    the fair load and beyond (a full block, yellow)."""
    share = (count_E.double() / count_E.double().mean().clamp_min(1e-9)).tolist()
    width = -(-len(share) // STRIP_WIDTH)
    text = Text()
    for i in range(0, len(share), width):
        group = share[i : i + width]
        load = sum(group) / len(group)
        if load == 0:
            text.append("·", "bold red")
        else:
            text.append(STRIP[min(7, int(load * 4))], "yellow" if load >= 2 else "green")
    return text


def plain_line(line: MetricsLine, steps: int) -> str:
    """A metrics line as a sentence for a log file."""
    parts = [f"step {line.step}/{steps}"]
    if line.lm_loss is not None:
        parts += [f"loss {line.lm_loss:.4f}", f"{line.tokens_per_s:,.0f} tokens/s", f"lr {line.lr:.2e}"]
    if line.answers:
        parts += [f"{name} {value:.3g}" for name, value in line.answers.items()]
    if line.layers:
        parts.append(f"max_vio {max(metrics.max_vio for metrics in line.layers):.2f}")
        parts.append(f"dead {sum(metrics.dead for metrics in line.layers)}")
    if line.val:
        parts.append(f"val loss {line.val.loss:.4f} bpb {line.val.bpb:.4f}")
    return "  ".join(parts)


class Watch:
    """Shows metrics lines. Use as a context manager; `say` prints a line above the bar."""

    def __init__(self, name: str, steps: int, done: int, every: int) -> None:
        self.name, self.steps, self.every, self.val = name, steps, every, ""
        self.console = Console()
        self.live: Live | None = None
        self.left = False  # whether the reader has gone, and stderr was told
        self.last: MetricsLine | None = None
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn(f"[bold]{escape(terminal.printable(name))}"), BarColumn(), MofNCompleteColumn(),
                TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=steps, completed=done, note="")
            self.live = Live(self.bar, console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Watch":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()
            if self.last:  # the bar is gone
                self.say(plain_line(self.last, self.steps))

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.live:
            self.console.print(terminal.printable(text), markup=False, highlight=False)
        else:
            terminal.say(text)

    def step(self, line: MetricsLine, counts: list[Tensor]) -> None:
        """Show one metrics line; `counts` holds each MoE layer's routed rows per expert."""
        if line.val:
            self.val = f"  val {line.val.loss:.3f}"
        self.last = line
        if self.live:
            if line.lm_loss is not None:
                vio = f"  max_vio {max(metrics.max_vio for metrics in line.layers):.2f}" if line.layers else ""
                note = f"loss {line.lm_loss:.3f}{self.val}{vio}  {line.tokens_per_s:,.0f} tokens/s"
                self.bar.update(self.task, completed=line.step, note=note)
            strips = [
                Text(f"layer {metrics.layer:>3} ") + load_strip(count_E)
                for metrics, count_E in zip((line.layers or []) if counts else [], counts, strict=True)
            ]
            self.live.update(Group(self.bar, *strips))
        elif line.val or line.step % self.every == 0 or line.step == self.steps:
            terminal.say(plain_line(line, self.steps))
        if (error := terminal.lost()) and not self.left:
            self.left = True
            why = f"Nobody reads standard output ({error.strerror})"
            print(f"{why}: training goes on; a signal ends it.", file=sys.stderr, flush=True)
