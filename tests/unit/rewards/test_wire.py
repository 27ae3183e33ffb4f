"""Messages between processes: complete ones come out, cut ones never do."""

import socket

import pytest

from prefixrl_mcore.rewards.wire import Inbox, encode, receive


def test_messages_come_out_whole_however_they_arrive() -> None:
    messages = [["a", 1], {"b": [None, True, 0.5]}, "\ud800\x00", ""]
    stream = b"".join(encode(message) for message in messages)
    for step in (1, 3, 7, len(stream)):
        inbox = Inbox()
        received = []
        for start in range(0, len(stream), step):
            received += inbox.feed(stream[start : start + step])
        assert received == messages


def test_a_message_that_was_cut_off_never_comes_out() -> None:
    inbox = Inbox()
    assert inbox.feed(encode("whole") + encode("cut off")[:-1]) == ["whole"]
    assert inbox.feed(b"") == []


def test_garbage_is_refused() -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        Inbox().feed(b"\x00\x00\x00\x01?")


def test_receive_ends_when_the_other_side_is_gone() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(encode([1, 2]) + encode("cut off")[:-1])
    theirs.close()
    with ours:
        assert receive(ours) == [1, 2]
        with pytest.raises(EOFError):
            receive(ours)
