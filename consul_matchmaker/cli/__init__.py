"""The command line: read arguments, ask a Matchmaker, print its answer."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from .. import __version__
from ..errors import (
    ConfigurationError,
    Denied,
    LeaseLost,
    MatchmakerError,
    NoLiveHosts,
    Unavailable,
)
from ..matchmaker import Matchmaker
from ..model import Host, Instance, Snapshot, checked_topic
from ..settings import URL_VARIABLE, Settings
from ..texts import escaped_line, escaped_word
from . import doctor
from .supervise import Holder
from .sweep import sweep
from .watching import Follower

PROGRAM = "consul-matchmaker"
OK, FAILED, WRONG_USAGE, NO_HOSTS, NO_ANSWER = 0, 1, 2, 3, 4
INTERRUPTED = 130  # 128 + SIGINT, the convention of shells
TAKE_COMMAND = ("register", "watch")
BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of our output has closed it

EXIT_CODES = """\
exit codes:
  0    done
  1    any other failure
  2    wrong usage or configuration; Consul was neither asked nor written to
  3    no hosts, or nothing to expire
  4    Consul cannot be asked, or refuses the token
  130  interrupted
"""

MakeMatchmaker = Callable[[Settings], Matchmaker]


def main(argv: Sequence[str] | None = None, *, make_matchmaker: MakeMatchmaker = Matchmaker) -> int:
    """Run the command in *argv* (default: the process's arguments); return its exit code."""
    try:
        arguments = _parse(list(sys.argv[1:] if argv is None else argv))
        with _logging_to_stderr(arguments):
            return int(arguments.run(arguments, make_matchmaker))
    except SystemExit as end:  # argparse, after --help and --version
        return end.code if isinstance(end.code, int) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout when it exits, and would print an error.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except MatchmakerError as error:
        _say(f"error: {error}")
        return _code_of(error)


def _code_of(error: MatchmakerError) -> int:
    if isinstance(error, ConfigurationError):
        return WRONG_USAGE
    if isinstance(error, NoLiveHosts):
        return NO_HOSTS
    return NO_ANSWER if isinstance(error, (Unavailable, Denied, LeaseLost)) else FAILED


# --- the commands --------------------------------------------------------------------------------


def _hosts(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    with make_matchmaker(_settings(arguments)) as matchmaker:
        snapshot = matchmaker.hosts(arguments.topic, server=arguments.server)
        _answer(arguments, _object_of(snapshot), _words_of(snapshot))
        if snapshot.source == "disk":
            age = f"{snapshot.age_seconds:.0f} s"
            _say(f"warning: Consul cannot be asked; this answer is {age} old")
        if not snapshot.is_complete:
            _say("warning: the answer is incomplete: there are more hosts than these")
        return OK if snapshot else NO_HOSTS


def _explain(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    with make_matchmaker(_settings(arguments)) as matchmaker:
        told = matchmaker.explain(arguments.topic, server=arguments.server)
        _answer(arguments, told, _lines(told))
        answer = matchmaker.cached_hosts(arguments.topic, server=arguments.server)
        if answer is None:
            return NO_ANSWER
        return OK if answer else NO_HOSTS


def _watch(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    with make_matchmaker(_settings(arguments)) as matchmaker:
        if arguments.command_to_run:
            return Follower(
                arguments.topic,
                lambda: matchmaker.watch(arguments.topic),
                command=arguments.command_to_run,
                say=_say,
            ).run()
        for snapshot in matchmaker.watch(arguments.topic):
            _answer(arguments, _object_of(snapshot), [" ".join(_words_of(snapshot))])
    return OK


def _register(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    settings = _settings(arguments)
    topic, host = checked_topic(arguments.topic), Host.parse(arguments.host)
    is_catalog = settings.mode == "catalog"
    if is_catalog and not arguments.command_to_run:
        raise ConfigurationError(
            "in catalog mode nothing can be registered here: write a service definition for "
            "Consul, or use consul+service:// or consul+kv://"
        )
    with make_matchmaker(settings) as matchmaker:
        holder = Holder(
            None
            if is_catalog
            else lambda: matchmaker.register(
                topic,
                host,
                server=arguments.server,
                tags=arguments.tag,
                meta=dict(arguments.meta),
                weight=arguments.weight,
                check=arguments.check,
            ),
            host,
            command=arguments.command_to_run,
            when_listening=not arguments.at_once,
            drain_seconds=arguments.drain,
            say=_say,
        )
        if is_catalog:
            _say("catalog mode registers nothing: only the command runs")
        return holder.run()


def _topics(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    with make_matchmaker(_settings(arguments)) as matchmaker:
        topics = list(matchmaker.topics())
        _answer(arguments, {"topics": topics}, map(escaped_word, topics))
        return OK


def _expire(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    settings = _settings(arguments)
    topic, host = checked_topic(arguments.topic), Host.parse(arguments.host)
    if settings.mode == "catalog":
        raise ConfigurationError(
            "in catalog mode this program has no registrations to remove: deregister the service "
            "in Consul, or use consul+service:// or consul+kv://"
        )
    with make_matchmaker(settings) as matchmaker:
        removed = matchmaker.expire(topic, host)
        answer = {"topic": topic, "host": str(host), "removed": removed}
        _answer(arguments, answer, [str(removed)])
        return OK if removed else NO_HOSTS


def _status(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    settings = _settings(arguments)
    with make_matchmaker(settings) as matchmaker:
        problem: MatchmakerError | None = None
        try:
            if settings.mode != "catalog":
                matchmaker.topics()
            else:  # Consul's own service: only whether an answer comes counts
                matchmaker.hosts("consul")
        except MatchmakerError as error:
            problem = error
        status = {
            "answers": problem is None,
            "problem": None if problem is None else str(problem),
            **matchmaker.status(),
        }
        _answer(arguments, status, _lines(status))
        return OK if problem is None else _code_of(problem)


def _sweep(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    orphans, removed = sweep(_settings(arguments), remove=arguments.remove)
    lines = (
        f"{escaped_word(key)}: {reason}" + (", removed" if key in removed else "")
        for key, reason in orphans.items()
    )
    _answer(arguments, {"orphans": orphans, "removed": removed}, lines)
    if orphans and not arguments.remove:
        _say("nothing was removed: --remove removes them")
    return OK


def _doctor(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    found = []
    for finding in doctor.findings(_settings(arguments)):
        found.append(finding)
        if arguments.output == "text":
            _print([f"{finding.level:<4}  {escaped_line(finding.what + ': ' + finding.text)}"])
    if arguments.output == "json":
        _print([json.dumps({"findings": [finding._asdict() for finding in found]})])
    return NO_ANSWER if any(finding.level == "fail" for finding in found) else OK


def _demo(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    from . import demo

    return demo.run()


# --- what they print -----------------------------------------------------------------------------


def _answer(
    arguments: argparse.Namespace, value: Mapping[str, object], lines: Iterable[str]
) -> None:
    """Print *value* where JSON was asked for, else *lines*."""
    _print([json.dumps(value, default=str)] if arguments.output == "json" else lines)


def _print(lines: Iterable[str]) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        # What the terminal cannot show is escaped, too: anybody may choose these names.
        print(line.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _say(text: str) -> None:
    """One line for the operator, on stderr."""
    print(f"{PROGRAM}: {escaped_line(' '.join(text.split()))}", file=sys.stderr, flush=True)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped_line(super().formatMessage(record))


def _words_of(snapshot: Snapshot) -> Iterator[str]:
    return (escaped_word(str(host)) for host in snapshot)


def _object_of(snapshot: Snapshot) -> dict[str, object]:
    return {
        "topic": snapshot.topic,
        "hosts": [str(host) for host in snapshot],
        "instances": [
            {
                "host": str(instance.host),
                "address": instance.host.address,
                "port": instance.host.port,
                "server": instance.server,
                "priority": instance.priority,
                "weight": instance.weight,
                **_of_service(instance),
            }
            for instance in snapshot.instances
        ],
        "source": snapshot.source,
        "age_seconds": round(snapshot.age_seconds, 3),
        "is_stale": snapshot.is_stale,
        "is_complete": snapshot.is_complete,
    }


def _of_service(instance: Instance) -> dict[str, object]:
    """What service mode knows beside."""
    if instance.node is None:
        return {}
    return {
        "tags": list(instance.tags),
        "meta": dict(instance.meta),
        "node": instance.node,
        "datacenter": instance.datacenter,
    }


def _lines(value: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, inner in value.items():
        name = escaped_word(str(name))  # a topic, in some
        if isinstance(inner, Mapping) and inner:
            yield f"{indent}{name}:"
            yield from _lines(inner, indent + "  ")
        elif isinstance(inner, (list, tuple)) and any(isinstance(one, Mapping) for one in inner):
            yield f"{indent}{name}:"
            for one in inner:
                words = ", ".join(f"{key} {_word(part)}" for key, part in one.items())
                yield f"{indent}  {words}"
        elif isinstance(inner, (list, tuple)):
            yield f"{indent}{name}: {', '.join(map(_word, inner)) or '-'}"
        else:
            yield f"{indent}{name}: {_word(inner)}"


def _word(value: Any) -> str:
    if value is None or value in ("", {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escaped_line(str(round(value, 3) if isinstance(value, float) else value))


# --- what they read ------------------------------------------------------------------------------


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.url is None:
        return Settings.from_env()
    settings = Settings.from_url(arguments.url)
    if Settings.from_url(arguments.url, {}).token is not None:
        _say(
            "warning: everybody on this machine can read the token in --url (ps): "
            f"put the URL into {URL_VARIABLE}, or use token_file"
        )
    return settings


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, like every other error of this program."""

    def error(self, message: str) -> NoReturn:
        # argparse repeats the argument, which may be a URL with a token.
        message = _INVALID_CHOICE.sub(r"must be one of: \1", message)
        message = _EXPLICIT_ARGUMENT.sub("takes no value", message)
        raise ConfigurationError(f"{message} (see {self.prog} --help)")


_INVALID_CHOICE = re.compile(r"invalid choice: .*\(choose from (.*)\)\Z", re.DOTALL)
_EXPLICIT_ARGUMENT = re.compile(r"ignored explicit argument .*", re.DOTALL)
_OPTION = re.compile(r"--?[a-z][a-z-]{0,20}\Z")
_URL = re.compile(r"(consul\+[a-z]*|https?)://", re.IGNORECASE)


def _parse(argv: list[str]) -> argparse.Namespace:
    argv, command_to_run = _split_command(argv)
    if any(word.startswith("--tok") for word in argv):  # first, so that no message repeats it
        raise ConfigurationError(
            "there is no option for a token, as everybody on this machine could read it: "
            "use CONSUL_HTTP_TOKEN, CONSUL_MATCHMAKER_TOKEN, or the setting token_file"
        )
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        what = "unknown option" if options else "too many arguments"
        if options and _OPTION.match(options[0]):
            what += f" {options[0]}"
        raise ConfigurationError(f"{what} (see {PROGRAM} {arguments.command} --help)")
    if any(_URL.match(getattr(arguments, name, "")) for name in ("topic", "host")):
        raise ConfigurationError(f"TOPIC or HOST is a URL: give it as --url, or in {URL_VARIABLE}")
    if command_to_run is not None and not (arguments.command in TAKE_COMMAND and command_to_run):
        words = " and ".join(f"`{name}`" for name in TAKE_COMMAND)
        raise ConfigurationError(f"only {words} take --, and a command must follow it")
    arguments.command_to_run = command_to_run or []
    return arguments


def _split_command(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """The command after the first `--`, which argparse would parse as options."""
    if "--" in argv and any(name in argv[: argv.index("--")] for name in TAKE_COMMAND):
        end = argv.index("--")
        return argv[:end], argv[end + 1 :]
    return argv, None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Which hosts serve this topic now?  A matchmaker over Consul.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[_common_options(None, "text", 0)],
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # The same options after the command: without a default, they win only where they are given.
    common = _common_options(*[argparse.SUPPRESS] * 3)

    def command(
        name: str,
        run: Callable[[argparse.Namespace, MakeMatchmaker], int],
        text: str,
        operands: Iterable[str] = (),
        *,
        log_level: int = logging.CRITICAL,  # an error is reported once, by `main`
        usage: str | None = None,
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=text,
            usage=usage,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            parents=[common],
        )
        made.set_defaults(run=run, log_level=log_level)
        for operand in operands:
            made.add_argument(operand.lower(), metavar=operand)
        return made

    hosts = command("hosts", _hosts, "print the live hosts of a topic, one per line", ["TOPIC"])
    explain = command(
        "explain",
        _explain,
        "print how the answer of `hosts` came about: what was asked, answered, left out, rejected",
        ["TOPIC"],
    )
    for looking_up in (hosts, explain):
        looking_up.add_argument("--server", metavar="S", help="only the host of this server name")
    register = command(
        "register",
        _register,
        "register a host while this program, or COMMAND, runs",
        ["TOPIC", "HOST"],
        log_level=logging.WARNING,
        usage=f"{PROGRAM} register [options] TOPIC HOST:PORT [-- COMMAND ...]",
    )
    register.add_argument("--server", metavar="S", help="the server name of this host")
    register.add_argument(
        "--tag", metavar="T", action="append", default=[], help="a tag, in service mode; repeatable"
    )
    register.add_argument(
        "--meta",
        metavar="KEY=VALUE",
        type=_pair,
        action="append",
        default=[],
        help="what the service says of itself, in service mode; repeatable",
    )
    register.add_argument(
        "--weight", metavar="N", type=int, default=1, help="its share, in service mode; default 1"
    )
    register.add_argument(
        "--check",
        metavar="URL",
        help="what Consul probes, in service mode: http://, https://, tcp:// or grpc://",
    )
    register.add_argument(
        "--at-once",
        action="store_true",
        help="register when COMMAND starts; do not wait until HOST:PORT accepts TCP connections",
    )
    register.add_argument(
        "--drain",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="after SIGTERM or SIGINT, stop COMMAND this long after the withdrawal; default 0",
    )
    command(
        "watch",
        _watch,
        "print the hosts of a topic on one line, separated by spaces, now and after each change; "
        "an empty line means that there are none; or run COMMAND now and after each change, with "
        "HOSTS, ADDED, REMOVED and TOPIC in its environment",
        ["TOPIC"],
        log_level=logging.WARNING,
        usage=f"{PROGRAM} watch [options] TOPIC [-- COMMAND ...]",
    )
    command("topics", _topics, "print every topic that has hosts, one per line")
    command(
        "expire",
        _expire,
        "remove every registration of a host for a topic, and print how many there were; "
        "an owner that is alive registers again",
        ["TOPIC", "HOST"],
    )
    sweeping = command(
        "sweep",
        _sweep,
        "print the keys under the prefix that no process will remove, or that are not this "
        "library's, each with the reason",
    )
    sweeping.add_argument(
        "--remove",
        action="store_true",
        help="remove those that have the form of this library's keys and that no session holds",
    )
    command("status", _status, "print which agents are used, and whether Consul answers")
    command("doctor", _doctor, "check agents, token and keys, and say how to mend what is wrong")
    command("demo", _demo, "start a Consul cluster of its own and show each mode")
    return parser


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (key and separator):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, not {text!r}")
    return key, value


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError("must be a number of seconds, 0 or more")


def _common_options(url: Any, output: Any, verbose: Any) -> _Parser:
    common = _Parser(add_help=False, allow_abbrev=False)
    common.add_argument(
        "--url",
        default=url,
        help="consul+catalog://HOST:PORT, consul+service://HOST:PORT or "
        f"consul+kv://HOST:PORT/PREFIX; default ${URL_VARIABLE}",
    )
    common.add_argument(
        "-o", "--output", choices=("text", "json"), default=output, help="default text"
    )
    common.add_argument(
        "-v", "--verbose", action="count", default=verbose, help="log to stderr; -vv for more"
    )
    return common


@contextlib.contextmanager
def _logging_to_stderr(arguments: argparse.Namespace) -> Iterator[None]:
    package = logging.getLogger(__package__.partition(".")[0])
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(f"{PROGRAM}: %(levelname)s %(name)s: %(message)s"))
    levels = [arguments.log_level, logging.INFO, logging.DEBUG]
    level_before = package.level
    package.addHandler(handler)
    package.setLevel(levels[min(arguments.verbose, 2)])
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level_before)
