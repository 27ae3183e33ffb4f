"""Completions of one call of the in-process engine, by request, until it is enough."""

from collections.abc import Sequence

from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.decoding import Row
from prefixrl_mcore.rollout.engine import IsEnough, OnCompleted, SampleRequest
from prefixrl_mcore.rollout.interruption import IsInterrupted


class Collected:
    """Puts completions in the order of their requests and asks whether there are enough."""

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        is_enough: IsEnough,
        on_completed: OnCompleted | None,
        is_interrupted: IsInterrupted,
    ) -> None:
        """Start with none of the requests' completions."""
        self.was_interrupted = False
        """The sampling was ended by another than the caller."""
        self._is_enough = False
        self._is_interrupted = is_interrupted
        self._requests = requests
        self._index = {request.request_id: index for index, request in enumerate(requests)}
        self._ask = is_enough
        self._on_completed = on_completed
        self._done: list[dict[int, Completion]] = [{} for _ in requests]

    def is_over(self) -> bool:
        """Return whether no more is to be sampled; asked between two tokens."""
        if not self._is_enough:  # else it is whole, and no longer to be thrown away
            self.was_interrupted = self.was_interrupted or self._is_interrupted()
        return self._is_enough or self.was_interrupted

    def add(self, row: Row, completion: Completion) -> None:
        """Take the completion of a row."""
        index = self._index[row.request.request_id]
        of_request = self._done[index]
        of_request[row.sample_index] = completion
        completions = [of_request[sample] for sample in sorted(of_request)]
        is_whole = len(completions) == row.request.num_samples
        if is_whole and all(one.is_finished for one in completions):
            if self._on_completed is not None:
                self._on_completed(len(completions), sum(len(c.token_ids) for c in completions))
            self._is_enough = self._is_enough or self._ask(index, completions)

    def in_order(self, *, policy_version: int) -> list[list[Completion]]:
        """Return all completions, in the order of the requests.

        Args:
            policy_version: of the completions that were aborted before their turn came.
        """
        unstarted = Completion.unstarted(policy_version)
        return [
            [of_request.get(sample, unstarted) for sample in range(request.num_samples)]
            for request, of_request in zip(self._requests, self._done, strict=True)
        ]
