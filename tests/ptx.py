"""Runs compiled Triton kernels without a GPU: their PTX, instruction by instruction, on NumPy arrays.

All threads of all programs go together, one array element each; those that branch apart wait for one
another where their paths meet. Memory is the process's own, so kernels update CPU tensors. Accesses must be
aligned. Approximate instructions err by as much as NVIDIA allows, at random. Instructions that our kernels
do not have are refused.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Array = np.ndarray

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}
_TYPE = re.compile(r"^([bsuf])(8|16|32|64)$")
_TOKEN = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_STATEMENT = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.]*)\s*(.*)$", re.DOTALL)
_NAN = np.uint32(0x7FFFFFFF)


def _dtype(name: str) -> Any:
    kind, bits = _TYPE.match(name).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return {"b": _UNSIGNED, "u": _UNSIGNED, "s": _SIGNED, "f": _FLOATS}[kind][int(bits)]


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _canonical(x: Array) -> Array:
    """Results of arithmetic: the hardware has one NaN."""
    return np.where(np.isnan(x), _NAN.view(np.float32), x) if x.dtype == np.float32 else x


def _bf16(x: Array) -> Array:
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _e4m3(x: Array) -> Array:
    """Rounded to nearest even, what is too large to the largest."""
    x = np.clip(x, np.float32(-448), np.float32(448))
    return torch.from_numpy(np.atleast_1d(x)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _halves(code: Array) -> Array:
    """The bits of fp16 values for codes in lower bytes."""
    codes = torch.from_numpy(code.astype(np.uint8)).view(torch.float8_e4m3fn)
    return codes.to(torch.float16).view(torch.uint16).numpy()


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros_like(both)
    for i in range(4):
        nibble = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), 255, 0), byte)
        result |= byte.astype(np.uint64) << np.uint64(8 * i)
    return result.astype(np.uint32)


def _chosen(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit by bit what a table of eight has for the three."""
    terms = [
        (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        for k in range(8)
        if int(table[0]) >> k & 1
    ]
    return np.bitwise_or.reduce(np.broadcast_arrays(*terms))


def _dot(parts: list[str], a: Array, b: Array, c: Array) -> Array:
    """Four products of bytes, or two of halves with the lower or upper bytes, all of one signedness."""
    signed = parts[-1] == "s32"
    halves = parts[0] == "dp2a"
    wide, narrow = (np.int16, np.int8) if signed else (np.uint16, np.uint8)
    first = np.ascontiguousarray(a)[:, None].view(wide if halves else narrow)
    second = np.ascontiguousarray(b)[:, None].view(narrow)
    if halves:
        second = second[:, 2:] if parts[1] == "hi" else second[:, :2]
    return (c + (first.astype(np.int64) * second).sum(1)).astype(c.dtype)


def _fused(a: Array, b: Array, c: Array) -> Array:
    # Exact but for a sum whose 53 bits end in a tie of 24.
    return (a.astype(np.float64) * b + c).astype(np.float32)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "neu": np.not_equal, "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "equ": lambda a, b: ~((a < b) | (a > b)),
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip


class Machine:
    """Threads that run one kernel."""

    def __init__(self, ptx: str, programs: int, threads: int, arguments: Sequence[int], shared: int) -> None:
        self.count = programs * threads
        self.program, self.thread = np.divmod(np.arange(self.count, dtype=np.uint32), np.uint32(threads))
        self.arguments = arguments
        self.registers: dict[str, Array] = {}
        self.shared = np.zeros((programs, max(shared, 16)), np.uint8)
        self.random = np.random.default_rng(0)
        self.code, self.labels = _parsed(ptx)

    def run(self) -> None:
        """Runs all threads to their ends."""
        end = len(self.code)
        place = np.zeros(self.count, np.int64)
        at = 0
        with np.errstate(all="ignore"):
            while at < end:
                together = place == at
                self.lanes: Any = slice(None) if together.all() else together.nonzero()[0]
                # Straight on, until a branch or where others wait.
                others = place[place > at]
                stop = int(others.min()) if len(others) else end
                following = self._straight(at, stop)
                if isinstance(following, int):
                    place[self.lanes] = following
                else:
                    taken, target, here = following
                    place[self.lanes] = np.where(taken, target, here + 1)
                at = int(place.min())

    def _straight(self, at: int, stop: int) -> int | tuple[Array, int, int]:
        while at < stop:
            negated, guard, name, operands = self.code[at]
            taken = None
            if guard:
                taken = self.read(guard, bool) ^ negated
            parts = name.split(".")
            if parts[0] in ("ret", "exit"):
                return len(self.code)
            if parts[0] == "bra":
                target = self.labels[operands[-1]]
                if taken is None:
                    return target
                return taken, target, at
            self._execute(parts, operands, taken)
            at += 1
        return at

    def read(self, operand: str, dtype: Any) -> Array:
        """An operand of the threads that are running."""
        special = {"%tid.x": self.thread, "%ctaid.x": self.program}
        if operand in special:
            return special[operand][self.lanes].astype(dtype)
        if operand in self.registers:
            value = self.registers[operand][self.lanes]
            return value if dtype is bool else _sized(value, dtype)
        if operand == "global_smem":
            return np.zeros(1, dtype)
        if operand.startswith(("0f", "0d")):
            return np.array([int(operand[2:], 16)], _UNSIGNED[8 * np.dtype(dtype).itemsize]).view(dtype)
        # Of a register that was never written the compiler does not care what it is.
        number = 0xA5A5A5A5A5A5A5A5 if operand.startswith("%") else int(operand.rstrip("U"), 0)
        if dtype is bool:
            return np.array([bool(number)])
        bits = 8 * np.dtype(dtype).itemsize
        return np.array([number % 2**bits], np.uint64).astype(_UNSIGNED[bits]).view(dtype)

    def write(self, operand: str, value: Array, taken: Array | None = None) -> None:
        """Sets a register of the threads that are running."""
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(_UNSIGNED[8 * value.dtype.itemsize])
        register = self.registers.get(operand)
        if register is None or register.dtype != value.dtype:
            register = self.registers[operand] = np.zeros(self.count, value.dtype)
        if taken is None:
            register[self.lanes] = value
        else:
            register[self.lanes] = np.where(taken, value, register[self.lanes])

    def _bytes(self, address: Array, size: int, shared: bool) -> tuple[Any, Array]:
        """Memory as integers of a size, and the indices of addresses in it."""
        if shared:
            return self.shared.view(_UNSIGNED[8 * size]), address // np.uint64(size)
        low, high = int(address.min()), int(address.max())
        memory = (ctypes.c_uint8 * (high - low + size)).from_address(low)
        whole = np.frombuffer(memory, _UNSIGNED[8 * size])
        return whole, (address - np.uint64(low)) // np.uint64(size)

    def _move(self, parts: list[str], operands: list[str], taken: Array | None) -> None:
        store, shared = parts[0] == "st", "shared" in parts
        place, values = operands if store else operands[::-1]
        if "param" in parts:
            index = int(place.strip("[]").rsplit("_", 1)[1])
            self.write(values, np.array([self.arguments[index]], np.uint64).astype(_dtype(parts[-1])))
            return
        registers = [name.strip() for name in values.strip("{} ").split(",")]
        base, _, offset = place.strip("[] ").partition("+")
        address = self.read(base.strip(), np.uint64 if not shared else np.uint32).astype(np.uint64)
        address = np.broadcast_to(address, self.program[self.lanes].shape) + np.uint64(int(offset or 0))
        size = np.dtype(_dtype(parts[-1])).itemsize
        active = np.ones(len(address), bool) if taken is None else taken
        if not active.any():
            return
        assert (address[active] % np.uint64(size * len(registers)) == 0).all(), "a vector is not aligned"
        lanes = np.arange(self.count)[self.lanes][active]
        for i, register in enumerate(registers):
            memory, index = self._bytes(address[active] + np.uint64(i * size), size, shared)
            key = (self.program[lanes], index) if shared else index
            if store:
                value = np.broadcast_to(self.read(register, _UNSIGNED[8 * size]), active.shape)
                memory[key] = value[active]
            else:
                value = np.zeros(len(active), _UNSIGNED[8 * size])
                value[active] = memory[key]
                # A byte goes to a register of 16 bits.
                self.write(register, value.astype(np.uint16) if size == 1 else value, taken)

    def _exchange(self, parts: list[str], operands: list[str]) -> None:
        """What the threads of a warp do together."""
        value = np.broadcast_to(self.read(operands[1], np.uint32), self.program[self.lanes].shape)
        assert len(value) % 32 == 0, "threads of a warp are apart"
        warps = value.reshape(-1, 32)
        if parts[0] == "shfl":
            assert parts[2] == "bfly" and operands[3] == "31"
            other = np.arange(32) ^ int(operands[2])
            self.write(operands[0], warps[:, other].ravel())
        else:
            typed = warps.view(_dtype(parts[3]))
            top = {"max": typed.max(1), "min": typed.min(1)}[parts[2]]
            self.write(operands[0], np.repeat(top, 32))

    def _converted(self, parts: list[str], operands: list[str]) -> Array:
        target, source = parts[-2], parts[-1]
        if target == "e4m3x2":
            upper, lower = (_e4m3(self.read(each, np.float32)) for each in operands[1:])
            return upper.astype(np.uint16) << np.uint16(8) | lower
        if source == "e4m3x2":
            pair = self.read(operands[1], np.uint16)
            lower, upper = (_halves(pair >> np.uint16(i)) for i in (0, 8))
            return upper.astype(np.uint32) << np.uint32(16) | lower
        if target in ("bf16x2", "f16x2", "bf16"):
            half = (lambda x: x.astype(np.float16).view(np.uint16)) if target == "f16x2" else _bf16
            halves = [half(self.read(each, np.float32)) for each in operands[1:]]
            return halves[0] if len(halves) == 1 else halves[0].astype(np.uint32) << np.uint32(16) | halves[1]
        return self.read(operands[1], _dtype(source)).astype(_dtype(target))

    def _approximate(self, name: str, x: Array) -> Array:
        """Within an ulp of the exact result, at random on either side of it."""
        x = _flushed(x)
        wide = x.astype(np.float64)
        exact = {"rcp": lambda: 1 / wide, "sqrt": lambda: np.sqrt(wide), "rsqrt": lambda: 1 / np.sqrt(wide)}
        result = exact[name]().astype(np.float32)
        ordinary = np.isfinite(result) & (result != 0)
        off = self.random.integers(-1, 2, len(result)).astype(np.int32)
        moved = (result.view(np.int32) + off).view(np.float32)
        return _flushed(np.where(ordinary, moved, result))

    def _execute(self, parts: list[str], operands: list[str], taken: Array | None) -> None:
        name = parts[0]
        if name in ("bar", "barrier"):
            return
        if name in ("ld", "st"):
            self._move(parts, operands, taken)
        elif name in ("shfl", "redux"):
            assert taken is None, "a warp's exchange under a condition"
            self._exchange(parts, operands)
        elif operands[0].startswith("{"):
            halves = [each.strip() for each in operands[0].strip("{}").split(",")]
            size = np.dtype(_dtype(parts[-1])).itemsize * 4
            value = self.read(operands[1], _UNSIGNED[2 * size]).astype(np.uint64)
            for i, half in enumerate(halves):
                self.write(half, (value >> np.uint64(i * size)).astype(_UNSIGNED[size]), taken)
        else:
            self.write(operands[0], self._result(parts, operands), taken)

    def _result(self, parts: list[str], operands: list[str]) -> Array:
        name, kind = parts[0], parts[-1]
        if name == "cvt":
            return self._converted(parts, operands)
        if name == "mov" and operands[1].startswith("{"):
            half, whole = {32: (np.uint16, np.uint32), 64: (np.uint32, np.uint64)}[int(kind[1:])]
            low, high = (self.read(each.strip(), half) for each in operands[1].strip("{}").split(","))
            return high.astype(whole) << whole(8 * half().itemsize) | low
        sources = operands[1:]
        if kind.endswith("16x2"):
            shape = self.program[self.lanes].shape
            words = (np.broadcast_to(self.read(each, np.uint32), shape) for each in sources)
            halves = [np.ascontiguousarray(word).view(_dtype(kind[:-2])) for word in words]
            return self._computed(name, parts, halves, _dtype(kind[:-2])).view(np.uint32)
        dtype = bool if kind == "pred" else _dtype(kind)
        if name == "selp":
            a, b = (self.read(each, dtype) for each in sources[:2])
            return np.where(self.read(sources[2], bool), a, b)
        if name in ("shl", "shr"):
            shift = np.minimum(self.read(sources[1], np.uint32), 8 * np.dtype(dtype).itemsize - 1)
            # The shifts of our kernels are smaller than their operands.
            x = self.read(sources[0], dtype)
            return x << shift.astype(dtype) if name == "shl" else x >> shift.astype(dtype)
        if name == "mad" and parts[1] == "wide":
            wide = {np.uint32: np.uint64, np.int32: np.int64}[dtype]
            a, b = (self.read(each, dtype).astype(wide) for each in sources[:2])
            return a * b + self.read(sources[2], wide)
        x = [self.read(each, dtype) for each in sources]
        if "ftz" in parts:
            x = [_flushed(each) for each in x]
        result = self._computed(name, parts, x, dtype)
        if result.dtype == np.float32 and name not in ("neg", "abs", "mov"):
            result = _canonical(result)
        return _flushed(result) if "ftz" in parts else result

    def _computed(self, name: str, parts: list[str], x: list[Array], dtype: Any) -> Array:
        if name == "mul" and parts[1] in ("wide", "hi"):
            wide = {np.uint32: np.uint64, np.int32: np.int64}[dtype]
            product = x[0].astype(wide) * x[1].astype(wide)
            return product if parts[1] == "wide" else (product >> wide(32)).astype(dtype)
        if name in _BINARY:
            return _BINARY[name](x[0], x[1]).astype(dtype)
        if name in ("min", "max"):
            # A number is preferred to NaN unless asked otherwise, and -0 is less than 0.
            passes_nan = {"min": np.minimum, "max": np.maximum}
            result = (passes_nan if "NaN" in parts else {"min": np.fmin, "max": np.fmax})[name](x[0], x[1])
            if dtype is np.float32:
                zeros = (x[0] == 0) & (x[1] == 0)
                bits = [each.view(np.uint32) for each in x]
                joined = bits[0] & bits[1] if name == "max" else bits[0] | bits[1]
                result = np.where(zeros, joined.view(np.float32), result)
            return result
        if name == "setp":
            return _COMPARISONS[parts[1]](x[0], x[1])
        if name in ("rcp", "sqrt", "rsqrt") and "approx" in parts:
            return self._approximate(name, x[0])
        if name == "fma":
            return _fused(*x)
        if name == "mad":
            return x[0] * x[1] + x[2]
        if name == "lop3":
            return _chosen(*x)
        if name in ("dp4a", "dp2a"):
            return _dot(parts, *x)
        if name == "bfe":
            start, length = int(x[1][0]), int(x[2][0])
            up = np.uint32(32 - start - length)
            return (x[0].view(np.uint32) << up).view(dtype) >> dtype(32 - length)
        single = {
            "mov": lambda: x[0], "not": lambda: ~x[0], "abs": lambda: np.abs(x[0]), "neg": lambda: -x[0],
            "sqrt": lambda: np.sqrt(x[0]), "rcp": lambda: (np.float32(1) / x[0]),
            "prmt": lambda: _permuted(x[0], x[1], x[2]),
        }  # fmt: skip
        if name not in single:
            raise NotImplementedError(".".join(parts))
        return single[name]()


def _sized(value: Array, dtype: Any) -> Array:
    """A register's lower bits as a type; a wider register is cut as ``ld`` and ``st`` of bytes do."""
    size = np.dtype(dtype).itemsize
    if value.dtype == bool:
        return value
    if value.dtype.itemsize != size:
        value = value.astype(_UNSIGNED[8 * size])
    return np.ascontiguousarray(value).view(dtype)


def _parsed(ptx: str) -> tuple[list[tuple[bool, str | None, str, list[str]]], dict[str, int]]:
    """Statements ``(negated, predicate, name, operands)`` of the one kernel, and where labels are."""
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    body = re.sub(r"//[^\n]*", "", body)
    code: list[tuple[bool, str | None, str, list[str]]] = []
    labels: dict[str, int] = {}
    for line in re.split(r"[;\n]", body):
        text = line.strip()
        while (label := re.match(r"(\$?\w+):", text)) is not None:
            labels[label[1]] = len(code)
            text = text[label.end() :].strip()
        text = re.sub(r"^[{}]\s*", "", text)
        if not text or text.startswith((".", "}", ")", "(")):
            continue
        found = _STATEMENT.match(text)
        assert found is not None, text
        operands = [token.strip() for token in _TOKEN.findall(found[4])]
        code.append((found[1] == "!", found[2], found[3], operands))
    return code, labels
