"""patch, unpatch and what can be asked of a patched model."""

from fasttune.patching.compare import Comparison, compare
from fasttune.patching.engine import is_patched, patch, unpatch
from fasttune.patching.mixed import mixed_adapters
from fasttune.patching.report import Explanation, Report, explain, report
from fasttune.patching.verify import Verification, verify
from fasttune.patching.warmup import WarmUp, warmup

__all__ = [
    "Comparison",
    "Explanation",
    "Report",
    "Verification",
    "WarmUp",
    "compare",
    "explain",
    "is_patched",
    "mixed_adapters",
    "patch",
    "report",
    "unpatch",
    "verify",
    "warmup",
]
