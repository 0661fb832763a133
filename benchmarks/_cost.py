"""Bytes and FLOPs of a compiled program, read from its text: loops counted as often as they run.

XLA's own `cost_analysis` counts the body of a loop once, and has nothing to say of programs for GPUs. Here every
instruction that becomes a kernel of its own moves its operands and results, unless they stay in the fast memory of
a TPU's core; of an operand that a fusion only slices, or of a result that it only updates, by a slice or a scatter,
what it changes.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
SIZES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
TUPLE = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"  # whose entries may be tuples, too
INSTRUCTION = re.compile(rf"^\s+(ROOT )?%?([\w.\-]+) = ({TUPLE}|\S+) ([\w\-]+)\((.*)$")
# Instructions that move nothing.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "after-all", "partition-id"}
FREE |= {"optimization-barrier", "copy-done", "slice-done", "async-done", "all-reduce-done"}


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    kind: str  # its type
    operation: str
    operands: list[str]
    rest: str  # what follows the operands
    text: str  # the operands as they are written
    root: bool


class Kernel(NamedTuple):
    """What an instruction costs each time, and how often it runs."""

    instruction: Instruction
    bytes: int
    flops: int
    wide: int  # of these, of products of float32
    times: int


class Chip(NamedTuple):
    """Of one JAX device: FLOPs of products and bytes of its memory, a second."""

    flops: float  # of bfloat16
    bytes: float
    wide: float = 1.0  # how often as long products of float32 take, rounded as JAX does by default


# From the vendors' data sheets. A TPU v7x has two devices.
CHIPS = {
    "v5e": Chip(197e12, 819e9),
    "v5p": Chip(459e12, 2765e9),
    "v6e": Chip(918e12, 1640e9),
    "v7x": Chip(1153e12, 3690e9),
    "h100": Chip(989e12, 3350e9, wide=2.0),
}


def seconds(kernels: list[Kernel], chip: Chip) -> float:
    """Of all kernels one after the other, each as fast as its products or its bytes allow."""
    return sum(
        k.times * max((k.flops + (chip.wide - 1.0) * k.wide) / chip.flops, k.bytes / chip.bytes) for k in kernels
    )


def total_bytes(kernels: list[Kernel]) -> int:
    """Moved by all kernels."""
    return sum(k.times * k.bytes for k in kernels)


def kernels_of(text: str, steps: int = 1) -> list[Kernel]:
    """All kernels of a program, where data are not extreme and all tokens count.

    Loops whose length depends on data take so many steps, jaxent's attempts at a loss one, and further attempts none.
    Where all tokens can be taken at once, they are.
    """
    program, entry = _parse(text)
    return list(_walk(program, entry, 1, steps))


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    program: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = program.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif match := INSTRUCTION.match(line):
            root, name, kind, operation, rest = match.groups()
            end = _closing(rest)
            operands = re.findall(r"%([\w.\-]+)", rest[:end])
            current.append(Instruction(name, kind, operation, operands, rest[end:], rest[:end], bool(root)))
    return program, entry


def _closing(rest: str) -> int:
    """Where the parenthesis that was opened before `rest` closes."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    return len(rest)


def _walk(program: dict[str, list[Instruction]], name: str, times: int, steps: int) -> Iterator[Kernel]:
    body = {i.name: i for i in program[name]}
    for i in program[name]:
        if i.operation in FREE or 'custom_call_target="AllocateBuffer"' in i.rest:
            continue
        called = dict(re.findall(r"(body|calls|to_apply|condition)=%?([\w.\-]+)", i.rest))
        if i.operation == "while":
            known = re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', i.rest)
            count = int(known[1]) if known else _bound(program[called["condition"]])
            count = 1 if "attempts/while" in i.rest else 0 if "again/while" in i.rest else count
            yield from _walk(program, called["body"], times * (steps if count is None else count), 0)
        elif i.operation == "call":
            yield from _walk(program, called["to_apply"], times, steps)
        elif i.operation == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            by_name = r"(?:true|false)_computation=%?([\w.\-]+)"
            names = re.findall(r"[\w.\-]+", branches[1]) if branches else re.findall(by_name, i.rest)
            costs = [list(_walk(program, n, times, steps)) for n in names]
            yield from costs[-1 if branches else 0] if "at_once/cond" in i.rest else max(costs, key=total_bytes)
        elif times:
            fused = program[called["calls"]] if i.operation == "fusion" else None
            yield Kernel(i, _bytes(program, i, body, fused), *_flops(program, fused or [i], body), times)


def _bound(condition: list[Instruction]) -> int | None:
    """How often a loop runs whose condition compares its counter, which starts at 0, with a constant."""
    constants = [i.text for i in condition if i.operation == "constant" and i.kind.startswith("s32[]")]
    compared = any(i.operation == "compare" and "direction=LT" in i.rest for i in condition)
    return int(constants[0]) if compared and len(constants) == 1 else None


def array_bytes(kind: str, *, fast: bool = False) -> int:
    """Of all arrays in a type; those in fast memory only with `fast`."""
    return sum(
        SIZES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims, layout in ARRAY.findall(kind)
        if fast or "S(" not in layout
    )


def _bytes(
    program: dict[str, list[Instruction]],
    i: Instruction,
    body: dict[str, Instruction],
    fused: list[Instruction] | None,
) -> int:
    types = [body[name].kind if name in body else "" for name in i.operands]
    if i.operation in ("dynamic-slice", "slice", "gather"):
        return array_bytes(i.kind) + (array_bytes(i.kind, fast=True) if array_bytes(types[0]) else 0)
    if i.operation == "dynamic-update-slice":
        return array_bytes(types[1]) + (array_bytes(types[1], fast=True) if array_bytes(i.kind) else 0)
    if i.operation == "slice-start":
        whole, part = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", i.kind)[:2]
        return array_bytes(part) + (array_bytes(part, fast=True) if array_bytes(whole) else 0)
    if i.operation == "copy-start":
        return sum(array_bytes(kind) for kind in re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", i.kind)[:2])
    if fused is None:
        return array_bytes(i.kind) + sum(map(array_bytes, types))
    moved, updated = 0, set()
    roots = [inner for inner in fused if inner.root]
    inside = {inner.name: inner for inner in fused}
    if roots and roots[0].operation == "tuple":
        roots = [inside[name] for name in roots[0].operands]
    for root in roots:
        place = {"dynamic-update-slice": 1, "scatter": 2}.get(root.operation)
        changes = None if place is None else inside.get(root.operands[place])
        if changes is not None:
            moved += array_bytes(changes.kind, fast=True) if array_bytes(i.kind) else 0
            updated.add(root.operands[0])
        else:
            moved += _in_slow_memory(i.kind, root.kind)
    for inner in fused:
        if inner.operation == "parameter" and inner.name not in updated:
            whole = array_bytes(types[int(inner.text)])
            moved += int(min(whole, _sliced(program, fused, inner.name)))
    return moved


def _sliced(program: dict[str, list[Instruction]], fused: list[Instruction], name: str) -> float:
    """Bytes of what a fusion, and those inside of it, slice out of one of its values; infinite if it takes all."""
    total, users = 0.0, [i for i in fused if name in i.operands]
    for user in users:
        if user.operation in ("dynamic-slice", "slice", "gather"):
            total += array_bytes(user.kind, fast=True)
        elif user.operation == "fusion":
            called = program[re.search(r"calls=%?([\w.\-]+)", user.rest)[1]]
            places = [str(place) for place, operand in enumerate(user.operands) if operand == name]
            inner = [i.name for i in called if i.operation == "parameter" and i.text in places]
            total += sum(_sliced(program, called, parameter) for parameter in inner)
        elif user.operation == "bitcast":
            total += _sliced(program, fused, user.name)
        else:
            return math.inf
    return total if users else math.inf


def _in_slow_memory(result: str, root: str) -> int:
    """Bytes of a result of a fusion, which says where it lies."""
    shape = re.match(r"\w+\[[\d,]*\]", root)
    if shape is None:
        return 0
    found = re.search(re.escape(shape[0]) + r"(\{[^}]*\})?", result)
    return array_bytes(found[0]) if found else array_bytes(root)


def _flops(
    program: dict[str, list[Instruction]], body: list[Instruction], around: dict[str, Instruction]
) -> tuple[int, int]:
    """Of the matrix products in a kernel, and of those of float32 among them."""
    kinds = {name: i.kind for name, i in around.items()} | {i.name: i.kind for i in body}
    total = wide = 0
    for i in body:
        if i.operation in ("fusion", "call"):
            called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", i.rest)
            if called and called[1] in program:
                inside = _flops(program, program[called[1]], {})
                total, wide = total + inside[0], wide + inside[1]
        flops = _product_flops(i, [kinds.get(name, "") for name in i.operands])
        total += flops
        wide += flops if flops and kinds[i.operands[0]].startswith("f32") else 0
    return total, wide


def _product_flops(i: Instruction, kinds: list[str]) -> int:
    """Of an instruction with such operands."""
    if i.operation == "custom-call" and "jaxent_product" in i.rest:  # of the two matrices among them
        (features, classes), (tokens, _) = (size for size in map(_sizes, kinds) if len(size) == 2)
        return 2 * tokens * features * classes
    if i.operation not in ("convolution", "dot"):
        return 0
    left = _sizes(kinds[0])
    if i.operation == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        contracted = math.prod(left[int(axis)] for axis in axes[1].split(",")) if axes else 1
    else:
        labels = re.search(r"dim_labels=(\w+)_", i.rest)
        window = re.search(r"window=\{size=([\dx]+)", i.rest)
        contracted = left[labels[1].index("f")] if labels else 1
        contracted *= math.prod(map(int, window[1].split("x"))) if window else 1
    return 2 * math.prod(_sizes(i.kind)) * contracted


def _sizes(kind: str) -> list[int]:
    match = ARRAY.search(kind)
    return [int(n) for n in match[2].split(",") if n] if match else []
