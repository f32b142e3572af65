"""What a compiled program sends between devices, read from its HLO text, and how long that takes on given links."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of ``KINDS``. bytes: of its result on one device. shapes: of its results.
      group: the devices of its first group. calls: in one run of the program.
    """

    kind: str
    bytes: int
    shapes: tuple[tuple[int, ...], ...]
    group: tuple[int, ...]
    calls: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one run, each call being done in a ring."""
        n = len(self.group)
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return self.calls * self.bytes * share.get(self.kind, (n - 1) / n)


@dataclass(frozen=True)
class Links:
    """What connects the devices; the defaults are the data sheet's of 8 H100 a host and one InfiniBand NDR card each.

    Attributes:
      host: devices of one host. inside, between: bytes/s of one device in one direction, within a host and out of it.
      reached: share of these that collectives reach. latency: s of one collective within a host; with each doubling
        of the hosts it grows by as much again.
    """

    host: int = 8
    inside: float = 450e9
    between: float = 50e9
    reached: float = 0.8
    latency: float = 15e-6

    def seconds(self, collective: Collective) -> float:
        """Of all calls, but for the latency. A ring through several devices of a host leaves it by all their cards."""
        members = Counter(device // self.host for device in collective.group)
        out = min(self.inside, min(members.values()) * self.between)
        return collective.sent / (self.reached * (self.inside if len(members) == 1 else out))

    def wait(self, devices: int) -> float:
        """Latency of one collective of so many devices."""
        return self.latency * (1 + math.log2(max(1, devices / self.host)))


class Program:
    """The collectives of ``compiled.as_text()``; a loop counts as often as it runs, where that is known."""

    def __init__(self, hlo: str):
        self.lines: dict[str, list[str]] = defaultdict(list)
        name = self.entry = ""
        for line in hlo.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                self.entry = name if header[1] else self.entry
            elif name:
                self.lines[name].append(line)
        self.devices = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", hlo)) else 1
        self._known: dict[str, tuple[list[Collective], int]] = {}

    @cached_property
    def collectives(self) -> list[Collective]:
        """All of them."""
        return self._walk(self.entry)[0]

    @property
    def in_sequence(self) -> int:
        """The longest chain of collectives each of which waits for the one before."""
        return self._walk(self.entry)[1]

    def _walk(self, name: str) -> tuple[list[Collective], int]:
        """A computation's collectives, and its longest chain."""
        if name in self._known:
            return self._known[name]
        found: list[Collective] = []
        depth: dict[str, int] = {}
        for line in self.lines[name]:
            if not (instruction := _INSTRUCTION.match(line)):
                continue
            label, result, opcode = instruction.groups()
            kind, own = opcode.removesuffix("-start"), 0
            if kind in KINDS:
                found.append(self._read(kind, result, line, opcode != kind))
                own = 1
            else:
                for called in [*_CALLED.findall(line), *_NAME.findall("".join(_BRANCHES.findall(line)))]:
                    trips = int(count[1]) if (count := _TRIPS.search(line)) else 1
                    inner, chain = self._walk(called)
                    found += [Collective(c.kind, c.bytes, c.shapes, c.group, trips * c.calls) for c in inner]
                    own = max(own, trips * chain)
            operands = _NAME.findall(line[instruction.end() :])
            depth[label] = own + max((depth.get(operand, 0) for operand in operands), default=0)
        self._known[name] = found, max(depth.values(), default=0)
        return self._known[name]

    def _read(self, kind: str, result: str, line: str, started: bool) -> Collective:
        arrays = _ARRAY.findall(result)
        if started and kind != "all-reduce":  # (operand, result, …)
            arrays = arrays[1:2]
        shapes = tuple(tuple(map(int, filter(None, sizes.split(",")))) for _, sizes in arrays)
        total = sum(math.prod(shape) * _width(dtype) for (dtype, _), shape in zip(arrays, shapes))
        return Collective(kind, total, shapes, self._group(line), 1)

    def _group(self, line: str) -> tuple[int, ...]:
        if mesh := _MESH.search(line):
            return _first_of_mesh(*mesh.groups())
        if iota := _IOTA.search(line):
            groups, dims, order = (_numbers(part) for part in iota.groups())
            devices = np.arange(math.prod(dims)).reshape(dims)
            return tuple(map(int, devices.transpose(order or None).reshape(groups)[0]))
        if listed := _GROUPS.search(line):
            return tuple(map(int, listed[1].split(",")))
        return tuple(range(self.devices))


def _numbers(text: str | None) -> list[int]:
    return [int(item) for item in text.split(",")] if text else []


def _first_of_mesh(mesh: str, dims: str | None, order: str | None, axes: str) -> tuple[int, ...]:
    """The first group of devices along some axes of a mesh; 'a':(2)4 is the part of size 4 of a, behind one of 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    devices = np.arange(math.prod(sizes.values()))
    if dims:
        devices = devices.reshape(_numbers(dims)).transpose(_numbers(order) or None)
    used = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS.findall(axes)}
    shape: list[int] = []
    index: list[int | slice] = []
    for name, size in sizes.items():
        before, part = used.get(name, (size, 1))
        shape += [before, part, size // before // part]
        index += [0, slice(None), 0]
    return tuple(map(int, devices.reshape(shape)[tuple(index)].ravel()))


def _width(dtype: str) -> int:
    return BYTES.get(dtype) or (1 if dtype.startswith("f8") else max(1, int(re.sub(r"\D", "", dtype)) // 8))


def by_kind(collectives: Sequence[Collective]) -> dict[str, float]:
    """Bytes that a device sends in one run, by kind."""
    total: dict[str, float] = defaultdict(float)
    for collective in collectives:
        total[collective.kind] += collective.sent
    return dict(total)
