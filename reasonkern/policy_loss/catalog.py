"""The objectives by name: paper, formula, aggregation, passes over the logits.

Prints the table of this folder's README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from .objective import Objective

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- objectives: begin -->\n", "<!-- objectives: end -->\n"


class Entry(NamedTuple):
    """One named constructor of `Objective`."""

    name: str
    method: str
    paper: str
    """arXiv number, or where it comes from."""
    formula: str
    """Loss of a token before its weight; sg = no gradient, s and w of the whole sequence."""
    aggregation: str = "token-mean"
    """Mode of `token_weights` that the source uses."""

    @property
    def passes(self) -> str:
        """How often loss and gradient read the logits."""
        return {1: "one", 2: "two"}[getattr(Objective, self.name)().passes]


PPO = "−min(rA, clip(r)·A)"
OBJECTIVES = (
    Entry("ppo", "PPO", "1707.06347", PPO),
    Entry("grpo", "GRPO", "2402.03300", PPO, "seq-mean-token-mean"),
    Entry("dapo", "DAPO", "2503.14476", f"{PPO}, clip-higher"),
    Entry("dr_grpo", "Dr. GRPO", "2503.20783", PPO, "constant"),
    Entry("tppo", "T-PPO", "2506.15050", f"{PPO}, tokens of the current window"),
    Entry("gppo", "GPPO", "2508.07629", "−r·A; clipped side −β·bound·r/sg(r)·A"),
    Entry("ce_gppo", "CE-GPPO", "2509.20712", "GPPO with β (0.25, 1)"),
    Entry("cispo", "CISPO", "2506.13585", "−sg(clip(r))·A·logp"),
    Entry("sapo", "SAPO", "2511.20347", "−A·(4/τ)·σ(τ(r−1))", "seq-mean-token-mean"),
    Entry("reinforce", "REINFORCE", "Williams 1992", "−sg(clip(r))·A·logp, bounds 1 and 1",
          "seq-mean-token-sum"),
    Entry("gpg", "GPG", "2504.02546", "−A·logp"),
    Entry("rloo", "RLOO", "2402.14740", "−A·logp, leave-one-out A", "seq-mean-token-sum"),
    Entry("dppo_tv", "DPPO-TV", "2602.04879", "−sg(min(r, c)·[p − p_old in bounds])·A·logp",
          "constant"),
    Entry("dppo_kl", "DPPO-KL", "2602.04879", "as dppo_tv, KL(p_old ‖ p) ≤ threshold",
          "constant"),
    Entry("dro", "DRO", "2405.19107", "−(A·logp − β/2·(logp − old)²)"),
    Entry("gspo", "GSPO", "2507.18071", "−min(sA, clip(s)·A), s = exp mean log r",
          "seq-mean-token-mean"),
    Entry("gmpo", "GMPO", "2507.20673", "−A·exp mean clip(log r)", "seq-mean-token-mean"),
    Entry("vespo", "VESPO", "2602.10693", "−φ(w)·A·logp, φ = e^(λ + k·ln w − λw), w = sg(Π r)"),
    Entry("bapo", "BAPO", "2510.18927", f"{PPO}, bounds from `bapo_bounds`"),
    Entry("clip_cov", "Clip-Cov", "2505.22617", f"{PPO}, 0 on `covariance_mask`"),
    Entry("kl_cov", "KL-Cov", "2505.22617", "−rA, + κ·abs(log r) on `covariance_mask`"),
    Entry("high_entropy", "80/20", "2506.01939", f"{PPO} on `high_entropy_mask`, else 0"),
    Entry("gtpo", "GTPO", "2508.03772", "−λ·(A − γ⟨H⟩)·logp, 0 if ⟨H⟩ > ln 2",
          "seq-mean-token-mean"),
)  # fmt: skip


def table() -> str:
    """Markdown."""
    rows = ["| `Objective.…` | method | source | token loss | weights | reads |"]
    rows.append("|---|---|---|---|---|---|")
    for e in OBJECTIVES:
        numbered = e.paper[:4].isdigit()
        source = f"[arXiv {e.paper}](https://arxiv.org/abs/{e.paper})" if numbered else e.paper
        cells = (f"`{e.name}`", e.method, source, e.formula, e.aggregation, e.passes)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def with_table(text: str) -> str:
    """The README with its table replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    name = "python -m reasonkern.policy_loss.catalog"
    parser = argparse.ArgumentParser(name, description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    if parser.parse_args(arguments).write:
        README.write_text(with_table(README.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
