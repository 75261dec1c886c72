"""A token is planted wherever somebody may put one: no error, line or log repeats a part of it."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from consul_matchmaker import Host, Matchmaker, Settings
from consul_matchmaker.cli import main
from consul_matchmaker.errors import MatchmakerError
from consul_matchmaker.texts import without_secret

pytestmark = pytest.mark.system  # some ask an agent that is not there

TOKEN = "7d1f93ce-a85b-4e0d-bc6f-3be9d4ca5b7f"
PARTS = [TOKEN[start : start + 4] for start in range(len(TOKEN) - 3)]
AWAY = "127.0.0.1:1"  # tcpmux: refused at once on every machine without it
COMMA = TOKEN[:3] + "," + TOKEN[3:]

URLS = [
    f"consul+kv://:{TOKEN}@{AWAY}",
    f"consul+kv://:{TOKEN}@{AWAY}/p?ttl_seconds=x",
    f"consul+kv://{TOKEN}@{AWAY}",
    f"consul+kv://x:{TOKEN}@{AWAY}",
    f"consul+kv://:{TOKEN}",
    f"consul+kv://{TOKEN}",
    f"consul+kv://{TOKEN}:{AWAY}",
    f"consul+kv://{AWAY}:{TOKEN}",
    f"consul+kv://{AWAY},{TOKEN}@{AWAY}",
    f"consul+kv://:{COMMA}@{AWAY}/?ttl_seconds=x",
    f"consul+kv://{AWAY}/{TOKEN}?mode=catalog",
    f"consul+kv://{AWAY}/p?token:{TOKEN}",
    f"consul+kv://{AWAY}/p&token={TOKEN}",
    f"consul+kv://{AWAY}/p?{TOKEN}",
    f"consul+kv://{AWAY}/p?{TOKEN}=",
    f"consul+kv://{AWAY}/p?token={TOKEN}",
    f"consul+kv://{AWAY}/p?tokn={TOKEN}",
    f"consul+kv://{AWAY}/p?token={TOKEN}%20",
    f"consul+kv://{AWAY}/p?token={TOKEN}%20x",
    f"consul+kv://{AWAY}/p?token={TOKEN}&token={TOKEN}",
    f"consul+kv://{AWAY}/p?token={TOKEN}&token_file={TOKEN}",
    f"consul+kv://{AWAY}/p?token_file={TOKEN}",
    f"consul+kv://{AWAY}/p?tls=true&ca_cert={TOKEN}",
    f"consul+kv://{AWAY}/p?state_path={TOKEN}",
    f"consul+kv://{AWAY}/p?token_file=/nonexistent&tag={TOKEN}%20",
    f"consul+kv://{AWAY}/p?ttl_seconds=5;token={TOKEN}",
    f"consul+kv://{AWAY}/p?ttl_seconds=5?token={TOKEN}",
    f"consul+kv://{AWAY}/p?tls=true,{TOKEN}",
    f"consul+kv://{AWAY}/p?prefix=a?token={TOKEN}",
    f"consul+kv://{AWAY}/p?service_map={TOKEN}",
    f"consul+kv://{AWAY}/p?liveness={TOKEN}",
    f"consul+kv://{AWAY}/p#{TOKEN}",
    f"consul+catalog://:{TOKEN}@{AWAY}",
    f"consul+catalog://:{TOKEN}@{AWAY}/p",
    f"consul+catalog://{AWAY}?domain={TOKEN}%20",
    f"consul+dns://:{TOKEN}@{AWAY}",
    f"http://:{TOKEN}@{AWAY}/?token={TOKEN}",
    f"consul+kv://:{TOKEN}@[::1",
    f"consul+kv://:{TOKEN}@\N{DOUBLE-STRUCK CAPITAL C}\N{ACCOUNT OF}:1",
    f"consul+kv://:{TOKEN}/x",
    f"consul+kv://:{TOKEN}@a:0",
    f"consul+kv://:{TOKEN}@{AWAY}?ttl_second=1",
    f"consul+kv://:{TOKEN}@{AWAY}?token={TOKEN}",
    f"consul+kv://:{TOKEN}@{AWAY}?token_file=x",
    f"consul+kv://:x/{TOKEN}@{AWAY}",
    f"consul+kv://:x?{TOKEN}@{AWAY}",
    f"consul+kv://:x?tag={TOKEN}@{AWAY}",
    f"consul+kv://:x#{TOKEN}@{AWAY}",
    f"consul+kv://{AWAY}?token={TOKEN}&x",
    f"consul+kv://{AWAY}?addresses=:{TOKEN}%40{AWAY}",
    f":{TOKEN}@{AWAY}",
    TOKEN,
]
ENVIRONMENTS = [
    {"CONSUL_HTTP_ADDR": f"http://{AWAY}/?token={TOKEN}"},
    {"CONSUL_HTTP_ADDR": f"{AWAY}?token={TOKEN}"},
    {"CONSUL_HTTP_ADDR": f"http://:{TOKEN}@{AWAY}"},
    {"CONSUL_HTTP_ADDR": f"http://:{COMMA}@{AWAY}"},
    {"CONSUL_HTTP_ADDR": f"unix://{TOKEN}"},
    {"CONSUL_HTTP_ADDR": TOKEN},
    {"CONSUL_HTTP_ADDR": AWAY, "CONSUL_HTTP_TOKEN": TOKEN},
    {"CONSUL_HTTP_ADDR": AWAY, "CONSUL_HTTP_TOKEN": f"{TOKEN} x"},
    {"CONSUL_HTTP_ADDR": AWAY, "CONSUL_HTTP_TOKEN": f"{TOKEN}é"},
    {"CONSUL_HTTP_ADDR": AWAY, "CONSUL_HTTP_TOKEN": f"{TOKEN}\nx"},
    {"CONSUL_HTTP_ADDR": AWAY, "CONSUL_HTTP_TOKEN_FILE": TOKEN},
    {"CONSUL_HTTP_ADDR": AWAY, "CONSUL_HTTP_SSL": TOKEN},
    {"CONSUL_HTTP_ADDR": AWAY, "CONSUL_HTTP_SSL_VERIFY": f"{TOKEN}"},
    {"CONSUL_MATCHMAKER_ADDRESSES": f":{TOKEN}@{AWAY}"},
    {"CONSUL_MATCHMAKER_ADDRESSES": f":{COMMA}@{AWAY}"},
    {"CONSUL_MATCHMAKER_ADDRESSES": f"{AWAY},{TOKEN}"},
    {"CONSUL_MATCHMAKER_ADDRESSES": f"{AWAY}/?token={TOKEN}"},
    {"CONSUL_MATCHMAKER_ADDRESSES": f"{AWAY}", "CONSUL_MATCHMAKER_PREFIX": f"p?token={TOKEN}"},
    {"CONSUL_MATCHMAKER_ADDRESSES": AWAY, "CONSUL_MATCHMAKER_TOKEN": TOKEN},
    {"CONSUL_MATCHMAKER_ADDRESSES": AWAY, "CONSUL_MATCHMAKER_TOKEN": f"{TOKEN}\n{TOKEN}"},
    {"CONSUL_MATCHMAKER_ADDRESSES": AWAY, "CONSUL_MATCHMAKER_TOKEN_FILE": TOKEN},
    {"CONSUL_MATCHMAKER_ADDRESSES": AWAY, "CONSUL_MATCHMAKER_TTL_SECONDS": TOKEN},
    {"CONSUL_MATCHMAKER_ADDRESSES": AWAY, "CONSUL_MATCHMAKER_MODE": TOKEN},
    {"CONSUL_MATCHMAKER_ADDRESSES": AWAY, f"CONSUL_MATCHMAKER_{TOKEN}": "1"},
]
WHERE_A_URL_CAN_STAND: list[Callable[[str], list[str]]] = [
    lambda url: ["hosts", "t", "--url", url],
    lambda url: ["--url", url, "doctor"],
    lambda url: ["--url", url, "status"],
    lambda url: ["--url", url, "explain", "t"],
    lambda url: ["--url", url, "-vv", "topics"],
    lambda url: ["--url", url, "sweep"],
    lambda url: [url],
    lambda url: [url, "hosts", "t"],
    lambda url: ["hosts", "t", url],
    lambda url: ["register", "t", url],
    lambda url: ["expire", "t", url],
    lambda url: ["register", "t", "a:1", url],
    lambda url: ["hosts", "t", "-o", url],
    lambda url: ["hosts", "t", f"-o{url}"],
    lambda url: ["hosts", "t", f"-v{url}"],
    lambda url: ["hosts", "t", f"-v={url}"],
    lambda url: ["hosts", "t", f"--verbose={url}"],
    lambda url: ["hosts", "t", f"--{url}"],
    lambda url: ["hosts", "t", f"--ur={url}"],
    lambda url: ["hosts", "t", f"--url{url}"],
    lambda url: ["hosts", "t", "--tokn", url],
    lambda url: ["register", "t", "a:1", "--drain", url],
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No setting of the machine that runs the tests, and every log line of every library."""
    for name in list(os.environ):
        if name.startswith("CONSUL_"):
            monkeypatch.delenv(name)
    caplog.set_level(logging.DEBUG)


def all_of(error: BaseException) -> str:
    """All that a log could show of *error* and of every error behind it, suppressed or not."""
    shown = [str(error), repr(error), repr(error.args), repr(vars(error))]
    shown += traceback.format_exception(error)
    for inner in (error.__cause__, error.__context__):
        if inner is not None:
            shown.append(all_of(inner))
    return "\n".join(shown)


def told(settings_of: Callable[[], Settings]) -> str:
    """All that is said of the settings, and of questions to an agent that is not there."""
    try:
        settings = settings_of()
    except MatchmakerError as error:
        return all_of(error)
    said = [repr(settings), str(settings)]
    with Matchmaker(settings) as matchmaker:
        for ask in (matchmaker.hosts, matchmaker.explain):
            try:
                said.append(repr(ask("t")))
            except MatchmakerError as error:
                said.append(all_of(error))
        said += [repr(matchmaker), repr(matchmaker.status())]
    return "\n".join(said)


def leaks(text: str) -> list[str]:
    """The parts of the token in *text*, with what stands around them."""
    return [text[max(0, text.index(part) - 60) :][:100] for part in PARTS if part in text]


@pytest.mark.finding("E14")
@pytest.mark.parametrize("url", URLS)
def test_no_url_shows_its_token(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a wrong one by its error, nor a right one by what is said later."""
    said = told(lambda: Settings.from_url(url, {})) + caplog.text
    said += told(lambda: Settings.from_env({"CONSUL_MATCHMAKER_URL": url})) + caplog.text
    assert leaks(said) == []


@pytest.mark.finding("E14")
@pytest.mark.parametrize("environ", ENVIRONMENTS, ids=lambda environ: "-".join(environ)[:60])
def test_no_variable_shows_its_token(
    environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it was put into, our own or the consul command's."""
    said = told(lambda: Settings.from_env({"CONSUL_MATCHMAKER_MODE": "kv", **environ}))
    said += told(lambda: Settings.from_url("consul+kv://", environ))
    assert leaks(said + caplog.text) == []


@pytest.mark.finding("E14")
@pytest.mark.parametrize("text", [*URLS[:8], f"{TOKEN}:1", f"a:{TOKEN}", COMMA, f"x/{TOKEN}"])
def test_no_value_shows_its_token(text: str, caplog: pytest.LogCaptureFixture) -> None:
    """Arguments of the constructors: addresses as text or list, hosts, a URL in the wrong place."""
    makers: list[Callable[[], object]] = [
        lambda: Settings(mode="kv", addresses=text),  # type: ignore[arg-type]
        lambda: Settings(mode="kv", addresses=[text]),  # type: ignore[arg-type]
        lambda: Settings(mode="kv", addresses=(AWAY, text)),  # type: ignore[arg-type]
        lambda: Settings.from_mapping({"mode": "kv", text: 1}, {}),
        lambda: Settings(mode=text),
        lambda: Settings(mode="kv", token=f"{text} x"),
        lambda: Settings(mode="kv", token=[text]),  # type: ignore[arg-type]
        lambda: Host.parse(text),
        lambda: Host.parse(f"{text}:1"),
        lambda: Matchmaker(text),  # type: ignore[arg-type]
        lambda: Matchmaker(Settings(mode="kv", addresses=AWAY)).register("t", text),  # type: ignore[arg-type]
    ]
    said = []
    for make in makers:
        try:
            make()
        except MatchmakerError as error:
            said.append(all_of(error))
    assert said
    assert leaks("\n".join(said) + caplog.text) == []


@pytest.mark.finding("E14")
@pytest.mark.parametrize(
    "content", [f"{TOKEN} x", f"{TOKEN}\n\n# mine", f"{TOKEN}é", f"{TOKEN}\udcff", TOKEN]
)
def test_no_token_file_shows_what_it_holds(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither when it holds something else as well, nor when the agent is away."""
    path = tmp_path / "token"
    path.write_bytes(content.encode(errors="surrogateescape"))
    said = told(lambda: Settings(mode="kv", addresses=AWAY, token_file=str(path)))  # type: ignore[arg-type]
    assert str(path) in said
    assert leaks(said + caplog.text) == []


@pytest.mark.finding("E14")
@pytest.mark.parametrize("place", range(len(WHERE_A_URL_CAN_STAND)))
def test_no_argument_shows_its_token(
    place: int,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever stands where on the command line, what is printed does not repeat it."""
    monkeypatch.setenv("CONSUL_MATCHMAKER_URL", f"consul+kv://{AWAY}")
    for url in [*URLS, f"{TOKEN}/x"]:
        code = main(WHERE_A_URL_CAN_STAND[place](url))
        captured = capsys.readouterr()
        # Since Python 3.14 `-vh...` is `-v -h`: it asks for help.
        assert code != 0 or captured.out.startswith("usage: ")
        assert leaks(captured.out + captured.err + caplog.text) == []
        assert "Traceback" not in captured.err


@pytest.mark.finding("E14")
def test_a_url_is_no_topic(capsys: pytest.CaptureFixture[str]) -> None:
    """Put where the topic stands, it would be asked for, and come back in every error."""
    for url in (each for each in URLS if "://" in each and not each.startswith(":")):
        for argv in (
            ["hosts", url],
            ["watch", url],
            ["register", url, "a:1"],
            ["expire", url, "a:1"],
        ):
            assert main(["--url", f"consul+kv://{AWAY}", *argv]) == 2
            captured = capsys.readouterr()
            assert "--url" in captured.err
            assert leaks(captured.out + captured.err) == []


@pytest.mark.parametrize(
    ("text", "secret", "shown"),
    [
        ("a token of 12345678.", "12345678", "a token of ***."),
        ("cut: 45678", "12345678", "cut: ***"),
        ("1234 5678 234", "12345678", "*** *** 234"),
        ("x1234567x12345678", "12345678", "x***x***"),
        ("ab", "ab", "***"),
        ("nothing", None, "nothing"),
        ("", "12345678", ""),
    ],
)
def test_parts_of_a_secret_are_left_out(text: str, secret: str | None, shown: str) -> None:
    """Each run of them is three stars; parts shorter than four characters tell nothing."""
    assert without_secret(text, secret) == shown


def test_the_secret_is_long_enough_to_be_seen() -> None:
    """No part of it is in what is printed anyway, so that finding one is a leak."""
    assert leaks(repr([*sys.modules, AWAY])) == []
