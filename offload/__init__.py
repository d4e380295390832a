"""The offload core: imports torch, never a host, a server or a node."""

from .policy import OffloadMode, OffloadPolicy, OffloadPolicyWarning
from .session import Session

__all__ = ["OffloadMode", "OffloadPolicy", "OffloadPolicyWarning", "Session"]
