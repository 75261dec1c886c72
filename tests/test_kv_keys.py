"""Keys: every text survives, no two meet, nothing leaves its folder or Consul's alphabet."""

import re
import uuid

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from consul_matchmaker.backends.kv.keys import (
    MAX_KEY_BYTES,
    SENTINEL,
    Key,
    checked_registration,
    decode_segment,
    encode_segment,
    host_folder,
    topic_folder,
)
from consul_matchmaker.errors import ConfigurationError, InvalidTopic
from consul_matchmaker.model import Host, Registration

PREFIX = "matchmaker"
LEASE_ID = "0f8e2ab4-1c9d-4e6f-8a7b-112233445566"

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
servers = st.none() | texts
ports = st.integers(1, 65535)


def _host_at(address: object, port: int) -> Host:
    return Host.parse(f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}")


hosts = st.one_of(
    st.builds(_host_at, st.ip_addresses(), ports),
    st.builds(Host, st.from_regex(r"\A[a-z]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{2,5})?\Z"), ports),
    texts.map(Host.opaque),
)
registrations = st.builds(Registration, texts, hosts, servers)
lease_ids = st.uuids().map(str)

NASTY = [
    "/",
    "..",
    ".",
    "../..",
    "a/../b",
    "//",
    "_",
    "_-",
    "__",
    "_2f",
    "%2F",
    "-",
    "--",
    " ",
    " x ",
    "\n",
    "\x00",
    "é",
    "é",
    "😀",
    "\ufeff",
    "10.0.0.5:9501",
    "[::1]:1",
    LEASE_ID,
    "a" * 5000,
]


# -- segments -------------------------------------------------------------------------------------


@given(texts)
def test_every_text_survives(text):
    """Encoding and decoding give the very same text, in the alphabet every Consul accepts."""
    segment = encode_segment(text)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", segment)
    assert decode_segment(segment) == text


@pytest.mark.parametrize("text", NASTY)
def test_every_nasty_text_survives(text):
    """So do the texts that would hurt if they came through as they are."""
    segment = encode_segment(text)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", segment)
    assert decode_segment(segment) == text


@given(texts, texts)
def test_two_texts_never_meet(one, other):
    """Different texts have different segments, also where a file system would not care."""
    assume(one != other)
    assert encode_segment(one) != encode_segment(other)


@given(st.text(st.sampled_from("ab-_019fA/.:%é "), max_size=12))
def test_only_an_encoding_is_decoded(segment):
    """What decodes is exactly what encoding gives: there is no second spelling."""
    try:
        text = decode_segment(segment)
    except ValueError:
        return
    assert encode_segment(text) == segment


@pytest.mark.parametrize(
    "segment",
    ["", "_", "_2", "_2F", "_zz", "_41", "_ff", "_c3", "_c3_28", "a b", "a/b", "é", "a\n", "_-"],
)
def test_what_no_text_encodes_to_is_refused(segment):
    """Upper case digits, needless or cut escapes, invalid UTF-8, foreign characters."""
    with pytest.raises(ValueError, match=r"\S"):
        decode_segment(segment)


def test_plain_names_stay_readable():
    """People who look into Consul's UI read ordinary names as they are."""
    assert encode_segment("scheduler-7") == "scheduler-7"
    assert encode_segment("10.0.0.5:9501") == "10_2e0_2e0_2e5_3a9501"


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_what_is_not_unicode_is_refused(text):
    """A lone surrogate cannot be stored by anybody."""
    with pytest.raises(ConfigurationError, match="Unicode"):
        encode_segment(text)


# -- keys -----------------------------------------------------------------------------------------


@given(registrations, lease_ids, st.sampled_from([PREFIX, "a/b", "x-1/y_2/z"]))
def test_every_registration_survives(registration, lease_id, prefix):
    """Its key, read back, is the same registration under the same lease."""
    key = Key.of(registration, lease_id)
    text = key.under(prefix)
    assert Key.parse(prefix, text) == key
    assert key.registration == registration


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("place", ["topic", "host", "server"])
def test_nasty_texts_survive_in_every_place(text, place):
    """Wherever such a text stands, the key keeps its form and gives the text back."""
    values = {"topic": "t", "host": Host("10.0.0.5", 1), "server": "s"}
    values[place] = Host.opaque(text) if place == "host" else text
    key = Key.of(Registration(**values), LEASE_ID)
    written = key.under(PREFIX)
    assert re.fullmatch(rf"{PREFIX}(/[A-Za-z0-9_-]+){{3}}", written)
    assert Key.parse(PREFIX, written) == key


@given(registrations, registrations, lease_ids, lease_ids)
def test_two_registrations_never_share_a_key(one, other, lease_1, lease_2):
    """Another topic, host, server or lease is another key."""
    assume((one, lease_1) != (other, lease_2))
    assert Key.of(one, lease_1).under(PREFIX) != Key.of(other, lease_2).under(PREFIX)


@given(registrations)
@example(Registration("t", Host.opaque("10.0.0.5:9501"), "s"))
def test_a_server_name_is_part_of_the_key(registration):
    """The same host under another server name is another key."""
    for server in (None, "another"):
        other = Registration(registration.topic, registration.host, server)
        assert (other == registration) == (
            Key.of(other, LEASE_ID) == Key.of(registration, LEASE_ID)
        )


@given(ports)
def test_an_opaque_text_is_never_taken_for_a_host(port):
    """The identity `10.0.0.5:PORT` and the host 10.0.0.5:PORT are two hosts with two keys."""
    host, opaque = Host("10.0.0.5", port), Host.opaque(f"10.0.0.5:{port}")
    assert host_folder(PREFIX, "t", host) != host_folder(PREFIX, "t", opaque)
    for each in (host, opaque):
        key = Key("t", each, LEASE_ID)
        assert Key.parse(PREFIX, key.under(PREFIX)).host == each


@given(registrations, lease_ids)
def test_a_key_is_in_its_folders(registration, lease_id):
    """A listing of the topic's folder, and of the host's, shows the key."""
    text = Key.of(registration, lease_id).under(PREFIX)
    topic, host = registration.topic, registration.host
    assert text.startswith(host_folder(PREFIX, topic, host))
    assert host_folder(PREFIX, topic, host).startswith(topic_folder(PREFIX, topic))
    assert topic_folder(PREFIX, topic).startswith(PREFIX + "/")


@given(texts, texts)
@example("scheduler", "scheduler2")
@example("a", "a/b")
@example("a", "..")
def test_no_folder_holds_another(one, other):
    """A listing of one topic never shows another's keys."""
    assume(one != other)
    assert not topic_folder(PREFIX, one).startswith(topic_folder(PREFIX, other))
    hosts = Host.opaque(one), Host.opaque(other)
    folders = [host_folder(PREFIX, "t", host) for host in hosts]
    assert not folders[0].startswith(folders[1])


@pytest.mark.parametrize("topic", ["", None, 5, b"bytes"])
def test_a_folder_needs_a_topic(topic):
    """An empty topic would be the folder of all topics."""
    with pytest.raises(InvalidTopic):
        topic_folder(PREFIX, topic)


@given(registrations)
def test_a_registration_that_survives_is_accepted(registration):
    """Whatever parse and opaque can make may be registered."""
    assert checked_registration(registration) is registration


@pytest.mark.parametrize(
    "registration",
    [
        Registration("", Host("10.0.0.5", 1)),
        Registration("\ud800", Host("10.0.0.5", 1)),
        Registration("t", Host("10.0.0.5", 1), "\ud800"),
        Registration("t", Host("10.0.0.5", 1), ""),
        Registration("t", Host.opaque("\ud800")),
        Registration("t", Host("0::1", 1)),
        Registration("t", Host("FE80::1", 1)),
        Registration("t", Host("10.0.0.500", 1)),
        Registration("t", Host("no host", 1)),
        Registration("t", Host("a/../b", 1)),
    ],
)
def test_a_registration_that_nobody_could_read_is_refused(registration):
    """What would be published and never found is a mistake of the caller, said at once."""
    with pytest.raises(ConfigurationError):
        checked_registration(registration)


# -- keys that are not ours -----------------------------------------------------------------------

GOOD = f"{PREFIX}/topic/10_2e0_2e0_2e5_3a9501/{LEASE_ID}"


def test_the_good_key_is_good():
    """The key that the next test spoils is read."""
    assert Key.parse(PREFIX, GOOD) == Key("topic", Host("10.0.0.5", 9501), LEASE_ID)
    assert Key.parse(PREFIX, GOOD + "-node7").server == "node7"


@pytest.mark.parametrize(
    "text",
    [
        "",
        PREFIX,
        PREFIX + "/",
        f"{PREFIX}/{SENTINEL}",
        f"{PREFIX}/topic/{SENTINEL}",
        "other" + GOOD[len(PREFIX) :],
        "/" + GOOD,
        GOOD + "/",
        GOOD + "/more",
        GOOD + "\n",
        GOOD + "x",
        GOOD + "-",
        GOOD + "-_",
        GOOD + "_61",
        GOOD[:-1],
        GOOD.replace(LEASE_ID, LEASE_ID.upper()),
        GOOD.replace(LEASE_ID, "not-a-lease"),
        GOOD.replace("topic", ""),
        GOOD.replace("topic", ".."),
        GOOD.replace("topic", "_41"),
        GOOD.replace("_3a9501", ""),
        GOOD.replace("9501", "0"),
        GOOD.replace("9501", "65536"),
        GOOD.replace("9501", "09501"),
        GOOD.replace("10_2e0", "10_2e00"),
        GOOD.replace("10_2e0_2e0_2e5", "999_2e0_2e0_2e5"),
        GOOD.replace("10_2e0_2e0_2e5_3a9501", "_-"),
        GOOD.replace("10_2e0_2e0_2e5", "host_0a"),
        GOOD.replace("10_2e0_2e0_2e5_3a9501", ""),
        GOOD.replace("10_2e0_2e0_2e5_3a9501", "_5b0_3a_3a1_5d_3a9501"),  # [0::1], not [::1]
    ],
)
def test_a_foreign_key_is_refused(text):
    """Other people's keys under our prefix are told from ours, not half understood."""
    with pytest.raises(ValueError, match=r"\S"):
        Key.parse(PREFIX, text)


@given(st.text(max_size=80))
def test_no_text_makes_the_reader_fail_otherwise(text):
    """Whatever stands under the prefix, reading it raises ValueError or gives a key of ours."""
    for candidate in (text, f"{PREFIX}/{text}", f"{PREFIX}/t/h_3a1/{LEASE_ID}{text}"):
        try:
            key = Key.parse(PREFIX, candidate)
        except ValueError:
            continue
        assert key.under(PREFIX) == candidate


@given(st.lists(st.sampled_from(["topic", "10_2e0_2e0_2e5_3a9501", LEASE_ID, "_", "", "-a"])))
def test_what_is_read_is_written_the_same(segments):
    """A key that is read has no second spelling: written again it is the same text."""
    text = "/".join([PREFIX, *segments])
    try:
        key = Key.parse(PREFIX, text)
    except ValueError:
        return
    assert key.under(PREFIX) == text


def test_a_real_session_id_is_a_lease_id():
    """Consul's session ids are version 4 UUIDs or look like them; ours in tests too."""
    for _ in range(100):
        Key.parse(PREFIX, Key("t", Host("h", 1), str(uuid.uuid4())).under(PREFIX))


def test_the_sentinel_is_no_text():
    """No topic can be named so that its folder is the sentinel."""
    with pytest.raises(ValueError, match="not an encoded"):
        decode_segment(SENTINEL)


@pytest.mark.finding("E2")
def test_a_registration_whose_key_is_too_long_is_refused() -> None:
    """Before anything is sent, with the bound, and without repeating the whole name."""
    host = Host("10.0.0.5", 9501)
    longest = "x" * (MAX_KEY_BYTES - len(Key("y", host, "0" * 36).under("x")) + 1)
    assert checked_registration(Registration(longest, host))
    for too_long in (Registration(longest + "x", host), Registration("t", host, "\u4e16" * 900)):
        with pytest.raises(ConfigurationError, match=str(MAX_KEY_BYTES)) as caught:
            checked_registration(too_long)
        assert len(str(caught.value)) < 400
