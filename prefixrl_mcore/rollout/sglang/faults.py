"""What can go wrong with a call to a server, by what the caller may do about it."""

_KEY_REMEDY = (
    "; the server asks for an API key, and there is none or another one here: set "
    "PREFIXRL_SGLANG_API_KEY or rollout.sglang.api_key_file to its key"
)


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
