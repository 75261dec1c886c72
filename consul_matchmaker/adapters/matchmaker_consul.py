"""The name that operators give: the classic matchmaker is in `oslo.zmq.classic`."""

from .oslo.zmq.classic import MatchMakerConsul, MatchMakerException

__all__ = ["MatchMakerConsul", "MatchMakerException"]
