"""The command line: `fastldm "a prompt"`, and the commands `info`, `convert`, `samplers`, `completion`."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from fastldm.assets import SHAPES
from fastldm.errors import Error, FileError
from fastldm.signals import importing, stoppable

if TYPE_CHECKING:
    from fastldm.paint import Order, Painted, Painter, Settings

MODEL_VARIABLE = "FASTLDM_MODEL"
RANDOM_SEEDS = 1 << 32  # as many as the web UI's
LIKE_A_COMMAND = 0.85  # of difflib: "samplres" is, "point" is not
LOADING = ("config", "original_config", "prediction_type", "extract_ema", "variant", "vae", "text_encoder", "tokenizer")
# What may be elsewhere, if it is not on the disk: an address, or a name on the hub.
ELSEWHERE = re.compile(r"https?://.+|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Arguments of the pipeline, and the options for them.
OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "image_guidance_scale": "--image-guidance",
    "negative_prompt": "--negative",
    "mask_image": "--mask",
    "out": "-o",
    "model": "--model",
    **{name: f"--{name}" for name in ("prompts", "image", "strength", "seed", "device", "overlay", "eta")},
    "clip_skip": "--clip-skip",
}


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """An error of ours is one line and exit code 1."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except Error as error:
            click.echo(f"fastldm: {' '.join(_by_option(error).splitlines())}", err=True)
            sys.exit(1)

    return run


def _by_option(error: Error) -> str:
    """The message, with the names of options in place of those of arguments."""
    text, name = str(error), error.field or ""
    text = re.sub(rf"\b({'|'.join(LOADING)})=(?=\W|$)", lambda match: _option(match[1]), text)
    if name in ("height", "width"):
        return f"--size: {text}"
    if name in OPTIONS and re.match(rf"{name}( =|:) ", text):
        return OPTIONS[name] + text.removeprefix(name)
    return text


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Commands(click.Group):
    """A group whose first word, if it is no command, is a prompt to paint."""

    def main(self, *args: Any, **extra: Any) -> Any:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")  # a path that is no UTF-8 stays what it is
        with stoppable():
            return super().main(*args, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            if len(args) == 1 and not ctx.resilient_parsing:
                self._check_word(ctx, args[0])
            args = ["paint", *args]
        return super().parse_args(ctx, args)

    def _check_word(self, ctx: click.Context, word: str) -> None:
        """A mistyped command is no prompt."""
        for name in get_close_matches(word, self.commands, n=1, cutoff=LIKE_A_COMMAND):
            text = f"There is no command {word!r}, but {name!r}. To paint the word: fastldm paint {word}"
            raise click.UsageError(text, ctx)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] PROMPT")
        formatter.write_usage(ctx.command_path, "COMMAND ...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Those of painting, too."""
        known = [*self.commands["paint"].params, *self.get_params(ctx)]
        records = [option.get_help_record(ctx) for option in known if isinstance(option, click.Option)]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record is not None])
        self.format_commands(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        items = [*super().shell_complete(ctx, incomplete), *self.commands["paint"].shell_complete(ctx, incomplete)]
        return list({item.value: item for item in items}.values())


class SamplerName(click.ParamType):  # type: ignore[type-arg]  # which older click does not take
    """A name of `fastldm.samplers()`, which are read when one is asked for."""

    name = "sampler"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        known = _samplers()
        if value not in known:
            from fastldm.png import sampler_label

            alike = (name for name in known if value.casefold() in (name, sampler_label(name).casefold()))
            found = next(alike, None)
            if found is not None:
                return found
            near = "".join(f" There is {name!r}." for name in get_close_matches(value, known, n=1))
            self.fail(f"There is no sampler {value!r}.{near} 'fastldm samplers' lists them.", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name, help=line) for name, line in _samplers().items() if name.startswith(incomplete)]


class Size(click.ParamType):  # type: ignore[type-arg]
    """ "512x768" -> (512, 768): width and height."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        matched = re.fullmatch(r"([0-9]{1,5})[xX×]([0-9]{1,5})", value)
        if matched is None:
            self.fail(f"{value!r} is no WIDTHxHEIGHT, such as 512x768.", param, ctx)
        return int(matched[1]), int(matched[2])


def _samplers() -> dict[str, str]:
    from fastldm.sampling.names import samplers

    return samplers()


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Options as one decorator, in the order of the help."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


PATH, FILE = click.Path(), click.Path(dir_okay=False)
UNIT, PERCENT = click.FloatRange(0, 1), click.FloatRange(0, 100)
DTYPE = click.Choice(["fp32", "fp16", "bf16"])
STRENGTH = "How much of the image to give up. Default: 0.8; 1 with --mask."
PROMPTS = "One image for each line, into the folder -o; - reads the standard input."
of_a_model = together(
    click.option("--config", metavar="FOLDER", type=PATH, help="A single file's configurations, in diffusers' layout."),
    click.option("--original-config", metavar="FILE", type=PATH, help="A single file's yaml, if not beside it."),
    click.option("--prediction-type", metavar="TYPE", help="epsilon or v_prediction, in place of what it shows."),
    click.option("--extract-ema", is_flag=True, help="Take a single file's averaged weights."),
    click.option("--variant", metavar="WORD", help="A folder's weights of that variant, such as fp16."),
)
of_its_parts = together(
    click.option("--vae", metavar="PATH", type=PATH, help="A folder or file, in place of the model's autoencoder."),
    click.option("--text-encoder", metavar="FOLDER", type=PATH, help="In place of the model's text encoder."),
    click.option("--tokenizer", metavar="FOLDER", type=PATH, help="Where a single file's tokenizer is."),
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="fastldm", message="%(prog)s %(version)s")
def main() -> None:
    """Paint images with a latent diffusion model.

    \b
    fastldm "a small red circle left of a big blue square"
    fastldm "in winter" --image photo.jpg --strength 0.6 --sampler dpmpp_2m_karras --model model.ckpt
    fastldm --prompts prompts.txt -o folder --model model.ckpt --size 512x768

    A first word that is no command is a prompt. FASTLDM_MODEL may name the model instead of --model. Without either it
    is the embedded model of coloured shapes.
    """


# ------------------------------------------------------------------------------------------------------------- painting


@main.command(context_settings={"allow_extra_args": True})
@click.argument("prompt", required=False)
@click.option("-o", "--out", metavar="PATH", type=PATH, help="The PNG file to write or replace. Default: a new one.")
@click.option(
    "-m",
    "--model",
    metavar="PATH",
    type=PATH,
    envvar=MODEL_VARIABLE,
    help="A file or folder. Default: the embedded one.",
)
@click.option("--negative", metavar="TEXT", default="", help="What to keep away from.")
@click.option(
    "--steps", metavar="N", type=click.IntRange(1, 1000), help="How many. Default: 50; 100 for instruct-pix2pix."
)
@click.option("--sampler", metavar="NAME", type=SamplerName(), help="One of 'fastldm samplers'. Default: the model's.")
@click.option("--guidance", metavar="X", type=PERCENT, help="How close to the prompt. Default: 7.5.")
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0),
    help="Of the first image, then N + 1, ... Default: random; 0 with --prompts.",
)
@click.option("--size", metavar="WIDTHxHEIGHT", type=Size(), help="In pixels. Default: the model's, or the image's.")
@click.option(
    "-n", "--n", "number", metavar="N", type=click.IntRange(1, 10_000), default=1, help="How many images. Default: 1."
)
@click.option("--image", metavar="FILE", type=FILE, help="PNG, JPEG or WebP to start from, or to edit.")
@click.option("--strength", metavar="X", type=UNIT, help=STRENGTH)
@click.option("--mask", metavar="FILE", type=FILE, help="With --image: white is painted anew, black is kept.")
@click.option("--overlay", is_flag=True, help="Keep what the mask keeps bit for bit.")
@click.option("--image-guidance", metavar="X", type=PERCENT, help="Of instruct-pix2pix. Default: 1.5.")
@click.option("--clip-skip", metavar="N", type=click.IntRange(0), help="Leave out the text encoder's last N layers.")
@click.option("--eta", metavar="X", type=UNIT, help="Noise in the steps of DDIM. Default: 0.")
@click.option("--prompts", metavar="FILE", type=click.Path(dir_okay=False, allow_dash=True), help=PROMPTS)
@click.option("--overwrite", is_flag=True, help="With --prompts: replace images that were made otherwise.")
@click.option("--dtype", type=DTYPE, default="fp32", help="To compute in. Default: fp32.")
@click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N. Default: cpu.")
@of_its_parts
@of_a_model
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each image instead of its path.")
@reported
def paint(
    prompt: str | None,
    prompts: str | None,
    out: str | None,
    number: int,
    seed: int | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Paint PROMPT, which may be the name of a command."""
    with importing():
        from fastldm import paint as library
    _check_extra(click.get_current_context().args)
    if (prompt is None) == (prompts is None):
        raise click.UsageError("Give one of PROMPT and --prompts FILE.")
    if prompts is None and overwrite:
        raise click.UsageError("--overwrite belongs to --prompts; what -o names is replaced anyway.")
    if prompts is not None and number > 1:
        raise click.UsageError("--n does not go with --prompts, which paints one image for each line.")
    if options["model"] is None:
        options["model"] = str(SHAPES)
        if sys.stderr.isatty():
            click.echo("no --model: the embedded one, which knows coloured shapes alone", err=True)
    show = _as_json if as_json else _as_path
    if prompt is None:
        orders = library.of_prompts(str(prompts), out, seed or 0, overwrite=overwrite)
        _paint_prompts(orders, _settings(options), show)
    else:
        orders = library.of_prompt(prompt, out, number, secrets.randbelow(RANDOM_SEEDS) if seed is None else seed)
        if seed is None and sys.stderr.isatty():
            click.echo(f"seed {orders[0].seed}", err=True)
        _paint_prompt(orders, _settings(options), show)


def _check_extra(words: list[str]) -> None:
    if words:
        arguments = "argument" if len(words) == 1 else "arguments"
        raise click.UsageError(f"Got unexpected extra {arguments} ({' '.join(words)}): put the prompt in quotes.")


def _paint_prompt(orders: list[Order], settings: Settings, show: Callable[[Painted], str]) -> None:
    painter = _painter(settings)
    for order in orders:
        click.echo(show(painter.paint(order)))


def _paint_prompts(orders: list[Order], settings: Settings, show: Callable[[Painted], str]) -> None:
    """What is there stays. A file that says something else ends it, if possible before the model is loaded."""
    from fastldm.paint import make_folder, still_to_paint

    still_to_paint(orders, settings, complete=False)
    painter = _painter(settings)
    left = still_to_paint(orders, painter.settings, complete=True)
    make_folder(orders[0].path.parent)
    painter.hide_steps()
    with _bar(unit="image", total=len(orders), initial=len(orders) - len(left)) as bar:
        for order in left:
            painted = painter.paint(order)
            bar.write(show(painted), file=sys.stdout)
            sys.stdout.flush()
            bar.update()


def _painter(settings: Settings) -> Painter:
    if not os.path.lexists(os.path.expanduser(settings.model)) and not ELSEWHERE.fullmatch(settings.model):
        raise FileError(f"model = {settings.model}: there is no such file or folder", field="model")
    with importing():
        import fastldm.pipeline  # noqa: F401  this brings torch
        from fastldm.paint import Painter
    painter = Painter(settings)
    if settings.eta and not painter.settings.uses_eta:
        click.echo(f"fastldm: --eta has no effect with the sampler {painter.settings.sampler}", err=True)
    return painter


def _bar(**options: Any) -> Any:
    """A bar on a terminal, nothing elsewhere."""
    with importing():
        from tqdm import tqdm
    return tqdm(disable=not sys.stderr.isatty(), leave=False, **options)


def _settings(options: dict[str, Any]) -> Settings:
    from fastldm.paint import Settings, read_picture

    loading = {name: value for name in LOADING if (value := options.pop(name))}
    for option, argument in (("image", "image"), ("mask", "mask_image")):
        if options[option] is not None:
            options[option] = read_picture(options[option], argument)
    return Settings(loading=loading, **options)


def _as_json(painted: Painted) -> str:
    return json.dumps(asdict(painted))


def _as_path(painted: Painted) -> str:
    return painted.path


# --------------------------------------------------------------------------------------------------- the other commands


@main.command(short_help="Write a model as a file or as a folder.")
@click.argument("model", metavar="IN", type=PATH)
@click.argument("out", metavar="OUT", type=PATH)
@of_a_model
@of_its_parts
@click.option("--dtype", type=DTYPE, help="Of all weights; as they are if not given.")
@reported
def convert(model: str, out: str, dtype: str | None, **options: Any) -> None:
    """Write the model IN to OUT: one file if OUT ends in .safetensors, else a folder in diffusers' layout."""
    with importing():
        from fastldm import convert as library
        from fastldm.asked import Asked

    with _bar(unit="B", unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        path = library.convert(Asked(model, **options), out, dtype=dtype, progress=progress)
    click.echo(path)


@main.command(short_help="Tell what a model is, or what an image was made by.")
@click.argument("path", metavar="PATH", type=PATH)
@of_a_model
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def info(path: str, as_json: bool, **options: Any) -> None:
    """Tell what the model PATH is, without reading its weights, or what the PNG image PATH was made by."""
    said, lines = _about_image(path) if _is_image(path) else _about_model(path, options)
    click.echo(json.dumps(said, indent=2) if as_json else "\n".join(lines))
    sys.exit(1 if said.get("problems") else 0)


def _is_image(path: str) -> bool:
    from fastldm import png

    return png.is_png(Path(path)) or Path(path).suffix.lower() == ".png"


def _about_image(path: str) -> tuple[dict[str, Any], list[str]]:
    from fastldm import png

    picture = png.read(Path(path))
    if picture.text is None:
        raise FileError(f"{path} is a PNG file without the text 'parameters': nothing says what it was made by")
    found = png.parsed(picture.text)
    said = {"path": path, "kind": "PNG image", "width": picture.width, "height": picture.height}
    prompts = {"prompt": found.prompt, "negative_prompt": found.negative_prompt}
    return {**said, **prompts, "settings": found.settings}, _lines({**said, **prompts, **found.settings})


def _about_model(path: str, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    with importing():
        from fastldm import info as library
        from fastldm.asked import Asked

    said = library.info(Asked(path, **options))
    return said, _lines(said)


def _lines(said: Mapping[str, Any]) -> list[str]:
    """One for each thing that is known."""
    lines = []
    for key, value in said.items():
        if value in (None, "", [], {}):
            continue
        if key == "components":
            lines += [f"{name}: {_values(parts)}" for name, parts in value.items()]
        elif key == "problems":
            lines += [f"problem: {_values(problem)}" for problem in value]
        else:
            lines.append(f"{_values(key.replace('_', ' '))}: {_values(value)}")
    return lines


def _values(value: Any) -> str:
    """Strings out of files cannot steer the terminal."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_values(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_values, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text if text.isprintable() else repr(text)


@main.command(short_help="Compile a model's kernels ahead of its first image.")
@click.argument("model", metavar="MODEL", type=PATH)
@click.option("--size", "sizes", metavar="WIDTHxHEIGHT", type=Size(), multiple=True, help="In pixels; may be repeated.")
@click.option("-n", "--n", "images", metavar="N", type=click.IntRange(1, 16), default=1, help="Images at once.")
@click.option("--dtype", type=DTYPE, default="fp16", help="To compute in. Default: fp16.")
@click.option("--target", metavar="CHIP", help="Such as sm_90, which need not be here. Default: the GPU that is here.")
@click.option("--jobs", metavar="N", type=click.IntRange(1, 256), help="Processes. Default: one for each processor.")
@of_its_parts
@of_a_model
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def warmup(
    model: str,
    sizes: tuple[tuple[int, int], ...],
    images: int,
    dtype: str,
    target: str | None,
    jobs: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile the kernels that MODEL needs on a GPU; they are kept for every process to come."""
    with importing():
        import torch

        from fastldm import warmup as library
        from fastldm.asked import Asked

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    asked, turned = Asked(model, **options), [(height, width) for width, height in sizes]
    done = library.warmup(asked, turned, images=images, dtype=kind, target=target, jobs=jobs)
    line = f"{done.kernels} kernels, {done.compiled} compiled now, {done.seconds:.1f} s"
    click.echo(json.dumps(asdict(done)) if as_json else line)


@main.command("samplers")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_samplers(as_json: bool) -> None:
    """List the names for --sampler, with a line about each."""
    found = _samplers()
    width = max(map(len, found))
    lines = [f"{name:{width}}  {line}" for name, line in found.items()]
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines))


@main.command(short_help="Print the completion for a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands, options, samplers and paths.

    \b
    bash: fastldm completion bash > ~/.local/share/bash-completion/completions/fastldm
    zsh:  fastldm completion zsh > ~/.zfunc/_fastldm   (with fpath+=~/.zfunc before compinit in ~/.zshrc)
    fish: fastldm completion fish > ~/.config/fish/completions/fastldm.fish
    """
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(main, {}, "fastldm", "_FASTLDM_COMPLETE").source())
