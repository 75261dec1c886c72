"""An exchange as the transport of the ``consul`` package, whichever of the two it is."""

import consul.base
import pytest

from consul_matchmaker.backends.http.exchange import Exchange

from .http_servers import Server, reply

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    ("verb", "more", "body"),
    [
        ("get", {}, b""),
        ("put", {"data": "text"}, b"text"),
        ("post", {"data": b"bytes"}, b"bytes"),
        ("delete", {}, b""),
    ],
)
def test_the_consul_package_can_ask_by_it(verb, more, body):
    """It hands over what is asked, and makes what it likes of the answer."""
    with Server(lambda request: reply(404, b"\xc3\xa4", ["X-Consul-Index: 7"])) as server:
        exchange = Exchange("127.0.0.1", server.port)
        assert isinstance(exchange, consul.base.HTTPClient)
        headers = {"X-Consul-Token": "secret"}
        how = {"params": [("keys", ""), ("dc", "a b")], "headers": headers, **more}
        answer = getattr(exchange, verb)(lambda answer: answer, "/v1/kv/a b", **how)
        exchange.close()
        (request,) = server.requests
    assert (answer.code, answer.headers["x-consul-index"], answer.body) == (404, "7", "ä")
    assert (request.method, request.target) == (verb.upper(), "/v1/kv/a%20b?keys=&dc=a+b")
    assert (request.token, request.body) == ("secret", body)


def test_no_header_is_two():
    """What would end a header line is refused, before anybody is asked."""
    exchange = Exchange("127.0.0.1", 1)
    with pytest.raises(ValueError, match="more than one line"):
        exchange.get(lambda answer: answer, "/v1/kv/a", headers={"X-Consul-Token": "a\r\nB: c"})
