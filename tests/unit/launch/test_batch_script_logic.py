"""What the batch script does with exit codes, run by bash with stand-ins for Slurm's commands."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskEnd

GOLDEN = Path(__file__).parents[2] / "fixtures" / "batch_scripts"

SRUN = """#!/bin/bash
# Stand-in: the role is the last argument, but for the pre-check.
role=${@: -1}
if [[ $* == *precheck.task* ]]; then
    echo "bad node node-b: reason" >$LOGS/precheck.log
    ((PRECHECK_CODE != 77)) || echo node-b >$LOGS/precheck.bad
    eval "$PRECHECK_DOES"
    exit $PRECHECK_CODE
fi
# Told to end, srun kills its tasks. HUP is here for the SIGTERM that scancel brings to them.
trap 'echo "$role killed" >>$SAID; kill $!; exit 137' TERM
trap 'echo "$role told to end" >>$SAID; kill $!; exit 0' HUP
trap 'echo "$role told to save" >>$SAID; kill $!; exit 138' USR1
if [[ $role == rollout ]]; then
    trap 'echo "$role told to end" >>$SAID; kill $!; exit 0' USR2
    trap '' USR1 HUP
fi
echo $$ >>$SAID.steps
echo "$role $PREFIXRL_TRAINER_HOSTS $PREFIXRL_ROLLOUT_HOSTS" >>$SAID
# Who is told to end before it listens would end without a word.
other=$([[ $role == trainer ]] && echo rollout || echo trainer)
while [[ -n $HAS_SERVERS ]] && ! grep -q "^$other " $SAID; do sleep 0.05; done
if [[ $role == trainer ]]; then sleep $TRAINER_SECONDS >&- 2>&- & wait; exit $TRAINER_CODE; fi
sleep $ROLLOUT_SECONDS >&- 2>&- & wait
exit $ROLLOUT_CODE
"""

SCONTROL = """#!/bin/bash
case "$*" in
"show hostnames node-[a-c]") printf 'node-a\\nnode-b\\nnode-c\\n' ;;
"show hostnames"*) tr , '\\n' <<<"$3" ;;
"show job"*)
    echo '   StartTime=2026-01-01T00:00:00 EndTime=2026-01-01T04:00:00 Deadline=N/A'
    preempted=None
    if [[ $PREEMPTED_IN == precheck || $PREEMPTED_IN == tasks && -e $SAID ]]; then
        preempted=2026-01-01T01:00:00
    fi
    echo "   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=$preempted"
    echo "   ReqNodeList=(null) ExcNodeList=$EXCLUDED"
    ;;
*) echo "scontrol $*" >>$SAID ;;
esac
"""

SCANCEL = """#!/bin/bash
# Stand-in: all tasks of a job get a signal, not its script.
[[ $2 == 7 && -z $SCANCEL_FAILS ]] || exit 1
signal=${1#--signal=}
while read step; do kill -s ${signal/TERM/HUP} $step 2>/dev/null; done <$SAID.steps
exit 0
"""

SINFO = """#!/bin/bash
for argument in "$@"; do
    [[ $argument != --partition=* ]] || cat "$NODES.${argument#*=}" 2>/dev/null
done
"""


def _run(
    folder: Path,
    shape: str,
    *,
    trainer: int,
    rollout: int | None = None,
    restarts: int = 0,
    precheck: int = 0,
    excluded: str = "(null)",
    precheck_does: str = "",
    hang_seconds: int = 960,
    nodes: dict[str, str] | None = None,
    scancel_fails: bool = False,
    preempted_in: str = "",
    say: dict[str, list[int]] | None = None,
) -> tuple[int, str, str]:
    """Run a golden script; the first step to end is the trainer's unless ``rollout`` is given.

    ``nodes`` is what sinfo says of each partition; else it does not answer. ``preempted_in`` is
    ``precheck`` or ``tasks``. ``say`` has, by role, the exit codes that tasks write down.

    Returns:
        Exit code, what the stand-ins were told, and the script's own words.
    """
    programs = folder / "bin"
    programs.mkdir()
    for partition, text in (nodes or {}).items():
        (folder / f"nodes.{partition}").write_text(text)
    for name, text in (
        *(("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL), ("sinfo", SINFO)),
        ("module", "#!/bin/bash\n"),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    golden = (GOLDEN / f"{shape}.sh").read_text()
    script = golden.replace("960", str(hang_seconds)).replace("--kill-after=60", "--kill-after=1")
    script = script.replace("/jobs/golden-1", str(folder))  # last: its name may have such numbers
    (folder / ".prefixrl-secrets").write_text("")
    for role, codes in (say or {}).items():
        for task, code in enumerate(codes):
            end = TaskEnd(task=f"{role}-{task}", node="node-a", exit_code=code, unix_seconds=1.0)
            JobFolder(folder).write_end(restarts, end)
    said = folder / "said"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder),
            "SAID": str(said),
            "NODES": f"{folder}/nodes",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node-[a-c]",
            "SLURM_JOB_NODELIST_HET_GROUP_0": "node-a",
            "SLURM_JOB_NODELIST_HET_GROUP_1": "node-b",
            "SLURM_RESTART_COUNT": str(restarts),
            "LOGS": f"{folder}/logs/start-{restarts}",
            "PRECHECK_CODE": str(precheck),
            "PRECHECK_DOES": precheck_does,
            "EXCLUDED": excluded,
            "PREEMPTED_IN": preempted_in,
            "SCANCEL_FAILS": "yes" if scancel_fails else "",
            "TRAINER_SECONDS": "0" if rollout is None else "30",
            "TRAINER_CODE": str(trainer),
            "ROLLOUT_SECONDS": "30" if rollout is None else "0",
            "ROLLOUT_CODE": str(rollout or 0),
            "HAS_SERVERS": "yes" if "task /jobs/golden-1 rollout" in golden else "",
        },
    )
    told = said.read_text() if said.exists() else ""
    return done.returncode, told, done.stdout + done.stderr


@pytest.mark.parametrize("code", [75, 138])
def test_a_run_that_has_saved_goes_back_into_the_queue(tmp_path: Path, code: int) -> None:
    result, told, _ = _run(tmp_path, "colocated", trainer=code, restarts=2)
    assert result == code
    assert told.splitlines()[-1] == "scontrol requeue 7"
    assert (tmp_path / "logs" / "start-2").is_dir()


@pytest.mark.parametrize("code", [0, 1, 2, 76, 143])
def test_any_other_end_is_the_jobs(tmp_path: Path, code: int) -> None:
    result, told, said = _run(tmp_path, "colocated", trainer=code)
    assert result == code
    assert "requeue" not in told
    assert f"start 0 of job 7 ended with exit code {code}" in said


@pytest.mark.parametrize(
    ("shape", "code"),
    [("colocated", 143), ("colocated", 1), ("split", 143), ("heterogeneous", 143)],
)
def test_a_preempted_job_goes_back_into_the_queue_however_it_ends(
    tmp_path: Path, shape: str, code: int
) -> None:
    result, told, said = _run(tmp_path, shape, trainer=code, preempted_in="tasks")
    assert result == code
    assert told.splitlines()[-1] == "scontrol requeue 7"
    assert "back into the queue, preempted, to go on from what is saved" in said


def test_a_run_that_completes_in_the_grace_of_a_preemption_is_complete(tmp_path: Path) -> None:
    result, told, _ = _run(tmp_path, "colocated", trainer=0, preempted_in="tasks")
    assert result == 0
    assert "requeue" not in told


def test_preemptions_have_an_end(tmp_path: Path) -> None:
    result, told, said = _run(tmp_path, "split", trainer=143, restarts=20, preempted_in="tasks")
    assert result == 143
    assert "requeue" not in told
    assert "error: not requeued: requeue.max_restarts = 20 of the site allows no more" in said


@pytest.mark.parametrize("code", [0, 77, 143])
def test_a_pre_check_that_a_preemption_interrupts_accuses_nobody(tmp_path: Path, code: int) -> None:
    does = "touch $LOGS/precheck.json; ((PRECHECK_CODE == 0)) || touch $LOGS/precheck.end.json"
    settings = {"precheck": code, "precheck_does": does, "preempted_in": "precheck"}
    result, told, said = _run(tmp_path, "split", trainer=0, **settings)
    assert (result, told) == (143, "scontrol requeue 7\n")
    assert "back into the queue, preempted" in said
    assert [file.name for file in (tmp_path / "logs" / "start-0").iterdir()] == ["precheck.log"]


def test_a_hang_that_a_preemption_ends_accuses_nobody(tmp_path: Path) -> None:
    hang = {"precheck_does": "sleep 60", "hang_seconds": 1, "preempted_in": "precheck"}
    result, told, _ = _run(tmp_path, "split", trainer=0, **hang)
    assert (result, told) == (143, "scontrol requeue 7\n")


def test_restarts_have_an_end(tmp_path: Path) -> None:
    result, told, said = _run(tmp_path, "colocated", trainer=75, restarts=20)
    assert result == 75
    assert "requeue" not in told
    assert "error: not requeued: requeue.max_restarts = 20 of the site allows no more" in said


def test_a_job_that_slurm_starts_too_often_ends_before_anything_else(tmp_path: Path) -> None:
    result, told, said = _run(tmp_path, "colocated", trainer=0, restarts=21)
    assert (result, told) == (78, "")
    assert "prefixrl: error: the job was preempted, or lost a node, and was started more" in said
    assert "requeue.max_restarts = 20 of the site" in said


@pytest.mark.parametrize(("refused", "is_requeued"), [(0, True), (5, True), (6, False)])
def test_a_controller_that_is_away_is_asked_again_to_requeue(
    tmp_path: Path, refused: int, is_requeued: bool
) -> None:
    script = (GOLDEN / "colocated.sh").read_text().replace("/jobs/golden-1", str(tmp_path))
    part = script[script.index("requeue() {") : script.index("# A preempted job")]
    asked = "scontrol() { echo asked; ((++n > refused)); }; sleep() { echo slept $1; }; start=0"
    done = subprocess.run(
        ["bash", "-c", f"refused={refused}; {asked}\n{part}\nrequeue why"],
        check=False,
        capture_output=True,
        text=True,
    )
    said = done.stdout.splitlines()[1:]
    assert said == ["asked", *["slept 10", "asked"] * min(refused, 5)]
    assert (done.returncode == 0) == is_requeued
    told = "prefixrl: error: not requeued: Slurm has refused it for a minute; launch the run again"
    assert (told in done.stderr) == (not is_requeued)


def test_a_start_that_slurm_has_lost_does_not_requeue_the_one_that_runs(tmp_path: Path) -> None:
    (tmp_path / "logs" / "start-3").mkdir(parents=True)
    result, told, said = _run(tmp_path, "colocated", trainer=75, restarts=2)
    assert result == 75
    assert "requeue" not in told
    assert "not requeued: Slurm had lost this start" in said


def test_srun_says_of_whose_step_it_speaks(tmp_path: Path) -> None:
    script = (GOLDEN / "split.sh").read_text()
    (name,) = [line for line in script.splitlines() if line.startswith("srun_rollout() ")]
    (command,) = [line for line in script.splitlines() if line.startswith("srun_rollout --")]
    program = tmp_path / "srun"
    program.symlink_to("/bin/bash")  # which says by what name it was started
    own = f"{name}\nsrun_rollout -c 'echo $0 $$' & pids[1]=$!; wait; echo ${{pids[1]}}"
    told = subprocess.run(
        ["bash", "-c", own],
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    ).stdout.split()
    assert told[0] == "srun-rollout"
    assert told[1] == told[2]  # the process that is waited for is srun's
    assert command.endswith("rollout & pids[1]=$!")


def test_the_trainers_end_ends_the_servers(tmp_path: Path) -> None:
    result, told, _ = _run(tmp_path, "split", trainer=3)
    assert result == 3
    assert "trainer node-a,node-b node-c" in told
    assert "rollout told to end" in told


def test_servers_that_never_came_up_end_the_job(tmp_path: Path) -> None:
    result, told, said = _run(tmp_path, "split", trainer=0, rollout=1)
    assert result == 1
    assert "trainer told to end" in told
    assert "requeue" not in told
    assert "the rollout servers ended before the trainer, with exit code 1" in said


def test_servers_that_leave_without_a_word_fail_the_job(tmp_path: Path) -> None:
    assert _run(tmp_path, "split", trainer=0, rollout=0)[0] == 1


def test_servers_on_the_trainers_nodes_end_with_it(tmp_path: Path) -> None:
    result, told, _ = _run(tmp_path, "colocated-two-nodes", trainer=0)
    assert result == 0
    assert "trainer node-a,node-b node-c" in told  # the stand-in always has three nodes
    assert "rollout told to end" in told


def test_a_trainer_that_does_not_end_without_servers_is_left_to_the_end_of_the_job(
    tmp_path: Path,
) -> None:
    script = (GOLDEN / "split.sh").read_text()
    part = script[script.index("end_step() {") : script.index("while are_alive")]
    told = "scancel() { echo $*; }; SLURM_JOB_ID=7"
    done = subprocess.run(
        ["bash", "-c", f"{told}\n{part}\nsleep 30 & end_step TERM $! 1; kill -9 $!"],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "--signal=TERM 7\n")  # and is still alive


def test_lost_servers_let_the_trainer_save_and_send_the_job_back_into_the_queue(
    tmp_path: Path,
) -> None:
    result, told, _ = _run(tmp_path, "split", trainer=0, rollout=75)
    assert result == 75
    assert told.splitlines()[-2:] == ["trainer told to save", "scontrol requeue 7"]


@pytest.mark.parametrize(
    ("srun_says", "tasks_say", "code"),
    [
        pytest.param(1, [75] * 8, 75, id="saved"),
        pytest.param(1, [0] * 8, 0, id="completed"),
        pytest.param(1, [0, 9, 138, 0, 0, 9, 0, 0], 138, id="the-highest"),
        pytest.param(1, [75] * 7, 1, id="one-was-killed"),
        pytest.param(1, [], 1, id="none-has-a-word"),
        pytest.param(143, [75] * 8, 143, id="nothing-was-killed-for-memory"),
    ],
)
def test_a_kill_for_memory_that_all_tasks_outlive_does_not_decide_the_job(
    tmp_path: Path, srun_says: int, tasks_say: list[int], code: int
) -> None:
    say = {"trainer": tasks_say}
    result, told, said = _run(tmp_path, "colocated", trainer=srun_says, say=say)
    assert result == code
    assert ("scontrol requeue 7" in told) == (code in (75, 138))
    assert f"start 0 of job 7 ended with exit code {code}\n" in said


def test_servers_that_are_killed_for_memory_too_often_are_lost_ones(tmp_path: Path) -> None:
    say = {"rollout": [75] * 8}
    result, told, said = _run(tmp_path, "split", trainer=0, rollout=1, say=say)
    assert result == 75
    assert told.splitlines()[-2:] == ["trainer told to save", "scontrol requeue 7"]
    assert "the rollout servers ended before the trainer, with exit code 75" in said


def test_a_split_run_outlives_a_kill_for_memory(tmp_path: Path) -> None:
    result, told, _ = _run(tmp_path, "split", trainer=1, say={"trainer": [75] * 16})
    assert result == 75
    assert told.splitlines()[-2:] == ["rollout told to end", "scontrol requeue 7"]


def test_a_step_that_no_signal_reaches_is_killed(tmp_path: Path) -> None:
    result, told, _ = _run(tmp_path, "split", trainer=0, rollout=75, scancel_fails=True)
    assert result == 75
    assert told.splitlines()[-2:] == ["trainer killed", "scontrol requeue 7"]


@pytest.mark.parametrize(
    ("excluded", "all_excluded"), [("(null)", "node-b"), ("node-[x-y]", "node-[x-y],node-b")]
)
def test_bad_nodes_are_left_out_of_the_next_start(
    tmp_path: Path, excluded: str, all_excluded: str
) -> None:
    result, told, said = _run(tmp_path, "colocated", trainer=0, precheck=77, excluded=excluded)
    assert result == 77
    # Only a job that waits can exclude nodes: first the requeue.
    assert told.splitlines() == [
        "scontrol requeue 7",
        f"scontrol update JobId=7 ExcNodeList={all_excluded}",
    ]
    assert "bad node node-b: reason" in said
    assert "without node-b" in said


def test_a_bad_node_is_left_out_where_there_are_enough_others_that_may_be_repaired(
    tmp_path: Path,
) -> None:
    nodes = {"gpu": "node-a\nnode-b\nnode-c\nnode-x\n"}
    bad = {"precheck": 77, "excluded": "node-x"}
    result, told, _ = _run(tmp_path, "colocated-two-nodes", trainer=0, nodes=nodes, **bad)
    assert result == 77
    assert told.splitlines()[-1] == "scontrol update JobId=7 ExcNodeList=node-x,node-b"


def test_a_job_that_would_never_find_enough_nodes_ends_and_says_so(tmp_path: Path) -> None:
    nodes = {"gpu": "node-b\nnode-c\nnode-x\n"}
    bad = {"precheck": 77, "excluded": "node-x"}
    result, told, said = _run(tmp_path, "colocated-two-nodes", trainer=0, nodes=nodes, **bad)
    assert (result, told) == (78, "")
    assert (
        "prefixrl: error: without the bad nodes node-x,node-b the partition gpu has 1 nodes, the "
        "job needs 2; have the nodes repaired"
    ) in said


def test_each_partition_of_a_heterogeneous_job_must_have_enough(tmp_path: Path) -> None:
    for name, others, code in (("enough", "node-c\n", 77), ("short", "", 78)):
        nodes = {"batch": "node-a\n", "inference": f"node-b\n{others}"}
        folder = tmp_path / name
        folder.mkdir()
        result, _, said = _run(folder, "heterogeneous", trainer=0, precheck=77, nodes=nodes)
        assert result == code
        assert ("partition inference has 0 nodes, the job" in said) == (code == 78)


def _verdict(folder: Path, start: int) -> dict[str, Any]:
    return json.loads((folder / "logs" / f"start-{start}" / "precheck.json").read_text())


def test_a_first_node_that_hangs_is_left_out_and_counted(tmp_path: Path) -> None:
    _, told, said = _run(tmp_path, "split", trainer=0, precheck_does="sleep 60", hang_seconds=1)
    assert told.splitlines()[-1] == "scontrol update JobId=7 ExcNodeList=node-a"
    assert "bad node node-a: it came to no verdict within 1 s" in said
    verdict = _verdict(tmp_path, 0)
    assert (verdict["outcome"], list(verdict["bad"])) == ("exclude", ["node-a"])
    failure = JobFolder(tmp_path).first_failure()
    assert failure is not None
    assert (failure.task, failure.node, failure.exit_code) == ("precheck", "node-a", 124)


def test_an_srun_that_must_be_killed_is_a_first_node_that_hangs(tmp_path: Path) -> None:
    stuck = "trap '' TERM; while true; do sleep 0.1; done"
    result, told, _ = _run(tmp_path, "split", trainer=0, precheck_does=stuck, hang_seconds=1)
    assert result == 124
    assert told.splitlines()[-1] == "scontrol update JobId=7 ExcNodeList=node-a"


def test_hanging_nodes_have_a_bound(tmp_path: Path) -> None:
    before = tmp_path / "logs" / "start-0"
    before.mkdir(parents=True)
    (before / "precheck.bad").write_text("v,w,x,y\n")
    hang = {"precheck_does": "sleep 60", "hang_seconds": 1}
    result, told, said = _run(tmp_path, "split", trainer=0, restarts=1, **hang)
    assert (result, told) == (124, "")
    assert "4 nodes were excluded before, and precheck.max_excluded_nodes of the site is 4" in said
    assert _verdict(tmp_path, 1)["outcome"] == "fail"


def test_a_verdict_holds_though_the_task_of_a_bad_node_hangs(tmp_path: Path) -> None:
    does = "echo '{}' >$LOGS/precheck.json; echo node-b >$LOGS/precheck.bad; sleep 60"
    result, told, said = _run(tmp_path, "split", trainer=0, precheck_does=does, hang_seconds=3)
    assert result == 124
    assert told.splitlines()[-1] == "scontrol update JobId=7 ExcNodeList=node-b"
    assert "without node-b" in said


def test_a_verdict_without_bad_nodes_whose_tasks_hang_accuses_nobody(tmp_path: Path) -> None:
    does = "echo '{}' >$LOGS/precheck.json; sleep 60"
    result, told, said = _run(tmp_path, "split", trainer=0, precheck_does=does, hang_seconds=3)
    assert (result, told) == (124, "")
    assert "its tasks did not end" in said


@pytest.mark.parametrize("code", [77, 124, 137])
def test_exit_codes_of_the_pre_check_mean_nothing_of_a_trainer(tmp_path: Path, code: int) -> None:
    assert "scontrol" not in _run(tmp_path, "colocated", trainer=code)[1]


def test_a_killed_pre_check_accuses_nobody(tmp_path: Path) -> None:
    assert _run(tmp_path, "colocated", trainer=0, precheck=137)[:2] == (137, "")


def test_a_verdict_that_could_not_be_written_is_the_first_nodes(tmp_path: Path) -> None:
    gone = "rm $LOGS/precheck.bad"
    _, told, _ = _run(tmp_path, "colocated", trainer=0, precheck=77, precheck_does=gone)
    assert told.splitlines()[-1] == "scontrol update JobId=7 ExcNodeList=node-a"


@pytest.mark.parametrize("code", [1, 78])
def test_a_pre_check_that_fails_ends_the_job_before_the_tasks(tmp_path: Path, code: int) -> None:
    assert _run(tmp_path, "colocated", trainer=0, precheck=code)[:2] == (code, "")


def test_a_signal_during_the_pre_check_sends_the_job_back_into_the_queue(tmp_path: Path) -> None:
    assert _run(tmp_path, "colocated", trainer=0, precheck=138)[1] == "scontrol requeue 7\n"


def test_bad_nodes_do_not_restart_a_job_for_ever(tmp_path: Path) -> None:
    result, told, said = _run(tmp_path, "colocated", trainer=0, precheck=77, restarts=20)
    assert (result, told) == (77, "")
    assert "error: not requeued: requeue.max_restarts = 20 of the site allows no more" in said


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        pytest.param("source ~/nowhere", 1, id="line"),
        pytest.param("f() { false; return 3; }; f", 3, id="function"),
        pytest.param("export A=1\nif true; then\n    (exit 4)\nfi", 4, id="in-a-block"),
        pytest.param("f() { false; [[ -n $nothing ]]; true; }; f", None, id="survives"),
        pytest.param("source <(echo false; echo true)", None, id="survives-in-a-file"),
        pytest.param("[[ -n $nothing ]] && echo a", None, id="question"),
    ],
)
def test_the_first_setup_line_that_fails_ends_the_job_and_says_so(
    tmp_path: Path, lines: str, code: int | None
) -> None:
    script = (GOLDEN / "colocated.sh").read_text().replace("/jobs/golden-1", str(tmp_path))
    begin, end = script.index("trap 'line_code"), script.index("# Of the rollout servers")
    own = script[: script.index("\n}' ERR\n", begin) + len("\n}' ERR\n")]
    rest = script[script.index("trap - ERR\n") : end]
    file = tmp_path / "batch.sh"
    file.write_text(f"{own}{lines}\n{rest}\nfalse\necho went on")
    done = subprocess.run(
        ["bash", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SLURM_JOB_ID": "7"},
    )
    told = f"prefixrl: error: a setup line of the site failed, with exit code {code}\n"
    assert (done.returncode, told in done.stderr) == (code or 0, code is not None)
    assert ("went on" in done.stdout) == (code is None)


def test_options_of_bash_that_setup_lines_set_are_not_the_scripts(tmp_path: Path) -> None:
    script = (GOLDEN / "colocated.sh").read_text().replace("/jobs/golden-1", str(tmp_path))
    head = script.partition("# What the tasks must know")[0]
    assert "source ~/.prefixrl-secrets" in head
    head = head.replace("source ~/.prefixrl-secrets", "set -euxo pipefail")
    told = 'echo "$PREFIXRL_SGLANG_API_KEY"; [[ $- != *[eux]* ]] && set +o | grep "pipefail"'
    done = subprocess.run(
        ["bash", "-c", f"module() {{ :; }}\n{head}\n{told}"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SLURM_JOB_ID": "7"},
    )
    *_, key, pipefail = done.stdout.splitlines()
    assert (len(key), pipefail) == (64, "set +o pipefail")
    assert key not in done.stderr  # a secret of the tasks, which -x would write into the log


def test_a_setup_line_that_fails_ends_the_job_before_any_task(tmp_path: Path) -> None:
    script = (GOLDEN / "colocated.sh").read_text()
    assert "source ~/.prefixrl-secrets" in script
    (tmp_path / "bin").mkdir()
    done = subprocess.run(
        ["bash", "-c", script.replace("/jobs/golden-1", str(tmp_path))],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SLURM_JOB_ID": "7"},
    )
    assert done.returncode != 0
    assert "a setup line of the site failed" in done.stderr
    assert "srun" not in done.stderr
