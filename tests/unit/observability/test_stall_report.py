"""Who is late, told from phases and stacks."""

from collections.abc import Sequence

import pytest

from prefixrl_mcore.observability.stall_report import (
    Beat,
    RankReport,
    late_ranks,
    main_frames,
    render,
)

COLLECTIVE = '  File "/site-packages/torch/distributed/distributed_c10d.py", line 4 in barrier'
RECEIVE = (
    '  File "/site-packages/megatron/core/pipeline_parallel/p2p_communication.py", line 413 in '
    "_communicate"
)
REDUCE = '  File "/x/distributed/param_and_grad_buffer.py", line 823 in finish_grad_sync'
SLEEP = '  File "/src/pack.py", line 7 in pack'


def _report(
    rank: int,
    phase: str,
    *,
    step: str = "step 3",
    changes: int = 5,
    stage: int = 0,
    beats: int = 0,
    answered: bool = True,
    frames: Sequence[str] = (SLEEP,),
) -> RankReport:
    beat = Beat(
        rank=rank,
        host="node",
        pid=10 + rank,
        stage=stage,
        step=step,
        phase=phase,
        num_changes=changes,
        num_beats=beats,
        seconds=601.0,
        time=0.0,
        answers=int(answered),
    )
    return RankReport(
        rank=rank, beat=beat, silent_seconds=42.0, has_answered=answered, frames=tuple(frames)
    )


@pytest.mark.parametrize(
    ("reports", "late"),
    [
        pytest.param(
            [_report(0, "forward_backward", changes=6), _report(1, "pack")],
            [1],
            id="the least far phase",
        ),
        pytest.param(
            [_report(0, "sync", step="step 4", changes=6), _report(1, "save")],
            [1],
            id="the least step",
        ),
        pytest.param(
            [_report(0, "sync", changes=9), _report(1, "other", changes=8)],
            [1],
            id="an evaluation's sync comes after the step",
        ),
        pytest.param(
            [_report(0, "start", changes=4), _report(1, "optimizer", changes=3)],
            [1],
            id="between supervised updates",
        ),
        pytest.param(
            [
                _report(0, "forward_backward", stage=0, beats=5),
                _report(1, "forward_backward", stage=1, beats=2, frames=[RECEIVE]),
            ],
            [0],
            id="the last stage waits for the first",
        ),
        pytest.param(
            [
                _report(0, "forward_backward", stage=0, beats=5),
                _report(1, "forward_backward", stage=0, beats=5),
                _report(2, "forward_backward", stage=1, beats=2),
                _report(3, "forward_backward", stage=1, beats=1),
            ],
            [3],
            id="the least microbatch of a stage",
        ),
        pytest.param(
            [
                _report(0, "optimizer", changes=6),
                _report(1, "forward_backward", beats=2),
                _report(2, "forward_backward", beats=3),
            ],
            [1],
            id="the least microbatch",
        ),
        pytest.param(
            [_report(0, "verify"), _report(1, "rollout", frames=[COLLECTIVE])],
            [0],
            id="verification is not ahead of those who wait for it",
        ),
        pytest.param(
            [_report(rank, "forward_backward", frames=[COLLECTIVE]) for rank in (0, 1)]
            + [_report(2, "forward_backward")],
            [2],
            id="who is not in a collective",
        ),
        pytest.param(
            [_report(0, "pack"), _report(1, "optimizer", answered=False)],
            [1],
            id="who does not answer",
        ),
        pytest.param([_report(0, "save"), _report(1, "save")], [0, 1], id="cannot be told"),
    ],
)
def test_the_late_rank(reports: list[RankReport], late: list[int]) -> None:
    assert [report.rank for report in late_ranks(reports)] == late


@pytest.mark.parametrize("frame", [COLLECTIVE, RECEIVE, REDUCE])
def test_waiting_for_other_ranks_is_recognised(frame: str) -> None:
    assert _report(0, "forward_backward", frames=[frame, SLEEP]).is_waiting
    assert not _report(0, "forward_backward", frames=[SLEEP] * 3 + [frame]).is_waiting


def test_a_rank_that_never_lived_is_late() -> None:
    dead = RankReport(rank=1, beat=None, silent_seconds=0.0, has_answered=False, frames=())
    text = render([_report(0, "start", step=""), dead], limits={}, folder="f")
    assert text.splitlines()[0] == "stall: rank 1 never gave a sign of life"
    assert "  rank 1: no heartbeat" in text


def test_a_silent_rank_was_last_seen_somewhere() -> None:
    text = render([_report(0, "pack"), _report(1, "pack", answered=False)], limits={}, folder="f")
    assert text.startswith(
        "stall: rank 1 without a sign of life for 42 s, last seen in phase pack of step 3: "
    )


def test_the_report_names_rank_phase_time_and_stack_and_joins_equal_stacks() -> None:
    reports = [
        _report(rank, "forward_backward", changes=6, frames=[COLLECTIVE]) for rank in (0, 2, 3)
    ]
    reports.insert(1, _report(1, "pack"))
    lines = render(reports, limits={"pack": 600.0}, folder="/run/heartbeats").splitlines()
    assert lines[0] == (
        "stall: rank 1 late in phase pack of step 3, no progress for 601 s (limit 600 s)"
    )
    assert lines[1] == (
        "  rank 0 (node, process 10): forward_backward of step 3, no progress for 601 s, "
        "in a collective, at distributed_c10d.py:4 in barrier"
    )
    assert lines[2].endswith("at pack.py:7 in pack <- late")
    assert lines[5:] == [
        "stack of rank 0, 2, 3, innermost call first:",
        COLLECTIVE,
        "stack of rank 1, innermost call first:",
        SLEEP,
        "stacks of all threads: /run/heartbeats/rank-*.stacks",
    ]


def test_the_main_thread_is_found_in_the_last_dump() -> None:
    text = f"""main thread 0x00000000000000aa
Thread 0x00000000000000bb (most recent call first):
  File "/a.py", line 1 in other
Thread 0x00000000000000aa (most recent call first):
  File "/a.py", line 2 in before
Timeout (0:00:01)!
Thread 0x00000000000000aa (most recent call first):
{SLEEP}
  File "/a.py", line 3 in main
Current thread 0x00000000000000bb (most recent call first):
  File "/a.py", line 1 in other
"""
    assert main_frames(text) == (SLEEP, '  File "/a.py", line 3 in main')
    assert main_frames("main thread 0x00aa\n") == ()
