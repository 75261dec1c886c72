"""Which hosts serve this topic, right now?  A matchmaker over Consul."""

from . import errors
from .matchmaker import Matchmaker
from .model import Host, Registration, Snapshot
from .settings import Settings

__version__ = "0.1.0"

__all__ = ["Host", "Matchmaker", "Registration", "Settings", "Snapshot", "__version__", "errors"]
