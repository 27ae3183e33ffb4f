"""Import of traces made elsewhere: by another run, by another model family, by people.

A text is tokenised exactly once, here, with the run's tokenizer, by itself and placed right after
the prompt: the prompt's tokens are those that the policy will see, and no token spans the
boundary. A trace that ended by itself gets the end token if it has none. From then on only token
ids are used. Every trace is verified before it is stored; what is not stored is reported with its
place and the reason.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from prefixrl_mcore.data.import_report import Disagreement, ImportReport, Rejection
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.data.trace_files import Candidate, TraceFormat, read_candidates
from prefixrl_mcore.data.traces import (
    AttemptRecord,
    TraceRecord,
    TraceStore,
    build_trace_id,
    check_hash,
    merge_attempts,
)
from prefixrl_mcore.data.verification import Attempt, verify_attempts
from prefixrl_mcore.records import Problem, Prompt, Verdict
from prefixrl_mcore.rewards.base import Verifier

_logger = logging.getLogger(__name__)

Keep = Literal["first", "all"]

IMPORT_SAMPLER = "import"
"""``sampler`` of imported traces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokenised:
    """A candidate that can be verified."""

    candidate: Candidate
    prompt: Prompt
    token_ids: tuple[int, ...]
    trace_id: str

    @property
    def problem_id(self) -> str:
        return self.prompt.problem.problem_id


@dataclass(kw_only=True, slots=True)
class _Progress:
    """What one import has found so far."""

    rejections: dict[int, Rejection] = field(default_factory=dict)
    tokenised: dict[int, _Tokenised] = field(default_factory=dict)
    costs: list[AttemptRecord] = field(default_factory=list)
    num_inexact_texts: int = 0


def import_traces(
    path: Path,
    *,
    file_format: TraceFormat,
    source_model: str | None,
    store: TraceStore,
    problems: Sequence[Problem],
    renderer: PromptRenderer,
    verifier: Verifier,
    keep: Keep = "first",
    max_total_tokens: int | None = None,
) -> ImportReport:
    """Verify the traces of a file and append those that are right to the store, in one round.

    All candidates that can be verified are verified, so that labels can be compared, also of
    problems that have a trace already. The cost given in the file is recorded once for every
    known problem in it, solved or not; a file is recognised by its content. Importing a file
    again with the same options adds nothing.

    Args:
        path: the file.
        file_format: see ``trace_files``.
        source_model: name of the model that wrote the traces; a name in the file goes before it.
        store: must have the renderer's hashes.
        problems: problems that traces may answer, with the answers to verify against.
        renderer: makes the prompts and tokenises the texts.
        verifier: decides.
        keep: ``first`` keeps one verified trace per problem, the first in the file, and none for
            a problem that has one in the store; ``all`` keeps every one.
        max_total_tokens: reject longer prompt + trace; None has no limit.

    Raises:
        ValueError: if the file is malformed, ids belong to another tokenizer, the store's hashes
            differ from the renderer's, no source model is given, or two problems have the same
            text although the file names problems by text.
    """
    if keep not in ("first", "all"):
        raise ValueError(f"keep must be first or all, got {keep!r}")
    for what, found, expected in (
        ("tokenizer", store.header.tokenizer_hash, renderer.tokenizer_hash),
        ("chat template", store.header.chat_template_hash, renderer.chat_template_hash),
    ):
        check_hash(what, store.folder, found, expected)
    file = read_candidates(path, file_format)
    progress = _tokenise(file.candidates, problems, renderer, source_model, max_total_tokens)
    order = sorted(progress.tokenised)
    items = [progress.tokenised[index] for index in order]
    verdicts = dict(zip(order, verify_attempts(_attempts(items), verifier, renderer), strict=True))
    accepted = _choose(progress, verdicts, store, keep)
    origin = f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    _store(progress, accepted, store, source_model, verifier.name, origin)
    report = _report(progress, verdicts, accepted, file.ignored_fields, len(file.candidates))
    _log(path, report)
    return report


def _tokenise(
    candidates: Sequence[Candidate],
    problems: Sequence[Problem],
    renderer: PromptRenderer,
    source_model: str | None,
    max_total_tokens: int | None,
) -> _Progress:
    """Turn candidates into token ids, or reject them."""
    by_id = {problem.problem_id: problem for problem in problems}
    by_text = _problems_by_text(candidates, problems)
    prompts: dict[str, Prompt] = {}
    progress = _Progress()
    for index, candidate in enumerate(candidates):
        if candidate.source_model is None and source_model is None:
            raise ValueError(
                f"{candidate.where}: no source_model; name the model that wrote the traces with "
                "--source"
            )
        if candidate.tokenizer_hash is not None:
            where = Path(candidate.where)
            check_hash("tokenizer", where, candidate.tokenizer_hash, renderer.tokenizer_hash)
        named_by_id = candidate.problem_id is not None
        key = candidate.problem_id if named_by_id else candidate.problem_text
        problem = (by_id if named_by_id else by_text).get(key or "")
        if problem is None:
            progress.rejections[index] = Rejection(
                where=candidate.where,
                problem_id=candidate.problem_id or "",
                reason="unknown_problem",
            )
            continue
        if problem.problem_id not in prompts:
            prompts[problem.problem_id] = renderer.render(problem)
        prompt = prompts[problem.problem_id]
        token_ids, is_exact = _token_ids(candidate, renderer)
        progress.costs.append(
            AttemptRecord(
                problem_id=problem.problem_id,
                num_tries=candidate.num_tries,
                num_tokens=len(prompt.token_ids) + len(token_ids),
                flops=candidate.flops,
                seconds=candidate.seconds,
                is_solved=False,
            )
        )
        progress.num_inexact_texts += not is_exact
        reason = _refusal(prompt, token_ids, renderer, max_total_tokens)
        if reason is not None:
            progress.rejections[index] = Rejection(
                where=candidate.where, problem_id=problem.problem_id, reason=reason
            )
            continue
        progress.tokenised[index] = _Tokenised(
            candidate=candidate,
            prompt=prompt,
            token_ids=token_ids,
            trace_id=build_trace_id(problem.problem_id, token_ids),
        )
    return progress


def _problems_by_text(
    candidates: Sequence[Candidate], problems: Sequence[Problem]
) -> dict[str, Problem]:
    """Return problem text -> problem; refuse equal texts if the file names problems by text."""
    by_text: dict[str, Problem] = {}
    named = {c.problem_text for c in candidates if c.problem_text is not None}
    for problem in problems:
        known = by_text.setdefault(problem.text, problem)
        if known is not problem and problem.text in named:
            raise ValueError(
                f"problems {known.problem_id!r} and {problem.problem_id!r} have the same text, by "
                "which the trace file names them; name problems by problem_id"
            )
    return by_text


def _token_ids(candidate: Candidate, renderer: PromptRenderer) -> tuple[tuple[int, ...], bool]:
    """Return the trace's tokens, and whether a text comes back unchanged from them."""
    if candidate.token_ids is not None:
        return candidate.token_ids, True
    assert candidate.text is not None, "a candidate has text or token ids"
    token_ids = renderer.encode_continuation(candidate.text)
    is_exact = renderer.decode(token_ids) == candidate.text
    has_end = bool(token_ids) and token_ids[-1] in renderer.stop_token_ids
    if candidate.finish_reason == "stop" and not has_end:
        token_ids += (renderer.end_token_id,)
    return token_ids, is_exact


def _refusal(
    prompt: Prompt,
    token_ids: tuple[int, ...],
    renderer: PromptRenderer,
    max_total_tokens: int | None,
) -> str | None:
    """Return why a trace cannot be used whatever it says; None when it can."""
    if any(not 0 <= token_id < renderer.vocab_size for token_id in token_ids):
        return "token_out_of_range"
    stop = frozenset(renderer.stop_token_ids)
    if not stop.isdisjoint(token_ids[:-1]):
        return "stop_token_inside"
    if max_total_tokens is not None and len(prompt.token_ids) + len(token_ids) > max_total_tokens:
        return "too_long"
    return None


def _attempts(items: Sequence[_Tokenised]) -> list[Attempt]:
    """Return what the verifier needs."""
    return [
        Attempt(
            attempt_id=item.trace_id,
            problem=item.prompt.problem,
            completion_token_ids=item.token_ids,
            finish_reason=item.candidate.finish_reason,
        )
        for item in items
    ]


def _choose(
    progress: _Progress, verdicts: dict[int, Verdict], store: TraceStore, keep: Keep
) -> list[int]:
    """Return the indices of the traces to store; reject the others with their reason."""
    stored = [(record.trace_id, record.problem_id) for record in store.traces()]
    known_ids = {trace_id for trace_id, _ in stored}
    solved = {problem_id for _, problem_id in stored}
    accepted: list[int] = []
    for index, item in progress.tokenised.items():
        if verdicts[index].reward <= 0.0:
            reason = f"verifier:{verdicts[index].reason}"
        elif item.trace_id in known_ids:
            reason = "duplicate"
        elif keep == "first" and item.problem_id in solved:
            reason = "already_solved"
        else:
            accepted.append(index)
            known_ids.add(item.trace_id)
            solved.add(item.problem_id)
            continue
        progress.rejections[index] = Rejection(
            where=item.candidate.where, problem_id=item.problem_id, reason=reason
        )
    return accepted


def _store(
    progress: _Progress,
    accepted: Sequence[int],
    store: TraceStore,
    source_model: str | None,
    verifier_name: str,
    origin: str,
) -> None:
    """Append the accepted traces and the cost of every problem of the file as one round."""
    header = store.header
    solved = {progress.tokenised[index].problem_id for index in accepted}
    attempts = [
        replace(cost, is_solved=cost.problem_id in solved, origin=origin)
        for cost in merge_attempts(progress.costs)
    ]
    if origin in store.origins():  # charged before: only the new traces are news
        attempts = [
            replace(attempt, num_tries=0, num_tokens=0, flops=0.0, seconds=0.0)
            for attempt in attempts
            if attempt.is_solved
        ]
    records = [
        TraceRecord(
            trace_id=item.trace_id,
            problem_id=item.problem_id,
            prompt_token_ids=item.prompt.token_ids,
            completion_token_ids=item.token_ids,
            rollout_logprobs=item.candidate.rollout_logprobs,
            finish_reason=item.candidate.finish_reason,
            sampler=IMPORT_SAMPLER,
            source_model=item.candidate.source_model or source_model or "",
            policy_version=-1,
            weights_hash="",
            temperature=item.candidate.temperature,
            seed=item.candidate.seed,
            verifier=verifier_name,
            tokenizer_hash=header.tokenizer_hash,
            chat_template_hash=header.chat_template_hash,
            num_tries=item.candidate.num_tries,
            flops=item.candidate.flops,
            seconds=item.candidate.seconds,
            label=item.candidate.label,
        )
        for item in (progress.tokenised[index] for index in accepted)
    ]
    store.append(records, attempts)


def _report(
    progress: _Progress,
    verdicts: dict[int, Verdict],
    accepted: Sequence[int],
    ignored_fields: dict[str, int],
    num_candidates: int,
) -> ImportReport:
    """Compare labels with verdicts and put everything together."""
    num_labelled = 0
    disagreements: list[Disagreement] = []
    for index, item in progress.tokenised.items():
        label, verdict = item.candidate.label, verdicts[index]
        if label is None:
            continue
        num_labelled += 1
        if label != (verdict.reward > 0.0):
            disagreements.append(
                Disagreement(
                    where=item.candidate.where,
                    problem_id=item.problem_id,
                    answer=item.prompt.problem.answer,
                    label=label,
                    reason=verdict.reason,
                    extracted=verdict.extracted,
                )
            )
    return ImportReport(
        num_candidates=num_candidates,
        num_accepted=len(accepted),
        rejections=tuple(progress.rejections[index] for index in sorted(progress.rejections)),
        num_labelled=num_labelled,
        disagreements=tuple(disagreements),
        num_inexact_texts=progress.num_inexact_texts,
        ignored_fields=ignored_fields,
    )


def _log(path: Path, report: ImportReport) -> None:
    """Say what became of the file; the caller shows the details."""
    _logger.info(
        "%s: %d traces, %d stored, rejected: %s",
        path,
        report.num_candidates,
        report.num_accepted,
        ", ".join(f"{count} {reason}" for reason, count in report.reasons.items()) or "none",
    )
    if report.ignored_fields:
        _logger.warning("%s: fields without meaning here: %s", path, report.ignored_fields)
    if report.num_inexact_texts:
        _logger.warning(
            "%s: %d texts do not come back unchanged from their tokens",
            path,
            report.num_inexact_texts,
        )
