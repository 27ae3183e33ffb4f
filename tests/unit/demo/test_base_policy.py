"""Pre-training of the demo's base policy, at a size that takes a second."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefixrl_mcore.demo.base_policy import (
    BasePolicySettings,
    PretrainProgress,
    build_base_policy,
    demonstration_batch,
    learning_rate_scale,
    pretrain,
)
from prefixrl_mcore.demo.quiz import Quiz
from prefixrl_mcore.demo.tokenizer import encode

QUIZ = Quiz(num_parts=2, num_ops=2, num_methods=2)
TINY = BasePolicySettings(
    hidden_size=32,
    num_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    ffn_hidden_size=32,
    num_steps=4,
    batch_size=4,
)


def test_full_size_policy_has_the_documented_number_of_parameters() -> None:
    settings = BasePolicySettings(num_steps=1, batch_size=1)
    model = pretrain(QUIZ, settings)
    per_layer = 4 * 128 * 128 + 3 * 128 * 256 + 2 * 128 + 2 * 32
    embedding = len(QUIZ.vocabulary) * 128
    assert model.num_parameters() == 2 * per_layer + embedding + 128


def test_targets_are_the_solution_shifted_by_one() -> None:
    token_ids_BS, targets_BS = demonstration_batch(
        QUIZ, 3, sound_probability=0.5, rng=random.Random(0)
    )
    vocabulary = QUIZ.vocabulary
    for row, targets in zip(token_ids_BS.tolist(), targets_BS.tolist(), strict=True):
        words = [vocabulary[token_id] for token_id in row]
        end = words.index("<eos>")
        assert words[QUIZ.num_prompt_tokens - 1] == ":"
        assert targets[: QUIZ.num_prompt_tokens - 1] == [-100] * (QUIZ.num_prompt_tokens - 1)
        assert targets[QUIZ.num_prompt_tokens - 1 : end] == row[QUIZ.num_prompt_tokens : end + 1]
        assert set(targets[end:]) == {-100}
        assert set(words[end + 1 :]) <= {"<pad>"}


def test_learning_rate_warms_up_stays_and_falls_linearly() -> None:
    settings = BasePolicySettings(num_steps=100, num_warmup_steps=10, constant_fraction=0.4)
    scales = [learning_rate_scale(settings, step) for step in (0, 9, 39, 40, 70)]
    # Half of the decay from 1 to 0.02 leaves 0.51.
    assert scales == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.51])


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1).item()
    torch.manual_seed(1)
    first = pretrain(QUIZ, TINY).state_dict()
    assert torch.rand(1).item() == expected
    second = pretrain(QUIZ, TINY).state_dict()
    other = pretrain(QUIZ, dataclasses.replace(TINY, seed=1)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.norm.weight"], other["model.norm.weight"])


def test_progress_names_the_phase_of_every_step() -> None:
    seen: list[PretrainProgress] = []
    pretrain(QUIZ, dataclasses.replace(TINY, textbook_fraction=0.5), on_progress=seen.append)
    assert [(p.step, p.num_steps, p.phase) for p in seen] == [
        (1, 4, "textbook"),
        (2, 4, "textbook"),
        (3, 4, "corpus"),
        (4, 4, "corpus"),
    ]


def test_training_lowers_the_loss() -> None:
    seen: list[PretrainProgress] = []
    settings = dataclasses.replace(TINY, num_steps=80, textbook_fraction=1.0, batch_size=16)
    pretrain(QUIZ, settings, on_progress=seen.append)
    # Uniform over 22 tokens is 3.1 nats; knowing the kind of each token leaves about 1.7.
    assert seen[0].loss_nats > 2.9
    assert seen[-1].loss_nats < 2.0


def test_diverging_training_is_an_error() -> None:
    settings = dataclasses.replace(TINY, adamw_lr=1e30, num_warmup_steps=1)
    with pytest.raises(RuntimeError, match="base policy: loss is nan"):
        pretrain(QUIZ, settings)


def test_folder_loads_with_transformers_alone(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    build_base_policy(QUIZ, TINY, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 3
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    token_ids = torch.tensor([encode(QUIZ, "<bos> a 1 2 b 3 4 : a 1 2")])
    expected = pretrain(QUIZ, TINY)(input_ids=token_ids).logits
    torch.testing.assert_close(model(input_ids=token_ids).logits, expected, rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(ValueError, match=r"base: exists; remove it or choose another"):
        build_base_policy(QUIZ, TINY, tmp_path / "base")


@pytest.mark.slow
def test_default_policy_can_work_out_answers_and_seldom_does() -> None:
    quiz = Quiz()
    model = pretrain(quiz, BasePolicySettings(sound_probability=0.08))
    token_ids_BS, targets_BS = demonstration_batch(
        quiz, 64, sound_probability=0.3, rng=random.Random(7)
    )
    with torch.no_grad():
        probabilities_BSV = model(input_ids=token_ids_BS).logits.softmax(-1)
    is_target = targets_BS != -100
    targets = targets_BS[is_target]
    probabilities = probabilities_BSV[is_target].gather(1, targets[:, None]).squeeze(1)
    sound = quiz.vocabulary.index(quiz.sound_methods["a"])
    digits = torch.tensor([quiz.vocabulary.index(str(digit)) for digit in range(10)])
    # A step copies two digits; the sound method then writes two more, and the answer after them.
    is_digit = torch.isin(targets, digits)
    boxed = torch.tensor([quiz.vocabulary.index(f"\\boxed{{{value}}}") for value in range(3)])
    is_worked_answer = torch.isin(targets, boxed) & torch.isin(token_ids_BS[is_target], digits)
    assert probabilities[is_digit].mean() > 0.98
    assert probabilities[is_worked_answer].mean() > 0.98
    assert 0.05 < probabilities[targets == sound].mean() < 0.12
