"""What a CUDA C++ kernel is given: its constants in the library, and a launch's parameters and tables.

The layouts are those of ``csrc/table.h`` and ``csrc/task.cuh``.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fused_optim.kernels.launch import HEADER
from fused_optim.kernels.masking import keeps_dense
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.spec import ROW_HEADER, Codec, Rule

_PARAMETERS = 0x0A
"""EIATTR_PARAM_CBANK: a symbol, then where a kernel's parameters begin and how long they are."""

_STORAGES = 2 + max(len(rule.slots) for rule in RULES.values()) + 2
_TABLE, _TILES, _ROWS, _PLANES = (i << 32 for i in (1, 2, 3, 16))
ELEMENTS = 4096
"""Of a block: ``csrc/registers.cuh``."""


class Constants(NamedTuple):
    """A kernel's own bank of constants, and where its parameters begin in bank 0."""

    own: bytes
    parameters: int
    length: int


def _sections(cubin: bytes) -> dict[str, bytes]:
    start, (count, names) = struct.unpack_from("<Q", cubin, 0x28)[0], struct.unpack_from("<HH", cubin, 0x3C)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + 64 * i) for i in range(count)]
    text = cubin[headers[names][4] :]
    found = dict[str, bytes]()
    for header in headers:
        name = text[header[0] : text.index(b"\0", header[0])].decode()
        found[name] = cubin[header[4] : header[4] + header[5]]
    return found


def _parameters(information: bytes) -> tuple[int, int] | None:
    """Start and length of a kernel's parameters in its ``.nv.info``."""
    at = 0
    while at < len(information):
        form, attribute, size = struct.unpack_from("<BBH", information, at)
        if (form, attribute) == (4, _PARAMETERS):
            return struct.unpack_from("<HH", information, at + 8)
        at += 4 + (size if form == 4 else 0)
    return None


def constants(tool: str, library: Path, sm: int) -> dict[str, Constants]:
    """What the kernels of a library for one capability find in their banks, by function."""
    found = dict[str, Constants]()
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "-xelf", f"sm_{sm}", str(library.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        for file in sorted(Path(folder).glob("*.cubin")):
            sections = _sections(file.read_bytes())
            for name, content in sections.items():
                function = name.removeprefix(".nv.info.")
                given = _parameters(content) if function != name else None
                if given is not None:
                    found[function] = Constants(sections.get(f".nv.constant2.{function}", b""), *given)
    return found


def _storage(codec: Codec, number: int, column: int) -> bytes:
    bits = [plane.bits // plane.per for plane in codec.planes]
    if len(bits) > 1:
        bits[1] = codec.planes[1].bits
    flags = codec.lookup is not None, codec.random, codec.write_only, codec.signed_scale
    numbers = number, column, bits[0], (*bits, 0)[1], codec.block.bit_length() - 1
    return struct.pack("<5i4?", *numbers, *flags)


class Launch:
    """A launch for one dense, aligned tensor of many tiles, of which a block works on the first.

    ``codecs``: of the parameter, the gradient and the states; ``numbers`` are those that the library gives to
    them.
    """

    def __init__(
        self, rule: Rule, codecs: Sequence[Codec], numbers: Mapping[str, int], constants: Constants
    ) -> None:
        self._own, self._start = constants.own, constants.parameters
        records, addresses, column = dict[int, bytes](), list[int](), HEADER
        for i in (0, *range(2, len(codecs)), 1):
            codec = codecs[i]
            records[i] = _storage(codec, numbers[codec.name], column)
            column += codec.columns
            addresses += [_PLANES + (len(addresses) + k << 32) for k in range(codec.columns)]
        wide = any(codec.planes[0].bits == 32 for codec in codecs)
        neighbours = rule.inner is not None or not wide or any(c.block > 1 or c.random for c in codecs)
        header = struct.pack("<6q", _TABLE, 1, _TILES, 0, _ROWS, rule.row_length)
        storages = b"".join(records.get(i, bytes(24)) for i in range(_STORAGES))
        self._parameters = header + storages
        self._parameters += struct.pack("<2?2xi", neighbours, keeps_dense(rule), rule.group)
        assert len(self._parameters) == constants.length
        numel, aligned = 64 * ELEMENTS, 1
        # A row's floats are ones, so that it is active and a mask is made; seed and step are any number.
        ones = struct.pack("<f", 1.0) * (ROW_HEADER + len(rule.scalars))
        table = struct.pack(f"<{HEADER + len(addresses)}q", numel, 0, aligned, 0, 0, 0, *addresses)
        self._memory = {_TABLE >> 32: table, _TILES >> 32: bytes(8), _ROWS >> 32: ones}

    def constant(self, bank: int, offset: int, width: int) -> int | None:
        """What a bank of constants holds; None if it is not known."""
        content, start = {0: (self._parameters, self._start), 2: (self._own, 0)}.get(bank, (b"", 0))
        return _integer(content, offset - start, width)

    def load(self, address: int, width: int) -> int | None:
        """What global memory holds; None in planes and in tables of codecs."""
        return _integer(self._memory.get(address >> 32, b""), address & 0xFFFFFFFF, width)


def _integer(content: bytes, start: int, width: int) -> int | None:
    if start < 0 or start + width > len(content):
        return None
    return int.from_bytes(content[start : start + width], "little")
