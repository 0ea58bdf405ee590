"""What a file of tensors is, told by its names and shapes alone: which Stable Diffusion, or which other thing.

Nothing is assumed: a file that is not recognised is refused, and one that is something else is refused by what it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from fastldm.errors import FileError, WeightsError
from fastldm.weights.families import FAMILIES, REFINER, SD1, SD2, SDXL, TASKS, Family, Text
from fastldm.weights.shapes import Shapes, context_dim
from fastldm.weights.strict import shown

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
MAX_WRAPPERS = 3
TEXT_PREFIXES = ("cond_stage_model.transformer.", "cond_stage_model.model.", "transformer.", "model.", "")
VAE_PREFIXES = ("first_stage_model.", "")
FIRST = "input_blocks.0.0.weight"  # of every U-Net in the original layout
TELLTALES = (FIRST, "input_blocks.1.0.in_layers.0.weight")  # either shows a U-Net, of which the other may be missing
WRAPPERS = ("state_dict.", "module.")  # what training tools put before every name

# Beside the weights: what training keeps. None of it is needed to run the model.
IGNORED = re.compile(
    r"model_ema\.(?:decay|num_updates|diffusion_model\w+)"
    r"|(?:betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|lvlb_weights)"
    r"|(?:scale_factor|global_step|denoiser\.sigmas|denoiser\.\w+_sigmas|v_pred|ztsnr)"
    r"|.*embeddings\.position_ids"
    r"|(?:.*\.)?(?:logit_scale|logit_bias|attn_mask)"
    r"|(?:cond_stage_model|conditioner\.embedders\.\d+)\..*text_projection(?:\.weight)?"
    r"|(?:cond_stage_model\.|conditioner\.embedders\.\d+\.|)(?:transformer\.|model\.|)(?:vision_model|visual|visual_projection)"
    r"\..*"  # the other half of CLIP
    r"|alphas_cumprod_original|embedding_manager\..*|safety_checker\..*|epoch"
    r"|(?:first_stage_model\.)?(?:loss\..*|model_ema\..*)"
)


class OtherKind(FileError):
    """A file that is no Stable Diffusion checkpoint. kind: what it is instead, "is a LoRA: ..."."""

    def __init__(self, where: str, kind: str) -> None:
        super().__init__(f"{where}: {kind}", field="model")
        self.kind = kind


@dataclass(frozen=True)
class Found:
    """A Stable Diffusion checkpoint in the original layout. sections: {component: the prefix of its names}."""

    family: Family
    task: str
    sections: Mapping[str, str]


def found(shapes: Shapes, where: str, *, family: Family | None = None, configured: bool = False) -> Found:
    """What the file `where` with tensors of these `shapes` is.

    family: that its yaml says; None: told by the text encoders, or by the width of the text. configured: whether what
    the family would tell is known already, so that its dimensions may be any.
    Raises `OtherKind` if it is no Stable Diffusion checkpoint, `FileError` if its parts are of different ones.
    """
    prefix = next((p for p in UNET_PREFIXES if any(p + name in shapes for name in TELLTALES)), None)
    if prefix is None:
        torso = _any_under(shapes, "first_stage_model.") and _any_under(shapes, ("cond_stage_model.", "conditioner."))
        what = "has no U-Net (model.diffusion_model.*)" if torso else other_kind(shapes)
        raise OtherKind(where, what)
    unet = under(shapes, prefix)
    _refuse_relatives(shapes, unet, where)
    if FIRST not in unet:
        raise WeightsError(f"{where}: {prefix}{FIRST}: is missing", field=prefix + FIRST)
    family = family or _family(shapes, unet, where, configured)
    sections = {"unet": prefix}
    if _any_under(shapes, "first_stage_model."):
        sections["vae"] = "first_stage_model."
    for component, text in family.texts.items():
        present = text_prefix(shapes, text.prefix)
        if present is not None:
            sections[component] = present
    first = unet[FIRST]
    extra = first[1] - 4 if len(first) == 4 else 0
    return Found(family, TASKS.get(extra, f"{extra + 4} input channels"), sections)


def vae_prefix(shapes: Shapes, where: str) -> str:
    """The prefix of the autoencoder in a file that may hold nothing else."""
    for prefix in VAE_PREFIXES:
        if prefix + "decoder.conv_in.weight" in shapes and any(n.startswith(f"{prefix}decoder.up.") for n in shapes):
            return prefix
    if any(name.startswith("decoder.up_blocks.") for name in shapes):
        reason = "is an autoencoder in diffusers' layout: pass its folder, with config.json"
        raise FileError(f"{where}: {reason}", field="vae")
    raise FileError(f"{where}: holds no autoencoder; it {other_kind(shapes)}", field="vae")


def text_prefix(shapes: Shapes, prefix: str) -> str | None:
    """`prefix` as it is in the file: some tools leave out CLIP's "text_model.". None: there is no such encoder."""
    return next((found for found in (f"{prefix}text_model.", prefix) if _any_under(shapes, found)), None)


def lone_text(shapes: Shapes, where: str) -> Text:
    """The text encoder in a file that may hold nothing else. Raises `FileError`."""
    for prefix in TEXT_PREFIXES:
        if f"{prefix}token_embedding.weight" in shapes:
            return Text(prefix, "open_clip", read=23)  # what Stable Diffusion 2 reads of its 24 layers
        for inner in ("text_model.", ""):
            if f"{prefix}{inner}embeddings.token_embedding.weight" in shapes:
                return Text(prefix + inner, "clip")
    raise FileError(f"{where}: holds no text encoder; it {other_kind(shapes)}", field="text_encoder")


def wrapper(names: Collection[str]) -> str:
    """What stands before every one of these names and says nothing about the model: "state_dict.module.", say."""
    found = ""
    for _ in range(MAX_WRAPPERS):
        found += next((w for w in WRAPPERS if names and all(name.startswith(found + w) for name in names)), "")
    return found


def under(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """What begins with `prefix`, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def other_kind(names: Iterable[str]) -> str:
    """What a file of tensors with these names is: "is a LoRA: ..."."""
    names = list(names)
    description = _first_of(_KINDS, names)
    if description is not None:
        return f"is {description}"
    some = ", ".join(shown(name) for name in names[:3])
    return f"is nothing that fastldm knows: {len(names)} tensors, such as {some}"


def _family(shapes: Shapes, unet: Shapes, where: str, configured: bool) -> Family:
    by_text = {
        "conditioner.embedders.1.": SDXL,
        "conditioner.embedders.0.model.": REFINER,
        "cond_stage_model.model.": SD2,
        "cond_stage_model.transformer.": SD1,
    }
    width = context_dim(unet)
    by_width = next((family for family in FAMILIES if family.context_dim == width), None)
    family = next((family for prefix, family in by_text.items() if _any_under(shapes, prefix)), by_width)
    if configured:
        return family or SD1
    if family is None or family.context_dim != width:
        if family is not None and by_width is not None:
            reason = f"the text encoder is that of {family.name}, and the U-Net that of {by_width.name}"
            raise FileError(f"{where}: {reason}", field="model")
        known = ", ".join(f"{family.context_dim} ({family.name})" for family in FAMILIES)
        reason = f"its U-Net reads text that is {width} wide, and that of the known families is {known}"
        raise FileError(f"{where}: {reason}: pass config= with a folder in diffusers' layout", field="config")
    return family


def _any_under(shapes: Shapes, prefix: str | tuple[str, ...]) -> bool:
    return any(name.startswith(prefix) and not IGNORED.fullmatch(name) for name in shapes)


def _refuse_relatives(shapes: Shapes, unet: Shapes, where: str) -> None:
    """Models whose U-Net has the same names, and which are not Stable Diffusion."""
    description = _first_of(_RELATIVES, shapes)
    if description is not None:
        raise OtherKind(where, f"is {description}, {_UNSUPPORTED}")
    channels, width = unet.get(FIRST, ())[1:2], context_dim(unet)
    if width is None:
        raise OtherKind(where, f"is a diffusion model that reads no text, {_UNSUPPORTED}")
    if channels == (5,):
        raise OtherKind(where, f"is a depth-to-image model, {_UNSUPPORTED}")
    if channels == (7,):
        raise OtherKind(where, f"is an upscaler of Stable Diffusion 2, {_UNSUPPORTED}")
    if width in (SD1.context_dim, SD2.context_dim) and "label_emb.0.0.weight" in unet:
        raise OtherKind(where, f"is a Stable unCLIP model, {_UNSUPPORTED}")
    if not _any_under(unet, "middle_block.1."):
        what = "a distilled Stable Diffusion (as SSD-1B), whose middle block is cut"
        raise OtherKind(where, f"is {what}, {_UNSUPPORTED}")


def _first_of(kinds: Mapping[str, str], names: Iterable[str]) -> str | None:
    """The description of the first pattern that the beginning of a name matches; in one pass, as names may be many."""
    pattern = re.compile("|".join(f"(?P<kind{i}>{pattern})" for i, pattern in enumerate(kinds)))
    found = {match.lastgroup for match in map(pattern.match, names) if match}
    return next((description for i, description in enumerate(kinds.values()) if f"kind{i}" in found), None)


_RELATIVES = {
    r"lora_controlnet$": "a Control-LoRA",
    r"encoder_(proj|pooling)\.": "DeepFloyd IF",
    r"clip_to_seq\.": "Kandinsky",
    r".*\btime_mixer\.mix_factor$|.*\.time_stack\.": "Stable Video Diffusion",
    r"control_model\.|(.*\.)?input_hint_block\.": "a ControlNet with the Stable Diffusion that it was trained on",
    r"cond_stage_model\.embedding\.weight$": "a class-conditional latent diffusion model",
    r"cond_stage_model\.transformer\.token_emb\.": "the first text-to-image latent diffusion model (with BERT)",
    r"cond_stage_model\.channel_mapper\.": "a latent diffusion model for semantic maps",
    r"first_stage_model\.quantize\.": "a latent diffusion model with a vector-quantised autoencoder",
    r"depth_model\.": "a depth-to-image model",
    r"(embedder|noise_augmentor)\.": "a Stable unCLIP model",
    r"low_scale_model\.": "an upscaler of Stable Diffusion 2",
    r".*temporal_transformer\.|.*\.motion_modules\.": "an AnimateDiff model",
    r"edm_(mean|std|vpred\.)": "an SDXL trained with EDM's noise levels (as CosXL and Playground v2.5)",
}

_ADDITION = "an addition to a model, not a model"
_UNSUPPORTED = "which is not supported"
_KINDS = {  # the first that matches the beginning of a tensor's name is what the file is
    r"lora_controlnet$": f"a Control-LoRA: {_ADDITION}",
    r"lora_(unet|te\d?|prior)_|.*\.lora_[AB]\.|.*\.lora_(down|up)\.|.*\.lora\.(down|up)\.|.*\.dora_scale$|"
    r".*\.(hada|lokr)_\w+$|.*_lora\.(down|up)\.": f"a LoRA: {_ADDITION}",
    r"control_model\.|zero_convs\.0\.|input_hint_block\.": f"a ControlNet: {_ADDITION}",
    r"controlnet_cond_embedding\.|controlnet_down_blocks\.": f"a ControlNet: {_ADDITION}",
    r"adapter\.(body|conv_in)|body\.0\.(in_conv|block1|resnets)": f"a T2I-Adapter: {_ADDITION}",
    r"(image_proj|ip_adapter)\.": f"an IP-Adapter: {_ADDITION}",
    r".*temporal_transformer\.|.*motion_modules\.": f"an AnimateDiff motion module: {_ADDITION}",
    r"(emb_params|string_to_param\b.*|\*|clip_[lg]|<[^>]+>)$": "a textual inversion: the embedding of a word",
    r"(768|1280|1024|640|320)\.\d": f"a hypernetwork, {_UNSUPPORTED}",
    r"(.*\.)?joint_blocks\.\d+\.": f"Stable Diffusion 3, {_UNSUPPORTED}",
    r"txt_in\.individual_token_refiner\.": f"a video model (HunyuanVideo), {_UNSUPPORTED}",
    r"(.*\.)?double_blocks\.\d+\.|(.*\.)?single_transformer_blocks\.": f"Flux, or a relative of it, {_UNSUPPORTED}",
    r"(.*\.)?double_layers\.\d+\.": f"AuraFlow, {_UNSUPPORTED}",
    r"attention_y_norm\.": f"Sana, {_UNSUPPORTED}",
    r"(.*\.)?t_block\.1\.|adaln_single\.": f"PixArt, {_UNSUPPORTED}",
    r"(.*\.)?(text_states_proj|mlp_t5|pooler)\.": f"HunyuanDiT, {_UNSUPPORTED}",
    r"(.*\.)?(clip_txt_mapper|clip_txt_pooled_mapper|effnet_mapper)\.": f"Stable Cascade, {_UNSUPPORTED}",
    r"layers\.0\.adaLN_modulation\.0\.": f"Z-Image, {_UNSUPPORTED}",
    r"txt_norm\.": f"Qwen-Image, {_UNSUPPORTED}",
    r"(.*\.)?(cap_embedder|context_refiner)\.": f"Lumina, {_UNSUPPORTED}",
    r"(.*\.)?blocks\.0\.cross_attn\.norm_k\.|(.*\.)?patchify_proj\.": f"a video model, {_UNSUPPORTED}",
    r"quantize\.embedding\.": f"a vector-quantised autoencoder, {_UNSUPPORTED}",
    r"(encoder|decoder)\.(conv_in|down\.|up\.|mid\.|down_blocks|up_blocks|mid_block)|first_stage_model\.": "an "
    "autoencoder alone: pass it as vae= beside a model",
    r"((encoder|decoder)\.(layers\.)?|taesd_(en|de)coder\.|)\d+\.(conv\.\d+\.)?(weight|bias)$": "a tiny autoencoder "
    f"(TAESD), {_UNSUPPORTED}",
    r"(.*\.)?block\.0\.layer\.0\.SelfAttention\.|(.*\.)?(text_model\.|embeddings\.token_embedding|resblocks\.0\.)|"
    r"(.*\.)?token_embedding\.|cond_stage_model\.|text_encoders\.": "a text encoder alone: pass it as "
    "text_encoder= beside a model",
    r"(visual|vision_model)\.": "an image encoder, not an image generator",
    r"(unet\.)?(down_blocks|up_blocks|mid_block|time_embedding)\.": "a U-Net in diffusers' layout: pass the "
    "folder of the whole model, or convert that",
    r"(model\.)?layers\.\d+\.self_attn\.|transformer\.h\.\d+\.|lm_head\.|wte\.": "a language model",
    r"inner_model\.": f"an upscaler of latents, {_UNSUPPORTED}",
    r"(params_ema\.)?stylegan_decoder\.": "a restorer of faces (GFPGAN)",
    r"(params_ema\.)?(conv_first|RRDB_trunk|body\.\d+\.rdb\d)|model\.1\.sub\.\d": "an upscaler of images (ESRGAN)",
    r"layer[1-4]\.\d\.conv\d\.|features\.\d+\.": "an image classifier",
}
