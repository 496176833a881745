from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttune.demo.data import Message, Sample
from fasttune.demo.encode import (
    IGNORE,
    MAX_HELD_OUT,
    PLAIN_TEMPLATE,
    Example,
    collate,
    encode_prompt,
    encode_sample,
    pack,
    split_samples,
    training_order,
)
from fasttune.demo.options import DemoError


def chat(*contents: str, line: int = 1) -> Sample:
    roles = ("user", "assistant")
    turns = (Message(roles[i % 2], content) for i, content in enumerate(contents))
    return Sample(line, tuple(turns))


def trained_text(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE]))


def test_only_the_answer_and_its_end_are_trained(tokenizer: Any) -> None:
    example = encode_sample(tokenizer, chat("Why?", "Because."))
    assert trained_text(tokenizer, example) == "Because.<|end|>"
    assert tokenizer.decode(example.input_ids).startswith("<|user|>Why?<|end|>")


def test_every_assistant_turn_is_trained(tokenizer: Any) -> None:
    example = encode_sample(tokenizer, chat("Why?", "So.", "Why so?", "Åäö 日本!"))
    assert trained_text(tokenizer, example) == "So.<|end|>Åäö 日本!<|end|>"


def test_an_answer_that_repeats_the_question_is_trained_only_once(tokenizer: Any) -> None:
    example = encode_sample(tokenizer, chat("same", "same"))
    assert trained_text(tokenizer, example) == "same<|end|>"
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    prompt = tokenizer.decode(example.input_ids[:first])
    assert prompt == "<|user|>same<|end|>\n<|assistant|>"


def test_trained_labels_are_the_tokens_themselves(tokenizer: Any) -> None:
    example = encode_sample(tokenizer, chat("Why?", "Because."))
    pairs = zip(example.input_ids, example.labels, strict=True)
    assert all(label in (IGNORE, token) for token, label in pairs)


def test_plain_text_is_trained_whole_and_ended_once(tokenizer: Any) -> None:
    example = encode_sample(tokenizer, Sample(1, text="Once"))
    assert example.labels == example.input_ids
    assert tokenizer.decode(example.input_ids) == "Once<|end|>"
    again = encode_sample(tokenizer, Sample(1, text="Once<|end|>"))
    assert again.input_ids == example.input_ids


def test_prompt_is_what_precedes_the_answer(tokenizer: Any) -> None:
    sample = chat("Why?", "Because.", "Oh.", "Yes.")
    ids, reference = encode_prompt(tokenizer, sample)
    assert tokenizer.decode(ids) == "<|user|>Why?<|end|>\n<|assistant|>"
    assert reference == "Because."


def test_plain_text_is_continued_from_its_first_quarter(tokenizer: Any) -> None:
    ids, reference = encode_prompt(tokenizer, Sample(1, text="abcdefgh"))
    assert (tokenizer.decode(ids), reference) == ("ab", "cdefgh")


def test_template_of_a_model_without_one_trains_the_answer(tokenizer: Any) -> None:
    stock = tokenizer.chat_template
    tokenizer.chat_template = PLAIN_TEMPLATE
    try:
        example = encode_sample(tokenizer, chat("Why?", "Because."))
    finally:
        tokenizer.chat_template = stock
    assert trained_text(tokenizer, example) == "Because.<|end|>"


def test_refusing_template_names_the_line(tokenizer: Any) -> None:
    stock = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    try:
        with pytest.raises(DemoError, match=r"line 9: .*no system turns"):
            encode_sample(tokenizer, chat("Why?", "Because.", line=9))
    finally:
        tokenizer.chat_template = stock


def test_packing_loses_no_token_and_leaks_no_label() -> None:
    lengths = [5, 3, 8, 2, 7, 1, 4]
    starts = [100 * i for i in range(len(lengths))]
    samples = [
        Example(list(range(start, start + n)), list(range(start, start + n)))
        for start, n in zip(starts, lengths, strict=True)
    ]
    rows = pack(samples, 8)
    packed = Counter(token for row in rows for token in row.input_ids)
    assert packed == Counter(token for sample in samples for token in sample.input_ids)
    assert all(row.n_tokens <= 8 for row in rows)
    assert len(rows) == 4
    for row in rows:
        assert row.position_ids is not None
        fields = zip(row.input_ids, row.labels, row.position_ids, strict=True)
        for token, label, position in fields:
            assert position == token % 100  # restarts with every sample, samples stay whole
            assert label == (IGNORE if position == 0 else token)


def test_packing_refuses_a_sample_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="9 tokens does not fit 8"):
        pack([Example([0] * 9, [0] * 9)], 8)


def test_packed_samples_do_not_see_each_other(tiny_model: Path) -> None:
    from fasttune.demo.model import ModelSource, load_model

    model = load_model(ModelSource("tiny", str(tiny_model)), dtype="float32", device="cpu")
    model.train()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 250, (n,), generator=generator).tolist() for n in (6, 9, 4, 12)]
    samples = [Example(row, row) for row in ids]
    rows = pack(samples, 16)
    batch = collate(rows, 0)
    assert len(rows) < len(samples)
    assert "attention_mask" not in batch
    batch.pop("labels")
    logits = model(**batch).logits
    for sample in samples:
        row, start = next(
            (i, j)
            for i, packed in enumerate(rows)
            for j in range(packed.n_tokens)
            if packed.input_ids[j : j + sample.n_tokens] == sample.input_ids
        )
        alone = model(input_ids=torch.tensor([sample.input_ids])).logits[0]
        torch.testing.assert_close(logits[row, start : start + sample.n_tokens], alone)


def test_collator_pads_to_the_longest_of_the_batch() -> None:
    batch = collate([Example([5, 6, 7], [IGNORE, 6, 7]), Example([8], [8])], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "position_ids" not in batch


def test_padding_of_a_packed_row_is_a_sample_of_its_own() -> None:
    rows = pack([Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [8, 9])], 3)
    batch = collate(rows, pad_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]


def pairs(count: int) -> list[Sample]:
    return [chat(f"q{i}", f"answer {i}", line=i + 1) for i in range(count)]


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (40, 4), (500, MAX_HELD_OUT)])
def test_split_is_disjoint_and_complete(tokenizer: Any, count: int, held_out: int) -> None:
    split = split_samples(tokenizer, pairs(count), seq_len=64, packing=False, seed=0)
    texts = [tokenizer.decode(e.input_ids) for e in [*split.train, *split.held_out]]
    assert len(split.held_out) == held_out
    assert len(set(texts)) == len(texts) == count
    assert split.n_train_samples == count - held_out
    shown = tokenizer.decode(encode_sample(tokenizer, split.shown).input_ids)
    assert shown in [tokenizer.decode(example.input_ids) for example in split.held_out]


def test_packing_concerns_the_training_part_only(tokenizer: Any) -> None:
    split = split_samples(tokenizer, pairs(40), seq_len=128, packing=True, seed=0)
    assert all(example.position_ids is None for example in split.held_out)
    assert all(example.position_ids is not None for example in split.train)
    assert len(split.train) < split.n_train_samples


def test_long_samples_are_cut_and_those_without_an_answer_left_out(tokenizer: Any) -> None:
    samples = [*pairs(10), chat("why?", "x" * 100), chat("q" * 100, "never reached")]
    split = split_samples(tokenizer, samples, seq_len=40, packing=False, seed=0)
    assert (split.n_truncated, split.n_dropped) == (1, 1)
    assert max(example.n_tokens for example in [*split.train, *split.held_out]) == 40


def test_nothing_left_within_the_length_is_an_error(tokenizer: Any) -> None:
    samples = [chat("q" * 100, "never reached") for _ in range(4)]
    with pytest.raises(DemoError, match="raise --seq-len"):
        split_samples(tokenizer, samples, seq_len=40, packing=False, seed=0)


def test_training_order_is_whole_epochs_and_repeatable() -> None:
    examples = [Example([i], [i]) for i in range(7)]
    order = training_order(examples, 17, seed=3)
    assert order == training_order(examples, 17, seed=3)
    assert order != training_order(examples, 17, seed=4)
    ids = [example.input_ids[0] for example in order]
    assert sorted(ids[:7]) == sorted(ids[7:14]) == list(range(7))
    assert ids[:7] != ids[7:14]
