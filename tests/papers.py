"""The papers the library implements: system → functions → tests, as data.

``python tests/papers.py`` writes docs/papers.md; test_papers.py checks both. A function is named as
users reach it from ``reasonkern``; one that does not exist yet is shown as such.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "papers.md"


class Paper(NamedTuple):
    """A row of the table."""

    number: int
    arxiv: str
    system: str
    title: str
    functions: tuple[str, ...]
    tests: tuple[str, ...] = ()
    """file.py::test, in tests/; at least one as soon as one of the functions exists."""
    note: str = ""


SHAPING, REWARDS, SCALING, MODULATION = (
    f"test_{name}_papers.py::test_" for name in ("shaping", "rewards", "scaling", "modulation")
)
LOSS, STATS = "test_policy_loss_", "test_policy_loss.py::test_"
FORMULA = LOSS + "objectives.py::test_reference_is_the_published_formula"
FUSED = LOSS + "objectives.py::test_objective"
ROWS = STATS + "statistics_and_gradient_on_hard_rows"
SFT = SCALING + "sft_of_astro_sky_t1_and_ded"
PROMPTS = "the rest is prompts and scheduling"

PAPERS = (
    Paper(1, "2510.18927", "BAPO",
          "BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced "
          "Policy Optimization with Adaptive Clipping",
          ("Objective.bapo", "bapo_bounds"),
          (LOSS + "bapo.py::test_bounds_equal_the_loop_on_1000_batches",
           LOSS + "bapo.py::test_bounds_go_into_the_objective_and_back")),
    Paper(2, "2505.07787", "LeaP", "Learning from Peers in Reasoning Models",
          ("scaling.route_peers",), (SCALING + "leap",), PROMPTS),
    Paper(3, "2510.17498", "Deep Self-Evolving Reasoning", "Deep Self-Evolving Reasoning",
          ("scaling.markov_improvement", "scaling.tail_answers", "scaling.vote_ids"),
          (SCALING + "deep_self_evolving_reasoning", SCALING + "ettrl_label_and_vote_ids"),
          PROMPTS),
    Paper(4, "2505.13672", "A*-Decoding", "A*-Decoding: Token-Efficient Inference Scaling",
          ("scaling.AStarFrontier",), (SCALING + "a_star_decoding",)),
    Paper(5, "2510.08483", "DeepPrune",
          "DeepPrune: Parallel Scaling without Inter-trace Redundancy",
          ("scaling.greedy_cluster", "scaling.finish_plan", "scaling.focal_bce"),
          (SCALING + "deepprune", SCALING + "deepprune_judge_loss")),
    Paper(6, "2506.15050", "T-PPO", "Truncated Proximal Policy Optimization",
          ("shaping.gae", "shaping.tppo_masks", "Objective.tppo"),
          (SHAPING + "t_ppo", "test_gae.py::test_equals_the_definition",
           LOSS + "adaptive.py::test_loss_and_gradient_are_the_formula")),
    Paper(7, "2510.11686", "RepExp",
          "Representation-Based Exploration for Language Models: From Test-Time to "
          "Post-Training",
          ("shaping.elliptical_bonus", "scaling.elliptical_select"),
          (SHAPING + "representation_based_exploration",
           "test_elliptical_select.py::test_representation_based_exploration_at_test_time")),
    Paper(8, "2508.09883", "DED",
          "Beyond Scaling Law: A Data-Efficient Distillation Framework for Reasoning",
          ("scaling.select_diverse", "linear_token_stats"), (SCALING + "ded", SFT)),
    Paper(9, "2506.04708", "STAND",
          "Accelerated Test-Time Scaling with Model-Free Speculative Sampling",
          ("NgramTable", "DraftTree", "tune_tree", "verify_tree", "generation.generate"),
          ("test_speculation_loop.py::test_equality_gives_the_plain_text_and_learns",
           "test_generation.py::test_speculation_gives_the_plain_text",
           "test_tune.py::test_the_kept_nodes_are_the_most_accepted")),
    Paper(10, "2505.11966", "Solve-Detect-Verify",
          "Solve-Detect-Verify: Inference-Time Scaling with Flexible "
          "Generative Verifier",
          ("scaling.flexible_verification", "completion_probe"),
          (SCALING + "flexive", MODULATION + "solve_detect_verify_probe")),
    Paper(11, "2505.07686", "S-GRPO",
          "S-GRPO: Early Exit via Reinforcement Learning in Reasoning Models",
          ("shaping.serial_decay", "Budget"),
          (REWARDS + "s_grpo", MODULATION + "budget_forcing"),
          "the forced exit phrase is a thinking budget"),
    Paper(12, "2508.07629", "Klear-Reasoner", "Klear-Reasoner: Advancing Reasoning Capability via "
          "Gradient-Preserving Clipping Policy Optimization",
          ("Objective.gppo", "Objective.ce_gppo"), (FORMULA, FUSED)),
    Paper(13, "2504.02010", "Reasoning meets compression",
          "When Reasoning Meets Compression: Benchmarking "
          "Compressed Large Reasoning Models on Complex Reasoning Tasks",
          ("scaling.pass_at_k", "scaling.length_statistics"),
          (SCALING + "reasoning_meets_compression",)),
    Paper(14, "2505.19914", "Enigmata",
          "Enigmata: Scaling Logical Reasoning in Large Language Models with "
          "Synthetic Verifiable Puzzles",
          ("shaping.gae", "shaping.length_adaptive_lambda"), (SHAPING + "enigmata",)),
    Paper(15, "2502.07374", "Structure, not content",
          "LLMs Can Easily Learn to Reason from Demonstrations "
          "Structure, not content, is what matters!",
          ("linear_token_stats",), (SFT,), "fine-tuning loss"),
    Paper(16, "2508.13382", "Datarus-R1",
          "Datarus-R1: An Adaptive Multi-Step Reasoning LLM for Automated Data "
          "Analysis",
          ("shaping.mix_rewards", "shaping.cosine", "Objective.grpo"),
          (SHAPING + "datarus_r1", FORMULA)),
    Paper(17, "2505.21178", "ConciseR",
          "Walk Before You Run! Concise LLM Reasoning via Reinforcement Learning",
          ("Objective.dapo", "shaping.dynamic_sampling_mask", "shaping.concise_gated"),
          (SHAPING + "conciser", FORMULA)),
    Paper(18, "2510.01123", "Parallel-Distill-Refine",
          "Rethinking Thinking Tokens: LLMs as Improvement "
          "Operators",
          ("NgramTable",), ("test_speculation_table_life.py::test_scopes_do_not_leak",),
          "one draft table, shared by parallel drafts and refinement"),
    Paper(19, "2510.02611", "Role of temperature sampling",
          "On the Role of Temperature Sampling in Test-Time "
          "Scaling",
          ("scaling.temperature_vote", "sample"),
          (SCALING + "role_of_temperature_sampling",
           "test_speculation_sample.py::test_sample_random_rows")),
    Paper(20, "2502.06773", "RLSP",
          "On the Emergence of Thinking in LLMs I: Searching for the Right Intuition",
          ("shaping.mix_rewards",), (SHAPING + "rlsp",)),
    Paper(21, "2508.11356", "ETTRL",
          "ETTRL: Balancing Exploration and Exploitation in LLM Test-Time "
          "Reinforcement Learning Via Entropy Mechanism",
          ("entropy_forks", "shaping.entropy_reshape", "scaling.vote_ids"),
          (MODULATION + "ettrl_forks", SHAPING + "ettrl", SCALING + "ettrl_label_and_vote_ids")),
    Paper(22, "2508.03772", "GTPO",
          "GTPO: Trajectory-Based Policy Optimization in Large Language Models",
          ("Objective.gtpo", "conflict_token_weights", "entropy_filter"),
          (LOSS + "adaptive.py::test_gtpo_with_conflict_weights",
           LOSS + "conflict.py::test_weights_equal_the_definition",
           LOSS + "conflict.py::test_entropy_filter_equals_the_definition")),
    Paper(23, "2507.00417", "ASTRO",
          "ASTRO: Teaching Language Models to Reason by Reflecting and Backtracking "
          "In-Context",
          ("linear_token_stats", "shaping.group_advantages"),
          (SHAPING + "group_advantages", SFT), 'advantages with scale="none"'),
    Paper(24, "2506.10209", "TTT-Bench",
          "TTT-Bench: A Benchmark for Evaluating Reasoning Ability with Simple "
          "and Novel Tic-Tac-Toe-style Games",
          ("scaling.pass_at_k", "scaling.cons_at_k"),
          (SCALING + "ttt_bench", SCALING + "math_beyond")),
    Paper(25, "2505.18086", "GRPO-λ", "Stable Reinforcement Learning for Efficient Reasoning",
          ("shaping.grpo_lambda",), (REWARDS + "grpo_lambda",)),
    Paper(26, "2510.11653", "MATH-Beyond",
          "MATH-Beyond: A Benchmark for RL to Expand Beyond the Base Model",
          ("scaling.pass_at_k",), (SCALING + "math_beyond",)),
    Paper(27, "2504.20708", "Beyond the last answer",
          "Beyond the Last Answer: Your Reasoning Trace Uncovers "
          "More than You Think",
          ("scaling.subthought_split", "scaling.vote"),
          (SCALING + "beyond_the_last_answer",)),
    Paper(28, "2510.02919", "SRGen",
          "Self-Reflective Generation at Test Time", ("srgen_delta", "EntropyTrigger"),
          (MODULATION + "srgen", "test_modulation_latent.py::test_srgen_gradient_is_autograd")),
    Paper(29, "2506.11077", "CyclicReflex",
          "CyclicReflex: Improving Large Reasoning Models via Cyclical "
          "Reflection Token Scheduling",
          ("Cyclic", "TIP", "Budget", "MinThink", "Ban"),
          tuple(MODULATION + name for name in ("cyclicreflex", "tip", "budget_forcing", "nowait")),
          "its neighbours TIP, s1 and NoWait are parts beside it"),
    Paper(30, "2505.14464", "Not all correct answers are equal",
          "Not All Correct Answers Are Equal: Why Your "
          "Distillation Source Matters",
          ("token_stats", "scaling.length_statistics"),
          (SCALING + "not_all_correct_answers_are_equal", ROWS)),
    Paper(31, "2505.15612", "LASER",
          "Learn to Reason Efficiently with Adaptive Length-based Reward Shaping",
          ("shaping.laser", "shaping.laser_d", "shaping.laser_de",
           "shaping.adaptive_length_targets"),
          (REWARDS + "laser", REWARDS + "laser_d_and_de", REWARDS + "laser_target_search")),
    Paper(32, "2502.14922", "SIFT", "SIFT: Grounding LLM Reasoning in Contexts via Stickers",
          ("scaling.vote",), (SCALING + "sift",), PROMPTS),
    Paper(33, "2505.13308", "LatentSeek",
          "Seek in the Dark: Reasoning via Test-Time Instance-Level Policy "
          "Gradient in Latent Space",
          ("latent_policy_gradient",),
          (MODULATION + "latentseek",
           "test_modulation_latent.py::test_latent_gradient_is_autograd")),
    Paper(34, "2504.19162", "SPC",
          "SPC: Evolving Self-Play Critic via Adversarial Games for LLM Reasoning",
          ("shaping.zero_sum_rewards", "Objective.reinforce"), (REWARDS + "spc", FORMULA)),
    Paper(35, "2504.09772", "Two heads are better",
          "Two Heads are Better Than One: Test-time Scaling of "
          "Multi-agent Collaborative Reasoning",
          ("scaling.vote", "Budget"),
          (SCALING + "two_heads_are_better", MODULATION + "budget_forcing"), PROMPTS),
    Paper(36, "2510.01833", "PTA-GRPO",
          "Plan Then Action: High-Level Planning Guidance Reinforcement Learning "
          "for LLM Reasoning",
          ("shaping.mix_rewards", "Objective.grpo"), (SHAPING + "pta_grpo", FORMULA)),
    Paper(37, "2504.16656", "Skywork R1V2",
          "Skywork R1V2: Multimodal Hybrid Reinforcement Learning for "
          "Reasoning",
          ("shaping.prioritised_sample", "shaping.mix_rewards"), (SHAPING + "skywork_r1v2",)),
    Paper(38, "2505.19439", "Surrogate signals",
          "Surrogate Signals from Format and Length: Reinforcement "
          "Learning for Solving Mathematical Problems without Ground Truth Answers",
          ("shaping.format_length_surrogate",), (REWARDS + "format_and_length_surrogate",)),
    Paper(39, "2510.08189", "R-Horizon",
          "R-Horizon: How Far Can Your Large Reasoning Model Really Go in Breadth "
          "and Depth?",
          ("shaping.composed_all_correct",), (REWARDS + "r_horizon",)),
    Paper(40, "2505.18822", "AdaCtrl", "AdaCtrl: Towards Adaptive and Controllable Reasoning via "
          "Difficulty-Aware Budgeting",
          ("shaping.adactrl",), (REWARDS + "adactrl",)),
    Paper(41, "2505.14157", "Prior prompt engineering",
          "Prior Prompt Engineering for Reinforcement Fine-Tuning",
          ("Objective.grpo",), (FORMULA, FUSED), PROMPTS),
    Paper(42, "2504.17565", "DeepDistill",
          "DeepDistill: Enhancing LLM Reasoning Capabilities via Large-Scale "
          "Difficulty-Graded Data Training",
          ("scaling.difficulty_grade",), (SCALING + "deepdistill",)),
    Paper(43, "2501.11651", "T1",
          "Advancing Language Model Reasoning through Reinforcement Learning and "
          "Inference Scaling",
          ("shaping.group_advantages", "shaping.anchor_update_", "KL"),
          (SHAPING + "t1", FORMULA)),
    Paper(44, "2503.19633", "1.4M distilled dataset",
          "1.4 Million Open-Source Distilled Reasoning Dataset to "
          "Empower Large Language Model Training",
          ("token_stats",), (SCALING + "not_all_correct_answers_are_equal", ROWS),
          "filter by perplexity"),
    Paper(45, "2510.11701", "Demystifying agentic RL",
          "Demystifying Reinforcement Learning in Agentic Reasoning",
          ("Objective.dapo", "shaping.overlong_penalty", "token_weights"),
          (REWARDS + "demystifying_agentic_rl", FORMULA,
           LOSS + "weights.py::test_weights_are_a_literal_loop"),
          "tool tokens are masked"),
)  # fmt: skip


def exists(function: str) -> bool:
    """Whether users find it under this name."""
    import reasonkern

    try:
        functools.reduce(getattr, function.split("."), reasonkern)
    except AttributeError:
        return False
    return True


def render() -> str:
    """docs/papers.md."""
    lines = [
        "# Papers",
        "",
        "What the library holds for each paper, and the test that checks it against the paper's",
        "formula. Where a paper leaves a number or a rule open, the docstring says what is ours.",
        "Generated by `python tests/papers.py`.",
        "",
        "| # | system | paper | functions | tests |",
        "|---|---|---|---|---|",
    ]
    for paper in PAPERS:
        functions = [f"`{f}`" + ("" if exists(f) else " (not yet)") for f in paper.functions]
        note = f"; {paper.note}" if paper.note else ""
        tests = "<br>".join(f"`{test}`" for test in paper.tests) or "–"
        title = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
        cells = (str(paper.number), paper.system, title, ", ".join(functions) + note, tests)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TARGET.write_text(render())
