"""Bad input of shaping and scaling is named: what, what was expected, what was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from reasonkern import scaling as sc
from reasonkern import shaping as sh

X, GROUP = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
BITS, ROWS = torch.zeros(3, dtype=torch.bool), torch.zeros(3, 2)
FEATURES = torch.zeros(3, 4)
NAN = torch.tensor([1.0, torch.nan, 0.5])
IDS = torch.zeros(3, 2, dtype=torch.int64)

WRONG: list[tuple[Callable[[], Any], str]] = [
    # shapes, dtypes, devices
    (lambda: sh.group_advantages([1.0], GROUP), "reward: expected a tensor, got list"),
    (lambda: sh.group_advantages(ROWS, GROUP), r"reward: expected shape \(N,\).*got \(3, 2\)"),
    (lambda: sh.group_advantages(X, GROUP[:2]), r"group: expected shape .* got \(2,\)"),
    (lambda: sh.group_advantages(X, GROUP.int()), "group: expected dtype torch.int64"),
    (lambda: sh.group_advantages(X, GROUP.to("meta")), "group: expected the device of reward"),
    (lambda: sh.serial_decay(X, GROUP), "correct: expected dtype torch.bool"),
    (lambda: sh.entropy_reshape(X, ROWS, GROUP), r"entropy_mean: expected shape \(N,\)"),
    (lambda: sh.entropy_reshape(X, X, GROUP, active=X), "active: expected dtype torch.bool"),
    (lambda: sh.composed_all_correct(BITS), r"correct: expected shape \(N, k\), got \(3,\)"),
    (lambda: sh.composed_all_correct(ROWS.bool(), valid=BITS), "valid: expected shape"),
    (lambda: sh.tppo_masks(BITS, BITS, BITS), r"mask: expected shape \(B, T\)"),
    (lambda: sh.tppo_masks(ROWS.bool(), ROWS, BITS), "generated_this_step: expected dtype"),
    (lambda: sh.elliptical_bonus(X, GROUP), r"features: expected floating point of shape \(N, d\)"),
    (lambda: sh.elliptical_bonus(FEATURES / 0, GROUP), r"features: expected finite .* \(0, 0\)"),
    (lambda: sh.laser(X, BITS, target=ROWS), "target: expected shape"),
    (lambda: sh.laser_d(X, BITS, GROUP, targets=(1, 2)), "targets: expected three"),
    (lambda: sh.laser_d(X, BITS, GROUP, targets=X[:2]), "targets: expected shape"),
    (lambda: sh.length_adaptive_lambda(ROWS), r"length: expected shape \(B,\)"),
    (lambda: sh.anchor_update_([X], [], 0.5), "params: expected 1 tensors.*got 0"),
    (lambda: sh.anchor_update_([X], [ROWS], 0.5), r"params\[0\]: expected shape"),
    (lambda: sc.vote_ids(GROUP), r"answer_ids: expected shape \(B, N\)"),
    (lambda: sc.vote_ids(ROWS), "answer_ids: expected dtype torch.int64"),
    (lambda: sc.vote_ids(IDS, X), "weights: expected shape"),
    (lambda: sc.cons_at_k(IDS, X, 1), "reference: expected dtype torch.int64"),
    (lambda: sc.difficulty_grade(X), r"scores: expected shape \(P, R\)"),
    (lambda: sc.markov_improvement(ROWS.bool()[:0]), r"correct: expected shape \(chains, steps\)"),
    (lambda: sc.tail_answers(IDS), r"answer_ids: expected shape \(B, chains, steps\)"),
    (lambda: sc.flexible_verification(ROWS.bool()[:, :0]), r"votes: expected shape \(B, k\)"),
    (lambda: sc.focal_bce(X, ROWS), "target: expected shape"),
    (lambda: sc.elliptical_select(GROUP, 1), r"features: expected floating point of shape \(N, d"),
    (lambda: sc.greedy_cluster([[1.0, 2.0]]), "scores: expected a square matrix"),
    (lambda: sh.composed_all_correct(ROWS.bool(), valid=3), "valid: expected a tensor, got int"),
    (lambda: sh.composed_all_correct(ROWS.bool(), valid=ROWS.bool().to("meta")), "valid: .*device"),
    (lambda: sh.concise_gated(X.to_sparse(), BITS, GROUP, limit=1), "length: expected a dense ten"),
    (lambda: sh.adactrl(X.cfloat(), BITS, GROUP, GROUP), "length: expected a dense tensor of flo"),
    (lambda: sh.covariance_mask(X, X, X, candidates=BITS.to("meta")), "candidates: .*device"),
    (lambda: sh.entropy_filter(X, 3, ROWS), "entropy: expected a tensor, got int"),
    (lambda: sc.vote_ids(IDS, 3), "weights: expected a tensor, got int"),
    (lambda: sc.cons_at_k(IDS, GROUP.to("meta"), 1), "reference: expected the device of answer"),
    (lambda: sc.length_statistics(X.to("meta"), BITS), "length: expected the device of correct"),
    (lambda: sc.focal_bce(X, X.to("meta")), "target: expected the device of logit"),
    (lambda: sc.focal_bce(GROUP, X), "logit: expected floating point, got torch.int64"),
    (lambda: sc.greedy_cluster(ROWS[..., None]), "scores: expected a square matrix"),
    (lambda: sc.greedy_cluster(FEATURES.to("meta")), "scores: expected a tensor with values"),
    (lambda: sc.pass_at_k(X.long(), X[:2].long(), 1), "c: expected a shape that broadcasts"),
    # values that would otherwise vanish in a comparison
    (lambda: sh.prioritised_sample(NAN, 1), r"advantage: expected finite .* got nan at \(1,\)"),
    (lambda: sh.entropy_filter(X, NAN[:, None], X[:, None] + 1), r"entropy: .* nan at \(1, 0\)"),
    (lambda: sh.entropy_reshape(X, NAN, GROUP), r"entropy_mean: expected finite .* at \(1,\)"),
    (lambda: sh.dynamic_sampling_mask(NAN, GROUP), r"reward: expected finite .* at \(1,\)"),
    (lambda: sh.pass_at_k_reward(NAN, GROUP), r"reward: expected finite .* at \(1,\)"),
    (lambda: sh.laser(NAN, BITS, target=1), r"length: expected finite numbers, got nan at \(1,\)"),
    (lambda: sc.vote_ids(IDS, ROWS - 1), r"weights: expected finite numbers >= 0, got -1"),
    (lambda: sc.vote_ids(IDS, ROWS / 0), "weights: expected finite numbers >= 0"),
    (lambda: sc.difficulty_grade(NAN[None]), r"scores: expected finite .* got nan at \(0, 1\)"),
    (lambda: sc.focal_bce(X, X + 0.5), "target: expected bool or 0/1 values"),
    # choices
    (lambda: sh.group_advantages(X, GROUP, baseline="median"), "baseline: expected 'group-mean'"),
    (lambda: sh.group_advantages(X, GROUP, scale="max"), "scale: expected 'std'"),
    (lambda: sh.group_advantages(X, GROUP, baseline="length-weighted"), "length: expected a ten"),
    (lambda: sh.elliptical_bonus(FEATURES, GROUP, mode="x"), "mode: expected 'leave-one-out'"),
    (lambda: sh.laser(X, BITS, target=1, mode="x"), "mode: expected 'reward'"),
    (lambda: sh.composed_all_correct(ROWS.bool(), mode="first"), "mode: expected 'all' or 'last'"),
    (lambda: sh.mix_rewards({"a": X}, {"a": 1}, normalise="x"), "normalise: expected 'none'"),
    (lambda: sc.vote([], tie="coin"), "tie: expected 'earliest'"),
    (lambda: sc.route_peers([], 0, strategy="similar"), "strategy: expected 'dispersed'"),
    # numbers
    (lambda: sh.group_advantages(X, GROUP, eps=-1.0), "eps: expected a finite number >= 0"),
    (lambda: sh.overlong_penalty(X, max_length=5, buffer=6), "buffer: expected at most max_length"),
    (lambda: sh.overlong_penalty(X, max_length=5, buffer=0), "buffer: expected .* > 0"),
    (lambda: sh.grpo_lambda(X, BITS, GROUP, alpha=1, top_fraction=2), "top_fraction: expected a"),
    (lambda: sh.concise_gated(X, BITS, GROUP, limit=0), "limit: expected a finite number > 0"),
    (lambda: sh.format_length_surrogate(X, BITS, peak=1), r"peak: expected a number in \(0, 1\)"),
    (lambda: sh.adaptive_length_targets(X, BITS, GROUP, lower=0, upper=9), "lower: expected an"),
    (lambda: sh.adaptive_length_targets(X, BITS, GROUP, lower=9, upper=8), "upper: expected an"),
    (lambda: sh.length_adaptive_lambda(X, 0.0), "alpha: expected a finite number > 0"),
    (lambda: sh.tppo_masks(ROWS.bool(), ROWS.bool(), BITS, drop_tail=-1), "drop_tail: expected"),
    (lambda: sh.prioritised_sample(X, 4), r"k: expected an integer in \[0, 3\], got 4"),
    (lambda: sh.prioritised_sample(X, 1, alpha=-1), "alpha: expected a finite number >= 0"),
    (lambda: sh.anchor_update_([], [], 1.5), r"decay: expected a number in \[0, 1\], got 1.5"),
    (lambda: sh.cosine(-1, 5), "step: expected a finite number >= 0"),
    (lambda: sh.cosine(1, 0), "total: expected a finite number > 0"),
    (lambda: sh.elliptical_bonus(FEATURES, GROUP, 0.0), "lam: expected a finite number > 0"),
    (lambda: sh.elliptical_bonus(FEATURES, GROUP, project=0), "project: expected an integer >= 1"),
    (lambda: sh.elliptical_bonus(FEATURES, GROUP, max_groups=0), "max_groups: expected an integer"),
    (lambda: sh.elliptical_bonus(FEATURES, GROUP, max_group_size=2), "max_group_size: .* least 3"),
    (lambda: sc.pass_at_k(4, X, 2), "c: expected an integer or a tensor of integers, got torch"),
    (lambda: sc.pass_at_k(4, 2, 0), "k: expected an integer >= 1, got 0"),
    (lambda: sc.pass_at_k(4, 2, 5), "n, c, k: expected .* got n = 4, c = 2, k = 5"),
    (lambda: sc.pass_at_k(4, torch.tensor([1, 5]), 2), "n, c, k: expected .* c = 5"),
    (lambda: sc.difficulty_grade(ROWS, thresholds=(0.1, 0.2)), "thresholds: expected descending"),
    (lambda: sc.markov_improvement(ROWS.bool(), prior=-1), "prior: expected a finite number >= 0"),
    (lambda: sc.tail_answers(IDS[None], 0), "last: expected an integer >= 1"),
    (lambda: sc.flexible_verification(ROWS.bool(), 0.5), r"agreement: expected a number in \(0.5"),
    (lambda: sc.focal_bce(X, X, gamma=-1), "gamma: expected a finite number >= 0"),
    (lambda: sc.focal_bce(X, X, alpha=2), r"alpha: expected a number in \[0, 1\]"),
    (lambda: sc.cons_at_k(IDS, GROUP, 3), r"k: expected an integer in \[1, 2\]"),
    (lambda: sc.elliptical_select(FEATURES, 4), r"k: expected an integer in \[0, 3\]"),
    (lambda: sc.elliptical_select(FEATURES, 1, 0.0), "lam: expected a finite number > 0"),
    (lambda: sc.vote(["a"], []), "weights: expected 1 numbers"),
    (lambda: sc.vote(IDS[0]), r"answers\[0\]: expected a string, .* vote_ids\), got Tensor"),
    (lambda: sc.vote([["a"]]), r"answers\[0\]: expected a string, .* got list"),
    (lambda: sc.vote(["a"], [-1.0]), r"weights\[0\]: expected a finite number >= 0"),
    (lambda: sc.temperature_vote(["a"], []), "temperature: expected 1 numbers"),
    (lambda: sc.temperature_vote([], [], intra=0), r"intra: expected a number in \(0, 1\]"),
    (lambda: sc.temperature_vote([], [], cross=2), r"cross: expected a number in \(0, 1\]"),
    (lambda: sc.subthought_split("a", ["", "b"]), "markers: expected one word or more"),
    (lambda: sc.route_peers(["a", "b"], 2), "top_k: expected at most 1"),
    (lambda: sc.route_peers(["a", "b"], -2), "top_k: expected an integer >= 0, or -1"),
    (lambda: sc.select_diverse(["a"], 2), r"k: expected an integer in \[0, 1\]"),
    (lambda: sc.greedy_cluster([[1.0]], max_clusters=0), "max_clusters: expected an integer >= 1"),
    (lambda: sc.finish_plan([[0]], 0, 1), "per_cluster: expected an integer >= 1"),
    (lambda: sc.finish_plan([[0], []], 1, 1), "clusters: expected clusters with members"),
    (lambda: sc.AStarFrontier(0), "budget: expected an integer >= 1 or None"),
    (lambda: sc.AStarFrontier().push(["a"], []), "rewards: expected 1 numbers"),
    (lambda: sc.AStarFrontier().push(["a"], [1.5]), r"rewards\[0\]: expected a number in \[0, 1\]"),
    (lambda: sc.AStarFrontier().pop(0), "count: expected an integer >= 1"),
    (lambda: sh.covariance_mask(X, X, X, seed=0.5), "seed: expected an integer"),
    (lambda: sh.prioritised_sample(X, 1, seed=None), "seed: expected an integer"),
    (lambda: sh.elliptical_bonus(FEATURES, GROUP, project=1, seed=1 << 70), "seed: expected an in"),
    (lambda: sh.length_adaptive_lambda(X, 1 << 70), "alpha: expected a finite number > 0"),
    (lambda: sh.laser(X, BITS, target=1, bonus=1e308), "bonus: expected a finite number"),
    (lambda: sh.tppo_masks(ROWS.bool(), ROWS.bool(), BITS, drop_tail=1 << 70), "drop_tail: expe"),
    (lambda: sc.pass_at_k(1.5, 1, 1), "n: expected an integer >= 0"),
    (lambda: sc.finish_plan([[0], [1]], 1, 1, seed=X), "seed: expected an integer"),
    # names
    (lambda: sh.mix_rewards({}, {}), "components: expected one component or more"),
    (lambda: sh.mix_rewards({"a": X}, {"b": 1}), r"weights: expected the names .* got \['b'\]"),
    (lambda: sh.mix_rewards({"a": X}, {"a": 1}, {"b": X}), "gates: expected some of the names"),
    (lambda: sh.mix_rewards({"a": X}, {"a": 1}, schedule={"b": 1}), "schedule: expected some of"),
    (lambda: sh.mix_rewards({"a": X, "b": ROWS}, {"a": 1, "b": 1}), r"b: expected shape \(N,\)"),
    (lambda: sh.mix_rewards({"a": X}, {"a": 1}, normalise="per-component"), "group: expected a te"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
