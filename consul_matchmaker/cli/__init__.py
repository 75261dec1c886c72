"""The command line: reads arguments, asks a Matchmaker, prints what it answers."""

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
from ..model import Host, Snapshot, checked_topic
from ..settings import URL_VARIABLE, Settings
from ..texts import escaped_line, escaped_word
from . import doctor
from .supervise import Holder

PROGRAM = "consul-matchmaker"
OK, FAILED, WRONG_USAGE, NO_HOSTS, NO_ANSWER = 0, 1, 2, 3, 4
INTERRUPTED = 130  # 128 + SIGINT, as shells say it
BROKEN_PIPE = 141  # 128 + SIGPIPE: whoever read our output has enough

EXIT_CODES = """\
exit codes:
  0    done
  1    something failed that is none of the following
  2    wrong usage or configuration; nothing was asked or written
  3    nobody there: no hosts, nothing to expire
  4    Consul cannot be asked, or refuses the token
  130  interrupted
"""

MakeMatchmaker = Callable[[Settings], Matchmaker]


def main(argv: Sequence[str] | None = None, *, make_matchmaker: MakeMatchmaker = Matchmaker) -> int:
    """Run the command *argv* names (default: the process's) and return its exit code."""
    try:
        arguments = _parse(list(sys.argv[1:] if argv is None else argv))
        with _logging_to_stderr(arguments):
            return int(arguments.run(arguments, make_matchmaker))
    except SystemExit as end:  # argparse, after --help and --version
        return end.code if isinstance(end.code, int) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout at its end, and would complain.
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
        if arguments.output == "json":
            _print(_json_of(snapshot))
        else:
            _print(*(escaped_word(str(host)) for host in snapshot))
        if snapshot.source == "disk":
            _say(f"warning: Consul cannot be asked; this is {snapshot.age_seconds:.0f} s old")
        if not snapshot.is_complete:
            _say("warning: the answer was cut; there are more hosts than these")
        return OK if snapshot else NO_HOSTS


def _explain(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    with make_matchmaker(_settings(arguments)) as matchmaker:
        told = matchmaker.explain(arguments.topic, server=arguments.server)
        if arguments.output == "json":
            _print(json.dumps(told, default=str))
        else:
            _print(*_lines(told))
        answer = matchmaker.cached_hosts(arguments.topic, server=arguments.server)
        if answer is None:
            return NO_ANSWER
        return OK if answer else NO_HOSTS


def _watch(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    with make_matchmaker(_settings(arguments)) as matchmaker:
        for snapshot in matchmaker.watch(arguments.topic):
            if arguments.output == "json":
                _print(_json_of(snapshot))
            else:
                _print(" ".join(escaped_word(str(host)) for host in snapshot))
    return OK


def _register(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    settings = _settings(arguments)
    topic, host = checked_topic(arguments.topic), Host.parse(arguments.host)
    is_catalog = settings.mode == "catalog"
    if is_catalog and not arguments.command_to_run:
        raise ConfigurationError(
            "in catalog mode Consul itself registers, by service definitions: "
            "write one there, or use consul+kv://"
        )
    with make_matchmaker(settings) as matchmaker:
        holder = Holder(
            None
            if is_catalog
            else lambda: matchmaker.register(topic, host, server=arguments.server),
            host,
            command=arguments.command_to_run,
            when_listening=not arguments.at_once,
            drain_seconds=arguments.drain,
            say=_say,
        )
        if is_catalog:
            _say("catalog mode registers nothing: just running the command")
        return holder.run()


def _topics(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    with make_matchmaker(_settings(arguments)) as matchmaker:
        topics = list(matchmaker.topics())
        if arguments.output == "json":
            _print(json.dumps({"topics": topics}))
        else:
            _print(*map(escaped_word, topics))
        return OK


def _expire(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    settings = _settings(arguments)
    topic, host = checked_topic(arguments.topic), Host.parse(arguments.host)
    if settings.mode == "catalog":
        raise ConfigurationError(
            "in catalog mode nothing is ours to remove: deregister the service in Consul, "
            "or use consul+kv://"
        )
    with make_matchmaker(settings) as matchmaker:
        removed = matchmaker.expire(topic, host)
        if arguments.output == "json":
            _print(json.dumps({"topic": topic, "host": str(host), "removed": removed}))
        else:
            _print(str(removed))
        return OK if removed else NO_HOSTS


def _status(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    settings = _settings(arguments)
    with make_matchmaker(settings) as matchmaker:
        problem: MatchmakerError | None = None
        try:
            if settings.mode == "kv":
                matchmaker.topics()
            else:
                matchmaker.hosts(
                    "consul"
                )  # the servers' own service; no answer but an error counts
        except MatchmakerError as error:
            problem = error
        status = {
            "answers": problem is None,
            "problem": None if problem is None else str(problem),
            **matchmaker.status(),
        }
        if arguments.output == "json":
            _print(json.dumps(status, default=str))
        else:
            _print(*_lines(status))
        return OK if problem is None else _code_of(problem)


def _sweep(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    with make_matchmaker(_settings(arguments)) as matchmaker:
        orphans = matchmaker.orphans()
        removed = matchmaker.sweep() if arguments.remove and orphans else []
        if arguments.output == "json":
            _print(json.dumps({"orphans": orphans, "removed": removed}))
        else:
            for key, reason in orphans.items():
                _print(f"{escaped_word(key)}: {reason}" + (", removed" if key in removed else ""))
        if orphans and not arguments.remove:
            _say("nothing was removed: add --remove for that")
        return OK


def _doctor(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    found = []
    for finding in doctor.findings(_settings(arguments)):
        found.append(finding)
        if arguments.output == "text":
            _print(f"{finding.level:<4}  {escaped_line(finding.what + ': ' + finding.text)}")
    if arguments.output == "json":
        _print(json.dumps({"findings": [finding._asdict() for finding in found]}))
    return NO_ANSWER if any(finding.level == "fail" for finding in found) else OK


def _demo(arguments: argparse.Namespace, make_matchmaker: MakeMatchmaker) -> int:
    from . import demo

    return demo.run()


# --- what they print -----------------------------------------------------------------------------


def _print(*lines: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        # What the terminal cannot show is escaped, too: the names are anybody's.
        print(line.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _say(text: str) -> None:
    """One line for the operator, on stderr."""
    print(f"{PROGRAM}: {escaped_line(' '.join(text.split()))}", file=sys.stderr, flush=True)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped_line(super().formatMessage(record))


def _json_of(snapshot: Snapshot) -> str:
    return json.dumps(
        {
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
                }
                for instance in snapshot.instances
            ],
            "source": snapshot.source,
            "age_seconds": round(snapshot.age_seconds, 3),
            "is_stale": snapshot.is_stale,
            "is_complete": snapshot.is_complete,
        }
    )


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
    """Says in one line what is wrong, as every other error of ours is said."""

    def error(self, message: str) -> NoReturn:
        # argparse repeats what was given, which may be a URL with a token.
        message = _INVALID_CHOICE.sub(r"must be one of: \1", message)
        message = _EXPLICIT_ARGUMENT.sub("takes no value", message)
        raise ConfigurationError(f"{message} (see {self.prog} --help)")


_INVALID_CHOICE = re.compile(r"invalid choice: .*\(choose from (.*)\)\Z", re.DOTALL)
_EXPLICIT_ARGUMENT = re.compile(r"ignored explicit argument .*", re.DOTALL)
_OPTION = re.compile(r"--?[a-z][a-z-]{0,20}\Z")
_URL = re.compile(r"(consul\+[a-z]*|https?)://", re.IGNORECASE)


def _parse(argv: list[str]) -> argparse.Namespace:
    argv, command_to_run = _split_command(argv)
    if any(word.startswith("--tok") for word in argv):  # before anything could repeat it
        raise ConfigurationError(
            "a token is not taken from the command line, where everybody can read it: "
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
        raise ConfigurationError(
            f"a URL is no TOPIC and no HOST: put it after --url, or into {URL_VARIABLE}"
        )
    if command_to_run is not None and (arguments.command != "register" or not command_to_run):
        raise ConfigurationError("after -- stands the command that `register` is to run")
    arguments.command_to_run = command_to_run or []
    return arguments


def _split_command(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """What stands after the first `--` of `register`; argparse would take it apart."""
    if "--" in argv and "register" in argv[: argv.index("--")]:
        end = argv.index("--")
        return argv[:end], argv[end + 1 :]
    return argv, None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Which hosts serve this topic, right now?  A matchmaker over Consul.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[_common_options(None, "text", 0)],
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # The same options after the command: they count only where they are given.
    common = _common_options(*[argparse.SUPPRESS] * 3)

    def command(
        name: str,
        run: Callable[[argparse.Namespace, MakeMatchmaker], int],
        text: str,
        operands: Iterable[str] = (),
        *,
        log_level: int = logging.CRITICAL,  # an error is told in one line, not twice
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

    hosts = command("hosts", _hosts, "print the live hosts of a topic, one a line", ["TOPIC"])
    hosts.add_argument("--server", metavar="S", help="only the host that goes by this name")
    explain = command(
        "explain",
        _explain,
        "print why `hosts` answers what it does: what was asked, answered, left out and rejected",
        ["TOPIC"],
    )
    explain.add_argument("--server", metavar="S", help="only the host that goes by this name")
    register = command(
        "register",
        _register,
        "register a host for as long as this, or COMMAND, runs",
        ["TOPIC", "HOST"],
        log_level=logging.WARNING,
        usage=f"{PROGRAM} register [options] TOPIC HOST:PORT [-- COMMAND ...]",
    )
    register.add_argument("--server", metavar="S", help="the name this host goes by")
    register.add_argument(
        "--at-once",
        action="store_true",
        help="register when COMMAND starts, not only when HOST:PORT accepts TCP connections",
    )
    register.add_argument(
        "--drain",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="on SIGTERM and SIGINT withdraw, and let COMMAND go on for so long; default 0",
    )
    command(
        "watch",
        _watch,
        "print the hosts of a topic, separated by spaces, now and after each change; "
        "an empty line means none",
        ["TOPIC"],
        log_level=logging.WARNING,
    )
    command("topics", _topics, "print every topic that has hosts, one a line")
    command(
        "expire",
        _expire,
        "remove a host's registrations of a topic for everybody, and print how many; "
        "its owner, if alive, registers again",
        ["TOPIC", "HOST"],
    )
    sweep = command(
        "sweep",
        _sweep,
        "print the keys under the prefix that nobody will ever remove or that are not ours, "
        "with the reason",
    )
    sweep.add_argument(
        "--remove",
        action="store_true",
        help="remove those that are named as ours and that no session holds",
    )
    command("status", _status, "print which Consul is asked, and whether it answers")
    command("doctor", _doctor, "examine what this needs of Consul, and say what to do")
    command("demo", _demo, "start a Consul cluster of its own and show what this does")
    return parser


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
        help=f"consul+catalog://HOST:PORT or consul+kv://HOST:PORT/PREFIX; default ${URL_VARIABLE}",
    )
    common.add_argument(
        "-o", "--output", choices=("text", "json"), default=output, help="default text"
    )
    common.add_argument(
        "-v", "--verbose", action="count", default=verbose, help="log to stderr; -vv logs more"
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
