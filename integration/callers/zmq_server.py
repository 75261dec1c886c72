"""A ZeroMQ server in a process of its own, which answers whatever is sent with its own host.

``python -m integration.callers.zmq_server TOPIC CONSUL_URL`` binds to every address, registers
that port at 127.0.0.1, and prints the host, once registered.
"""

from __future__ import annotations

import sys
import threading

import zmq

from consul_matchmaker import Matchmaker
from consul_matchmaker.adapters.zmq import advertise


def main(topic: str, url: str) -> None:
    with Matchmaker.from_url(url) as matchmaker, zmq.Context() as context:
        socket = context.socket(zmq.ROUTER)
        socket.bind("tcp://*:*")
        registration = advertise(matchmaker, topic, socket, address="127.0.0.1")
        registration.wait_until_published(timeout_seconds=10)
        print(registration.host, flush=True)
        threading.Thread(target=_answer, args=(socket, str(registration.host)), daemon=True).start()
        sys.stdin.read()


def _answer(socket: zmq.Socket[bytes], host: str) -> None:
    while True:
        peer, *question = socket.recv_multipart()
        socket.send_multipart([peer, *question, host.encode()])


if __name__ == "__main__":
    main(*sys.argv[1:])
