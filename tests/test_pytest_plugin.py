"""The fixtures that users' tests have: what they give, and that they cost nothing unused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PAGE = Path(__file__).parent.parent / "docs" / "testing.md"
NOWHERE = "CONSUL_BIN is set, but `/nowhere/consul version` cannot be run"
ONE_TEST = "def test_it(consul): ..."


def examples(fixture: str) -> str:
    """The example of the documents that uses *fixture*."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if f"({fixture})" in block]
    return str(found)


def test_the_example_of_the_documents(pytester: pytest.Pytester) -> None:
    """As it is printed, with the fixture that needs no Consul."""
    pytester.makepyfile(examples("matchmaker"))
    pytester.runpytest_inprocess().assert_outcomes(passed=4)


def test_each_test_has_a_matchmaker_of_its_own(pytester: pytest.Pytester) -> None:
    """Without what another test declared or registered, and closed afterwards."""
    pytester.makepyfile("""
        before = []

        def test_one(matchmaker):
            matchmaker.declare("web", ["10.0.0.5:80"])
            matchmaker.register("web", "10.0.0.6:80").wait_until_published(timeout_seconds=5)
            assert len(matchmaker.hosts("web")) == 2
            before.append(matchmaker)

        def test_other(matchmaker):
            assert not matchmaker.hosts("web")
            assert before[0].is_closed
            assert not matchmaker.is_closed
    """)
    pytester.runpytest_inprocess().assert_outcomes(passed=2)


def test_hosts_are_what_was_declared_last(pytester: pytest.Pytester) -> None:
    """At once, also when they become none, and again after an outage."""
    pytester.makepyfile("""
        from consul_matchmaker import Host

        def test_it(matchmaker):
            def found():
                return [str(host) for host in matchmaker.hosts("web")]

            for hosts in (["10.0.0.5:80"], [], ["10.0.0.6:80", "10.0.0.7:80"], ["10.0.0.7:80"]):
                matchmaker.declare("web", map(Host.parse, hosts))
                assert found() == hosts
            matchmaker.memory.is_available = False
            matchmaker.declare("web", ["10.0.0.8:80"])
            assert found() == ["10.0.0.7:80"]
            matchmaker.memory.is_available = True
            matchmaker.declare("web", ["10.0.0.9:80"])
            assert found() == ["10.0.0.9:80"]
    """)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


def test_an_outage_does_not_hold_up_the_end_of_a_test(pytester: pytest.Pytester) -> None:
    """What is registered is withdrawn although the test left Consul away or refusing."""
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("name, value", [("is_available", False), ("is_denied", True)])
        def test_it(matchmaker, name, value):
            matchmaker.register("web", "10.0.0.6:80").wait_until_published(timeout_seconds=5)
            setattr(matchmaker.memory, name, value)
    """)
    result = pytester.runpytest_inprocess("-o", "log_cli=true", "-o", "log_cli_level=WARNING")
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*Consul did not answer*")


def test_fixtures_of_a_conftest_win(pytester: pytest.Pytester) -> None:
    """Those of the same names."""
    pytester.makeconftest("""
        import pytest

        @pytest.fixture
        def consul():
            return "mine"

        @pytest.fixture(scope="session")
        def matchmaker():
            return "mine too"
    """)
    pytester.makepyfile("""
        def test_it(consul, matchmaker):
            assert (consul, matchmaker) == ("mine", "mine too")
    """)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


@pytest.mark.system
@pytest.mark.parametrize("option", [(), ("-p", "no:consul_matchmaker")])
def test_who_does_not_use_them_does_not_import_the_package(
    option: tuple[str, ...], pytester: pytest.Pytester
) -> None:
    """pytest starts with one file of ours, or none."""
    pytester.makepyfile(f"""
        import sys

        def test_it():
            ours = [name for name in sys.modules if name.startswith("consul_matchmaker")]
            assert ours == []
            assert ("_consul_matchmaker_pytest" in sys.modules) is {not option}
    """)
    pytester.runpytest_subprocess(*option).assert_outcomes(passed=1)


@pytest.mark.system
def test_with_xdist(pytester: pytest.Pytester) -> None:
    """Each worker has the fixtures."""
    pytester.makepyfile(examples("matchmaker"))
    pytester.runpytest_subprocess("-n", "2").assert_outcomes(passed=4)


@pytest.mark.system
@pytest.mark.parametrize(
    ("ini", "outcome", "says"),
    [
        ("", "errors", f"*{NOWHERE}*let these tests skip: consul_not_found = skip"),
        ("consul_not_found = skip", "skipped", f"*{NOWHERE}*"),
        ("consul_not_found = no", "errors", "*consul_not_found must be fail or skip, not 'no'"),
    ],
)
def test_where_no_consul_is_found(
    ini: str,
    outcome: str,
    says: str,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test fails with what to do, without a traceback; or it skips, if the project says so."""
    monkeypatch.setenv("CONSUL_BIN", "/nowhere/consul")
    pytester.makeini(f"[pytest]\n{ini}\n")
    pytester.makepyfile(ONE_TEST)
    result = pytester.runpytest_inprocess("-rs", "--strict-config")
    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines([says])
    if not ini:
        result.stdout.no_fnmatch_line("*Traceback*")
        result.stdout.no_fnmatch_line("*def consul*")
