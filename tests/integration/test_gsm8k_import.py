"""Real, labelled solutions of other models through import, verification and cutting."""

from pathlib import Path

from prefixrl_mcore.config.data import PrefixConfig, PromptConfig
from prefixrl_mcore.config.reward import RewardConfig
from prefixrl_mcore.data.prefixes import answer_finder, cut_prefixes, read_prefixes, write_prefixes
from prefixrl_mcore.data.problems import read_problems
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.data.source import MixtureSource, original_problems, union
from prefixrl_mcore.data.trace_import import import_traces
from prefixrl_mcore.data.traces import TraceStore
from prefixrl_mcore.data.verification import verify_store
from prefixrl_mcore.rewards.math_answer import MathVerifier
from tests.support.byte_tokenizer import write_byte_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_real_solutions_become_prefixed_problems_and_the_verifier_agrees_with_the_labels(
    tmp_path: Path,
) -> None:
    problems = read_problems(
        FIXTURES / "gsm8k_test_head.jsonl",
        id_field=None,
        text_field="question",
        answer_field="answer",
        answer_format="gsm8k",
        max_problems=None,
    )
    renderer = PromptRenderer(write_byte_tokenizer(tmp_path / "model"), PromptConfig())
    hashes = {
        "tokenizer_hash": renderer.tokenizer_hash,
        "chat_template_hash": renderer.chat_template_hash,
    }
    store = TraceStore.create(tmp_path / "traces", **hashes, model="bytes")
    verifier = MathVerifier(RewardConfig())
    try:
        report = import_traces(
            FIXTURES / "gsm8k_model_solutions_head.jsonl",
            file_format="gsm8k_solutions",
            source_model=None,
            store=store,
            problems=problems,
            renderer=renderer,
            verifier=verifier,
        )
        assert verify_store(store, problems, verifier, renderer).failures == ()
        traces = [record.as_trace() for record in store.traces()]
        prefixed, stats = cut_prefixes(
            traces,
            problems,
            PrefixConfig(),
            max_total_tokens=4096,
            max_completion_tokens=1024,
            finds_answer=answer_finder(verifier, renderer),
        )
    finally:
        verifier.close()

    # 4 models x 25 questions; the labels call 27 right, of 14 different questions.
    assert (report.num_candidates, report.num_labelled) == (100, 100)
    assert report.disagreements == ()
    assert report.num_accepted == len(traces) == 14
    assert report.reasons["already_solved"] == 27 - 14
    assert stats.num_prefixes == 3 * len(traces)
    write_prefixes(tmp_path / "prefixes", prefixed, config=PrefixConfig(), stats=stats, **hashes)
    restored = read_prefixes(tmp_path / "prefixes", problems, **hashes, config=PrefixConfig())
    assert restored == prefixed
    mixture = union(restored, original_problems(renderer.render(p) for p in problems))
    source = MixtureSource(mixture, seed=0)
    epoch = source.take(len(source))
    assert sum(bool(item.prefix_token_ids) for item in epoch) == 3 * len(traces)
    for item in epoch:
        whole = next((t for t in traces if t.trace_id == item.trace_id), None)
        if whole is not None:
            num_tokens = len(item.prefix_token_ids)
            assert item.prefix_token_ids == whole.completion_token_ids[:num_tokens]
