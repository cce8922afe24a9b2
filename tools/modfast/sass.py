# ruff: noqa
"""Executes a kernel's SASS (sm_90, text and control words of `nvdisasm -hex -c`) for one block and
counts the cycles of an in-order warp: stall counts, scoreboards, latencies of what has a variable one."""

import re, struct, math, collections
import numpy as np

LAT = dict(
    LDS=29,
    LDC=36,
    ULDC=30,
    S2R=26,
    S2UR=28,
    LDG=270,
    LD=34,
    MUFU=30,
    F2F=28,
    F2FP=8,
    I2F=28,
    F2I=28,
    POPC=22,
    FLO=22,
    BREV=18,
    SHFL=25,
    VOTE=8,
    DADD=16,
    DMUL=16,
    DFMA=16,
    DSETP=18,
    R2UR=12,
    BAR=22,
    B2R=20,
    STS=10,
    STG=12,
    IMAD=12,
    ACQBULK=20,
    CALL=12,
    RET=20,
    REDUX=14,
)
TAKEN, SYNC = 8, 6  # beyond the stall count: a taken branch; a BSYNC
M32, M64 = 0xFFFFFFFF, (1 << 64) - 1


class Ins:
    __slots__ = (
        "adr",
        "text",
        "op",
        "mods",
        "args",
        "pred",
        "neg",
        "stall",
        "wb",
        "rb",
        "wait",
        "fn",
        "line",
        "cat",
    )


def parse(path):
    """{function: ([Ins], {label: index}, {address: index})}"""
    fns, cur, labels, pend = {}, None, {}, []
    lines = open(path).read().splitlines()
    src = ""
    i = 0
    while i < len(lines):
        l = lines[i]
        m = re.match(r"\s*\.section\s+\.text\.(\S+?),", l)
        if m:
            cur, labels = [], {}
            fns[m[1]] = (cur, labels)
        m = re.match(r"^(\S+):\s*$", l)
        if m and cur is not None:
            labels[m[1]] = len(cur)
        m = re.search(r'//## File "([^"]+)", line (\d+)(.*)', l)
        if m:
            src = m[1].rsplit("/", 1)[-1] + ":" + m[2]
        m = re.match(r"^\s+(?:\{\s*)?/\*([0-9a-f]{4,5})\*/\s+(.*?);\s*/\* 0x([0-9a-f]{16}) \*/", l)
        if m:
            hi = int(re.search(r"/\* 0x([0-9a-f]{16}) \*/", lines[i + 1])[1], 16)
            c = hi >> 41
            ins = Ins()
            ins.adr, ins.text, ins.line = int(m[1], 16), m[2].strip(), src
            ins.stall, ins.wb, ins.rb, ins.wait = c & 15, c >> 5 & 7, c >> 8 & 7, c >> 11 & 63
            t = ins.text
            pm = re.match(r"@(!?)(U?P[0-9T]+)\s+(.*)", t)
            ins.pred, ins.neg = (pm[2], bool(pm[1])) if pm else (None, False)
            t = pm[3] if pm else t
            t = t.replace(".reuse", "")
            head, _, rest = t.partition(" ")
            parts = head.split(".")
            ins.op, ins.mods = parts[0], parts[1:]
            ins.args = [a.strip() for a in re.split(r",(?![^\[]*\])", rest)] if rest.strip() else []
            cur.append(ins)
            i += 1
        i += 1
    return fns


def f32(bits):
    return struct.unpack("<f", struct.pack("<I", bits & M32))[0]


def b32(x):
    try:
        return int(np.float32(x).view(np.uint32))
    except OverflowError:
        return 0x7F800000


def f64(bits):
    return struct.unpack("<d", struct.pack("<Q", bits & M64))[0]


def b64(x):
    return struct.unpack("<Q", struct.pack("<d", x))[0]


def s32(x):
    x &= M32
    return x - (1 << 32) if x >> 31 else x


def s64(x):
    x &= M64
    return x - (1 << 64) if x >> 63 else x


CMP = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}
SWIN = 0x1000


class Memory:
    def __init__(self):
        self.base, self.spans = 0x7000000000, []

    def add(self, array):
        """An address for a numpy array, which is read and written in place."""
        view = array.reshape(-1).view(np.uint8)
        at = self.base
        self.spans.append((at, at + len(view), view))
        self.base = (at + len(view) + 4095) // 4096 * 4096 + 4096
        return at

    def find(self, a, n):
        for lo, hi, v in self.spans:
            if lo <= a and a + n <= hi:
                return v, a - lo
        raise IndexError(f"global address {a:#x} of {n} bytes")

    def load(self, a, n):
        v, o = self.find(a, n)
        return int.from_bytes(v[o : o + n].tobytes(), "little")

    def store(self, a, n, x):
        v, o = self.find(a, n)
        v[o : o + n] = np.frombuffer((x & ((1 << 8 * n) - 1)).to_bytes(n, "little"), np.uint8)


class Warp:
    def __init__(self, fn, mem, const, shared, first, block, lanes=32, trace=False):
        self.ins, self.labels = fn
        self.at = {i.adr: k for k, i in enumerate(self.ins)}
        self.mem, self.const, self.shared, self.block = mem, const, shared, block
        self.tid = [first + l for l in range(32)]
        self.R = [[0xDEADBEEF] * 32 for _ in range(256)]
        self.R[255] = [0] * 32
        self.P = [[False] * 32 for _ in range(8)]
        self.P[7] = [True] * 32
        self.U, self.UP = [0] * 64, [False] * 8
        self.UP[7] = True
        self.pc = [0] * 32
        self.live = [True] * 32
        self.B, self.blocked = {}, [None] * 32
        self.t, self.sb = 0.0, [0.0] * 6
        self.count, self.lines, self.trace = 0, collections.Counter(), trace
        self.log = []
        self.loads = 0

    # ---- operands
    def reg(self, a):
        return 255 if a == "RZ" else int(a[1:])

    def ival(self, a, l, wide=False):
        """Integer operand of a lane: (value, negated?)"""
        neg = inv = False
        while a[0] in "-~" and not a.startswith("-0x"):
            neg, inv = neg or a[0] == "-", inv or a[0] == "~"
            a = a[1:]
        absolute = a.startswith("|")
        a = a.strip("|")
        if a.startswith("-0x"):
            v = -int(a[3:], 16) & M32
        elif a.startswith("0x"):
            v = int(a, 16)
        elif a.startswith("c["):
            v = self.cval(a, 8 if wide else 4, l)
        elif a.startswith("UR"):
            k = 63 if a == "URZ" else int(a[2:])
            v = 0 if k == 63 else self.U[k] | (self.U[k + 1] << 32 if wide else 0)
        elif a[0] == "R":
            k = self.reg(a.removesuffix(".H0_H0"))
            v = 0 if k == 255 else self.R[k][l] | (self.R[k + 1][l] << 32 if wide else 0)
        else:
            raise ValueError(a)
        if absolute:
            v = abs(s32(v))
        if inv:
            v = ~v & (M64 if wide else M32)
        return v, neg

    def i(self, a, l, wide=False):
        v, neg = self.ival(a, l, wide)
        return -v & (M64 if wide else M32) if neg else v

    def cval(self, a, n, l):
        m = re.match(r"c\[(0x\w+)\]\[(.*)\]", a)
        off = 0
        for part in m[2].split("+"):
            off += int(part, 16) if part.startswith("0x") else self.i(part, l)
        return int.from_bytes(self.const[int(m[1], 16)][off : off + n], "little")

    def num(self, a, l, double):
        neg = absolute = False
        if a[0] == "-" and (a[1] in "RU|"):
            neg, a = True, a[1:]
        if a[0] == "|":
            absolute, a = True, a.strip("|")
        if a.startswith("R") or a.startswith("UR") or a.startswith("c["):
            v, _ = self.ival(a, l, double)
            v = f64(v) if double else f32(v)
        else:
            v = {
                "+INF": math.inf,
                "-INF": -math.inf,
                "QNAN": math.nan,
                "+QNAN": math.nan,
                "-QNAN": math.nan,
            }.get(a)
            if v is None:
                v = float(a) if not a.startswith("0x") else f32(int(a, 16))
        if absolute:
            v = abs(v)
        return -v if neg else v

    def p(self, a, l):
        neg = a[0] == "!"
        a = a.lstrip("!")
        if a.startswith("U"):
            v = self.UP[7 if a == "UPT" else int(a[2:])]
        else:
            v = self.P[7 if a == "PT" else int(a[1:])][l]
        return v != neg

    def setp(self, a, l, v):
        if a.startswith("U"):
            if a != "UPT":
                self.UP[int(a[2:])] = v
        elif a != "PT":
            self.P[int(a[1:])][l] = v

    def set(self, a, l, v, wide=False):
        if a.startswith("UR"):
            k = 63 if a == "URZ" else int(a[2:])
            if k != 63:
                self.U[k] = v & M32
                if wide:
                    self.U[k + 1] = v >> 32 & M32
            return
        k = self.reg(a)
        if k == 255:
            return
        self.R[k][l] = v & M32
        if wide:
            self.R[k + 1][l] = v >> 32 & M32

    # ---- one step: the lanes at the lowest pc that are not blocked
    def step(self):
        """False: all lanes have left; "bar": at a barrier, which is not passed yet."""
        free = [l for l in range(32) if self.live[l] and self.blocked[l] is None]
        if not free:
            if not any(self.live):
                return False
            self.release()
            free = [l for l in range(32) if self.live[l] and self.blocked[l] is None]
            if not free:
                raise RuntimeError("deadlock")
        pc = min(self.pc[l] for l in free)
        group = [l for l in free if self.pc[l] == pc]
        ins = self.ins[pc]
        start = self.t
        for k in range(6):
            if ins.wait >> k & 1:
                start = max(start, self.sb[k])
        if ins.op == "BAR" and len(group) == sum(self.live):
            self.t = start
            return "bar"
        self.issue(ins, pc, group, start)
        return True

    def pass_barrier(self, t):
        group = [l for l in range(32) if self.live[l]]
        pc = self.pc[group[0]]
        self.issue(self.ins[pc], pc, group, t)
        self.t = max(self.t, t + LAT["BAR"])

    def issue(self, ins, pc, group, start):
        self.count += 1
        self.lines[ins.adr // 128] += 1
        waited = start - self.t
        self.t = start + max(1, ins.stall)
        active = [
            l for l in group if ins.pred is None or self.p(("!" if ins.neg else "") + ins.pred, l)
        ]
        for l in group:
            self.pc[l] = pc + 1
        lat = LAT.get(ins.op, 6)
        if ins.op == "IMAD" and "WIDE" not in ins.mods and "HI" not in ins.mods:
            lat = 6
        if ins.wb < 6:
            self.sb[ins.wb] = max(self.sb[ins.wb], start + (lat if active else 6))
        if ins.rb < 6:
            self.sb[ins.rb] = max(self.sb[ins.rb], start + 12)
        if self.trace:
            self.log.append((start, waited, len(active), ins))
        if active:
            once = ins.op[0] == "U" or ins.op in ("R2UR", "S2UR")
            getattr(self, "do_" + ins.op)(ins, active[:1] if once else active, group)
        if self.trace and active:
            d = next((a for a in ins.args if re.match(r"R\d+$", a)), None)
            l = active[0]
            self.log[-1] += (
                (
                    ""
                    if d is None
                    else f"{self.R[int(d[1:])][l]:08x}"
                    + (
                        f" {f64(self.R[int(d[1:])][l] | self.R[int(d[1:]) + 1][l] << 32):g}"
                        if ins.op[0] == "D"
                        else ""
                    )
                )
                if ins.op not in ("DSETP",)
                else "",
            )

    def release(self):
        """BSYNC: barriers whose lanes have all arrived."""
        for b in {x for x in self.blocked if x is not None}:
            want = [l for l in range(32) if self.live[l] and (b == "ALL" or l in self.B.get(b, ()))]
            if all(self.blocked[l] == b for l in want):
                for l in want:
                    self.blocked[l] = None
                self.t += SYNC

    # ---- control
    def jump(self, active, k):
        for l in active:
            self.pc[l] = k
        self.t += TAKEN

    def do_BRA(self, ins, active, group):
        m = re.search(r"`\((.*)\)", ins.text)
        a = ins.args[0]
        if "DIV" in ins.mods or a.startswith("UR"):  # taken where the warp is diverged
            return
        if re.match(r"!?U?P\d", a):
            active = [l for l in active if self.p(a, l)]
        if active:
            self.jump(active, self.labels[m[1]])

    def do_CALL(self, ins, active, group):
        self.jump(active, self.labels[re.search(r"`\((.*)\)", ins.text)[1]])

    def do_RET(self, ins, active, group):
        r = ins.args[0].split()[0]
        for l in active:
            self.pc[l] = self.at[self.i(r, l)]
        self.t += TAKEN

    def do_BSSY(self, ins, active, group):
        self.B[ins.args[0]] = set(active)

    def do_BREAK(self, ins, active, group):
        self.B[ins.args[-1]] -= set(active)

    def do_BSYNC(self, ins, active, group):
        for l in active:
            self.blocked[l] = ins.args[0]
        self.release()

    def do_WARPSYNC(self, ins, active, group):
        if len(active) == sum(self.live):
            return
        for l in active:
            self.blocked[l] = "ALL"

    def do_EXIT(self, ins, active, group):
        for l in active:
            self.live[l] = False
            for s in self.B.values():
                s.discard(l)
        if any(x is not None for x in self.blocked):
            self.release()

    def nothing(self, ins, active, group):
        pass

    vote = False

    def do_BAR(self, ins, active, group):
        pass

    def do_B2R(self, ins, active, group):
        for l in active:
            self.setp(ins.args[1], l, self.vote)

    do_NOP = do_PREEXIT = do_ACQBULK = do_MEMBAR = do_ERRBAR = do_CCTL = nothing

    def do_S2R(self, ins, active, group):
        for l in active:
            n = ins.args[1]
            v = {
                "SR_TID.X": self.tid[l],
                "SR_CTAID.X": self.block[0],
                "SR_CTAID.Y": self.block[1],
                "SR_LANEID": l,
                "SR_CgaCtaId": 0,
                "SR_SWINHI": SWIN,
                "SRZ": 0,
            }[n]
            self.set(ins.args[0], l, v)

    do_S2UR = do_S2R

    def do_CS2R(self, ins, active, group):
        for l in active:
            self.set(ins.args[0], l, 0, "32" not in ins.mods)

    # ---- integers
    def each(self, ins, active, f, wide=False):
        for l in active:
            self.set(ins.args[0], l, f(l), wide)

    def do_MOV(self, ins, active, group):
        self.each(ins, active, lambda l: self.i(ins.args[1], l))

    do_UMOV = do_MOV
    do_R2UR = do_MOV

    def do_IMAD(self, ins, active, group):
        a, mods = ins.args, ins.mods
        wide, unsigned = "WIDE" in mods, "U32" in mods
        if "HI" in mods:
            k = 1 if not a[1].startswith(("P", "!P")) else 2
            for l in active:
                v = self.i(a[k], l) * self.i(a[k + 1], l) + self.i(a[k + 2], l, True)
                if "X" in mods:
                    v += self.p(a[k + 3], l) << 32
                self.set(a[0], l, v >> 32)
                if k == 2:
                    self.setp(a[1], l, v >> 64 != 0)
            return
        k = 2 if a[1].startswith("P") else 1
        for l in active:
            x, y = self.i(a[k], l), self.i(a[k + 1], l)
            if wide:
                if not unsigned:
                    x, y = s32(x), s32(y)
                v = x * y + self.i(a[k + 2], l, True)
            else:
                v = x * y + self.i(a[k + 2], l)
            if "X" in mods:
                v += self.p(a[k + 3], l)
            self.set(a[0], l, v, wide)
            if k == 2:
                self.setp(a[1], l, v >> 64 != 0)

    do_UIMAD = do_IMAD

    def do_IADD3(self, ins, active, group):
        a = ins.args
        k, outs = 1, []
        while a[k].startswith(("P", "UP")):
            outs.append(a[k])
            k += 1
        for l in active:
            v = 0
            for x in a[k : k + 3]:
                y, neg = self.ival(x, l)
                v += (1 << 32) - y if neg else y
            if "X" in ins.mods:
                v += sum(self.p(x, l) for x in a[k + 3 : k + 5])
            self.set(a[0], l, v)
            if outs:
                self.setp(outs[0], l, v >> 32 > 0)

    do_UIADD3 = do_VIADD = do_IADD3

    def do_VIADD(self, ins, active, group):
        self.each(ins, active, lambda l: self.i(ins.args[1], l) + self.i(ins.args[2], l))

    def minmax(self, x, y, unsigned, smaller):
        key = (lambda v: v & M32) if unsigned else s32
        return min(x, y, key=key) if smaller else max(x, y, key=key)

    def do_VIMNMX(self, ins, active, group):
        a = ins.args
        self.each(
            ins,
            active,
            lambda l: self.minmax(
                self.i(a[1], l), self.i(a[2], l), "U32" in ins.mods, self.p(a[3], l)
            ),
        )

    do_IMNMX = do_VIMNMX

    def do_VIADDMNMX(self, ins, active, group):
        a = ins.args
        self.each(
            ins,
            active,
            lambda l: self.minmax(
                (self.i(a[1], l) + self.i(a[2], l)) & M32,
                self.i(a[3], l),
                "U32" in ins.mods,
                self.p(a[4], l),
            ),
        )

    def do_IABS(self, ins, active, group):
        self.each(ins, active, lambda l: abs(s32(self.i(ins.args[1], l))))

    def logic(self, c, q, r):
        op = next(m for m in q if m in ("AND", "OR", "XOR"))
        return c and r if op == "AND" else c or r if op == "OR" else c != r

    def do_ISETP(self, ins, active, group):
        a, mods = ins.args, ins.mods
        cmp = CMP[mods[0]]
        key = (lambda v: v) if "U32" in mods else s32
        for l in active:
            x, y = key(self.i(a[2], l)), key(self.i(a[3], l))
            c = cmp(x, y)
            if "EX" in mods:
                low = self.p(a[5], l)
                c = (
                    x != y or low
                    if mods[0] == "NE"
                    else (mods[0] != "EQ" and CMP[mods[0][0] + "T"](x, y)) or (x == y and low)
                )
            r = self.p(a[4], l)
            self.setp(a[0], l, self.logic(c, mods, r))
            self.setp(a[1], l, self.logic(not c, mods, r))

    def do_UISETP(self, ins, active, group):
        self.do_ISETP(ins, active[:1], group)

    def lut(self, k, x, y, z, mask):
        v = 0
        for n in range(8):
            if k >> n & 1:
                v |= (x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z)
        return v & mask

    def do_LOP3(self, ins, active, group):
        a = ins.args
        out = None
        if a[0].startswith(("P", "UP")):
            out, a = a[0], a[1:]
        for l in active:
            v = self.lut(int(a[4], 16), self.i(a[1], l), self.i(a[2], l), self.i(a[3], l), M32)
            self.set(a[0], l, v)
            if out:
                self.setp(out, l, v != 0 or self.p(a[5], l))

    do_ULOP3 = do_LOP3

    def do_PLOP3(self, ins, active, group):
        a = ins.args
        for l in active:
            x, y, z = (int(self.p(q, l)) for q in a[2:5])
            n = x << 2 | y << 1 | z
            v, w = int(a[5], 16) >> n & 1, int(a[6], 16) >> n & 1
            self.setp(a[0], l, bool(v))
            self.setp(a[1], l, bool(w))

    do_UPLOP3 = do_PLOP3

    def do_SHF(self, ins, active, group):
        a, m = ins.args, ins.mods
        for l in active:
            lo, s, hi = (self.i(x, l) for x in a[1:4])
            if m[0] == "L":
                v = (hi << 32 | lo) << min(s, 64)
                v = v >> 32 if "HI" in m else v
            elif "S64" in m or "S32" in m:
                v = s64(hi << 32 | lo) >> min(s, 63)
                v = (s32(hi) >> min(s, 31)) if "S32" in m else v >> 32 if "HI" in m else v
            else:
                v = (hi << 32 | lo) >> min(s, 64)
                v = v >> 32 if "HI" in m else v
            self.set(a[0], l, v)

    do_USHF = do_SHF

    def do_LEA(self, ins, active, group):
        a, m = ins.args, ins.mods
        k, out = (2, a[1]) if a[1].startswith(("P", "UP")) else (1, None)
        for l in active:
            if "SX32" in m:
                x = s32(self.i(a[k], l)) << int(a[k + 2], 16)
                v = (x >> 32 & M32) + self.i(a[k + 1], l) + (self.p(a[k + 3], l) if "X" in m else 0)
            elif "HI" in m:
                x = (self.i(a[k + 2], l) << 32 | self.i(a[k], l)) << int(a[k + 3], 16)
                v = (x >> 32 & M32) + self.i(a[k + 1], l) + (self.p(a[k + 4], l) if "X" in m else 0)
            else:
                v = (
                    (self.i(a[k], l) << int(a[k + 2], 16) & M32)
                    + self.i(a[k + 1], l)
                    + (self.p(a[k + 3], l) if "X" in m else 0)
                )
            self.set(a[0], l, v)
            if out:
                self.setp(out, l, v >> 32 != 0)

    do_ULEA = do_LEA

    def do_PRMT(self, ins, active, group):
        a = ins.args
        for l in active:
            x = self.i(a[1], l) | self.i(a[3], l) << 32
            s, v = self.i(a[2], l), 0
            for n in range(4):
                k = s >> 4 * n & 15
                b = x >> 8 * (k & 7) & 255
                v |= ((255 if b & 128 else 0) if k & 8 else b) << 8 * n
            self.set(a[0], l, v)

    do_UPRMT = do_PRMT

    def do_SEL(self, ins, active, group):
        a = ins.args
        self.each(ins, active, lambda l: self.i(a[1], l) if self.p(a[3], l) else self.i(a[2], l))

    do_USEL = do_SEL

    def do_POPC(self, ins, active, group):
        self.each(ins, active, lambda l: bin(self.i(ins.args[1], l)).count("1"))

    do_UPOPC = do_POPC

    def do_BREV(self, ins, active, group):
        self.each(ins, active, lambda l: int(f"{self.i(ins.args[1], l):032b}"[::-1], 2))

    def do_FLO(self, ins, active, group):
        def flo(l):
            v = self.i(ins.args[1], l)
            if v == 0:
                return M32
            return 32 - v.bit_length() if "SH" in ins.mods else v.bit_length() - 1

        self.each(ins, active, flo)

    do_UFLO = do_FLO
    do_UBREV = do_BREV

    def do_R2P(self, ins, active, group):
        for l in active:
            v, mask = self.i(ins.args[1], l), self.i(ins.args[2], l)
            for k in range(7):
                if mask >> k & 1:
                    self.P[k][l] = bool(v >> k & 1)

    def do_P2R(self, ins, active, group):
        for l in active:
            mask = self.i(ins.args[3], l)
            v = self.i(ins.args[2], l) & ~mask
            self.set(ins.args[0], l, v | sum((int(self.P[k][l]) << k) for k in range(7)) & mask)

    # ---- lanes
    def do_VOTE(self, ins, active, group):
        a = ins.args
        q = [l for l in active if self.p(a[-1], l)]
        any_ = len(q) > 0 if "ANY" in ins.mods else len(q) == len(active)
        for l in active:
            for x in a[:-1]:
                if x.startswith("R"):
                    self.set(x, l, sum(1 << n for n in q))
                elif x.startswith("P"):
                    self.setp(x, l, any_)

    def do_VOTEU(self, ins, active, group):
        a = ins.args
        q = [l for l in active if self.p(a[-1], l)]
        any_ = len(q) > 0 if "ANY" in ins.mods else len(q) == len(active)
        for x in a[:-1]:
            if x.startswith("UR"):
                self.set(x, 0, sum(1 << n for n in q))
            elif x.startswith("UP"):
                self.setp(x, 0, any_)

    def do_SHFL(self, ins, active, group):
        a = ins.args
        src = {l: self.i(a[2], l) for l in active}
        for l in active:
            k = self.i(a[3], l)
            n = {"IDX": k & 31, "BFLY": l ^ k, "DOWN": l + k, "UP": l - k}[ins.mods[0]]
            if not 0 <= n < 32:
                n = l
            self.set(a[1], l, src.get(n, 0xBADBAD))

    # ---- floating point
    def do_FSEL(self, ins, active, group):
        a = ins.args

        def bits(x, l):
            if x.startswith(("R", "-R", "|", "UR")):
                return self.i(x, l)
            return {"-QNAN": 0xFFC00000, "+QNAN": 0x7FC00000, "QNAN": 0x7FC00000}.get(x) or b32(
                self.num(x, l, False)
            )

        self.each(ins, active, lambda l: bits(a[1], l) if self.p(a[3], l) else bits(a[2], l))

    def fset(self, ins, active, double):
        a, m = ins.args, ins.mods
        for l in active:
            x, y = self.num(a[2], l, double), self.num(a[3], l, double)
            nan, n = math.isnan(x) or math.isnan(y), m[0]
            if n == "MAX":
                c, second = x > y, math.isnan(x)
                self.setp(a[0], l, c)
                self.setp(a[1], l, second)
                continue
            if n in ("NAN", "NUM"):
                c = nan == (n == "NAN")
            else:
                u = n.endswith("U")
                c = u if nan else CMP[n[:2]](x, y)
            if n == "NE" and nan:
                c = False
            r = self.p(a[4], l)
            self.setp(a[0], l, self.logic(c, m, r))
            self.setp(a[1], l, self.logic(not c, m, r))

    def do_FSETP(self, ins, active, group):
        self.fset(ins, active, False)

    def do_DSETP(self, ins, active, group):
        self.fset(ins, active, True)

    def real(self, ins, active, f, double):
        for l in active:
            x = [self.num(a, l, double) for a in ins.args[1:]]
            with np.errstate(all="ignore"):
                v = f(*x)
            self.set(ins.args[0], l, b64(v) if double else b32(v), double)

    def do_DADD(self, ins, active, group):
        self.real(ins, active, lambda x, y: float(np.float64(x) + np.float64(y)), True)

    def do_DMUL(self, ins, active, group):
        self.real(ins, active, lambda x, y: float(np.float64(x) * np.float64(y)), True)

    def do_DFMA(self, ins, active, group):
        self.real(ins, active, fma64, True)

    def do_FADD(self, ins, active, group):
        self.real(ins, active, lambda x, y: np.float32(x) + np.float32(y), False)

    def do_FMUL(self, ins, active, group):
        self.real(ins, active, lambda x, y: np.float32(x) * np.float32(y), False)

    def do_FFMA(self, ins, active, group):
        self.real(ins, active, lambda x, y, z: fma32(x, y, z), False)

    def do_FMNMX(self, ins, active, group):
        a = ins.args
        for l in active:
            x, y = self.num(a[1], l, False), self.num(a[2], l, False)
            self.set(a[0], l, b32(min(x, y) if self.p(a[3], l) else max(x, y)))

    def do_MUFU(self, ins, active, group):
        a = ins.args
        for l in active:
            if ins.mods[0] == "RCP64H":
                x = f64(self.i(a[1], l) << 32)
                self.set(a[0], l, b64(1 / x if x else math.inf) >> 32)
            else:
                x = self.num(a[1], l, False)
                f = {
                    "RCP": lambda: 1 / x if x else math.inf,
                    "EX2": lambda: 2.0**x,
                    "LG2": lambda: math.log2(x),
                }[ins.mods[0]]
                self.set(a[0], l, b32(f()))

    def do_F2F(self, ins, active, group):
        to, of = ins.mods[-2:]
        for l in active:
            x = self.num(ins.args[1], l, of == "F64")
            with np.errstate(all="ignore"):
                if to == "F64":
                    self.set(ins.args[0], l, b64(float(x)), True)
                elif to == "BF16":
                    self.set(ins.args[0], l, bf16(x))
                elif to == "F16":
                    self.set(ins.args[0], l, int(np.float16(x).view(np.uint16)))
                else:
                    self.set(ins.args[0], l, b32(x))

    def do_F2FP(self, ins, active, group):
        for l in active:
            hi, lo = (bf16(self.num("0x0" if x == "RZ" else x, l, False)) for x in ins.args[1:3])
            self.set(ins.args[0], l, hi << 16 | lo)

    def do_I2F(self, ins, active, group):
        m = ins.mods
        wide = "S64" in m or "U64" in m
        signed = "S64" in m or not ("U32" in m or "U64" in m)
        for l in active:
            v = self.i(ins.args[1], l, wide)
            v = (s64(v) if wide else s32(v)) if signed else v
            self.set(ins.args[0], l, b64(float(v)) if "F64" in m else b32(float(v)), "F64" in m)

    do_I2FP = do_I2F

    def do_F2I(self, ins, active, group):
        m = ins.mods
        wide = "S64" in m or "U64" in m
        for l in active:
            v = self.num(ins.args[1], l, "F64" in m)
            v = math.trunc(v) if "TRUNC" in m else math.floor(v) if "FLOOR" in m else round(v)
            self.set(ins.args[0], l, v & M64, wide)

    # ---- memory
    def size(self, mods):
        return {"64": 8, "128": 16, "U16": 2, "U8": 1, "S8": 1, "S16": 2}.get(
            next((m for m in mods if m in ("64", "128", "U16", "U8", "S8", "S16")), ""), 4
        )

    def address(self, a, l):
        a = a[a.index("[") :] if not a.startswith("desc") else a[a.index("]") + 1 :]
        v = 0
        for part in re.findall(r"[+-]?[^+\-\[\]]+", a.strip("[]")):
            sign = -1 if part[0] == "-" else 1
            part = part.strip("+-")
            if part.startswith("0x"):
                v += sign * int(part, 16)
            else:
                v += self.i(part.removesuffix(".64").removesuffix(".U32"), l, part.endswith(".64"))
        return v

    def load(self, ins, active, space):
        n = self.size(ins.mods)
        for l in active:
            a = self.address(ins.args[-1], l)
            if space == "LD":
                sh = a >> 32 == SWIN
                a = a & M32 if sh else a
            else:
                sh = space == "S"
            v = int.from_bytes(self.shared[a : a + n], "little") if sh else self.mem.load(a, n)
            k = self.reg(ins.args[-2])
            for w in range((n + 3) // 4):
                self.R[k + w][l] = v >> 32 * w & M32

    def do_LDG(self, ins, active, group):
        self.loads += 1
        self.load(ins, active, "G")

    def do_LD(self, ins, active, group):
        self.load(ins, active, "LD")

    def do_LDS(self, ins, active, group):
        self.load(ins, active, "S")

    def do_LDC(self, ins, active, group):
        for l in active:
            n = self.size(ins.mods)
            self.set(ins.args[0], l, self.cval(ins.args[1], n, l), n == 8)

    do_ULDC = do_LDC

    def store(self, ins, active, shared):
        n = self.size(ins.mods)
        for l in active:
            a, k = self.address(ins.args[0], l), self.reg(ins.args[1])
            v = sum(
                (self.R[k + w][l] if k != 255 else 0) << 32 * w for w in range((n + 3) // 4)
            ) & ((1 << 8 * n) - 1)
            if shared:
                self.shared[a : a + n] = v.to_bytes(n, "little")
            else:
                self.mem.store(a, n, v)

    def do_STS(self, ins, active, group):
        self.store(ins, active, True)

    def do_STG(self, ins, active, group):
        self.store(ins, active, False)


def bf16(x):
    b = b32(x)
    if x != x:
        return 0x7FFF
    return (b + 0x7FFF + (b >> 16 & 1)) >> 16


try:
    import ctypes

    _m = ctypes.CDLL("libm.so.6")
    _m.fma.restype, _m.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    _m.fmaf.restype, _m.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    fma64, fma32 = _m.fma, _m.fmaf
except OSError:
    raise


def run(fn, mem, params, blocks_xy, threads, shared_bytes=64 * 1024, trace=False, order=None):
    """All blocks; the warps of the last one."""
    const = bytearray(0x1000)
    const[0:4] = struct.pack("<I", threads)
    const[0x210 : 0x210 + len(params)] = params
    warps = None
    for y in range(blocks_xy[1]):
        for x in range(blocks_xy[0]):
            shared = bytearray(
                np.random.default_rng(1).integers(0, 255, shared_bytes, dtype=np.uint8).tobytes()
            )
            warps = [
                Warp(fn, mem, {0: const, 3: bytearray(0x1000)}, shared, w, (x, y), trace=trace)
                for w in range(0, threads, 32)
            ]
            state = [True] * len(warps)
            while any(s for s in state):
                for k, w in enumerate(warps):
                    while state[k] is True:
                        state[k] = w.step()
                at = [k for k, s in enumerate(state) if s == "bar"]
                if at:
                    t = max(warps[k].t for k in at)
                    votes = False
                    for k in at:
                        w = warps[k]
                        i = w.ins[w.pc[[l for l in range(32) if w.live[l]][0]]]
                        if "RED" in i.mods:
                            votes = votes or any(w.p(i.args[-1], l) for l in range(32) if w.live[l])
                    for k in at:
                        warps[k].vote = votes
                        warps[k].pass_barrier(t)
                        state[k] = True
            yield (x, y), warps
