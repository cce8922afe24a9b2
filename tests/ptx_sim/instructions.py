"""What each PTX instruction does: the C++ body of a function of a warp (sim.h)."""

from __future__ import annotations

import re
from typing import NamedTuple

SIZES = {f"{kind}{size}": size // 8 for kind in "bsuf" for size in (8, 16, 32, 64)}
SIZES |= {"pred": 1, "bf16": 2, "f16x2": 4, "bf16x2": 4}
CPP = {"pred": "bool", "f16": "half", "bf16": "bfloat", "f32": "float", "f64": "double"}
CPP |= {f"{kind}{n}": f"uint{n}_t" for kind in "bu" for n in (8, 16, 32, 64)}
CPP |= {f"s{n}": f"int{n}_t" for n in (8, 16, 32, 64)}

INT, REAL, SMALL = "[bsu](?:16|32|64)", "f32|f64", "b?f16(?:x2)?"
FLOAT = f"{REAL}|b?f16"
ANY = f"{INT}|{FLOAT}"
SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|"}
SIGNS |= {"xor": "^", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARES = "eq|ne|lt|le|gt|ge"
NAN = "(a != a || b != b)"
# The instruction, the types of its operands and the value. Of a type t, w is twice as wide and n
# its bits; T, W and X are the C++ of t, w and x, which for an operation is its sign.
ELEMENTWISE = [
    (rf"(?P<x>add|sub|mul|div)(\.rn)?\.(?P<t>{REAL})", "t t t", "result(a {x} b)"),
    (rf"fma\.rn\.(?P<t>{REAL})", "t t t t", "result(std::fma(a, b, c))"),
    (rf"(?P<x>add|sub)\.(?P<t>{INT})", "t t t", "a {x} b"),
    (rf"(?P<x>div|rem)\.(?P<t>{INT})", "t t t", "b ? a {x} b : {T}(-1)"),
    (rf"mul\.lo\.(?P<t>{INT})", "t t t", "a * b"),
    (rf"mul\.hi\.(?P<t>{INT})", "t t t", "high(a, b)"),
    (rf"mul\.wide\.(?P<t>{INT})", "w t t", "{W}(a) * {W}(b)"),
    (rf"mad\.lo\.(?P<t>{INT})", "t t t t", "a * b + c"),
    (rf"mad\.wide\.(?P<t>{INT})", "w t t w", "{W}(a) * {W}(b) + c"),
    (rf"(?P<x>and|or|xor)\.(?P<t>{INT}|pred)", "t t t", "a {x} b"),
    (rf"not\.(?P<t>{INT})", "t t", "~a"),
    (r"not\.(?P<t>pred)", "t t", "!a"),
    (rf"neg\.(?P<t>{ANY})", "t t", "-a"),
    (rf"abs\.(?P<t>{REAL})", "t t", "std::fabs(a)"),
    (r"abs\.ftz\.(?P<t>f32)", "t t", "flushed(std::fabs(a))"),
    (rf"abs\.(?P<t>{SMALL})", "n n", "a & 0x7FFF7FFF"),
    (r"abs\.(?P<t>s32|s64)", "t t", "a < 0 ? -a : a"),
    (rf"copysign\.(?P<t>{REAL})", "t t t", "std::copysign(b, a)"),
    (rf"min\.(?P<t>{INT}|{REAL})", "t t t", "result(least(a, b))"),
    (rf"max\.(?P<t>{INT}|{REAL})", "t t t", "result(most(a, b))"),
    (r"max\.NaN\.(?P<t>f32)", "t t t", f"result({NAN} ? a + b : most(a, b))"),
    (r"min\.NaN\.(?P<t>f32)", "t t t", f"result({NAN} ? a + b : least(a, b))"),
    (rf"shl\.(?P<t>{INT})", "t t u32", "left(a, b)"),
    (rf"shr\.(?P<t>{INT})", "t t u32", "right(a, b)"),
    (r"bfe\.(?P<t>[su](32|64))", "t t u32 u32", "field(a, b & 255, c & 255)"),
    (r"prmt\.(?P<t>b32)", "t t t t", "permuted(a, b, c)"),
    (r"popc\.(?P<t>b32|b64)", "u32 t", "__builtin_popcountll(a)"),
    (rf"selp\.(?P<t>{ANY})", "n n n pred", "c ? a : b"),
    (rf"mov\.(?P<t>{ANY}|pred)", "n n", "a"),
    (rf"setp\.(?P<x>{COMPARES})\.(?P<t>{INT})", "pred t t", "a {x} b"),
    (rf"setp\.(?P<x>{COMPARES})\.(?P<t>{FLOAT})", "pred t t", f"!{NAN} && a {{x}} b"),
    (rf"setp\.(?P<x>{COMPARES})u\.(?P<t>{FLOAT})", "pred t t", f"{NAN} || a {{x}} b"),
    (rf"setp\.num\.(?P<t>{FLOAT})", "pred t t", f"!{NAN}"),
    (rf"setp\.nan\.(?P<t>{FLOAT})", "pred t t", NAN),
    (r"cvt\.rn\.(?P<x>b?f16)x2\.(?P<t>f32)", "b32 t t",
     "uint32_t(bits<uint16_t>({X}(a).x)) << 16 | bits<uint16_t>({X}(b).x)"),
    (rf"cvt(\.rn)?\.(?P<x>{ANY})\.(?P<t>{ANY})", "x t", "converted<{X}, 0>({T}(a))"),
    (rf"cvt\.r(?P<m>[nzmp])i\.(?P<x>{ANY})\.(?P<t>{REAL})", "x t", "converted<{X}, '{m}'>(a)"),
    (r"ex2\.approx\.(?P<t>f32)", "t t", "result(std::exp2(a))"),
    (r"ex2\.approx\.ftz\.(?P<t>f32)", "t t", "result(flushed(std::exp2(flushed(a))))"),
    (r"rcp\.approx\.ftz\.(?P<t>f64)", "t t", "reciprocal(a)"),
    (rf"sqrt\.rn\.(?P<t>{REAL})", "t t", "result(std::sqrt(a))"),
]  # fmt: skip
REDUCTIONS = {"add": "a + b", "min": "least(a, b)", "max": "most(a, b)", "or": "a | b"}


class Address(NamedTuple):
    base: str
    offset: int


Operand = str | Address | list[str]


class Lowered(NamedTuple):
    """A function's body; the operands in the order of Op::at, with their types; Op::imm."""

    body: str
    operands: list[tuple[str, str]]
    imm: tuple[int, ...] = ()


def unknown(op: str) -> NotImplementedError:
    return NotImplementedError(f"ptx_sim knows no {op}")


def elementwise(types: list[str], value: str) -> str:
    names = "dabc"[: len(types)]
    heads = [f"auto* {n} = w.at<{CPP[types[k]]}>(o.at[{k}]);" for k, n in enumerate(names)]
    value = re.sub(r"\b([abc])\b", r"\1[l]", value)
    return " ".join(heads) + f" w.each([=](int l) {{ d[l] = {value}; }});"


def lower(op: str, operands: list[Operand], width: dict[str, str]) -> Lowered:
    """One instruction; the `width` of a register is pred, b16, b32 or b64."""
    if found := lower_exchange(op, operands, width):
        return found
    for pattern, types, value in ELEMENTWISE:
        if match := re.fullmatch(pattern, op):
            found = match.groupdict("")
            t, x = found["t"], found.get("x", "")
            named = {"t": t, "x": x, "n": "pred" if t == "pred" else f"b{8 * SIZES[t]}"}
            named["w"] = t[0] + str(16 * SIZES[t])
            given = [named.get(key, key) for key in types.split()]
            if op.startswith("cvt") and SIZES[width.get(operands[1], t)] > SIZES[t]:
                given[1] = width[operands[1]]  # of which t are the low bits
            spelt = {"x": SIGNS.get(x, x), "m": found.get("m", ""), "X": CPP.get(x, "")}
            value = value.format(**spelt, T=CPP.get(t), W=CPP.get(named["w"]))
            return Lowered(elementwise(given, value), list(zip(operands, given, strict=True)))
    raise unknown(op)


def lower_exchange(op: str, operands: list[Operand], width: dict[str, str]) -> Lowered | None:
    """What moves values between registers, lanes and memory; None: an elementwise instruction."""
    if op == "cp.async.commit_group":
        return Lowered("w.copies.emplace_back();", [])
    if op == "bar.warp.sync":
        return Lowered("w.together(); ++w.sync;", [])
    if not operands:
        return None
    head, *more = op.split(".")
    kind = more[-1]
    first, *others = lists = [x if isinstance(x, list) else [x] for x in operands]
    if head == "mov" and len(first) * len(others[0]) > 1:
        n = len(first) * len(others[0])
        part = f"b{8 * SIZES[kind] // n}"
        name = "unpack" if len(first) > 1 else "pack"
        given = [(x, part if len(xs) > 1 else kind) for xs in lists for x in xs]
        return Lowered(f"{name}<{CPP[kind]}, {CPP[part]}, {n}>(w, o);", given)
    if head == "ld" and more[0] == "param":
        (into,), ((address,),) = first, others
        if address.offset:
            raise unknown(f"{op} with an offset")
        body = elementwise([width[into], kind], "a")
        return Lowered(body, [(into, width[into]), (address.base, kind)])
    reads = head.startswith("ld")
    method = "read" if reads else "write"
    if head in ("ld", "st") and more[0] in ("global", "shared", "shared::cta"):
        held, (address,) = (first, *others) if reads else (*others, first)
        held_as, space = width.get(held[0], kind), more[0].partition(":")[0]
        base = "b64" if space == "global" else "b32"
        types = f"{CPP[base]}, {CPP[held_as]}, {CPP[kind]}, {len(held)}"
        body = f"{'load' if reads else 'store'}<&Warp::{method}_{space}, {types}>(w, o);"
        given = [*((x, held_as) for x in held), (address.base, base)]
        return Lowered(body, given, (address.offset,))
    if match := re.fullmatch(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16", op):
        held, (address,) = (first, *others) if reads else (*others, first)
        given = [(x, "b32") for x in (*held, address.base)]
        body = f"matrices<&Warp::{method}_shared, {match[1]}>(w, o);"
        return Lowered(body, given, (address.offset,))
    if match := re.fullmatch(r"(?:atom|red)\.global\.gpu\.relaxed\.add\.([us](?:32|64))", op):
        *into, address, of = operands
        given = [*((x, kind) for x in into), (address.base, "b64"), (of, kind)]
        return Lowered(f"atomic_add<{CPP[kind]}>(w, o, {len(into)});", given, (address.offset,))
    if match := re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", op):
        return Lowered(f"shuffle<'{match[1][0]}'>(w, o);", [(x, "b32") for x in operands])
    if match := re.fullmatch(r"redux\.sync\.(add|min|max|or)\.([usb]32)", op):
        how = f"[](auto a, auto b) {{ return {REDUCTIONS[match[1]]}; }}"
        return Lowered(f"reduce<{CPP[kind]}>(w, o, {how});", [(x, kind) for x in operands])
    if re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", op):
        to, of, size, used = operands
        given = [(to.base, "b32"), (of.base, "b64"), (used, "b32")]
        return Lowered(f"start_copies(w, o, {int(size, 0)});", given, (to.offset, of.offset))
    if op == "cp.async.wait_group":
        return Lowered("wait_for_copies(w, o.imm[0]);", [], (int(operands[0]),))
    return None
