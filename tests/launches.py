"""What a GPU is asked to do."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts the operators that would launch a kernel, not allocations, and beside them views."""

    FREE = ("empty", "new_empty", "empty_like", "detach", "alias", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.views += func.is_view
        if not func.is_view and func.overloadpacket.__name__ not in self.FREE:
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
