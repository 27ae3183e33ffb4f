"""A process that appends to a trace store until it is killed: ``python -m … FOLDER NAME``."""

import sys
from pathlib import Path

from prefixrl_mcore.data.traces import AttemptRecord, TraceRecord, TraceStore

NUM_TOKENS = 5000


def main(folder: Path, name: str) -> None:
    """Append rounds of one trace each, with ids ``<name>0``, ``<name>1``, …"""
    store = TraceStore.open(folder)
    for number in range(10**6):
        problem_id = f"{name}{number}"
        trace = TraceRecord(
            trace_id=problem_id,
            problem_id=problem_id,
            prompt_token_ids=(1,),
            completion_token_ids=(2,) * NUM_TOKENS,
            rollout_logprobs=(-0.5,) * NUM_TOKENS,
            finish_reason="stop",
            sampler="test",
            source_model="test",
            policy_version=-1,
            weights_hash="",
            temperature=1.0,
            seed=0,
            verifier="test",
            tokenizer_hash=store.header.tokenizer_hash,
            chat_template_hash=store.header.chat_template_hash,
            num_tries=1,
            flops=1.0,
            seconds=1.0,
        )
        attempt = AttemptRecord(
            problem_id=problem_id,
            num_tries=1,
            num_tokens=NUM_TOKENS,
            flops=1.0,
            seconds=1.0,
            is_solved=True,
        )
        store.append([trace], [attempt])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
