"""What a GPU's own instructions say of a kernel: how wide its main loop reads and writes, and how many it takes.

Read from nvdisasm's text, whose form is no interface. What cannot be told for sure is None.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

LABEL = re.compile(r"^\s*(\.L_\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
TARGET = re.compile(r"`\((\.L_\w+)\)")
JUMPS = ("BRA", "JMP")
ENDS = ("EXIT", "RET", "KILL", "BRX", "JMX")  # where they stand without a predicate, nothing follows
# Parts of an access's name; of none of these it moves 32 bits. LTC128B is a hint to the cache and no width.
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop's instructions, and the bits of each of its global accesses and of those outside of it."""

    instructions: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    outer_loads: tuple[int, ...] = ()
    outer_stores: tuple[int, ...] = ()


@dataclass(slots=True)
class _Code:
    """Operations in their order, and for each where control may come from."""

    operations: list[str] = field(default_factory=list)
    jumps: dict[int, int] = field(default_factory=dict)  # operation -> operation
    before: list[list[int]] = field(default_factory=list)


def disassembly(cubin: bytes) -> str:
    return _tool("nvdisasm", "-c", cubin=cubin)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of spilled registers (the stack frame of a kernel without local arrays)."""
    usage = _tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump named no resources:\n{usage}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _tool(name: str, option: str, *, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, option, file.name], capture_output=True, text=True, check=True).stdout


def bits(operation: str) -> int:
    """Of one global access, "LDG.E.128" or "STG.E.U16"."""
    return next((WIDTHS[part] for part in operation.split(".") if part in WIDTHS), 32)


def accesses(sass: str, kind: str) -> tuple[int, ...]:
    """Bits of every global access of a kind, "LDG" or "STG"."""
    return _widths((found[2] for line in sass.splitlines() if (found := INSTRUCTION.match(line))), kind)


def serial(sass: str) -> bool:
    """Whether a kernel for sm_90 waits for each of its products before it starts the next one.

    Products that run on are ended together: the last of a group alone names the barrier that is waited for.
    """
    products = [line for line in sass.splitlines() if (found := INSTRUCTION.match(line)) and found[2][:5] == "HGMMA"]
    return len(products) > 1 and all("gsb0" in line for line in products)


def narrowest(widths: Iterable[int], total: int) -> int | None:
    """The narrowest of the widest accesses that move `total` bits together; None where all of them do not."""
    moved = 0
    for width in sorted(widths, reverse=True):
        moved += width
        if moved >= total:
            return width
    return None


def main_loop(sass: str) -> Loop | None:
    """The loop with most global accesses, the inner one of nested loops that have as many; None without any.

    A loop is what its first instruction dominates and a branch back to it closes. So neither a block moved behind the
    kernel's end that returns into a loop makes a loop of all between, nor is one left out that belongs to it.
    """
    code = _parse(sass)
    bodies: dict[int, set[int]] = {}
    for end, start in code.jumps.items():
        if start > end:
            continue
        body, ahead = {start}, [end]
        while ahead:
            at = ahead.pop()
            if at not in body:
                body.add(at)
                ahead += code.before[at]
        if 0 not in body:  # the kernel's first instruction: there is a way in beside the loop's start
            bodies.setdefault(start, set()).update(body)
    loops = [_loop(code.operations, body) for body in bodies.values()]
    loops = [loop for loop in loops if loop.loads or loop.stores]
    return max(loops, key=lambda loop: (len(loop.loads) + len(loop.stores), -loop.instructions), default=None)


def _parse(sass: str) -> _Code:
    code = _Code()
    labels: dict[str, int] = {}
    targets: dict[int, str] = {}
    falls: list[bool] = []  # whether the next instruction may follow
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(falls)
        elif found := INSTRUCTION.match(line):
            predicate, operation, rest = found.groups()
            kind = operation.split(".")[0]
            target = TARGET.search(rest) if kind in JUMPS else None
            if target:
                targets[len(falls)] = target[1]
            # A condition is a predicate in front, or an operand: "BRA.U !UP2, `(.L_x_0)".
            always = not predicate and (kind in ENDS or (kind in JUMPS and rest.strip().startswith("`")))
            falls.append(not always)
            code.operations.append(operation)
    code.before = [[i - 1] if i and falls[i - 1] else [] for i in range(len(falls))]
    for at, name in targets.items():
        # A label behind the last instruction is no place to go on.
        if labels.get(name, len(falls)) < len(falls):
            code.jumps[at] = labels[name]
            code.before[labels[name]].append(at)
    return code


def _loop(operations: list[str], body: set[int]) -> Loop:
    inside = [operations[i] for i in sorted(body)]
    outside = [operation for i, operation in enumerate(operations) if i not in body]
    return Loop(
        sum(operation != "NOP" for operation in inside),
        _widths(inside, "LDG"), _widths(inside, "STG"), _widths(outside, "LDG"), _widths(outside, "STG"),
    )  # fmt: skip


def _widths(operations: Iterable[str], kind: str) -> tuple[int, ...]:
    return tuple(bits(operation) for operation in operations if operation.split(".")[0] == kind)
