"""FLOPs by the paper's rule, and the tokens that were really computed.

Sampling costs ``2 N D`` and an update ``6 N D``: N parameters, D tokens; with a KL term the
forward pass of the reference, of which the paper has none, adds ``2 N D`` to the update. D counts
prompt, prefix and completion of every rollout, also where an engine takes the prompt and prefix
from its KV cache; so the charge depends on the method and not on the engine. Rejection sampling
(failed tries included) and SFT are charged to the run. Screening of problems, evaluation and
verification are not, as in the paper.

N counts all parameters of the model, norms and biases included: a tied embedding once, an untied
output layer besides the embedding. Of the experts of a mixture-of-experts layer only the share
that a token is routed to counts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefixrl_mcore.records import Group


def sampling_flops(num_parameters: int, num_tokens: int) -> float:
    """Return ``2 N D``: the FLOPs charged for sampling.

    Args:
        num_parameters: N.
        num_tokens: D, prompt, prefix and completion tokens.
    """
    return 2.0 * num_parameters * num_tokens


def update_flops(num_parameters: int, num_tokens: int) -> float:
    """Return ``6 N D``: the FLOPs charged for a forward and backward pass.

    Args:
        num_parameters: N.
        num_tokens: D, prompt, prefix and completion tokens.
    """
    return 6.0 * num_parameters * num_tokens


@dataclass(kw_only=True, slots=True)
class FlopsMeter:
    """What a run has been charged so far; the same on every rank when charged alike."""

    num_parameters: int
    """N, see ``parameters.count_parameters``."""

    collect_flops: float = 0.0
    """Charge for the traces: the trace store's total, unsolved problems included."""

    sft_flops: float = 0.0
    """Charge for supervised steps."""

    sampling_flops: float = 0.0
    """Charge for rollouts."""

    update_flops: float = 0.0
    """Charge for policy-gradient steps."""

    interrupted_tokens: int = 0
    """D of sampling that a stop interrupted: charged, thrown away and sampled again."""

    num_interrupted_generations: int = 0
    """How often that happened."""

    charged_tokens: int = 0
    """Sum of D over sampling, passes of the reference, updates and SFT; a token that is sampled and
    trained on counts in both. Collection is not in it."""

    computed_tokens: int = 0
    """Tokens that engine and trainer really computed in the same passes: without context tokens
    from the KV cache, with the padding of streams that could not be cut off."""

    def __post_init__(self) -> None:
        """Refuse counts that cannot be."""
        if self.num_parameters < 1:
            raise ValueError(f"num_parameters must be at least 1, got {self.num_parameters}")

    @property
    def total_flops(self) -> float:
        """Everything charged so far."""
        return self.interrupted_flops + self.course_flops

    @property
    def course_flops(self) -> float:
        """Everything but what was interrupted: the same however often a run is stopped."""
        return self.collect_flops + self.sft_flops + self.sampling_flops + self.update_flops

    @property
    def interrupted_flops(self) -> float:
        """Charge for sampling that a stop interrupted."""
        return sampling_flops(self.num_parameters, self.interrupted_tokens)

    def charge_sampling(self, num_tokens: int, *, num_cached_tokens: int = 0) -> None:
        """Charge rollouts.

        Args:
            num_tokens: context and completion tokens of all that was sampled, whether it is
                trained on or not. What goes on after it was aborted has all its tokens so far as
                context.
            num_cached_tokens: those of them that the engine did not compute.
        """
        self.sampling_flops += sampling_flops(self.num_parameters, num_tokens)
        self.charged_tokens += num_tokens
        self.computed_tokens += num_tokens - num_cached_tokens

    def charge_interrupted(self, num_tokens: int, *, num_cached_tokens: int) -> None:
        """Charge a generation that was thrown away; arguments as of ``charge_sampling``."""
        self.num_interrupted_generations += 1
        self.interrupted_tokens += num_tokens
        self.charged_tokens += num_tokens
        self.computed_tokens += num_tokens - num_cached_tokens

    def charge_update(self, num_tokens: int, *, num_computed_tokens: int | None = None) -> None:
        """Charge a policy-gradient step.

        Args:
            num_tokens: context and completion tokens of all rollouts.
            num_computed_tokens: tokens of the streams, padding included; None takes
                ``num_tokens``.
        """
        self.update_flops += update_flops(self.num_parameters, num_tokens)
        self._count_pass(num_tokens, num_computed_tokens)

    def charge_sft(self, num_tokens: int, *, num_computed_tokens: int | None = None) -> None:
        """Charge a supervised step; the arguments are those of ``charge_update``."""
        self.sft_flops += update_flops(self.num_parameters, num_tokens)
        self._count_pass(num_tokens, num_computed_tokens)

    def charge_update_on(
        self, groups: Sequence[Group], *, num_computed_tokens: int, has_reference: bool
    ) -> None:
        """Charge the update on a step's groups, also on those without any gradient.

        Args:
            groups: what the step trains on.
            num_computed_tokens: tokens that the trainer really ran, kept padding included.
            has_reference: whether the reference ran forward on them, too.
        """
        num_tokens = sum(
            len(group.prefixed_problem.context_token_ids) + len(s.rollout.completion.token_ids)
            for group in groups
            for s in group.rollouts
        )
        self.charge_update(num_tokens, num_computed_tokens=num_computed_tokens)
        if has_reference:  # it costs as much as sampling them
            self.update_flops += sampling_flops(self.num_parameters, num_tokens)
            self._count_pass(num_tokens, num_computed_tokens)

    def metrics(self) -> dict[str, float]:
        """Return the totals so far under the names of ``metrics.jsonl``."""
        return {
            "flops/total": self.total_flops,
            "flops/collect": self.collect_flops,
            "flops/sft": self.sft_flops,
            "flops/sampling": self.sampling_flops,
            "flops/update": self.update_flops,
            "flops/interrupted": self.interrupted_flops,
            "flops/num_interrupted_generations": float(self.num_interrupted_generations),
            "tokens/charged": float(self.charged_tokens),
            "tokens/computed": float(self.computed_tokens),
        }

    def state(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``.

        Raises:
            ValueError: if it was of a model with another number of parameters, or the charge for
                the traces differs (the trace store was changed); the meter is then unchanged.
        """
        for name in ("num_parameters", "collect_flops"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"FLOPs meter: {name} of the saved run is {state[name]}, of this run "
                    f"{getattr(self, name)}; resume with the same model and trace store"
                )
        self.sft_flops = float(state["sft_flops"])
        self.sampling_flops = float(state["sampling_flops"])
        self.update_flops = float(state["update_flops"])
        self.interrupted_tokens = int(state["interrupted_tokens"])
        self.num_interrupted_generations = int(state["num_interrupted_generations"])
        self.charged_tokens = int(state["charged_tokens"])
        self.computed_tokens = int(state["computed_tokens"])

    def _count_pass(self, num_tokens: int, num_computed_tokens: int | None) -> None:
        """Count the tokens of a pass of the trainer."""
        self.charged_tokens += num_tokens
        self.computed_tokens += num_tokens if num_computed_tokens is None else num_computed_tokens
