"""Causal language models on held-out answers: how likely they are, how near the teacher is, what is written."""

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmdistill.data.batches import token_lengths
from llmdistill.data.language import IGNORE_INDEX
from llmdistill.evaluation.multiple_choice import score_choices
from llmdistill.models import check_head, last_hidden_states, output_head
from llmdistill.objectives.chunked import Head, select_tokens
from llmdistill.objectives.divergences import forward_kl

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS_AT_ONCE = 64
"""Tokens whose full logits exist together while they are scored."""

METRICS = {
    "answer_cross_entropy": "cross-entropy of the answers, nats per token",
    "perplexity": "perplexity of the answers",
    "kl_to_teacher": "KL(teacher || model), nats per token",
    "top1_agreement": "same likeliest token as the teacher",
    "rouge_l": "ROUGE-L F1 of greedy answers, 0 to 100",
    "tokens_per_second": "tokens read per second",
    "new_tokens_per_second": "tokens written per second",
    "parameters": "parameters",
}
"""Keys of the results and what they mean, in the order of the printed table."""


def compare(
    models: dict[str, "PreTrainedModel"],
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Dataset",
    teacher: str | None = None,
    batch_size: int = 8,
    generate: int = 32,
    max_new_tokens: int = 128,
    multiple_choice: dict[str, tuple[str, int | None]] | None = None,
) -> tuple[dict[str, dict[str, float]], list[dict[str, str]]]:
    """Everything this module knows about several models on the same rows.

    Args:
        models: by name, of one vocabulary and on one device.
        tokenizer: that the rows were tokenised with.
        rows: tokenised, `input_ids` and `labels`.
        teacher: the model of `models` that the others are compared with.
        batch_size: rows at once.
        generate: how many of the rows' prompts are answered; 0 for none.
        max_new_tokens: of an answer.
        multiple_choice: name -> file and how many of its rows (see `evaluation.multiple_choice`).

    Returns:
        For each model its metrics, and for each answered prompt a dictionary of the texts.
    """
    results = score_answers(models, rows, batch_size, teacher)
    prompts = rows.filter(lambda row: row["labels"][1] == IGNORE_INDEX, desc="Finding prompts")
    prompts = prompts.select(range(min(generate, len(prompts))))
    answers: list[dict[str, str]] = [{} for _ in prompts]
    for name, model in models.items():
        if len(prompts) > 0:
            metrics, written = write_answers(model, tokenizer, prompts, max_new_tokens, batch_size)
            results[name] |= metrics
            for one, texts in zip(answers, written, strict=True):
                one |= {"prompt": texts["prompt"], "reference": texts["reference"], name: texts["answer"]}
        for set_name, (path, num_rows) in (multiple_choice or {}).items():
            results[name] |= score_choices(model, tokenizer, {set_name: path}, num_rows, batch_size)
    return results, answers


@torch.no_grad()
def score_answers(
    models: dict[str, "PreTrainedModel"], rows: "Dataset", batch_size: int = 8, teacher: str | None = None
) -> dict[str, dict[str, float]]:
    """Likelihood of the answers' tokens, and how near the teacher's distribution each model's is.

    Args:
        models: by name, all of one vocabulary (the smallest head's rows are compared), on the same device.
        rows: tokenised, `input_ids` and `labels`.
        batch_size: rows at once.
        teacher: the model of `models` that the others are compared with.

    Returns:
        For each model, the keys of `METRICS` that need no writing; means are over all counted tokens.
    """
    heads = {name: output_head(model) for name, model in models.items()}
    size = min(len(head.weight) for head in heads.values())
    heads = {name: head.cropped(size) for name, head in heads.items()}
    sums: dict[str, dict[str, float]] = {name: defaultdict(float) for name in models}
    num_counted = num_tokens = 0
    device = next(iter(models.values())).device
    for model in models.values():  # the first call of a model is slower than the others and not timed
        last_hidden_states(model, next(batches(rows, batch_size, device))[0])
    for num_batches, (inputs, labels) in enumerate(batches(rows, batch_size, device)):
        counted = labels[:, 1:] != IGNORE_INDEX
        num_counted, num_tokens = num_counted + int(counted.sum()), num_tokens + int(inputs["attention_mask"].sum())
        hidden = {}
        for name, model in models.items():
            start = _seconds(device)
            states, last_logits = last_hidden_states(model, inputs)
            sums[name]["seconds"] += _seconds(device) - start
            if num_batches == 0:
                check_head(heads[name], states, last_logits, name)
            hidden[name] = select_tokens(states[:, :-1], counted)
        for name, part in _token_sums(heads, hidden, labels[:, 1:][counted], teacher).items():
            for key, value in part.items():
                sums[name][key] += value
    results = {}
    for name, total in sums.items():
        seconds = total.pop("seconds")
        results[name] = {key: value / num_counted for key, value in total.items()}
        results[name]["perplexity"] = float(torch.tensor(results[name]["answer_cross_entropy"]).exp())
        results[name]["tokens_per_second"] = num_tokens / seconds
        results[name]["parameters"] = models[name].num_parameters()
    return results


@torch.no_grad()
def write_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Dataset",
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Greedy answers to the rows' prompts, compared with the rows' own answers by ROUGE-L.

    Args:
        model: a causal language model.
        tokenizer: that the rows were tokenised with.
        rows: tokenised; the prompt is what comes before the first label.
        max_new_tokens: of an answer; the references are cut to as many.
        batch_size: answers written at once.

    Returns:
        `rouge_l` (mean F1 times 100, rouge-score with stemming) and `new_tokens_per_second`; and for each row its
        `prompt`, `reference` and `answer`.
    """
    from rouge_score.rouge_scorer import RougeScorer

    pad = next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None)
    pairs = [_prompt_and_answer(row) for row in rows]
    model.generate(input_ids=torch.tensor([pairs[0][0]], device=model.device), max_new_tokens=1, pad_token_id=pad)
    written, examples, start = 0, [], _seconds(model.device)
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        prompts = [torch.tensor(prompt) for prompt, _ in batch]
        padding = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence(prompts, padding_value=pad, **padding).to(model.device)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], **padding).to(model.device)
        answers = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=pad,
        )[:, ids.shape[1] :]
        written += int((answers != pad).sum())
        for (prompt, reference), answer in zip(batch, answers, strict=True):
            texts = (prompt, reference[:max_new_tokens], answer)
            decoded = (tokenizer.decode(text, skip_special_tokens=True).strip() for text in texts)
            examples.append(dict(zip(("prompt", "reference", "answer"), decoded, strict=True)))
    seconds = _seconds(model.device) - start

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(one["reference"], one["answer"])["rougeL"].fmeasure for one in examples]
    return {"rouge_l": 100 * sum(scores) / len(scores), "new_tokens_per_second": written / seconds}, examples


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as text, one line per metric and one column per model."""
    names = list(results)
    keys = [key for key in METRICS if any(key in values for values in results.values())]
    keys += sorted({key for values in results.values() for key in values} - set(METRICS))
    width = max(len(METRICS.get(key, key)) for key in keys)
    lines = [" " * width + "".join(f"  {name:>18}" for name in names)]
    for key in keys:
        cells = (_cell(key, results[name].get(key)) for name in names)
        lines.append(f"{METRICS.get(key, key):<{width}}" + "".join(f"  {cell:>18}" for cell in cells))
    return "\n".join(lines)


def _token_sums(
    heads: dict[str, Head], hidden: dict[str, Tensor], labels: Tensor, teacher: str | None
) -> dict[str, dict[str, float]]:
    """Sums over the counted tokens `[N]` of a batch, from hidden states `[N, H]` of every model."""
    sums: dict[str, dict[str, float]] = {name: defaultdict(float) for name in heads}
    for rows in (slice(start, start + TOKENS_AT_ONCE) for start in range(0, len(labels), TOKENS_AT_ONCE)):
        logits = {name: head.logits(hidden[name][rows]).float() for name, head in heads.items()}
        for name, own in logits.items():
            loss = torch.nn.functional.cross_entropy(own, labels[rows], reduction="sum")
            sums[name]["answer_cross_entropy"] += loss.item()
            if teacher is not None:
                sums[name]["kl_to_teacher"] += forward_kl(own, logits[teacher]).sum().item()
                agrees = own.argmax(-1) == logits[teacher].argmax(-1)
                sums[name]["top1_agreement"] += agrees.sum().item()
    return sums


def batches(rows: "Dataset", batch_size: int, device: torch.device) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Padded batches of rows of similar length."""
    lengths = token_lengths(rows)
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        batch = [rows[index] for index in order[start : start + batch_size]]
        ids = [torch.tensor(row["input_ids"]) for row in batch]
        labels = pad_sequence([torch.tensor(row["labels"]) for row in batch], True, IGNORE_INDEX)
        mask = pad_sequence([torch.ones_like(row) for row in ids], True)
        yield {"input_ids": pad_sequence(ids, True).to(device), "attention_mask": mask.to(device)}, labels.to(device)


def _seconds(device: torch.device) -> float:
    """A clock that waits for the device's work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _prompt_and_answer(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """The tokens before the first counted one, and the first run of counted ones."""
    counted = [label != IGNORE_INDEX for label in row["labels"]]
    start = counted.index(True)
    end = start + next((offset for offset, counts in enumerate(counted[start:]) if not counts), len(counted) - start)
    return row["input_ids"][:start], row["input_ids"][start:end]


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "parameters":
        return f"{value / 1e6:,.1f}M"
    if key == "top1_agreement" or key.startswith("accuracy"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if key.endswith("per_second") else f"{value:.3f}" if value < 10 else f"{value:,.2f}"
