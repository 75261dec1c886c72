"""The name that operators import: `enable`, `disable` and the matchmaker are in `oslo.zmq`."""

from .oslo.zmq.enable import disable, enable
from .oslo.zmq.matchmaker import MatchmakerConsul

__all__ = ["MatchmakerConsul", "disable", "enable"]
