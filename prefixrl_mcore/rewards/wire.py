"""Messages between the trainer, the nursery and the judging children: length, then JSON.

Standard library only: the children import this file and must start fast. JSON with ASCII escapes
carries any text, lone surrogates and NUL characters included.
"""

import json
import socket
import struct

type Json = bool | int | float | str | list[Json] | dict[str, Json] | None
"""What a message can hold."""

_HEADER = struct.Struct("!I")


def encode(message: Json) -> bytes:
    """Return the message as it travels: 4 bytes of length (network order), then the JSON."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    return _HEADER.pack(len(body)) + body


class Inbox:
    """Collects bytes as they arrive and gives back complete messages.

    A message that was cut off, because its sender was killed, never comes out.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Json]:
        """Add what was received; return the messages that are now complete, in order.

        Raises:
            ValueError: if a complete message is not JSON.
        """
        self._bytes += data
        messages: list[Json] = []
        start = 0
        while len(self._bytes) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._bytes, start)
            end = start + _HEADER.size + length
            if len(self._bytes) < end:
                break
            messages.append(json.loads(self._bytes[start + _HEADER.size : end]))
            start = end
        del self._bytes[:start]
        return messages


def receive(connection: socket.socket) -> Json:
    """Wait for one whole message.

    Raises:
        EOFError: if the other side has closed the connection or is dead.
        TimeoutError: if the connection has a timeout and it ran out.
    """
    (length,) = _HEADER.unpack(_receive_exactly(connection, _HEADER.size))
    return json.loads(_receive_exactly(connection, length))


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    chunks: list[bytes] = []
    while num_bytes > 0:
        chunk = connection.recv(min(num_bytes, 1 << 20))
        if not chunk:
            raise EOFError("the other side has closed the connection")
        chunks.append(chunk)
        num_bytes -= len(chunk)
    return b"".join(chunks)
