"""Which backend has run, and matched, on which GPU architecture.

Generated from benchmarks/results by `python -m benchmarks.evidence`; do not edit.
"""

# (op, architecture, backend) -> where and when
EVIDENCE: dict[tuple[str, str, str], str] = {
    ('compact_kv_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('conflict_runs', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('elliptical_select', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010.json)',
    ('gae', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010.json)',
    ('objective_map', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('objective_map', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('policy_loss', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('policy_loss_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010.json)',
    ('policy_metrics', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010.json)',
    ('sample', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('sample', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('scale_rows_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010.json)',
    ('table_draft', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('table_update_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('token_stats', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010.json)',
    ('token_stats_backward', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('token_stats_backward_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010.json)',
    ('token_stats_backward_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010.json)',
    ('verify_tree', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
    ('verify_tree', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-65fb010-tests.json)',
}
