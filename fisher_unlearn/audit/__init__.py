"""Is it gone, and what did it cost? `from fisher_unlearn.audit import audit`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report_card import audit

__all__ = ["audit"]


def __getattr__(name: str) -> Any:
    if name != "audit":
        raise AttributeError(f"module 'fisher_unlearn.audit' has no attribute {name!r}")
    from .report_card import audit

    return audit
