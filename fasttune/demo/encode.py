"""From samples to batches: chat template, masking, split, packing and the collator.

Only the assistant's turns are trained (with the end-of-turn token that follows them): the label of
every other token is -100. Plain text is trained as a whole.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune.demo.data import Message, Sample
from fasttune.demo.options import DemoError

IGNORE = -100
HELD_OUT_SHARE = 0.1
MAX_HELD_OUT = 24  # more would spend the time budget on evaluation

# For models without a chat template. It adds no tokens to the vocabulary.
PLAIN_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


@dataclass(frozen=True)
class Example:
    """One row of a batch before padding. All lists have the same length."""

    input_ids: list[int]
    labels: list[int]  # IGNORE where the token is not trained
    position_ids: list[int] | None = None  # set for packed rows; restarts at 0 with every sample

    @property
    def n_tokens(self) -> int:
        """Tokens of the row, padding excluded."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Split:
    """The encoded data."""

    train: list[Example]
    held_out: list[Example]  # never packed
    shown: Sample  # the held-out sample whose answer is generated before and after
    prompt_ids: list[int]  # its prompt, up to where the answer starts
    reference: str  # its answer in the data
    n_train_samples: int
    n_truncated: int
    n_dropped: int  # samples of which the cut at seq_len left nothing to train


def _render(tokenizer: Any, messages: Sequence[Message], prompt: bool, line: int) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except Exception as error:  # templates are programs of the model's author and raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DemoError(f"line {line}: the chat template refuses this sample: {reason}") from None
    return str(text)


def _trained_spans(tokenizer: Any, sample: Sample, text: str) -> list[tuple[int, int]]:
    """Character ranges of the assistant's turns in the rendered conversation.

    A turn is skipped if the template renders what precedes it differently than in the whole (some
    templates remove the reasoning of earlier turns).
    """
    spans = []
    for i, message in enumerate(sample.messages):
        if message.role != "assistant":
            continue
        before = _render(tokenizer, sample.messages[:i], True, sample.line) if i else ""
        through = _render(tokenizer, sample.messages[: i + 1], False, sample.line).rstrip()
        if text.startswith(before) and text.startswith(through) and len(through) > len(before):
            spans.append((len(before), len(through)))
    return spans


def encode_sample(tokenizer: Any, sample: Sample) -> Example:
    """Tokens and labels of one sample, not truncated.

    Raises:
        DemoError: the chat template refuses the conversation.
    """
    if sample.text is not None:
        ids = list(tokenizer(sample.text)["input_ids"])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return Example(ids, list(ids))
    text = _render(tokenizer, sample.messages, False, sample.line)
    spans = _trained_spans(tokenizer, sample, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    labels = [
        token if any(a <= start and end <= b and end > start for a, b in spans) else IGNORE
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return Example(ids, labels)


def _answered_turn(sample: Sample) -> int | None:
    """Index of the first assistant turn that follows something."""
    turns = enumerate(sample.messages)
    return next((i for i, message in turns if i and message.role == "assistant"), None)


def encode_prompt(tokenizer: Any, sample: Sample) -> tuple[list[int], str]:
    """The tokens to generate from, and the reference answer.

    For a conversation: what precedes its first answer. Where there is nothing to answer (plain
    text): the first quarter of the tokens.
    """
    turn = _answered_turn(sample)
    if turn is not None:
        text = _render(tokenizer, sample.messages[:turn], True, sample.line)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids, sample.messages[turn].content
    text = sample.text if sample.text is not None else sample.messages[0].content
    ids = list(tokenizer(text)["input_ids"])
    cut = max(1, min(64, len(ids) // 4))
    return ids[:cut], str(tokenizer.decode(ids[cut:], skip_special_tokens=True))


def _truncate(example: Example, seq_len: int) -> Example | None:
    """The first ``seq_len`` tokens, or None if none of them is trained.

    The first label is never predicted (labels are shifted), so it does not count.
    """
    labels = example.labels[:seq_len]
    if all(label == IGNORE for label in labels[1:]):
        return None
    return Example(example.input_ids[:seq_len], labels)


def pack(examples: Sequence[Example], seq_len: int) -> list[Example]:
    """Joins whole samples into rows of at most ``seq_len`` tokens, first fit, in order.

    Positions restart with every sample, which is how transformers keeps attention inside it. The
    first label of a sample is ignored: the token before it belongs to another sample.
    """
    rows: list[list[Example]] = []
    free: list[int] = []
    for example in examples:
        if example.n_tokens > seq_len:
            raise ValueError(f"a sample of {example.n_tokens} tokens does not fit {seq_len}")
        row = next((i for i, room in enumerate(free) if room >= example.n_tokens), None)
        if row is None:
            rows.append([])
            free.append(seq_len)
            row = len(rows) - 1
        rows[row].append(example)
        free[row] -= example.n_tokens
    return [
        Example(
            [token for example in row for token in example.input_ids],
            [label for example in row for label in [IGNORE, *example.labels[1:]]],
            [position for example in row for position in range(example.n_tokens)],
        )
        for row in rows
    ]


def split_samples(
    tokenizer: Any, samples: Sequence[Sample], *, seq_len: int, packing: bool, seed: int
) -> Split:
    """Encodes all samples and holds a tenth out (at least 1, at most ``MAX_HELD_OUT``).

    Raises:
        DemoError: fewer than two samples have a trained token within ``seq_len``.
    """
    kept: list[tuple[Sample, Example]] = []
    truncated = 0
    for sample in samples:
        whole = encode_sample(tokenizer, sample)
        example = _truncate(whole, seq_len)
        if example is not None:
            truncated += whole.n_tokens > seq_len
            kept.append((sample, example))
    if len(kept) < 2:
        raise DemoError(
            f"only {len(kept)} of {len(samples)} samples have an answer within --seq-len {seq_len}"
            "; two are needed, so raise --seq-len"
        )
    random.Random(seed).shuffle(kept)
    n_held_out = max(1, min(MAX_HELD_OUT, round(HELD_OUT_SHARE * len(kept))))
    held_out, train = kept[:n_held_out], [example for _, example in kept[n_held_out:]]
    answered = (sample for sample, _ in held_out if _answered_turn(sample) is not None)
    shown = next(answered, held_out[0][0])
    prompt_ids, reference = encode_prompt(tokenizer, shown)
    return Split(
        train=pack(train, seq_len) if packing else train,
        held_out=[example for _, example in held_out],
        shown=shown,
        prompt_ids=prompt_ids[-seq_len:],
        reference=reference,
        n_train_samples=len(train),
        n_truncated=truncated,
        n_dropped=len(samples) - len(kept),
    )


def training_order(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """``count`` examples: whole epochs, each in its own random order. Same seed, same order."""
    generator = random.Random(seed)
    order: list[Example] = []
    while len(order) < count:
        epoch = list(examples)
        generator.shuffle(epoch)
        order.extend(epoch)
    return order[:count]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pads to the longest row of the batch, on the right.

    Returns ``input_ids`` and ``labels`` (int64, [batch, longest]) and either ``attention_mask`` or,
    for packed rows, ``position_ids``; padding of a packed row counts as one more sample.
    """
    longest = max(example.n_tokens for example in examples)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

    batch = {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "labels": padded([example.labels for example in examples], IGNORE),
    }
    if any(example.position_ids is not None for example in examples):
        batch["position_ids"] = torch.tensor(
            [
                [
                    *(example.position_ids or range(example.n_tokens)),
                    *range(longest - example.n_tokens),
                ]
                for example in examples
            ]
        )
    else:
        batch["attention_mask"] = padded([[1] * example.n_tokens for example in examples], 0)
    return batch
