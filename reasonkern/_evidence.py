"""Which backend has run, and matched, on which GPU architecture.

Generated from benchmarks/results by `python -m benchmarks.evidence`; do not edit.
"""

# (op, architecture, backend) -> where and when
EVIDENCE: dict[tuple[str, str, str], str] = {
    ('compact_kv_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a-tests.json)',
    ('conflict_runs', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a-tests.json)',
    ('elliptical_select', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a-tests.json)',
    ('objective_map', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a-tests.json)',
    ('objective_map', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a-tests.json)',
    ('policy_loss', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a-tests.json)',
    ('policy_loss_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a.json)',
    ('policy_metrics', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a.json)',
    ('sample', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a.json)',
    ('scale_rows_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a.json)',
    ('table_draft', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a.json)',
    ('table_update_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a.json)',
    ('token_stats', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a.json)',
    ('token_stats_backward', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a-tests.json)',
    ('token_stats_backward_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a-tests.json)',
    ('verify_tree', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-13ad90a.json)',
}
