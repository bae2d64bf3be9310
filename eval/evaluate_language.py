"""Compare causal language models on held-out answers: any models of one vocabulary, made by llmdistill or not.

    python eval/evaluate_language.py --model runs/quickstart/model --teacher samples/smollm2-135m-instruct \
        --data samples/gsm8k --split test --rows 64
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from llmdistill.errors import UserError


def main(
    model: Annotated[list[str], typer.Option(help="Folder or Hub name, also NAME=FOLDER; several times for several.")],
    data: Annotated[str, typer.Option(help="File, folder, samples/<name> or Hub data set with held-out rows.")],
    split: str = "test",
    rows: Annotated[int | None, typer.Option(help="Only the first so many.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="OURS=THEIRS, e.g. completion=response.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The model that the others are compared with.")] = None,
    mask: Annotated[str, typer.Option(help="`assistant` or `all`: the tokens that count.")] = "assistant",
    max_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 1024,
    batch_size: int = 8,
    generate: Annotated[int, typer.Option(help="Rows whose prompts are answered for ROUGE-L.")] = 32,
    max_new_tokens: int = 128,
    choices: Annotated[list[str] | None, typer.Option(help="NAME=FILE of query, choices, gold (lm-eval).")] = None,
    choice_rows: Annotated[int | None, typer.Option(help="Only the first so many of each such file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
) -> None:
    """Score models side by side and print a table."""
    try:
        if output is not None and not output.parent.is_dir():
            raise UserError(f"there is no folder {output.parent} for the results.")
        if mask not in ("assistant", "all"):
            raise UserError(f"`--mask` must be assistant or all, got `{mask}`.")
        if teacher and "teacher" in dict(_named(one) for one in model):
            raise UserError("the name `teacher` is that of `--teacher`: give the model another one.")
        results = evaluate(
            dict(_named(one) for one in model) | ({"teacher": teacher} if teacher else {}),
            data=dict(path=data, split=split, rows=rows, columns=dict(_named(one) for one in column or [])),
            tokens=dict(mask=mask, max_length=max_length),
            batch_size=batch_size,
            generate=generate,
            max_new_tokens=max_new_tokens,
            teacher="teacher" if teacher else None,
            multiple_choice={name: (path, choice_rows) for name, path in map(_named, choices or [])},
        )
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n")


def evaluate(names: dict[str, str], data: dict, tokens: dict, multiple_choice: dict, **options) -> dict:
    """Load, compare and print (see `llmdistill.evaluation.language.compare`)."""
    from llmdistill import models
    from llmdistill.data import language as rows
    from llmdistill.data.rows import Source
    from llmdistill.data.vocabulary import shared_vocabulary
    from llmdistill.evaluation import language
    from llmdistill.evaluation.multiple_choice import check_file

    for path, _ in multiple_choice.values():
        check_file(path)
    source = rows.load(Source(**data))
    tokenizer, *others = (models.load_tokenizer(name) for name in names.values())
    size, *sizes = (models.load_config(name).get_text_config().vocab_size for name in names.values())
    for other, other_size in zip(others, sizes, strict=True):
        shared_vocabulary(tokenizer, other, size, other_size)
    tokenized = rows.tokenize(source, tokenizer, **tokens)
    compared = {
        key: models.load_causal_lm(name, models.default_dtype()).to(models.default_device()).eval()
        for key, name in names.items()
    }
    results, _ = language.compare(compared, tokenizer, tokenized, multiple_choice=multiple_choice, **options)
    print(language.table(results))
    return results


def _named(text: str) -> tuple[str, str]:
    """`name=value`, or a value that names itself."""
    name, equals, value = text.partition("=")
    return (name, value) if equals else (text, text)


if __name__ == "__main__":
    typer.run(main)
