"""What `docs/oslo-rpc.md` says: its two programs run as they stand, its table is the definition.

`python -m integration.rpc.test_documentation` writes the table anew.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consul_matchmaker.testing.consul_probe import Node
from integration.access_rules import new_token
from integration.cluster import ask
from integration.waiting import until

PAGE = Path(__file__).parents[2] / "docs" / "oslo-rpc.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
WAIT_SECONDS = 30.0
Make = Callable[..., Any]


def options_table() -> str:
    from consul_matchmaker.adapters.oslo.http.options import OPTIONS

    rows = ["| option | default | meaning |", "|---|---|---|"]
    for option in OPTIONS:
        default = "none" if option.default is None else f"{option.default:g}"
        if isinstance(option.default, bool):
            default = "on" if option.default else "off"
        elif isinstance(option.default, int):
            default = f"{option.default:,}"
        secret = " (secret)" if option.secret else ""
        rows.append(f"| `{option.name}` | {default} | {option.help}{secret} |")
    return "\n".join(rows) + "\n"


def test_the_options_table_is_the_definition() -> None:
    """Every option with its default and help; run this module to write it anew."""
    text = PAGE.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == options_table()


def test_each_option_of_the_page_is_one() -> None:
    """What stands as `name = value` in `[consul_http]`, or as `name=value` in a URL, exists."""
    from oslo_config import cfg
    from oslo_messaging import TransportURL

    from consul_matchmaker.adapters.oslo.http.options import OPTIONS, read_options

    text = PAGE.read_text()
    names = {option.name for option in OPTIONS}
    (section,) = re.findall(r"^\[consul_http\]\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    given = re.findall(r"^(\w+) = ", section, re.MULTILINE)
    assert given and set(given) <= names
    urls = re.findall(r"consul\+http://[^\s`\"'<>]+", text)
    assert len(urls) >= 3
    for url in urls:
        conf = cfg.ConfigOpts()
        conf([])
        read_options(conf, TransportURL.parse(conf, url))


def test_the_generated_sample_has_every_option() -> None:
    """The namespaces that the page names, asked as an operator asks."""
    from consul_matchmaker.adapters.oslo.http.options import OPTIONS

    command = re.search(r"`oslo-config-generator (.*?)`", PAGE.read_text())
    assert command is not None
    done = subprocess.run(
        [str(Path(sys.executable).parent / "oslo-config-generator"), *command[1].split()],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=True,
    )
    (section,) = re.findall(r"^\[consul_http\]\n(.*?)(?=^\[|\Z)", done.stdout, re.M | re.S)
    assert re.findall(r"^#(\w+) =", section, re.MULTILINE) == [each.name for each in OPTIONS]
    assert "[matchmaker_consul]" in done.stdout


def test_secrets_are_marked() -> None:
    """So oslo.config masks them in logs: what has a token in its name, files and settings apart."""
    from consul_matchmaker.adapters.oslo.config import options
    from consul_matchmaker.adapters.oslo.http.options import OPTIONS

    marked = {option.name for option in (*OPTIONS, *options()) if option.secret}
    assert marked == {"rpc_token", "token"}


def test_the_rights_of_the_page_are_enough(
    guarded: Node, transport: Make, serve: Make, client: Make
) -> None:
    """One token for who serves, and one for who only calls."""
    (rights,) = re.findall(r"```hcl\n(.*?)```", PAGE.read_text(), re.DOTALL)
    services, nodes, _ = (line.partition("#")[0].strip() for line in rights.splitlines())
    caller = services.replace("write", "read")
    assert caller != services
    over = []
    for rules in (services, caller):
        token = new_token(guarded, f"{rules} {nodes}")[1]
        over.append(transport(f"consul+http://:{token}@{guarded.http}/?host=127.0.0.1"))
    serve("compute", "node7", exchange="nova", over=over[0])
    assert client("compute", exchange="nova", over=over[1]).call({}, "who") == "node7"


# -- two terminals ---------------------------------------------------------------------------------


def program(name: str, agent: Node) -> str:
    """The one that the page says to run as *name*, with the test's own agent."""
    text = PAGE.read_text()
    found = re.search(rf"`python {re.escape(name)}`:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None, name
    code = found[1].replace("127.0.0.1:8500", agent.http)
    import oslo_messaging

    if not hasattr(oslo_messaging, "get_rpc_client"):  # of 14.0: as the page says
        code = code.replace("oslo_messaging.get_rpc_client", "oslo_messaging.RPCClient")
    return code


@contextmanager
def terminal(code: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """*code*, running, and the lines that it has printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(map(str.strip, process.stdout or ())))
    reader.start()
    try:
        yield process, lines
    finally:
        process.kill()
        process.wait()
        reader.join()


def call(agent: Node) -> list[str]:
    """What the client of the page prints."""
    code = program("client.py", agent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_two_terminals(agent: Node) -> None:
    """The client prints what the page says, the server too, the command finds it, and Ctrl-C ends
    it, after which Consul shows it no more."""
    said = re.search(
        r"It prints (`.*?`) and (`.*?`), and the server (`.*?`) and (`.*?`)", PAGE.read_text()
    )
    assert said is not None
    first, second, one, every = (each.strip("`") for each in said.groups())
    with terminal(program("server.py", agent)) as (server, printed):
        until(lambda: printed, WAIT_SECONDS, "the server serves")
        assert call(agent) == [first, second]
        until(lambda: set(printed[1:]) == {one, every}, WAIT_SECONDS, "both casts have come")
        command = re.search(
            r"^\$ consul-matchmaker --url (\S+) hosts (\S+)$", PAGE.read_text(), re.M
        )
        assert command is not None
        url = command[1].replace("127.0.0.1:8500", agent.http)
        shown = subprocess.run(
            [sys.executable, "-m", "consul_matchmaker", "--url", url, "hosts", command[2]],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        assert re.fullmatch(r"127\.0\.0\.1:\d+\n", shown.stdout), shown
        server.send_signal(signal.SIGINT)
        assert server.wait(WAIT_SECONDS) == 0
        path = f"/v1/health/service/{command[2]}?passing"
        until(lambda: ask(agent, path) == [], WAIT_SECONDS, "it is gone from Consul")


def test_the_second_server_answers_when_the_first_is_killed(agent: Node) -> None:
    """As the page tells to try."""
    first = program("server.py", agent)
    second = first.replace('server="first"', 'server="second"')
    assert second != first
    with terminal(second) as (_, printed):
        with terminal(first) as (server, serves):
            until(lambda: printed and serves, WAIT_SECONDS, "both serve")
            server.kill()
        client = program("client.py", agent).replace('server="first"', 'server="second"')
        done = subprocess.run(
            [sys.executable, "-c", client],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        assert (done.returncode, done.stdout.split()) == (0, ["5", "9"]), done.stderr


if __name__ == "__main__":
    page = PAGE.read_text()
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text(before + options_table() + after)
