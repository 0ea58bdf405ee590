"""The command line: `fastldm convert IN OUT` and `fastldm info MODEL`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from fastldm.errors import Error


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """An error of ours is one line and exit code 1; Ctrl-C is exit code 130."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except Error as error:
            click.echo(f"fastldm: {' '.join(str(error).splitlines())}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("fastldm: interrupted", err=True)
            sys.exit(130)

    return run


def of_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how a model is read."""
    options = (
        click.option("--config", metavar="FOLDER", help="Configurations in diffusers' layout, for a single file."),
        click.option("--original-config", metavar="FILE", help="A single file's yaml, in place of the one beside it."),
        click.option("--prediction-type", metavar="TYPE", help="epsilon or v_prediction, in place of what it shows."),
        click.option("--extract-ema", is_flag=True, help="Take a single file's averaged weights."),
        click.option("--variant", metavar="WORD", help="A folder's weights of that variant, such as fp16."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastldm", message="%(prog)s %(version)s")
def main() -> None:
    """Inference for latent diffusion models."""


@main.command()
@click.argument("model", metavar="IN")
@click.argument("out", metavar="OUT")
@of_a_model
@click.option("--vae", metavar="PATH", help="A folder or file, in place of the model's autoencoder.")
@click.option("--text-encoder", metavar="FOLDER", help="In place of the model's text encoder.")
@click.option("--tokenizer", metavar="FOLDER", help="Where a single file's tokenizer is.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Of all weights; as they are if not given.")
@reported
def convert(model: str, out: str, dtype: str | None, **options: Any) -> None:
    """Write the model IN to OUT: one file if OUT ends in .safetensors, else a folder in diffusers' layout."""
    from tqdm import tqdm

    from fastldm import convert as library
    from fastldm.assemble import Asked

    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        path = library.convert(Asked(model, **options), out, dtype=dtype, progress=progress)
    click.echo(path)


@main.command()
@click.argument("model")
@of_a_model
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def info(model: str, as_json: bool, **options: Any) -> None:
    """Tell what the file or folder MODEL is, without reading its weights."""
    from fastldm import info as library
    from fastldm.assemble import Asked

    said = library.info(Asked(model, **options))
    click.echo(json.dumps(said, indent=2) if as_json else _text(said))
    sys.exit(1 if said.get("problems") else 0)


def _text(said: dict[str, Any]) -> str:
    """One line for each thing that is known."""
    lines = []
    for key, value in said.items():
        if value in (None, [], {}):
            continue
        if key == "components":
            lines += [f"{name}: {_values(parts)}" for name, parts in value.items()]
        elif key == "problems":
            lines += [f"problem: {_values(problem)}" for problem in value]
        else:
            lines.append(f"{key.replace('_', ' ')}: {_values(value)}")
    return "\n".join(lines)


def _values(value: Any) -> str:
    """Strings out of files cannot steer the terminal."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_values(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_values, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text if text.isprintable() else ascii(text)
