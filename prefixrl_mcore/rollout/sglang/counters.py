"""What the pool counts between two lines of metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.sglang.schedule import max_over_mean


@dataclass(kw_only=True, slots=True)
class PoolCounters:
    """Counts since the last line of metrics; of one thread."""

    num_servers: int
    """Servers of the pool, dead or alive."""

    num_requests: int = 0
    """Requests that were answered."""

    num_reissued: int = 0
    """Times that a request was lost and issued again."""

    num_aborted: int = 0
    """Completions that were ended because enough had come."""

    num_bad_answers: int = 0
    """Answers that could not be believed."""

    num_deaths: int = 0
    """Times that a server was declared dead."""

    num_restarts: int = 0
    """Times that a dead server was started again, or waited for."""

    context_tokens: int = 0
    """Of all samples that were begun: each is conditioned on its request's context."""

    cached_tokens: int = 0
    """Of these, taken from a KV cache."""

    tokens_by_server: list[int] = field(default_factory=list)
    """[num_servers] tokens that each computed: contexts that were not cached, and completions."""

    requests_by_server: list[int] = field(default_factory=list)
    """[num_servers] requests that each answered."""

    def __post_init__(self) -> None:
        """Begin at zero."""
        self.tokens_by_server = [0] * self.num_servers
        self.requests_by_server = [0] * self.num_servers

    def note_answer(
        self, server: int | None, num_context_tokens: int, completions: Sequence[Completion]
    ) -> None:
        """Count one answered request; ``server`` is None where a router chose it."""
        begun = [one for one in completions if one.token_ids]
        cached = sum(one.num_cached_tokens for one in begun)
        contexts = num_context_tokens * len(begun)
        self.num_requests += 1
        self.num_aborted += sum(one.finish_reason == "abort" for one in completions)
        self.context_tokens += contexts
        self.cached_tokens += cached
        if server is not None:
            sampled = sum(len(one.token_ids) for one in completions)
            self.tokens_by_server[server] += contexts - cached + sampled
            self.requests_by_server[server] += 1

    def metrics(self, *, num_ready: int) -> dict[str, float]:
        """Return the counts by metric name.

        Args:
            num_ready: servers that sample at the moment, or sleep.
        """
        values = {
            "engine/num_requests": float(self.num_requests),
            "engine/num_reissued_requests": float(self.num_reissued),
            "engine/num_aborted_completions": float(self.num_aborted),
            "engine/num_bad_answers": float(self.num_bad_answers),
            "engine/num_server_deaths": float(self.num_deaths),
            "engine/num_server_restarts": float(self.num_restarts),
            "engine/num_ready_servers": float(num_ready),
        }
        if self.context_tokens:
            values["engine/cache_hit_fraction"] = self.cached_tokens / self.context_tokens
        if any(self.requests_by_server):
            values["engine/server_tokens_max_over_mean"] = max_over_mean(self.tokens_by_server)
            for server in range(self.num_servers):
                values[f"engine/server_{server}/tokens"] = float(self.tokens_by_server[server])
                values[f"engine/server_{server}/num_requests"] = float(
                    self.requests_by_server[server]
                )
        return values
