"""Gluon kernels run line by line as Python on CPU tensors: nothing of Triton's interprets them.

`running(module, kernel)` puts stand-ins in the place of the names that a module takes from Gluon. Partitions take turns
in one order; nothing is timed. Whatever is asynchronous happens as late as it may (a copy lands once every partition
waits, a product is made at the wait that it must not pass) and whatever is awaited is seen at once, so that a barrier
that is missing, too early or never reached shows on every run: as NaN, as another tile's numbers, or as a deadlock.
With `eager` a copy lands as it is asked for, so that a stage that is given back before it was read shows as well.
Layouts are not looked at: that they fit is the compiler's to say.
"""

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from triton.experimental.gluon import language as real
from triton.experimental.gluon._runtime import GluonJITFunction

DTYPES = {
    real.int64: torch.int64,
    real.float32: torch.float32,
    real.float16: torch.float16,
    real.bfloat16: torch.bfloat16,
}
GLUON = {dtype: name for name, dtype in DTYPES.items()}


class Value(torch.Tensor):
    """A tensor of a kernel, or a piece of shared memory, with Gluon's methods where they differ from torch's."""

    def to(self, dtype):
        return super().to(DTYPES.get(dtype, dtype))

    def split(self):
        return self[..., 0], self[..., 1]

    def index(self, i):
        return self[int(i)]


def _value(tensor):
    return tensor.as_subclass(Value)


class Pointer:
    """Elements of a tensor, which no access leaves."""

    def __init__(self, tensor, at=0):
        self.memory, self.at, self.dtype = tensor, at, SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset):
        return Pointer(self.memory, self.at + offset)

    def _index(self, mask):
        at = torch.as_tensor(self.at).as_subclass(torch.Tensor)
        mask = torch.as_tensor(True if mask is None else mask).as_subclass(torch.Tensor).expand(at.shape)
        assert ((at >= 0) & (at < self.memory.numel()))[mask].all(), "an address is outside its tensor"
        return at, mask

    def load(self, mask=None, other=None):
        at, mask = self._index(mask)
        values = torch.full(at.shape, 0 if other is None else other, dtype=self.memory.dtype)
        values[mask] = self.memory.view(-1)[at[mask]]
        return _value(values) if at.dim() else values.item()

    def store(self, value, mask=None):
        at, mask = self._index(mask)
        self.memory.view(-1)[at[mask]] = value.as_subclass(torch.Tensor)[mask]


class Barrier:
    """An mbarrier: a phase is over once `count` have arrived and the bytes that were expected are there."""

    def init(self, count):
        self.count = self.missing = int(getattr(count, "value", count))
        self.phase = self.bytes = 0

    def arrive(self, count=1, of_bytes=0):
        self.missing, self.bytes = self.missing - count, self.bytes + of_bytes
        assert self.missing >= 0, "more arrive at a barrier than it was told of"
        if self.missing == self.bytes == 0:
            self.phase, self.missing = self.phase ^ 1, self.count


class Block:
    """One program's partitions, each a thread that runs only in its turn, and its copies under way."""

    def __init__(self, program, programs, warps, eager):
        self.program, self.programs, self.warps, self.eager = program, programs, warps, eager
        self.fenced = False
        self.copies = []  # (what moves the bytes, the barrier, arrivals, bytes)
        self.turns, self.alive, self.turn, self.stalled, self.error = threading.Condition(), [0], 0, 0, None

    def specialize(self, partitions):
        self.alive = list(range(len(partitions)))
        threads = [
            threading.Thread(target=self._run, args=(number, function, arguments))
            for number, (function, arguments) in enumerate(partitions)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error

    def _run(self, number, function, arguments):
        try:
            self._await(number)
            function(*arguments)
        except BaseException as error:
            self.error = self.error or error
        with self.turns:
            self.stalled = 0
            following = self._following(number)
            self.alive.remove(number)
            self.turn = following
            self.turns.notify_all()

    def _following(self, number):
        return self.alive[(self.alive.index(number) + 1) % len(self.alive)]

    def _await(self, number):
        with self.turns:
            self.turns.wait_for(lambda: self.turn == number or self.error)
            if self.error:
                raise RuntimeError("another partition failed")

    def let_others(self):
        """Everyone else goes as far as they come."""
        with self.turns:
            number, self.turn = self.turn, self._following(self.turn)
            self.turns.notify_all()
        self._await(number)

    def wait(self, barrier, parity):
        while barrier.phase == parity:
            self.stalled += 1
            if self.stalled > len(self.alive):
                assert self.copies, "every partition waits and no copy is under way"
                self.land()
            self.let_others()
        self.stalled, self.fenced = 0, False

    def copy(self, *copy):
        """A copy is asked for."""
        self.copies.append(copy)
        if self.eager:
            self.land()

    def land(self):
        """The oldest copy arrives."""
        move, barrier, count, of_bytes = self.copies.pop(0)
        move()
        barrier.arrive(count, of_bytes)
        self.stalled = 0


class Sums:
    """An accumulator, with the products that are under way."""

    def __init__(self, value):
        self.value, self.products = value, []

    def wait(self, outstanding, deps):
        (acc,) = deps
        while len(acc.products) > outstanding:
            a, b = acc.products.pop(0)
            acc.value = acc.value + a.to(torch.float32) @ b.to(torch.float32)
        return acc if outstanding else acc.value


def _multiply(block, a, b, acc, is_async):
    assert is_async
    assert block.fenced, "tensor cores read what threads wrote, with no fence since"
    block.fenced = False
    acc.products.append((a, b))
    return acc


def _block_of(w, corner, into):
    """What the copy engine brings: a block of a tensor, with zeros beyond it."""
    into.zero_()
    memory = w.base.as_strided(w.shape, w.strides)
    inside = [slice(lo, lo + size) for lo, size in zip(corner, w.block_shape, strict=True)]
    piece = memory[tuple(inside)]
    into[tuple(slice(0, size) for size in piece.shape)] = piece


class _Gluon:
    """Stands in for the language; what it does not name is the real one's."""

    def __init__(self, block):
        self.block = block

    def __getattr__(self, name):
        return getattr(real, name)

    static_range = staticmethod(range)
    exp = staticmethod(torch.exp)
    sum = staticmethod(torch.sum)
    load = staticmethod(Pointer.load)
    store = staticmethod(Pointer.store)
    convert_layout = staticmethod(lambda value, layout: value)
    arange = staticmethod(lambda start, end, layout: _value(torch.arange(start, end)))
    zeros = staticmethod(lambda shape, dtype, layout: _value(torch.zeros(shape, dtype=DTYPES[dtype])))
    num_warps = property(lambda self: lambda: self.block().warps)
    program_id = property(lambda self: lambda axis: self.block().program)
    num_programs = property(lambda self: lambda axis: self.block().programs)

    def allocate_shared_memory(self, dtype, shape, layout):
        if dtype == real.int64:
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=lambda i: barriers[int(i)])
        return _value(torch.full(shape, torch.nan, dtype=DTYPES[dtype]))

    def warp_specialize(self, partitions, warps, registers):
        self.block().specialize(partitions)


@contextmanager
def running(module, *kernels, eager=False):
    """Inside, launching these kernels of the module runs them, program by program."""
    current = []
    block = lambda: current[-1]

    def arrive(barrier, count=1, pred=True):
        if pred:
            barrier.arrive(count)
            block().let_others()

    stand_ins = dict(
        gl=_Gluon(block),
        fence_async_shared=lambda: setattr(block(), "fenced", True),
        warpgroup_mma=lambda *arguments, **rest: _multiply(block(), *arguments, **rest),
        warpgroup_mma_init=lambda acc: acc if isinstance(acc, Sums) else Sums(acc),
        warpgroup_mma_wait=lambda outstanding, deps: Sums.wait(None, outstanding, deps),
        mbarrier=SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=Barrier.init,
            expect=lambda barrier, size: barrier.arrive(1, -size),
            arrive=arrive,
            wait=lambda barrier, parity: block().wait(barrier, parity),
        ),
        tma=SimpleNamespace(
            async_copy_global_to_shared=lambda w, corner, barrier, into: block().copy(
                lambda: _block_of(w, corner, into), barrier, 0, into.numel() * into.element_size()
            )
        ),
        async_copy=SimpleNamespace(
            async_copy_global_to_shared=lambda into, rows: block().copy(
                lambda: into.copy_(rows.load()), SimpleNamespace(arrive=lambda *_: None), 0, 0
            ),
            mbarrier_arrive=lambda barrier, increment_count: block().copy(
                lambda: None, barrier, 32 * int(module.LOADING_WARPS.value), 0
            ),
        ),
    )

    def device(argument):
        if torch.is_tensor(argument):
            return Pointer(argument)
        if hasattr(argument, "base"):
            kinds = dict(dtype=GLUON[argument.base.dtype], layout=argument.layout, block_shape=argument.block_shape)
            return SimpleNamespace(base=argument.base, shape=argument.shape, strides=argument.strides, **kinds)
        return argument

    def launcher(kernel):
        def launch(grid, *arguments, num_warps, num_stages, maxnreg, **constants):
            for program in range(grid[0]):
                current.append(Block(program, grid[0], num_warps, eager))
                kernel(*map(device, arguments), **constants)
                assert not current.pop().copies, "a copy is under way as the kernel ends"

        return type("Launcher", (), {"__getitem__": lambda self, grid: lambda *a, **k: launch(grid, *a, **k)})()

    functions = {name: value.fn for name, value in vars(module).items() if isinstance(value, GluonJITFunction)}
    functions |= {name: launcher(functions[name]) for name in kernels}
    with patch.multiple(module, **stand_ins, **functions):
        yield
