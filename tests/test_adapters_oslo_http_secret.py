"""The secret of RPC over HTTP: who is let in, and how a file of it changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from consul_matchmaker.adapters.oslo.http.secret import Secret
from consul_matchmaker.errors import ConfigurationError

OLD, NEW = "old-7d1f93ce-a85b", "new-bc6f3be9d4ca"


class File:
    """One that is written anew, as `mv` does; each time it is another file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self.path = folder / "secret"

    def write(self, text: str | bytes) -> None:
        self._number += 1
        other = self._folder / f"secret-{self._number}"
        other.write_bytes(text.encode() if isinstance(text, str) else text)
        other.replace(self.path)


@pytest.fixture
def file(tmp_path: Path) -> File:
    made = File(tmp_path)
    made.write(f"{OLD}\n")
    return made


def of(file: File) -> Secret:
    return Secret(None, str(file.path))


def said(secret: Secret) -> str | None:
    return secret.header().get("Authorization")


def lets_in(secret: Secret) -> list[str]:
    return [token for token in (OLD, NEW) if secret.accepts(f"Bearer {token}")]


def test_without_one_everybody_is_let_in() -> None:
    """And a client says nothing."""
    secret = Secret(None, None)
    assert secret.header() == {}
    assert secret.accepts(None)
    assert secret.accepts(f"Bearer {OLD}")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        OLD,
        f"Bearer {NEW}",
        f"Bearer {OLD[:-1]}",
        f"Bearer {OLD}x",
        f"Bearer {OLD.upper()}",
        f"Basic {OLD}",
        f"Bearer{OLD}",
        f"Bearer {OLD} {OLD}",
        f"Bearer {OLD}\udcff",
    ],
)
def test_who_has_it_wrong_is_not_let_in(header: str | None) -> None:
    """Nothing, a part, another scheme, and what is no text."""
    assert not Secret(OLD, None).accepts(header)


@pytest.mark.parametrize("kind", ["Bearer", "bearer", "BEARER"])
def test_what_a_client_says_is_accepted(kind: str) -> None:
    """The name of the scheme in small letters or capitals (RFC 9110)."""
    secret = Secret(OLD, None)
    assert said(secret) == f"Bearer {OLD}"
    assert secret.accepts(f"{kind} {OLD}")


def test_of_a_file_the_first_line_is_said_and_each_is_accepted(file: File) -> None:
    """Blank lines and spaces around are none."""
    file.write(f"\n  {NEW} \r\n\n{OLD}\n")
    secret = of(file)
    assert said(secret) == f"Bearer {NEW}"
    assert lets_in(secret) == [OLD, NEW]
    assert not secret.accepts("Bearer "), "a blank line is no secret"


def test_a_secret_is_changed_in_three_steps_and_nobody_is_refused(tmp_path: Path) -> None:
    """As the page says: whoever is a step ahead lets in who is behind, and the reverse."""
    steps = [f"{OLD}\n", f"{OLD}\n{NEW}\n", f"{NEW}\n{OLD}\n", f"{NEW}\n"]
    files = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        files.append(File(tmp_path / name))
        files[-1].write(steps[0])
    one, other = map(of, files)
    for step in steps[1:]:
        for file in files:  # one machine after the other
            file.write(step)
            assert one.accepts(said(other)) and other.accepts(said(one)), step
    assert lets_in(one) == lets_in(other) == [NEW]


def test_a_file_of_the_same_length_and_time_is_another(file: File) -> None:
    """`mv` of a file that was made at the same moment: it is another inode."""
    secret = of(file)
    before = file.path.stat()
    file.write(f"{'x' * len(OLD)}\n")
    os.utime(file.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert said(secret) == f"Bearer {'x' * len(OLD)}"


@pytest.mark.parametrize("text", ["", "\n \n", b"\xff\xfe\n", "schlüssel\n"])
def test_what_holds_none_changes_nothing(file: File, text: str | bytes) -> None:
    """An empty file, or one that is no ASCII text: it may be half written."""
    secret = of(file)
    file.write(text)
    assert said(secret) == f"Bearer {OLD}"
    assert lets_in(secret) == [OLD]
    file.write(f"{NEW}\n")
    assert lets_in(secret) == [NEW], "once it holds one again, that counts"


def test_a_file_that_is_gone_changes_nothing(file: File, caplog: pytest.LogCaptureFixture) -> None:
    """The log says why, and repeats no secret."""
    secret = of(file)
    file.path.unlink()
    assert lets_in(secret) == [OLD]
    assert "No such file or directory; keeping the secret it held" in caplog.text
    assert OLD not in caplog.text


@pytest.mark.parametrize("text", [None, "", " \n", b"\xff"])
def test_without_a_secret_at_the_start_it_is_refused(file: File, text: str | bytes | None) -> None:
    """Where one is meant nobody is let in without, so no server starts."""
    if text is None:
        file.path.unlink()
    else:
        file.write(text)
    with pytest.raises(ConfigurationError, match="holds no secret"):
        of(file)
