"""What assemblers made of a kernel: registers, spills, instructions, and the loop in which a matmul spends its time.

That loop is the innermost one with the most matrix instructions (multiply-adds, where there are none): a natural loop,
all that can come back to its head, without loops inside of it, which are waits that try again. Code that a compiler
puts elsewhere is counted where it runs, not where it stands.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import triton
from triton.knobs import NvidiaTool

MATRIX = re.compile(r"[HQ]GMMA|[HQ]MMA|DMMA|UTC\w*MMA|v_mfma")
MULTIPLY = re.compile(r"FFMA|DFMA|v_(pk_)?fma")  # of exact float32 and float64
BARRIER = re.compile(r"BAR\.|SYNCS\.PHASECHK|s_barrier")  # of a block's threads, or of a copy engine and them


class Instruction(NamedTuple):
    """One line of machine code."""

    text: str
    labels: tuple[str, ...]  # that stand before it
    target: str  # of a jump; "" for all else
    falls: bool  # whether the next line may follow it


class Loop(NamedTuple):
    """A matmul's loop over the summed width, a pass of which is a step of k, and what stands outside of it."""

    instructions: int
    barriers: int
    copies: (
        int | None
    )  # groups of asynchronous copies that its strictest wait leaves in flight; None: it waits for none
    products: int | None  # groups of asynchronous matrix instructions, likewise
    outside: int  # instructions of the kernel that are not in it


class Reading(NamedTuple):
    """A kernel's machine code in numbers."""

    registers: int  # of a thread; of both kinds on AMD
    spilled: int  # bytes that a thread stores to a stack
    instructions: Counter[str]  # by name; of a matmul, and on AMD of matrix instructions alone
    loop: Loop | None  # of a matmul


def nvidia(cubin: bytes, matmul: bool) -> Reading:
    """Read a cubin; bytes that are spilled are those of its STL instructions (ptxas: spill stores)."""

    def read(tool: NvidiaTool, *flags: str) -> str:
        return subprocess.run([tool.path, *flags, file.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", read(triton.knobs.nvidia.cuobjdump, "-res-usage"))
        assert usage, "cuobjdump names no registers"
        registers, stack = map(int, usage.groups())
        code = read(triton.knobs.nvidia.nvdisasm, "-c", "-ndf") if matmul or stack else ""
    words = {"": 4, ".64": 8, ".128": 16}
    spilled = sum(words[width] for width in re.findall(r"\bSTL(\.64|\.128|)\b", code))
    count = Counter(re.findall(r"\b[A-Z]+\b", code))
    return Reading(registers, spilled, count, main_loop(sass(code)) if matmul else None)


def amd(code: str, matmul: bool) -> Reading:
    """Read AMD's assembly, which ends with the assembler's own account."""
    number = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)$", code, re.MULTILINE)}
    count = Counter({"v_mfma": code.count("v_mfma")})
    loop = main_loop(gcn(code)) if matmul else None
    return Reading(number["vgpr_count"], 4 * number["vgpr_spill_count"], count, loop)


def sass(code: str) -> list[Instruction]:
    """nvdisasm's lines: `/*0f30*/ @!P1 BRA P0, `(.L_x_1) ;`. A jump under a predicate, before it or as its operand, may
    fall through."""
    lines: list[Instruction] = []
    labels: tuple[str, ...] = ()
    for line in code.splitlines():
        if label := re.match(r"(\.L\w*):", line):
            labels += (label[1],)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*(.*?)\s*;", line):
            predicate, text = match.groups()
            jump = re.match(r"BRA\S*\s+(.*)`\(([^)]+)\)", text)
            falls = bool(predicate or (jump and jump[1])) or not (jump or text.startswith(("EXIT", "RET")))
            lines.append(Instruction(text, labels, jump[2] if jump else "", falls))
            labels = ()
    return lines


def gcn(code: str) -> list[Instruction]:
    """The compiler's lines for AMD: `s_cbranch_scc1 .LBB0_9`."""
    lines: list[Instruction] = []
    labels: tuple[str, ...] = ()
    for line in code.splitlines():
        if label := re.match(r"(\.LBB\w*):", line):
            labels += (label[1],)
        elif match := re.match(r"\t([a-z]\w+)([^;]*)", line):
            jump = re.fullmatch(r"\s+(\.LBB\w+)\s*", match[2]) if "branch" in match[1] else None
            falls = match[1] not in ("s_branch", "s_endpgm")
            lines.append(Instruction(match[0].strip(), labels, jump[1] if jump else "", falls))
            labels = ()
    return lines


def main_loop(code: list[Instruction]) -> Loop | None:
    """The loop of a matmul, or None for code without one."""
    # Every natural loop: a jump to a line that is on every way to the jump, and what lies between the two.
    followers = _followers(code)
    loops: dict[int, set[int]] = {}
    for tail, heads in enumerate(followers):
        for head in heads:
            if head <= tail and tail not in _reached(followers, 0, without=head):
                loops[head] = loops.get(head, set()) | _body(followers, head, tail)

    # The innermost with the most matrix instructions, less the waits inside of it.
    for wanted in (MATRIX, MULTIPLY):
        products = {head: sum(bool(wanted.match(code[at].text)) for at in body) for head, body in loops.items()}
        inner = [head for head in loops if products[head] and not any(
            products[other] and loops[other] < loops[head] for other in loops
        )]  # fmt: skip
        if inner:
            chosen = max(inner, key=lambda head: products[head])
            waits = [body for head, body in loops.items() if body < loops[chosen]]
            return _loop(code, loops[chosen].difference(*waits), len(code))
    return None


def _loop(code: list[Instruction], body: set[int], total: int) -> Loop:
    """What the lines of a body are."""
    texts = [code[at].text for at in body]

    def strictest(wait: str) -> int | None:
        return min((int(match[1], 0) for text in texts if (match := re.match(wait, text))), default=None)

    return Loop(
        instructions=len(body),
        barriers=sum(bool(BARRIER.match(text)) for text in texts),
        copies=strictest(r"(?:DEPBAR\.LE SB0, |s_waitcnt .*vmcnt\()(\w+)"),
        products=strictest(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)"),
        outside=total - len(body),
    )


def _followers(code: list[Instruction]) -> list[list[int]]:
    """Where every line may go on."""
    place = {label: at for at, instruction in enumerate(code) for label in instruction.labels}
    after = [[at + 1] if line.falls and at + 1 < len(code) else [] for at, line in enumerate(code)]
    for at, line in enumerate(code):
        if line.target in place:
            after[at].append(place[line.target])
    return after


def _reached(followers: list[list[int]], start: int, without: int) -> set[int]:
    """Lines that can be come to from a line, not through another."""
    return _closure(followers, [start], {without})


def _body(followers: list[list[int]], head: int, tail: int) -> set[int]:
    """Lines from which the tail can be come to, not through the head; and both."""
    before: list[list[int]] = [[] for _ in followers]
    for at, nexts in enumerate(followers):
        for other in nexts:
            before[other].append(at)
    return _closure(before, [tail], {head}) | {head}


def _closure(edges: list[list[int]], todo: Iterable[int], barred: set[int]) -> set[int]:
    seen, todo = set[int](), [at for at in todo if at not in barred]
    while todo:
        at = todo.pop()
        if at not in seen:
            seen.add(at)
            todo += [other for other in edges[at] if other not in barred]
    return seen
