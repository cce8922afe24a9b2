"""A PTX kernel as an array of Op (sim.h), whose functions are compiled when they are first met."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .instructions import SIZES, Address, Lowered, Operand, lower, unknown

HERE = Path(__file__).resolve().parent
BUILD = HERE / "_build"
# No contraction: a fused multiply-add is one only where the PTX says fma. Integers wrap.
FLAGS = ["-std=c++20", "-O2", "-ftree-vectorize", "-fwrapv", "-ffp-contract=off"]
FLAGS += ["-fno-strict-aliasing", "-fPIC", "-shared", f"-I{HERE}"]
OP = np.dtype(
    [("run", "u8"), ("imm", "i8", 2), ("at", "i4", 12), ("guard", "i4"), ("negated", "i4")]
)
CONTROL = {"bar.sync": 1, "ret": 2, "bra": 3}  # in place of a function: sim.cpp
LANES = 32
POISON = 0xFF  # bytes of a register that nothing has set: NaN, -1


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(source: str) -> ctypes.CDLL:
    """The library of a source beside sim.h, compiled once."""
    header = (HERE / "sim.h").read_text()
    path = BUILD / f"{digest(repr(FLAGS) + header + source)}.so"
    if not path.exists():
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as place:
            (Path(place) / "x.cpp").write_text(source)
            command = [os.environ.get("CXX", "g++"), *FLAGS, "x.cpp", "-o", "x.so"]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"ptx_sim: g++ failed:\n{done.stderr[:4000]}")
            os.replace(Path(place) / "x.so", path)
    return ctypes.CDLL(str(path))


class Functions:
    """The functions of bodies, as addresses; those a program adds are compiled together."""

    def __init__(self) -> None:
        self.address: dict[str, int] = {}

    def add(self, bodies: set[str]) -> None:
        new = sorted(bodies - self.address.keys())
        texts = [
            f'extern "C" void f{digest(x)}(Warp& w, const Op& o) {{ (void)o; {x} }}' for x in new
        ]
        library = build("\n".join(['#include "sim.h"', *texts]))
        for body in new:
            found = ctypes.cast(getattr(library, f"f{digest(body)}"), ctypes.c_void_p).value
            assert found is not None
            self.address[body] = found


def statements(body: str) -> Iterator[tuple[str, str]]:
    """Labels, with their colon, and statements, each with its place in the Python source."""
    place, text = "", ""
    for line in body.splitlines():
        code, _, comment = line.strip().partition("//")
        if code.startswith(".loc"):
            place = comment.strip()
            continue
        # LLVM drops half of a register into a new one, which is then `_`, the operand for that.
        text += " " + code.replace("{ .reg .b32 tmp;", "").replace("tmp", "_")
        while match := re.match(r"[\s{}]*([$\w]+:)|[\s{}]*([^;]*);[\s}]*", text):
            yield " ".join((match[1] or match[2]).split()), place
            text = text[match.end() :]


def split(text: str) -> Iterator[Operand]:
    for item in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", text):
        inner = item[1:-1].replace(" ", "")
        if item[0] == "[":
            base, _, offset = inner.partition("+")
            yield Address(base, int(offset or "0"))
        else:
            yield inner.split(",") if item[0] == "{" else item


def bits_of(value: Any, size: int) -> bytes:
    """A constant, as PTX writes it, or an argument."""
    if isinstance(value, float):
        return struct.pack("<d" if size == 8 else "<f", value)
    if value == "global_smem":
        value = 0
    elif isinstance(value, str):
        value = int(value[2:], 16) if value[:2] in ("0f", "0d") else int(value.rstrip("U"), 0)
    return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")


class Program:
    """The entry point of a module."""

    def __init__(self, text: str, functions: Functions) -> None:
        head, _, body = text.partition(".visible .entry ")[2].partition("\n{")
        self.warps = int(re.findall(r"\.reqntid (\d+)", head)[0]) // LANES
        self.parameters = re.findall(r"(\w+_param_\d+)", head)
        self.lines: list[str] = []
        self.size = 0
        self.width: dict[str, str] = {"%brx": "pred"}  # of registers
        self.places: dict[tuple[str, int], int] = {}  # of registers, constants and parameters
        for name in ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z"):
            self.width[name] = "b32"
            self.place(name, "b32")
        self.assemble(self.rows(statements(body.partition("\n}")[0])), functions)

    def rows(self, found: Iterator[tuple[str, str]]) -> list[tuple[str, str, str]]:
        """(guard, instruction, place); a branch by an index becomes one branch per target."""
        rows: list[tuple[str, str, str]] = []
        self.labels: dict[str, int] = {}
        tables: dict[str, list[str]] = {}
        last = ""
        for text, where in found:
            op, _, rest = text.partition(" ")
            if text.endswith(":"):
                last = text[:-1]
                self.labels[last] = len(rows)
            elif match := re.match(r"\.reg \.(\w+) (%\w+)<(\d+)>", text):
                self.width |= {f"{match[2]}{k}": match[1] for k in range(int(match[3]))}
            elif op == ".branchtargets":
                tables[last] = rest.replace(",", " ").split()
            elif op == "brx.idx":
                index, table = rest.replace(",", " ").split()
                for k, target in enumerate(tables[table]):
                    rows.append(("", f"setp.eq.b32 %brx, {index}, {k}", where))
                    rows.append(("%brx", f"bra {target}", where))
            elif op[0] == "@":
                rows.append((op[1:], rest, where))
            elif op[0] != ".":
                rows.append(("", text, where))
            elif op != ".pragma":
                raise unknown(text)
        return rows

    def assemble(self, rows: list[tuple[str, str, str]], functions: Functions) -> None:
        lowered: list[Lowered | None] = []
        for _, text, where in rows:
            op, _, rest = text.partition(" ")
            is_control = text == "bar.sync 0" or op in ("ret", "bra", "bra.uni")
            lowered.append(None if is_control else lower(op, list(split(rest)), self.width))
            self.lines.append(f"{text} [{where}]")
        functions.add({x.body for x in lowered if x is not None})
        self.ops = np.zeros(len(rows), OP)
        for op, (guard, text, _), x in zip(self.ops, rows, lowered, strict=True):
            op["guard"] = self.place(guard.lstrip("!"), "pred") if guard else -1
            op["negated"] = guard.startswith("!")
            if x is None:
                op["run"] = CONTROL[text.split()[0].removesuffix(".uni")]
                op["imm"][0] = self.labels[text.split()[1]] if text.startswith("bra") else 0
            else:
                op["run"] = functions.address[x.body]
                op["at"][: len(x.operands)] = [self.place(*operand) for operand in x.operands]
                op["imm"][: len(x.imm)] = x.imm

    def place(self, name: str, kind: str) -> int:
        """The offset of 32 values in a warp's file."""
        size = SIZES[kind]
        if name in self.width and SIZES[self.width[name]] != size:
            raise unknown(f"{self.width[name]} register as a {kind}")
        if (name, size) not in self.places:
            self.places[name, size] = self.size
            self.size += max(64, size * LANES)
        return self.places[name, size]

    def file(self, arguments: Sequence[Any]) -> np.ndarray:
        """A warp's registers before it starts."""
        given = dict(zip(self.parameters, arguments, strict=True))
        file = np.full(self.size, POISON, np.uint8)
        for (name, size), at in self.places.items():
            if name not in self.width and name != "_":
                value = bits_of(given.get(name, name), size)
                file[at : at + LANES * size] = np.frombuffer(value * LANES, np.uint8)
        return file


class Simulator:
    """Launches programs; `backwards`: the last block, and of a block the last warp, goes first."""

    def __init__(self) -> None:
        self.functions = Functions()
        self.core = build((HERE / "sim.cpp").read_text())
        self.backwards = False

    def launch(
        self,
        program: Program,
        shared: int,
        grid: Sequence[int],
        arguments: Sequence[Any],
        tensors: Sequence[tuple[int, int]],
    ) -> None:
        """Arguments are numbers and addresses; `tensors`, from where to where they may lead."""
        file, ranges = program.file(arguments), np.array(tensors, np.uint64)
        message = ctypes.create_string_buffer(200)
        specials = [program.places[name, 4] for name in ("%tid.x", "%ctaid.x")]
        at = self.core.launch(
            ctypes.c_void_p(program.ops.ctypes.data), ctypes.c_void_p(file.ctypes.data),
            ctypes.c_int64(len(file)), *specials, program.warps, (ctypes.c_int * 3)(*grid),
            ctypes.c_int64(shared), ctypes.c_void_p(ranges.ctypes.data), len(tensors),
            int(self.backwards), message, len(message),
        )  # fmt: skip
        if at >= 0:
            raise RuntimeError(f"{message.value.decode()}: {program.lines[at]}")
