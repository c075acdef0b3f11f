"""`cook quantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from cook.config.quantization import SchemeName


def quantize(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model folder or a CPM-Live `.pt` file. Leave it out with --config."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Argument(metavar="OUT", help="Folder to write. Default with --config: `OUTPUT_DIR/quantized/FORMAT`."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Write the model of this run's stage `quantize`, with the numbers of its training."),
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    scheme: Annotated[
        SchemeName | None,
        typer.Option(help="How to round a model without training. Default: `int8`."),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="`int4`: inputs that share a scale. Default: 32.")] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(help="End of the names of modules to round; may be repeated. Default: all linear modules."),
    ] = None,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings",
            help="Store the token embedding in 8 bits too, and an output projection that is tied to it.",
        ),
    ] = False,
    format: Annotated[
        str,
        typer.Option(
            metavar="transformers|compressed-tensors|gguf",
            help="What reads the result: transformers (with torchao), vLLM, or programs for GGUF files.",
        ),
    ] = "transformers",
    data: Annotated[
        list[str] | None, typer.Option(help="A UTF-8 text file to compare the losses on; may be repeated.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of the text that the model sees at once.")] = 512,
) -> None:
    """Write a model with weights in 8 or 4 bits: of a run's stage `quantize`, or of any model, without training."""
    from cook.recipe.quantize_run import QuantizeOptions, quantize_run

    quantize_run(
        QuantizeOptions(
            model=model,
            output=output,
            config=config,
            overrides=set or [],
            scheme=scheme,
            group_size=group_size,
            modules=module or [],
            embeddings=embeddings,
            format=format,  # type: ignore[arg-type]
            data=data or [],
            window=window,
        )
    )
