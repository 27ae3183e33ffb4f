"""Which nodes are bad, and what becomes of the job: pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

Outcome = Literal["go", "exclude", "fail"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one node found out about itself."""

    node: str
    """Its name."""

    role: str
    """What it is to do; nodes of one role are compared."""

    clock_offset_seconds: float = 0.0
    """How far its clock is ahead of the first node's."""

    facts: dict[str, Any] = field(default_factory=dict)
    """Versions and the like, which must be the same on all nodes of a role."""

    faults: list[str] = field(default_factory=list)
    """What is wrong with it; empty if nothing is."""

    site_faults: list[str] = field(default_factory=list)
    """What is wrong with the site's settings, as far as one node can tell: another in its place
    would hardly do better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the pre-check came to."""

    outcome: Outcome
    """``go``; ``exclude`` the bad nodes and start again on others; or ``fail`` the job."""

    bad: dict[str, list[str]]
    """Faults by node."""

    why: str
    """One sentence."""


def decide(
    nodes: Sequence[str],
    findings: Mapping[str, Finding],
    *,
    max_clock_skew_seconds: float,
    num_excluded_before: int,
    max_excluded: int,
    timeout_seconds: float,
) -> Verdict:
    """Return what becomes of the job.

    Args:
        nodes: all nodes of the job, the first one first.
        findings: what they said, by node; a node may be missing.
        max_clock_skew_seconds: how far a clock may be from the median of all.
        num_excluded_before: nodes that earlier starts of the job excluded.
        max_excluded: nodes that all starts together may exclude.
        timeout_seconds: how long nodes had, for the words.
    """
    faults = {
        name: [*findings[name].faults, *findings[name].site_faults] if name in findings else []
        for name in nodes
    }
    for name in nodes:
        if name not in findings:
            faults[name].append(
                f"said nothing to {nodes[0]} within {timeout_seconds:g} s: it hangs, cannot start "
                "tasks, or does not reach that node"
            )
    _compare_clocks(findings, max_clock_skew_seconds, faults)
    _compare_facts([findings[name] for name in nodes if name in findings], faults)
    bad = {name: found for name, found in faults.items() if found}
    if not bad:
        return Verdict(outcome="go", bad=bad, why=f"{len(nodes)} nodes are good")
    of_site = any(finding.site_faults for finding in findings.values())
    if len(bad) == len(nodes) and (len(nodes) > 1 or of_site):
        why = "no node is good, so others would not be: look at the site's settings and limits"
        return Verdict(outcome="fail", bad=bad, why=why)
    if num_excluded_before + len(bad) > max_excluded:
        why = (
            f"{len(bad)} bad nodes, {num_excluded_before} were excluded before, and "
            f"precheck.max_excluded_nodes of the site is {max_excluded}"
        )
        return Verdict(outcome="fail", bad=bad, why=why)
    return Verdict(outcome="exclude", bad=bad, why=f"{len(bad)} of {len(nodes)} nodes are bad")


def _compare_clocks(
    findings: Mapping[str, Finding], limit: float, faults: dict[str, list[str]]
) -> None:
    """Add the nodes whose clock is far from the median."""
    if not findings:
        return
    middle = median(finding.clock_offset_seconds for finding in findings.values())
    for name, finding in findings.items():
        skew = finding.clock_offset_seconds - middle
        if abs(skew) > limit:
            where = "ahead of" if skew > 0 else "behind"
            faults[name].append(
                f"its clock is {abs(skew):.1f} s {where} the other nodes', {limit:g} s are allowed"
            )


def _compare_facts(findings: Sequence[Finding], faults: dict[str, list[str]]) -> None:
    """Add the nodes that differ from most of their role; of a tie the earliest node is right."""
    for role in {finding.role for finding in findings}:
        same = [finding for finding in findings if finding.role == role]
        for fact in sorted({name for finding in same for name in finding.facts}):
            # Faults explain what is not known.
            values = {f.node: f.facts[fact] for f in same if fact in f.facts}
            most = max(values.values(), key=list(values.values()).count)
            for name, value in values.items():
                if value != most:
                    faults[name].append(
                        f"{fact} is {_text(value)}, on the other {role} nodes {_text(most)}"
                    )


def _text(value: object) -> str:
    """Return a value in words."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
