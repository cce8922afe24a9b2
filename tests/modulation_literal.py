"""One request, literally: everything follows from the list of its tokens, counted anew every time.

Nothing here is shared with the package: plain loops over Python numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reasonkern import Modulation

INF = math.inf


class Literal:
    """A request by its spec, the ids of the sets and its tokens."""

    def __init__(
        self,
        spec: Modulation,
        sets: dict[str, tuple[int, ...]],
        prompt: Sequence[int],
        tokens: Sequence[int] = (),
    ) -> None:
        self.spec, self.sets, self.tokens = spec, sets, list(tokens)
        self.prompt = list(prompt)

    # ---- phases

    def _opened_in_prompt(self) -> int | None:
        """Prompt tokens after an open start; None where there is none."""
        spent = None
        for token in self.prompt:
            if spent is not None and token == self.spec.think_end:
                spent = None
            elif spent is not None:
                spent += 1
            elif token == self.spec.think_start:
                spent = 0
        return spent

    def phases(self) -> list[tuple[str, int]]:
        """(phase, thinking tokens so far) before each token and at the end."""
        if self.spec.think_start is None:
            phase, spent = "thinking", 0
        else:
            opened = self._opened_in_prompt()
            phase, spent = ("before", 0) if opened is None else ("thinking", opened)
        out = [(phase, spent)]
        for token in self.tokens:
            if phase == "thinking" and token == self.spec.think_end:
                phase = "closed"
            elif phase == "thinking":
                spent += 1
            elif phase == "before" and token == self.spec.think_start:
                phase = "thinking"
            out.append((phase, spent))
        return out

    # ---- forced phrases

    def budget_next(self) -> int | None:
        """Place in the budget's phrase, or None when it is done or given up."""
        budget, phases = self.spec.budget, self.phases()
        end, text = list(budget.end), []
        first = budget.tokens if budget.soft is None else budget.soft.start * budget.tokens
        matched = 0
        for i, token in enumerate(self.tokens):
            (phase, spent), (after, _) = phases[i], phases[i + 1]
            if spent < first or not (phase == "thinking" or matched > 0):
                continue
            text.append(token)
            # The longest beginning of the phrase that the text ends with.
            longest = max(
                n for n in range(matched + 2) if n <= len(end) and text[len(text) - n :] == end[:n]
            )
            if longest == len(end) or (after != "thinking" and longest != matched + 1):
                return None
            matched = longest
        return matched

    def waits(self) -> tuple[int, int]:
        """(place in the minimum's phrase, ends still to be replaced)."""
        rule, phases = self.spec.min_think, self.phases()
        place, left = 0, rule.ignore
        for i, token in enumerate(self.tokens):
            phase, spent = phases[i]
            active = phase == "thinking" and (spent < rule.tokens or left > 0)
            if place and token == rule.wait[place]:
                place = (place + 1) % len(rule.wait)
            elif active and token == rule.wait[0]:
                place, left = 1 % len(rule.wait), max(0, left - 1)
            else:
                place = 0
        return place, left

    def forced(self) -> int | None:
        phase, spent = self.phases()[-1]
        budget = self.spec.budget
        if budget is not None and spent >= budget.tokens:
            place = self.budget_next()
            if place is not None and (phase == "thinking" or place > 0):
                return budget.end[place]
        if self.spec.min_think is not None and self.waits()[0]:
            return self.spec.min_think.wait[self.waits()[0]]
        return None

    # ---- additions

    def wave(self) -> float:
        """The published code: three flanks."""
        c, t = self.spec.cyclic, len(self.tokens)
        if c.windows is not None and not any(low <= t < high for low, high in c.windows):
            return 0.0
        u = ((t + c.shift * c.period) % c.period) / c.period
        if u <= 0.25:
            return c.amplitude * u / 0.25
        if u <= 0.75:
            return c.amplitude - 2 * c.amplitude * (u - 0.25) / 0.5
        return -c.amplitude + c.amplitude * (u - 0.75) / 0.25

    def penalty(self) -> float:
        tip, psi = self.spec.tip, 0
        for i, token in enumerate(self.tokens):
            if token in self.sets[tip.set]:
                psi = i + 1
        return -tip.alpha if len(self.tokens) < psi + tip.beta else 0.0

    def scheduled(self) -> float:
        points, t = self.spec.schedule.points, len(self.tokens)
        for (t0, v0), (t1, v1) in zip(points, points[1:], strict=False):
            if t0 <= t < t1:
                return v0 + (v1 - v0) * (t - t0) / (t1 - t0)
        return points[0][1] if t < points[0][0] else points[-1][1]

    def added(self) -> list[tuple[str, float]]:
        spec, out = self.spec, []
        if spec.cyclic is not None:
            out.append((spec.cyclic.set, self.wave()))
        if spec.tip is not None:
            out.append((spec.tip.set, self.penalty()))
        if spec.constant is not None:
            out.append((spec.constant.set, spec.constant.bias))
        if spec.schedule is not None:
            out.append((spec.schedule.set, self.scheduled()))
        return out

    # ---- a row

    def row(self, z: Sequence[float], temperature: float) -> list[float]:
        """The logits after control, soft budgets included."""
        z = list(z)
        force = self.forced()
        if force is not None and z[force] > -INF:
            z[force] = 3e4
            return z
        phase, spent = self.phases()[-1]
        if phase != "thinking":
            return z
        banned = () if self.spec.ban is None else self.sets[self.spec.ban.set]
        if not any(math.isfinite(x) for v, x in enumerate(z) if v not in banned):
            banned = ()
        for name, delta in self.added():
            for v in self.sets[name]:
                z[v] += delta
        for v in banned:
            z[v] = z[v] if math.isnan(z[v]) else -INF
        self._replace_end(z, spent, temperature)
        self._raise_end(z, spent)
        return z

    def _replace_end(self, z: list[float], spent: int, temperature: float) -> None:
        rule = self.spec.min_think
        if rule is None or not (spent < rule.tokens or self.waits()[1] > 0):
            return
        wait, end = rule.wait[0], self.spec.think_end
        if z[wait] == -INF:
            return
        high, low = max(z[wait], z[end]), min(z[wait], z[end])
        if temperature > 0 and low > -INF:
            high += temperature * math.log1p(math.exp((low - high) / temperature))
        z[wait], z[end] = high, -INF

    def _raise_end(self, z: list[float], spent: int) -> None:
        budget = self.spec.budget
        if budget is None or budget.soft is None or spent >= budget.tokens:
            return
        first, place = budget.soft.start * budget.tokens, self.budget_next()
        if spent < first or place is None or not math.isfinite(z[budget.end[place]]):
            return
        v = budget.end[place]
        target = max(x for x in z if math.isfinite(x)) - budget.soft.margin
        z[v] += max(0.0, target - z[v]) * (spent - first) / (budget.tokens - first)
