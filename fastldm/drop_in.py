"""What programs written for diffusers' Stable Diffusion pipelines touch, and what becomes of it here.

Each name is a row: "supported", a "no-op" that says so once in the log, or "refused" with a reason. The tables hold all
that diffusers has, which `benchmarks/drop_in.py` checks; it writes docs/drop-in.md from them.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from fastldm.errors import ArgumentError, RefusedError, UnknownArgumentError, brief

log = logging.getLogger("fastldm")

Kind: TypeAlias = Literal["supported", "no-op", "refused"]
LONGEST = 64  # characters of a name for which others are suggested


@dataclass(frozen=True)
class Row:
    """note: for the user, what differs, why nothing is done, or what to do instead."""

    kind: Kind
    note: str


Table: TypeAlias = Mapping[str, Row]


def _each(kind: Kind, notes: Mapping[str, str]) -> dict[str, Row]:
    return {name: Row(kind, note) for name, note in notes.items()}


def _all(kind: Kind, note: str, *names: str) -> dict[str, Row]:
    return dict.fromkeys(names, Row(kind, note))


# ----------------------------------------------------------------------------------------------------------- the tables

_NO_LORA = "LoRAs are not supported: fuse them with diffusers, and load the model that it saves"
_NO_CHECKER = "no image is checked here"
_OF_A_CALL = "it belongs to a call, and the object that a callback gets has it"
_THE_LOOP = "it is a part of diffusers' own loop; here a call does all of it"
_CONFIGURATIONS = (
    "it is a part of diffusers' configuration classes; save_pretrained writes a model, and Pipeline reads it"
)
_NONE_LOADED = "none is ever loaded, so there is none to remove"
_WHOLE = "a model is whole on one device: device=, or .to(...)"
_IN_AND_OUT = "a call takes images of any kind and returns what output_type says"
_IP_ADAPTER = "IP-Adapters are not supported"
_IN_THE_FILES = "read from the model's files: config= or original_config= names others"

ATTRIBUTES: Table = {
    # making one, and keeping it
    **_each(
        "supported",
        {
            "from_pretrained": "a folder, the id of a model on the hub, or a single file; arguments below",
            "from_single_file": "needs no hub and no config, where the file's weights show what it is",
            "from_pipe": "shares the weights",
            "save_pretrained": "writes a folder that diffusers reads, too",
            "components": "Pipeline(**pipe.components) shares the weights",
            "config": "of the pipeline, as its model_index.json has it",
            "name_or_path": "what was loaded",
            "to": "a device, a dtype or both, in any order",
            "device": "where the model is",
            "dtype": "of weights and activations",
            "_execution_device": "the device",
        },
    ),
    # what it is made of
    **_each(
        "supported",
        {
            "scheduler": "assign a name or one of diffusers; it does not step: X.from_config(pipe.scheduler.config) "
            "makes one that does",
            "unet": "a view of the network; torch.compile of it does nothing; another: pass unet= to Pipeline(...)",
            "vae": "a view of the network; not to be assigned: pass vae= to Pipeline(...)",
            "text_encoder": "a view of the network, without output_hidden_states; not to be assigned: pass "
            "text_encoder= to Pipeline(...)",
            "tokenizer": "the model's own; not to be assigned: pass tokenizer= to Pipeline(...)",
            "vae_scale_factor": "pixels to a latent, in each direction",
        },
    ),
    **_all("supported", f"None, and None may be assigned: {_NO_CHECKER}", "safety_checker", "feature_extractor"),
    **_each(
        "supported",
        {
            "image_encoder": f"None, and None may be assigned: {_IP_ADAPTER}",
            "requires_safety_checker": f"False, and False may be assigned: {_NO_CHECKER}",
        },
    ),
    # using it
    **_each(
        "supported",
        {
            "encode_prompt": "what prompt_embeds and negative_prompt_embeds take",
            "progress_bar": "of tqdm",
            "set_progress_bar_config": "arguments of tqdm",
            "numpy_to_pil": "(H, W, C) or (B, H, W, C), in 0..1 or bytes, to a list of images; other values are errors",
            "enable_vae_slicing": "the default",
            "disable_vae_slicing": "a batch is decoded at once, with the memory that takes",
            "enable_vae_tiling": "little memory for large images, slightly other pixels",
            "disable_vae_tiling": "the default",
        },
    ),
    # what is done already, or has nothing to be done to
    **_all(
        "no-op",
        "attention never builds the full matrix here, so there is nothing to slice",
        "enable_attention_slicing",
        "disable_attention_slicing",
        "set_attention_slice",
    ),
    **_all(
        "no-op",
        "attention needs little memory as it is",
        "enable_xformers_memory_efficient_attention",
        "disable_xformers_memory_efficient_attention",
        "set_use_memory_efficient_attention_xformers",
    ),
    **_all(
        "no-op",
        "projections of the same input are always one product, with the result of several",
        "fuse_qkv_projections",
        "unfuse_qkv_projections",
    ),
    **_all(
        "no-op",
        "nothing is offloaded: the whole model goes to the GPU, if there is one",
        "enable_model_cpu_offload",
        "enable_sequential_cpu_offload",
        "enable_group_offload",
    ),
    **_all(
        "no-op",
        "nothing is offloaded, so there is nothing to free or to reset",
        "maybe_free_model_hooks",
        "remove_all_hooks",
        "reset_device_map",
    ),
    **_all(
        "no-op",
        _NONE_LOADED,
        "unload_lora_weights",
        "unfuse_lora",
        "disable_lora",
        "unload_textual_inversion",
        "unload_ip_adapter",
    ),
    **_each("no-op", {"disable_freeu": "FreeU is never on"}),
    # what is not here
    **_all(
        "refused",
        _NO_LORA,
        "load_lora_weights",
        "load_lora_into_unet",
        "load_lora_into_text_encoder",
        "lora_state_dict",
        "save_lora_weights",
        "write_lora_layers",
        "pack_weights",
        "fuse_lora",
        "enable_lora",
        "enable_lora_hotswap",
        "set_adapters",
        "delete_adapters",
        "get_active_adapters",
        "get_list_adapters",
        "set_lora_device",
        "lora_scale",
        "fused_loras",
        "num_fused_loras",
    ),
    **_all(
        "refused",
        _IP_ADAPTER,
        "load_ip_adapter",
        "set_ip_adapter_scale",
        "prepare_ip_adapter_image_embeds",
        "encode_image",
    ),
    **_all(
        "refused",
        "textual inversion is not supported: its vectors can stand in prompt_embeds",
        "load_textual_inversion",
        "maybe_convert_prompt",
    ),
    **_each(
        "refused",
        {
            "enable_freeu": "FreeU is not supported",
            "enable_pag": "perturbed-attention guidance is not supported",
            "download": "huggingface_hub does it: snapshot_download(...)",
            "push_to_hub": "huggingface_hub does it: save_pretrained(...), then upload_folder(...)",
            "decode_latents": "pipe.vae.decode(latents / pipe.vae.config.scaling_factor) does it",
            "run_safety_checker": _NO_CHECKER,
            "_encode_prompt": "encode_prompt(...) does it, and returns both parts",
        },
    ),
    **_all(
        "refused",
        _OF_A_CALL,
        "guidance_scale",
        "guidance_rescale",
        "image_guidance_scale",
        "do_classifier_free_guidance",
        "clip_skip",
        "cross_attention_kwargs",
        "num_timesteps",
        "interrupt",
        "_guidance_scale",
        "_guidance_rescale",
        "_image_guidance_scale",
        "_clip_skip",
        "_cross_attention_kwargs",
        "_num_timesteps",
    ),
    **_each("refused", {"_interrupt": f"{_OF_A_CALL}; from elsewhere, cancel=fastldm.CancelToken() stops one"}),
    **_all(
        "refused",
        _THE_LOOP,
        "check_inputs",
        "get_timesteps",
        "get_guidance_scale_embedding",
        "prepare_extra_step_kwargs",
        "prepare_image_latents",
        "prepare_latents",
        "prepare_mask_latents",
        "_callback_tensor_inputs",
    ),
    **_all("refused", _IN_AND_OUT, "image_processor", "mask_processor"),
    **_all("refused", _WHOLE, "hf_device_map", "model_cpu_offload_seq"),
    **_all(
        "refused",
        _CONFIGURATIONS,
        "config_name",
        "extract_init_dict",
        "from_config",
        "get_config_dict",
        "has_compatibles",
        "ignore_for_config",
        "load_config",
        "parameters",
        "register_for_auto_class",
        "register_modules",
        "register_to_config",
        "save_config",
        "text_encoder_name",
        "to_json_file",
        "to_json_string",
        "unet_name",
    ),
}

CALL: Table = {
    **_each(
        "supported",
        {
            "prompt": "the only one by position",
            "negative_prompt": "a text for all prompts, or one for each; no effect where guidance_scale is 1 or less",
            "image": "for image to image, and with mask_image to inpaint: the class is the same",
            "mask_image": "white is painted anew; for models with 4 and with 9 channels",
            "masked_image_latents": "for models with 9 channels",
            "padding_mask_crop": "paint only the box around the mask",
            "strength": "the share of the steps that is run on the image",
            "height": "for every task: images are resized",
            "width": "for every task: images are resized",
            "num_inference_steps": "1 to 1000; 50 if not given, for instruct-pix2pix 100",
            "timesteps": "for the samplers that take them in diffusers",
            "sigmas": "for the samplers that take them in diffusers",
            "guidance_scale": "0 to 100; 1 and below computes no unconditional branch",
            "guidance_rescale": "for every task; no effect where guidance_scale is 1 or less",
            "image_guidance_scale": "for models of instruct-pix2pix",
            "num_images_per_prompt": "in the result, those of one prompt follow each other",
            "eta": "of DDIM and samplers like it; without effect for others",
            "generator": "one, or one for each image; or seed=",
            "latents": "the first noise, of unit variance; at most 1e4 in magnitude",
            "prompt_embeds": "of encode_prompt",
            "negative_prompt_embeds": "of encode_prompt",
            "clip_skip": "how many of the last layers of the text encoder are left out",
            "output_type": '"pil", "np", "pt" or "latent"',
            "return_dict": "of no effect: the result is both, a tuple and an object with names",
            "callback_on_step_end": "gets the call's own state; what it changes takes effect",
            "callback_on_step_end_tensor_inputs": "the names that the callback gets",
        },
    ),
    **_all("refused", "callback_on_step_end is what is called, after every step", "callback", "callback_steps"),
    **_each("refused", {"cross_attention_kwargs": "LoRAs and processors of attention are not supported"}),
    **_all("refused", _IP_ADAPTER, "ip_adapter_image", "ip_adapter_image_embeds"),
    **_all("refused", "perturbed-attention guidance is not supported", "pag_scale", "pag_adaptive_scale"),
    **_each("refused", {"init_image": "it is called image"}),
}

LOADING: Table = {
    **_each(
        "supported",
        {
            "pretrained_model_name_or_path": "a folder, the id of a model on the hub, or a single file",
            "pretrained_model_link_or_path": "a file on disk, or its address on the hub",
            "torch_dtype": "one for the whole model: float32, bfloat16 or float16",
            "dtype": "the same as torch_dtype",
            "variant": '"fp16" picks *.fp16.safetensors',
            "use_safetensors": "True refuses pickles; False is as None: they are read where there is no safetensors",
            "revision": "of a model on the hub",
            "cache_dir": "of the hub",
            "local_files_only": "of the hub",
            "token": "of the hub",
            "config": "for single files: a folder with their configurations",
            "original_config": "for single files: their yaml file",
            "prediction_type": "for single files: in place of what the weights show",
            "extract_ema": "for single files: the averaged weights",
            "unet": "a folder, a file, or a module of diffusers",
            "vae": "a folder, a file, or a module of diffusers",
            "text_encoder": "a folder, or a module of transformers",
            "tokenizer": "a folder, or one of transformers",
            "scheduler": "what pipe.scheduler takes",
        },
    ),
    **_all(
        "no-op",
        "weights are read straight into their places, one tensor after the other",
        "low_cpu_mem_usage",
        "offload_state_dict",
    ),
    **_each(
        "no-op",
        {
            "disable_mmap": "files are read, never mapped",
            "resume_download": "huggingface_hub always resumes",
        },
    ),
    **_all(
        "refused",
        f"{_NO_CHECKER}: pass None, or False",
        "safety_checker",
        "feature_extractor",
        "requires_safety_checker",
        "load_safety_checker",
    ),
    **_each("refused", {"image_encoder": f"{_IP_ADAPTER}: pass None"}),
    **_all("refused", _WHOLE, "device_map", "max_memory", "offload_folder"),
    **_all(
        "refused",
        "a model brings no code here: docs/models.md says what loads",
        "custom_pipeline",
        "custom_revision",
        "trust_remote_code",
    ),
    **_all("refused", "a pipeline is one model", "load_connected_pipeline"),
    **_all("refused", "quantised weights are not supported", "quantization_config"),
    **_all("refused", "ONNX is not supported", "use_onnx", "provider", "sess_options", "provider_options"),
    **_all("refused", "not a format that is read here", "use_flashpack", "dduf_file"),
    **_all("refused", "perturbed-attention guidance is not supported", "enable_pag", "pag_applied_layers"),
    **_each(
        "refused",
        {
            "force_download": "huggingface_hub does it: snapshot_download(..., force_download=True)",
            "proxies": "set the environment variable HTTPS_PROXY",
            "mirror": "set the environment variable HF_ENDPOINT",
            "use_auth_token": "it is called token",
            "output_loading_info": "there is nothing to report: a missing or unexpected weight is an error",
            "original_config_file": "it is called original_config",
            "scheduler_type": "pass scheduler=, a name of fastldm.samplers()",
        },
    ),
    **_all("refused", _IN_THE_FILES, "scaling_factor", "image_size", "num_in_channels", "upcast_attention"),
}

OFF = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")
"""Attributes that hold None or False, and take nothing else."""
FIXED = ("unet", "vae", "text_encoder", "tokenizer")
"""Attributes that a loaded pipeline keeps."""


# ------------------------------------------------------------------------------------------------------------- the rows


def attribute(name: str, known: Iterable[str] = ()) -> Callable[..., None]:
    """What `Pipeline.name` is where the class has no such attribute: a function that does nothing, and says so once.

    Raises `RefusedError` with the reason for what is refused; for other names `AttributeError`, as Python words it,
    with a suggestion among `known` and what does not raise.
    """
    row = ATTRIBUTES.get(name)
    if row is None or row.kind == "supported":
        meant = "" if name.startswith("_") else _meant(name, [*known, *_offered(ATTRIBUTES)])
        raise AttributeError(f"'Pipeline' object has no attribute {brief(name)}{meant}", name=name)
    if row.kind == "refused":
        raise refused(name, f"Pipeline has no {name}: {row.note}")
    return partial(_do_nothing, name)


def drops(name: str, value: object) -> bool:
    """Whether an assignment to an attribute asks for what is the case, and is to be left out.

    Raises `RefusedError` where nothing would follow from it, as from `pipe.safety_checker = checker`.
    """
    row = ATTRIBUTES.get(name)
    if row is None or (row.kind != "refused" and name not in OFF + FIXED):
        return False
    if name not in FIXED and _asks_nothing(value):
        return True
    raise refused(name, f"{name} cannot be assigned {type(value).__name__!r}: {row.note}")


def check_options(table: Table, given: Mapping[str, object], known: Iterable[str]) -> None:
    """Arguments that no parameter took: those of a no-op are told once in the log, all others are errors.

    known: the parameters' names. Raises `UnknownArgumentError`, with a suggestion, and `ArgumentError` with the reason
    for what is refused; None and False ask for nothing.
    """
    for name, value in given.items():
        row = table.get(name)
        if row is None or row.kind == "supported":
            raise _unknown(name, value, table, known)
        if _asks_nothing(value):
            continue
        if row.kind == "refused":
            raise ArgumentError(f"{name} = {brief(value)}: {row.note}", field=name)
        _tell(name, row.note)


def tell(name: str, note: str | None = None) -> None:
    """Says in the log, once in a process, that an attribute does nothing, and why."""
    _tell(name, note or ATTRIBUTES[name].note)


_TOLD: dict[str, object] = {}


def _tell(name: str, note: str) -> None:
    mine = object()
    if _TOLD.setdefault(name, mine) is mine:  # one operation: of several threads one is the first
        log.warning("%s does nothing here: %s", name, note)


def _do_nothing(name: str, /, *_: Any, **__: Any) -> None:
    tell(name)


def refused(name: str, message: str) -> RefusedError:
    """The error of an attribute, with its name."""
    error = RefusedError(message, field=name)
    error.name = name  # or Python would suggest another attribute behind the reason
    return error


def _unknown(name: str, value: object, table: Table, known: Iterable[str]) -> UnknownArgumentError:
    names = list(known)
    called = name if len(name) <= LONGEST and name.isidentifier() else brief(name)
    meant = _meant(name, [*names, *_offered(table)]) or f"; there are {', '.join(names)}"
    return UnknownArgumentError(f"{called} = {brief(value)}: there is no such argument{meant}", field=called)


def _meant(name: str, names: Iterable[str]) -> str:
    """The question after what was probably meant; empty where nothing is near."""
    close = difflib.get_close_matches(name, dict.fromkeys(names), n=1) if len(name) <= LONGEST else []
    return f": did you mean {close[0]!r}?" if close else ""


def _offered(table: Table) -> list[str]:
    return [name for name, row in table.items() if row.kind != "refused" and not name.startswith("_")]


def _asks_nothing(value: object) -> bool:
    """None and False: the defaults of diffusers for all that is a no-op or refused here."""
    return value is None or value is False
