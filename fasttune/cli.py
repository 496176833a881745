"""The ``fasttune`` command."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fasttune.demo.options import DemoOptions

app = typer.Typer(
    name="fasttune",
    help="Faster, smaller parameter-efficient fine-tuning, numerically proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

USER_ERROR = 2
WORKER_ERROR = 1
INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fasttune {importlib.metadata.version('fasttune')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Faster, smaller parameter-efficient fine-tuning, numerically proven."""


@app.command()
def doctor() -> None:
    """Show which backends this machine has, and why not the others."""
    from fasttune.doctor import print_report

    print_report()


def _fail(message: str, status: int) -> typer.Exit:
    typer.echo(f"fasttune demo: {message}", err=True)
    return typer.Exit(status)


def _run(options: DemoOptions) -> int:
    """Imports what is heavy only once the cheap checks are done."""
    from rich.console import Console

    from fasttune.demo.data import load_data
    from fasttune.demo.options import DemoError
    from fasttune.demo.output import check_replaceable

    check_replaceable(options.out)
    samples = load_data(options)
    try:
        from fasttune.demo.handle import WorkerDied
        from fasttune.demo.runner import run_demo
    except ModuleNotFoundError as error:
        raise DemoError(
            f"{error.name} is not installed; run: pip install 'fasttune[demo]'"
        ) from None
    try:
        return run_demo(options, samples, Console())
    except WorkerDied as error:
        raise _fail(str(error), WORKER_ERROR) from None


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, folder or .gguf file.", show_default="SmolLM2-135M-Instruct, packaged"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines: messages, prompt/completion, text, Alpaca or ShareGPT.",
            show_default="503 packaged question/answer pairs",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps of each worker, never reduced.",
            show_default="60, fewer on a slow machine",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples, or packed rows, per forward.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Longest sample, or packed row, in tokens.")] = 256,
    grad_accum: Annotated[int, typer.Option(help="Forwards per optimizer step.")] = 1,
    packing: Annotated[
        bool, typer.Option("--packing", help="Join samples into rows of --seq-len tokens.")
    ] = False,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (bf16 where it is native), fp32 or bf16.")
    ] = "auto",
    out: Annotated[
        Path, typer.Option(help="New or empty folder, or an earlier output of the demo.")
    ] = Path("fasttune-demo"),
    seed: Annotated[int, typer.Option(help="Of the split, the order and the adapters.")] = 0,
) -> None:
    """Fine-tune stock and patched side by side: speed, memory, loss, and a LoRA adapter to keep.

    Exit status: 0, 1 if a worker failed, 2 for a problem with the input, 130 after Ctrl-C (which
    saves the adapter as it is).
    """
    from fasttune.demo.options import DemoError, DemoOptions

    try:
        options = DemoOptions(
            model=model,
            data=data,
            steps=steps,
            batch_size=batch_size,
            seq_len=seq_len,
            grad_accum=grad_accum,
            packing=packing,
            lr=lr,
            device=device,
            dtype=dtype,
            out=out,
            seed=seed,
        )
        status = _run(options)
    except DemoError as error:
        raise _fail(str(error), USER_ERROR) from None
    except KeyboardInterrupt:
        raise _fail("interrupted; nothing was saved", INTERRUPTED) from None
    raise typer.Exit(status)


def main() -> None:
    """Entry point of the ``fasttune`` script."""
    app()


if __name__ == "__main__":
    main()
