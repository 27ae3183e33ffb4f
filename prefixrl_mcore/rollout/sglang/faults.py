"""What can go wrong with a call to a server, by what the caller may do about it."""

_KEY_REMEDY = (
    "; the server asks for an API key, and there is none or another one here: set "
    "PREFIXRL_SGLANG_API_KEY or rollout.sglang.api_key_file to its key"
)


_HOPELESS = frozenset({400, 413, 422})
"""Statuses that say something of the request itself: no other server would answer differently."""

_AWAY = frozenset({429, 502, 503, 504})
"""Statuses of a router, or of a proxy, that has nobody to pass a request on to at the moment."""


class ServerFault(RuntimeError):  # noqa: N818 -- not an error of the caller's
    """A call to a server came to nothing; the kinds say how."""


class ServerLost(ServerFault):
    """The server did not answer: connection refused or broken, or the time ran out."""


class BadAnswer(ServerFault):
    """The server answered what no sound server answers; another one may do better."""


class WrongWeights(BadAnswer):
    """The server sampled with other weights than it was given."""


class ServerRefusal(ServerFault):
    """The server answered with an HTTP error."""

    def __init__(self, path: str, status: int, text: str) -> None:
        """Keep what was answered."""
        super().__init__(path, status, text)
        self.path, self.status, self.text = path, status, text

    def __str__(self) -> str:
        """Name the endpoint, the status and the server's words."""
        remedy = _KEY_REMEDY if self.status == 401 else ""
        return f"{self.path} answered {self.status}: {self.text[:1000]}{remedy}"

    @property
    def is_hopeless(self) -> bool:
        """Whether no server would do better."""
        return self.status in _HOPELESS


def is_away(fault: ServerFault) -> bool:
    """Return whether somebody cannot be reached, or reaches nobody, at the moment."""
    return isinstance(fault, ServerLost) or (
        isinstance(fault, ServerRefusal) and fault.status in _AWAY
    )
