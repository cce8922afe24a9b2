"""The table of operators in README.md: what users call, and from the registry what serves it.

Regenerate it with `python tests/ops.py`; the tests check that it is complete and up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "README.md"
TABLE = re.compile(r"(?<=<!-- python tests/ops.py -->\n\n)\|.*?\n(?=\n)", re.S)
SHORT = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
}
ROOMS = "reasonkern/{}/README.md"
LOSS, SPECULATION = ROOMS.format("policy_loss"), ROOMS.format("speculation")
MODULATION, HEAD = ROOMS.format("modulation"), "#hidden-states-in-front-of-a-frozen-head"
SHAPING, SCALING = ROOMS.format("shaping"), ROOMS.format("scaling")
VERIFY = "reasonkern/speculation/VERIFY.md"


class Row(NamedTuple):
    functions: Sequence[str]
    computes: str
    torch: str
    """The equivalent in plain torch."""
    operators: Sequence[str] = ()
    """Of the registry; none = torch functions."""
    autograd: str = "–"
    dtypes: str = "logits"
    """A key of `dtypes`, or the text itself."""
    page: str = LOSS


STATS = ("token_stats", "token_stats_backward", "token_stats_backward_")
ON_ROWS = ("policy_metrics", "objective_map", "sequence_map")
FUSED = ("policy_loss", "policy_loss_", "scale_rows_", *ON_ROWS)
ROWS = (
    Row(("token_stats",), "logprob, entropy, lse, Σp², varentropy, max p, top-1",
        "`log_softmax`, `gather`, `-(p * logp).sum(-1)`, …", STATS, "logprob, entropy, lse, Σp²"),
    Row(("policy_loss",), "the loss of an `Objective`, its gradient, metrics",
        "the \"before\" above", (*STATS, *FUSED), "loss"),
    Row(("linear_token_stats", "linear_policy_loss"),
        "the two above from hidden states and the head; (N, V) logits never exist",
        "the same of `F.linear(hidden, weight, bias)`", (*STATS, *FUSED), "hidden, weight, bias",
        page=LOSS + "#from-hidden-states-the-chunk-loop"),
    Row(("token_weights",), "aggregation modes as one weight per token", "`mask / mask.sum()`, …",
        dtypes="bool, 0/1"),
    Row(("rollout_mismatch",), "differences, KL, ratios, χ², perplexities of trainer and engine, "
        "mergeable", "`(old - rollout)[mask].abs().mean()`, …"),
    Row(("bapo_bounds", "covariance_mask", "high_entropy_mask"),
        "clip bounds and token selections of a whole batch, exact, over ranks",
        "a probe loop, `quantile`, `topk`, `randperm`", dtypes="float",
        page=LOSS + "#objectives-that-look-at-the-whole-batch"),
    Row(("conflict_token_weights",), "GTPO's factors", "a histogram over V × T per prompt",
        ("conflict_runs",), dtypes="ids"),
    Row(("entropy_filter",), "GTPO's advantages", "`where(H <= ln 2, A - 0.1 * H, 0)`",
        dtypes="float"),
    Row(("sample",), "seeded sampling with filters, as a pure function",
        "`(p.log() + gumbel(seed, position)).argmax(-1)`", ("sample",), page=VERIFY),
    Row(("verify_tree",), "the lossless walk of a draft tree", "a loop of `sample`",
        ("verify_tree",), page=VERIFY),
    Row(("compact_kv_",), "the cache after a step, in place",
        "`key[:, :, lengths + j] = key[:, :, start + path[:, j]]`", ("compact_kv_",), dtypes="any",
        page=VERIFY),
    Row(("NgramTable",), "drafts from learnt next-token distributions",
        "a dictionary from n-grams to averaged top-k",
        ("table_draft", "table_update_"), page=SPECULATION),
    Row(("DraftTree", "tune_tree"), "trees and their fit to traces", "–", dtypes="–",
        page=SPECULATION + "#trees"),
    Row(("request_seeds", "check_verifier"), "seeds by request; tests of a verifier's law", "–",
        dtypes="–", page=VERIFY + "#check_verifier"),
    Row(("modulate_logits_",), "control of decoding in place: waves, biases, budgets, phrases",
        "`z[set] += bias(t)` per request", ("modulate_logits_",), page=MODULATION),
    Row(("sample_controlled",), "the same without a copy of the logits, a token and its statistics",
        "`modulate_logits_`, `sample`, `Categorical(…).entropy()`",
        ("sample_controlled", "verify_controlled"), page=MODULATION),
    Row(("commit_",), "advances requests by the tokens they emitted", "a loop over tokens",
        ("commit_",), dtypes="ids", page=MODULATION),
    Row(("srgen_delta",), "SRGen's corrective vector of a hidden state, without autograd",
        "AdamW through `F.linear`", dtypes="logits", page=MODULATION + HEAD),
    Row(("latent_policy_gradient",), "LatentSeek's loss of latent states, for them alone",
        "`-(reward * logp.amax(-1)).sum()`", ("policy_loss_",), "hidden", page=MODULATION + HEAD),
    Row(("completion_probe",), "which of two answers a row holds, from the named logits alone",
        "`logp[:, a].logsumexp(-1) - logp[:, b].logsumexp(-1)`", page=MODULATION),
    Row(("entropy_forks",), "the most uncertain positions of each sequence", "`topk`",
        dtypes="float", page=MODULATION),
    Row(("shaping.gae",), "advantages, value targets; decoupled λ, truncated rows, tool tokens",
        "a loop over tokens", ("gae",), dtypes="rewards", page=SHAPING + "#gae"),
    Row(("shaping.*",), "group baselines (`group_advantages`), exploration bonus, 12 rewards "
        "(`laser_d`, `overlong_penalty`, …), masks and samplers (`dynamic_sampling_mask`, …)",
        "in the docstrings", dtypes="float", page=SHAPING),
    Row(("scaling.elliptical_select",), "k candidates unlike each other",
        "greedy argmax, d×d inverses", ("elliptical_select",), dtypes="float",
        page=SHAPING + "#elliptical-bonus-and-selection"),
    Row(("scaling.*",), "votes, pass@k, search, pruning", "in the docstrings",
        autograd="`focal_bce`", dtypes="float", page=SCALING),
)  # fmt: skip


def dtypes(key: str) -> str:
    """What the fronts accept, from their own constants."""
    from reasonkern.policy_loss import inputs as policy_loss
    from reasonkern.shaping import temporal
    from reasonkern.speculation import inputs as speculation

    assert policy_loss.LOGITS_DTYPES == speculation.LOGITS_DTYPES
    accepted = {"logits": policy_loss.LOGITS_DTYPES, "rewards": temporal.FLOATS}
    if key not in accepted:
        return key
    return " ".join(short for dtype, short in SHORT.items() if dtype in accepted[key])


def sources(pattern: str) -> str:
    return "\n".join(path.read_text() for path in sorted(ROOT.glob(f"csrc/*/{pattern}")))


def registered(cuda: bool) -> set[str]:
    """Operators that the C++ sources implement. `table_update_` is two launches on CUDA."""
    found = set(re.findall(r'm\.impl\("(\w+)"', sources("cuda*.cu" if cuda else "cpu*.cpp")))
    return found | ({"table_update_"} if "table_merge_" in found else set())


def backends(operators: Sequence[str]) -> str:
    """Those that every one of the operators has."""
    from reasonkern import _load

    if not operators:
        return "torch"
    cpu, cuda = registered(cuda=False), registered(cuda=True)
    held = {
        "C++": all(name in cpu for name in operators),
        "CUDA": all(_load._ops[name].get("cuda") and name in cuda for name in operators),
        "Triton": all(_load._ops[name].get("triton") for name in operators),
    }
    return ", ".join(name for name, held_by_all in held.items() if held_by_all)


def render() -> str:
    lines = [
        "| function | computes | plain torch | backends | autograd | dtypes |",
        "|" + "---|" * 6,
    ]
    for row in ROWS:
        names = ", ".join(f"[`{name}`]({row.page})" for name in row.functions)
        cells = (names, row.computes, row.torch, backends(row.operators), row.autograd)
        lines.append("| " + " | ".join((*cells, dtypes(row.dtypes))) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    text, found = TABLE.subn(lambda _: render(), TARGET.read_text())
    assert found == 1, "README.md: expected one table behind <!-- python tests/ops.py -->"
    TARGET.write_text(text)
