"""Files that are no Stable Diffusion checkpoint, and that people mistake for one: some names and real shapes of each.

Each is a sample after the module definition that its comment names; the relatives of Stable Diffusion are whole.
`says` is what an error about such a file should tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from tests.weights import originals
from tests.weights.originals import Named, Shape, Shapes, conv, cross_attention, linear, norm, res_block

Pairs = Iterable[tuple[str, Shape]]


@dataclass(frozen=True)
class Kind:
    says: str
    shapes: Shapes


KINDS: dict[str, Kind] = {}


def kind(name: str, says: str, *groups: Pairs) -> None:
    assert name not in KINDS
    KINDS[name] = Kind(says, {key: shape for group in groups for key, shape in group})


def under(prefix: str, *groups: Pairs) -> Iterator[tuple[str, Shape]]:
    return ((prefix + name, shape) for group in groups for name, shape in group)


def without(tensors: originals.Tensors, *prefixes: str) -> Pairs:
    return [(name, shape) for name, (shape, _) in tensors.items() if not name.startswith(prefixes)]


# Additions to a model: LoRA and its like.


def low_rank(module: str, c_in: int, c_out: int, down: str, up: str, rank: int = 16, kernel: Shape = ()) -> Named:
    yield f"{module}.{down}.weight", (rank, c_in, *kernel)
    yield f"{module}.{up}.weight", (c_out, rank, *kernel)


def kohya(module: str, c_in: int, c_out: int, *, rank: int = 16, kernel: Shape = ()) -> Named:
    yield f"{module}.alpha", ()
    yield from low_rank(module, c_in, c_out, "lora_down", "lora_up", rank, kernel)


def peft(module: str, c_in: int, c_out: int) -> Named:
    return low_rank(module, c_in, c_out, "lora_A", "lora_B")


_KOHYA_BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
_HUB_BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"

# kohya-ss/sd-scripts: networks/lora.py
kind(
    "kohya LoRA",
    "LoRA",
    kohya("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, 3072),
    kohya("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768),
    kohya("lora_unet_down_blocks_0_attentions_0_proj_in", 320, 320, kernel=(1, 1)),
    kohya(f"{_KOHYA_BLOCK}_attn1_to_q", 320, 320),
    kohya(f"{_KOHYA_BLOCK}_attn2_to_k", 768, 320),
    kohya(f"{_KOHYA_BLOCK}_ff_net_0_proj", 320, 2560),
)
kind(
    "kohya LoRA of SDXL",
    "LoRA",
    kohya("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 768, 768),
    kohya("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", 1280, 1280),
    kohya("lora_unet_input_blocks_4_1_proj_in", 640, 640),
    kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, 640),
    kohya("lora_unet_middle_block_1_transformer_blocks_9_ff_net_2", 5120, 1280),
)
kind("kohya LoRA of Flux", "LoRA", kohya("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216))
# huggingface/diffusers: loaders/lora_pipeline.py, with the names of huggingface/peft
kind(
    "peft LoRA",
    "LoRA",
    peft("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 768, 768),
    peft(f"{_HUB_BLOCK}.attn1.to_q", 320, 320),
    peft(f"{_HUB_BLOCK}.attn2.to_k", 768, 320),
    peft(f"{_HUB_BLOCK}.attn2.to_out.0", 320, 320),
)
# huggingface/peft: PeftModel.save_pretrained, adapter_model.safetensors
kind(
    "raw peft LoRA",
    "LoRA",
    peft("base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 320, 320),
    peft("base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 768, 1280),
)
kind(
    "peft LoRA of Flux",
    "LoRA",
    peft("transformer.transformer_blocks.0.attn.to_q", 3072, 3072),
    peft("transformer.single_transformer_blocks.0.proj_mlp", 3072, 12288),
)
# huggingface/diffusers before 0.22: models/attention_processor.py (LoRAAttnProcessor)
kind(
    "LoRA of attention processors",
    "LoRA",
    low_rank(f"{_HUB_BLOCK}.attn1.processor.to_q_lora", 320, 320, "down", "up", 4),
    low_rank(f"{_HUB_BLOCK}.attn2.processor.to_k_lora", 768, 320, "down", "up", 4),
)
# KohakuBlueleaf/LyCORIS: lycoris/modules/locon.py, loha.py, lokr.py, full.py; DoRA is an option of each (dora_scale)
_CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
kind(
    "LoCon",
    "LoRA",
    kohya(_CONV, 320, 320, rank=8, kernel=(1, 1)),
    [(f"{_CONV}.lora_mid.weight", (8, 8, 3, 3))],
    kohya("lora_unet_down_blocks_0_downsamplers_0_conv", 320, 320, rank=8, kernel=(1, 1)),
)
kind(
    "LoHa",
    "LoRA",
    [
        (f"{_KOHYA_BLOCK}_attn2_to_k.alpha", ()),
        (f"{_KOHYA_BLOCK}_attn2_to_k.hada_w1_a", (320, 8)),
        (f"{_KOHYA_BLOCK}_attn2_to_k.hada_w1_b", (8, 768)),
        (f"{_KOHYA_BLOCK}_attn2_to_k.hada_w2_a", (320, 8)),
        (f"{_KOHYA_BLOCK}_attn2_to_k.hada_w2_b", (8, 768)),
    ],
)
kind(
    "LoKr",
    "LoRA",
    [
        (f"{_KOHYA_BLOCK}_attn1_to_q.alpha", ()),
        (f"{_KOHYA_BLOCK}_attn1_to_q.lokr_w1", (16, 16)),
        (f"{_KOHYA_BLOCK}_attn1_to_q.lokr_w2_a", (20, 8)),
        (f"{_KOHYA_BLOCK}_attn1_to_q.lokr_w2_b", (8, 20)),
    ],
)
kind(
    "DoRA",
    "LoRA",
    kohya(f"{_KOHYA_BLOCK}_attn1_to_q", 320, 320),
    [(f"{_KOHYA_BLOCK}_attn1_to_q.dora_scale", (1, 320))],
)
kind("LyCORIS of whole weights", "LoRA", [(f"{_KOHYA_BLOCK}_attn1_to_q.diff", (320, 320))])

# AUTOMATIC1111/stable-diffusion-webui: modules/textual_inversion/textual_inversion.py; the last as diffusers saves it
kind("textual inversion", "textual inversion", [("emb_params", (8, 768))])
kind("textual inversion of a pickle", "textual inversion", [("string_to_param.*", (1, 768)), ("string_to_token.*", ())])
kind("textual inversion of SDXL", "textual inversion", [("clip_g", (8, 1280)), ("clip_l", (8, 768))])
kind("textual inversion of the hub", "textual inversion", [("<cat-toy>", (768,))])

# AUTOMATIC1111/stable-diffusion-webui: modules/hypernetworks/hypernetwork.py; the file has a pair for each width
kind(
    "hypernetwork",
    "hypernetwork",
    *(
        linear(f"{width}.{i}.linear.{layer}", c_in * width, c_out * width)
        for width in (320, 640, 768, 1280)
        for i in (0, 1)
        for layer, c_in, c_out in ((0, 1, 2), (1, 2, 1))
    ),
)

# Additions to a model: networks beside it.


def controlnet() -> Named:
    """lllyasviel/ControlNet: cldm/cldm.py (ControlNet), the half of the U-Net that goes down."""
    for name, shape in originals.unet(originals.SD15_UNET):
        if not name.startswith(("output_blocks.", "out.")):
            yield name, shape
    hint = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    for i, (c_in, c_out) in enumerate(pairwise(hint)):
        yield from conv(f"input_hint_block.{2 * i}", c_in, c_out, 3)
    for i, channels in enumerate((320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280)):
        yield from conv(f"zero_convs.{i}.0", channels, channels, 1)
    yield from conv("middle_block_out.0", 1280, 1280, 1)


kind("ControlNet", "ControlNet", under("control_model.", controlnet()))
kind("bare ControlNet", "ControlNet", controlnet())
kind("ControlNet with its model", "ControlNet", without(originals.SD15), under("control_model.", controlnet()))


def hub_controlnet() -> Named:
    """huggingface/diffusers: models/controlnets/controlnet.py (ControlNetModel)"""
    yield from conv("conv_in", 4, 320, 3)
    yield from linear("time_embedding.linear_1", 320, 1280)
    yield from conv("controlnet_cond_embedding.conv_in", 3, 16, 3)
    yield from conv("controlnet_cond_embedding.blocks.0", 16, 16, 3)
    yield from conv("controlnet_cond_embedding.conv_out", 256, 320, 3)
    yield from conv("controlnet_down_blocks.0", 320, 320, 1)
    yield from conv("controlnet_mid_block", 1280, 1280, 1)
    yield from norm("mid_block.resnets.0.norm1", 1280)


kind("ControlNet of the hub", "ControlNet", hub_controlnet(), norm("down_blocks.0.attentions.0.norm", 320))
kind(
    "ControlNet of the hub for SDXL",
    "ControlNet",
    hub_controlnet(),
    linear("add_embedding.linear_1", 2816, 1280),
    linear("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k", 640, 640, bias=False),
)
# stabilityai/control-lora; comfyanonymous/ComfyUI: comfy/controlnet.py (ControlLora)
kind(
    "Control-LoRA",
    "Control-LoRA",
    [
        ("lora_controlnet", (0,)),
        ("input_blocks.1.0.in_layers.2.up", (320, 128, 1, 1)),
        ("input_blocks.1.0.in_layers.2.down", (128, 320, 3, 3)),
        ("input_blocks.4.1.transformer_blocks.0.attn1.to_q.up", (640, 128)),
        ("input_blocks.4.1.transformer_blocks.0.attn1.to_q.down", (128, 640)),
    ],
    conv("input_blocks.0.0", 4, 320, 3),
    conv("input_hint_block.0", 3, 16, 3),
    conv("zero_convs.0.0", 320, 320, 1),
    linear("label_emb.0.0", 2816, 1280),
)
# TencentARC/T2I-Adapter: ldm/modules/encoders/adapter.py (Adapter with ksize 1 and sk, Adapter_light)
kind(
    "T2I-Adapter",
    "T2I-Adapter",
    conv("conv_in", 192, 320, 3),
    conv("body.0.block1", 320, 320, 3),
    conv("body.0.block2", 320, 320, 1),
    conv("body.2.in_conv", 320, 640, 1),
    conv("body.2.block1", 640, 640, 3),
)
kind(
    "light T2I-Adapter",
    "T2I-Adapter",
    conv("body.0.in_conv", 192, 80, 1),
    conv("body.0.body.0.block1", 80, 80, 3),
    conv("body.0.body.0.block2", 80, 80, 3),
    conv("body.0.out_conv", 80, 320, 1),
)
# huggingface/diffusers: models/adapter.py (T2IAdapter)
kind(
    "T2I-Adapter of the hub",
    "T2I-Adapter",
    conv("adapter.conv_in", 768, 320, 3),
    conv("adapter.body.0.resnets.0.block1", 320, 320, 3),
    conv("adapter.body.0.resnets.0.block2", 320, 320, 1),
    conv("adapter.body.1.in_conv", 320, 640, 1),
)
# tencent-ailab/IP-Adapter: ip_adapter/ip_adapter.py, resampler.py
_IP_LAYERS = [(f"ip_adapter.{i}.to_{part}_ip.weight", (320, 768)) for i in (1, 3) for part in "kv"]
kind(
    "IP-Adapter",
    "IP-Adapter",
    linear("image_proj.proj", 1024, 3072),
    norm("image_proj.norm", 768),
    _IP_LAYERS,
)
kind(
    "IP-Adapter plus",
    "IP-Adapter",
    [("image_proj.latents", (1, 16, 768))],
    linear("image_proj.proj_in", 1280, 768),
    linear("image_proj.proj_out", 768, 768),
    linear("image_proj.layers.0.0.to_q", 768, 768, bias=False),
    _IP_LAYERS,
)


def motion_module(name: str, channels: int, frames: int) -> Named:
    """guoyww/AnimateDiff: animatediff/models/motion_module.py (TemporalTransformer3DModel)"""
    name = f"{name}.temporal_transformer"
    yield from norm(f"{name}.norm", channels)
    yield from linear(f"{name}.proj_in", channels, channels)
    block = f"{name}.transformer_blocks.0"
    for i in (0, 1):
        yield from cross_attention(f"{block}.attention_blocks.{i}", channels, channels)
        yield f"{block}.attention_blocks.{i}.pos_encoder.pe", (1, frames, channels)
        yield from norm(f"{block}.norms.{i}", channels)
    yield from linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
    yield from norm(f"{block}.ff_norm", channels)


_MOTION = (("down_blocks.0.motion_modules.0", 320), ("up_blocks.2.motion_modules.0", 640))
kind("AnimateDiff", "AnimateDiff", *(motion_module(name, channels, 24) for name, channels in _MOTION))
kind(
    "AnimateDiff 2",
    "AnimateDiff",
    *(motion_module(name, channels, 32) for name, channels in _MOTION),
    motion_module("mid_block.motion_modules.0", 1280, 32),
)
kind(
    "AnimateDiff trained in parallel",
    "AnimateDiff",
    *(under("module.", motion_module(name, channels, 32)) for name, channels in _MOTION),
)

# Parts of a model.

# CompVis/stable-diffusion: ldm/models/autoencoder.py, with what was trained beside it: ldm/modules/losses/
# contperceptual.py (LPIPSWithDiscriminator)
kind(
    "autoencoder",
    "autoencoder",
    originals.vae(),
    [
        ("loss.logvar", ()),
        ("loss.perceptual_loss.scaling_layer.shift", (1, 3, 1, 1)),
        ("loss.perceptual_loss.lin0.model.1.weight", (1, 64, 1, 1)),
        ("model_ema.decay", ()),
        ("model_ema.num_updates", ()),
    ],
    conv("loss.perceptual_loss.net.slice1.0", 3, 64, 3),
    conv("loss.discriminator.main.0", 3, 64, 4),
)
kind("autoencoder with its prefix", "autoencoder", under("first_stage_model.", originals.vae()))
# huggingface/diffusers: models/autoencoders/autoencoder_kl.py
kind(
    "autoencoder of the hub",
    "autoencoder",
    conv("encoder.conv_in", 3, 128, 3),
    norm("encoder.down_blocks.0.resnets.0.norm1", 128),
    conv("encoder.down_blocks.0.downsamplers.0.conv", 128, 128, 3),
    linear("encoder.mid_block.attentions.0.to_q", 512, 512),
    conv("decoder.conv_in", 4, 512, 3),
    norm("decoder.up_blocks.0.resnets.0.norm1", 512),
    linear("decoder.mid_block.attentions.0.to_out.0", 512, 512),
    conv("quant_conv", 8, 8, 1),
    conv("post_quant_conv", 4, 4, 1),
)


def tiny_block(name: str) -> Named:
    for i in (0, 2, 4):
        yield from conv(f"{name}.conv.{i}", 64, 64, 3)


# madebyollin/taesd: taesd.py; each half is a file of its own, an nn.Sequential
kind(
    "TAESD decoder",
    "TAESD",
    conv("1", 4, 64, 3),
    *map(tiny_block, "345"),
    [("7.weight", (64, 64, 3, 3))],
    tiny_block("18"),
    conv("19", 64, 3, 3),
)
kind(
    "TAESD encoder",
    "TAESD",
    conv("0", 3, 64, 3),
    tiny_block("1"),
    [("2.weight", (64, 64, 3, 3))],
    *map(tiny_block, "345"),
    conv("14", 64, 4, 3),
)
# huggingface/diffusers: models/autoencoders/autoencoder_tiny.py
kind(
    "TAESD of the hub",
    "TAESD",
    conv("encoder.layers.0", 3, 64, 3),
    tiny_block("encoder.layers.1"),
    conv("decoder.layers.0", 4, 64, 3),
    tiny_block("decoder.layers.2"),
)
# huggingface/transformers: models/clip/modeling_clip.py, and mlfoundations/open_clip: src/open_clip/model.py
kind("CLIP text encoder", "text encoder", originals.clip_l(), [("text_model.embeddings.position_ids", (1, 77))])
kind("CLIP text encoder with its prefix", "text encoder", under("cond_stage_model.transformer.", originals.clip_l()))
kind("OpenCLIP text encoder", "text encoder", originals.vit_h())
# huggingface/transformers: models/t5/modeling_t5.py
kind(
    "T5 text encoder",
    "text encoder",
    [("shared.weight", (32128, 4096)), ("encoder.final_layer_norm.weight", (4096,))],
    linear("encoder.block.0.layer.0.SelfAttention.q", 4096, 4096, bias=False),
    [("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 64))],
    linear("encoder.block.0.layer.1.DenseReluDense.wi_0", 4096, 10240, bias=False),
)
# huggingface/transformers: models/clip/modeling_clip.py (CLIPVisionModelWithProjection)
kind(
    "CLIP image encoder",
    "image encoder",
    [
        ("vision_model.embeddings.class_embedding", (1280,)),
        ("vision_model.embeddings.patch_embedding.weight", (1280, 3, 14, 14)),
        ("vision_model.embeddings.position_embedding.weight", (257, 1280)),
        ("visual_projection.weight", (1024, 1280)),
    ],
    norm("vision_model.pre_layrnorm", 1280),
    linear("vision_model.encoder.layers.0.self_attn.q_proj", 1280, 1280),
)
# huggingface/diffusers: models/unets/unet_2d_condition.py
kind(
    "U-Net of the hub",
    "diffusers",
    conv("conv_in", 4, 320, 3),
    linear("time_embedding.linear_1", 320, 1280),
    norm("down_blocks.0.resnets.0.norm1", 320),
    linear("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 768, 320, bias=False),
    norm("mid_block.resnets.0.norm1", 1280),
    norm("up_blocks.0.resnets.0.norm1", 2560),
    norm("conv_norm_out", 320),
)

# Relatives of Stable Diffusion, with a U-Net of the same names.


def sd(model: originals.UNet, text: Pairs, first_stage: Pairs | None = None) -> Named:
    yield from originals.shapes(originals.SCHEDULE).items()
    yield from under("model.diffusion_model.", originals.unet(model))
    yield from under("first_stage_model.", originals.vae() if first_stage is None else first_stage)
    yield from text


_VIT_H = list(under("cond_stage_model.model.", originals.vit_h()))

# Stability-AI/stablediffusion: configs/stable-diffusion/v2-midas-inference.yaml, ldm/modules/midas/midas/dpt_depth.py
kind(
    "SD 2 depth",
    "depth",
    sd(replace(originals.SD21_UNET, in_channels=5), _VIT_H),
    [
        ("depth_model.model.pretrained.model.cls_token", (1, 1, 768)),
        ("depth_model.model.pretrained.model.pos_embed", (1, 577, 768)),
        ("depth_model.model.scratch.layer1_rn.weight", (256, 256, 3, 3)),
    ],
    linear("depth_model.model.pretrained.model.blocks.0.attn.qkv", 768, 2304),
)
# Stability-AI/stablediffusion: configs/stable-diffusion/v2-1-stable-unclip-h-inference.yaml (ImageEmbeddingConditioned-
# LatentDiffusion); the noise has a schedule of its own: ldm/modules/diffusionmodules/upscaling.py
_NOISE = [(name, shape) for name, (shape, _) in originals.SCHEDULE.items() if not name.startswith("posterior_")]
kind(
    "SD 2 unCLIP",
    "unCLIP",
    sd(replace(originals.SD21_UNET, vector=2048), _VIT_H),
    under("noise_augmentor.", _NOISE),
    [
        ("embedder.model.logit_scale", ()),
        ("embedder.model.visual.class_embedding", (1280,)),
        ("embedder.model.visual.proj", (1280, 1024)),
        ("embedder.model.visual.conv1.weight", (1280, 3, 14, 14)),
    ],
)


def upscaler() -> Named:
    """Stability-AI/stablediffusion: configs/stable-diffusion/x4-upscaling.yaml; with disable_self_attentions, both
    attentions read the text."""
    model = originals.UNet(7, 256, (1, 2, 2, 4), depth=(0, 1, 1, 1), middle_depth=1, context=1024, linear=True)
    for name, shape in sd(model, _VIT_H, originals.vae(channel_mult=(1, 2, 4))):
        yield name, (shape[0], 1024) if name.endswith((".attn1.to_k.weight", ".attn1.to_v.weight")) else shape
    yield "model.diffusion_model.label_emb.weight", (1000, 1024)
    yield from under("low_scale_model.", _NOISE)


kind("SD 2 upscaler", "upscaler", upscaler())
# stabilityai/sd-x2-latent-upscaler in crowsonkb/k-diffusion: k_diffusion/models/image_v1.py (ImageDenoiserModelV1)
kind(
    "latent upscaler",
    "upscaler",
    [("inner_model.timestep_embed.weight", (512, 1)), ("inner_model.mapping.main.0.weight", (1024, 1024))],
    conv("inner_model.proj_in", 9, 384, 1),
    conv("inner_model.u_net.d_blocks.0.0.main.2", 384, 384, 3),
    conv("inner_model.u_net.u_blocks.0.0.main.2", 768, 768, 3),
    conv("inner_model.proj_out", 384, 4, 1),
)


def video() -> Named:
    """Stability-AI/generative-models: scripts/sampling/configs/svd.yaml, sgm/modules/diffusionmodules/video_model.py"""
    unet = originals.unet(replace(originals.SD21_UNET, in_channels=8, vector=768))
    yield from under("model.diffusion_model.", unet)
    block = "model.diffusion_model.input_blocks.1"
    yield from norm(f"{block}.0.time_stack.in_layers.0", 320)
    yield f"{block}.0.time_stack.in_layers.2.weight", (320, 320, 3, 1, 1)
    yield f"{block}.0.time_mixer.mix_factor", (1,)
    yield from cross_attention(f"{block}.1.time_stack.0.attn1", 320, 320)
    yield from linear(f"{block}.1.time_pos_embed.0", 320, 1280)
    yield f"{block}.1.time_mixer.mix_factor", (1,)
    yield "conditioner.embedders.0.open_clip.model.visual.conv1.weight", (1280, 3, 14, 14)
    yield from conv("conditioner.embedders.3.encoder.encoder.conv_in", 3, 128, 3)
    yield from under("first_stage_model.", (pair for pair in originals.vae() if "quant_conv" not in pair[0]))
    yield "first_stage_model.decoder.up.0.block.0.time_stack.in_layers.2.weight", (128, 128, 3, 1, 1)


kind("Stable Video Diffusion", "Stable Video Diffusion", video())


def vq(codes: int, channels: int, width: int = 128, channel_mult: tuple[int, ...] = (1, 2, 4)) -> Named:
    """CompVis/latent-diffusion: ldm/models/autoencoder.py (VQModel): the encoder's last layer has no variance."""
    for name, shape in originals.vae(width, channel_mult, latent=channels):
        if name.startswith("encoder.conv_out."):
            yield name, (channels, *shape[1:])
        elif not name.startswith("quant_conv."):
            yield name, shape
    yield from conv("quant_conv", channels, channels, 1)
    yield "quantize.embedding.weight", (codes, channels)


def latent_diffusion_of_2021(model: originals.UNet, first_stage: Pairs) -> Named:
    """CompVis/latent-diffusion, before text: latents of three channels, and `out` back to them."""
    for name, shape in sd(model, [], first_stage):
        yield name, (model.in_channels, *shape[1:]) if name.startswith("model.diffusion_model.out.2.") else shape


def attention_block(name: str, channels: int) -> Named:
    """AttentionBlock of ldm/modules/diffusionmodules/openaimodel.py: attention without text."""
    yield from norm(f"{name}.norm", channels)
    yield f"{name}.qkv.weight", (3 * channels, channels, 1)
    yield f"{name}.qkv.bias", (3 * channels,)
    yield f"{name}.proj_out.weight", (channels, channels, 1)
    yield f"{name}.proj_out.bias", (channels,)


# CompVis/latent-diffusion: configs/latent-diffusion/cin256-v2.yaml
kind(
    "LDM of ImageNet's classes",
    "class-conditional",
    latent_diffusion_of_2021(
        originals.UNet(3, 192, (1, 2, 3, 5), depth=(0, 1, 1, 1), middle_depth=1, context=512, linear=False),
        vq(8192, 3),
    ),
    [("cond_stage_model.embedding.weight", (1001, 512))],
)


def faces() -> Named:
    """CompVis/latent-diffusion: configs/latent-diffusion/celebahq-ldm-vq-4.yaml"""
    model = originals.UNet(3, 224, (1, 2, 3, 4), depth=(0, 1, 1, 1), middle_depth=1, context=1, linear=False)
    for name, shape in latent_diffusion_of_2021(model, vq(8192, 3)):
        if name.endswith(".1.norm.weight") and name.startswith("model."):
            yield from attention_block(name.removesuffix(".norm.weight"), shape[0])
        elif not re.search(r"\.1\.(norm|proj_in|proj_out|transformer_blocks)\.", name):
            yield name, shape


kind("LDM of faces", "latent diffusion", faces())
# CompVis/latent-diffusion: configs/latent-diffusion/txt2img-1p4B-eval.yaml, ldm/modules/x_transformer.py
kind(
    "LDM of text with BERT",
    "BERT",
    sd(replace(originals.SD15_UNET, context=1280), []),
    [
        ("cond_stage_model.transformer.token_emb.weight", (30522, 1280)),
        ("cond_stage_model.transformer.pos_emb.emb.weight", (77, 1280)),
        ("cond_stage_model.transformer.attn_layers.layers.0.1.to_q.weight", (512, 1280)),
    ],
    norm("cond_stage_model.transformer.attn_layers.layers.0.0", 1280),
    linear("cond_stage_model.transformer.to_logits", 1280, 30522),
)
# CompVis/latent-diffusion: models/ldm/semantic_synthesis256/config.yaml (SpatialRescaler)
kind(
    "LDM of semantic maps",
    "semantic",
    under("model.diffusion_model.", conv("input_blocks.0.0", 6, 128, 3), res_block("input_blocks.1.0", 128, 128, 512)),
    under("model.diffusion_model.", attention_block("middle_block.1", 1024), conv("out.2", 128, 3, 3)),
    [("cond_stage_model.channel_mapper.weight", (3, 182, 1, 1))],
    under("first_stage_model.", vq(8192, 3)),
)
# CompVis/taming-transformers: taming/models/vqgan.py; configs of VQ-f16 with 16384 codes
kind(
    "vector-quantised autoencoder",
    "vector-quantised",
    vq(16384, 256, channel_mult=(1, 1, 2, 2, 4)),
    conv("loss.discriminator.main.0", 3, 64, 4),
)


def distilled(model: originals.UNet, depths: dict[str, int], middle: tuple[str, ...] = ()) -> Named:
    """A U-Net with fewer transformer blocks here and there (depths), and of the middle no more than `middle`."""
    for name, shape in originals.unet(model):
        found = re.match(r"(\w+\.\d+)\.(?:1\.transformer_blocks\.(\d+))?", name)
        assert found is not None
        block, depth = found.groups()
        if block.startswith("middle_block.") and block not in middle:
            continue
        if depth is None or int(depth) < depths.get(block, 99):
            yield f"model.diffusion_model.{name}", shape


# segmind/SSD-1B and etri-vilab/koala-700m; comfyanonymous/ComfyUI: comfy/model_detection.py (SSD_1B, KOALA_700M)
_SSD_1B_DEPTHS = {"input_blocks.7": 4, "input_blocks.8": 4, "output_blocks.0": 4, "output_blocks.1": 4}
_SSD_1B_DEPTHS |= {"output_blocks.4": 1, "output_blocks.5": 1}
kind(
    "SSD-1B",
    "distilled",
    without(originals.SDXL_BASE, "model."),
    distilled(originals.SDXL_UNET, _SSD_1B_DEPTHS, ("middle_block.0",)),
)
kind(
    "KOALA",
    "distilled",
    without(originals.SDXL_BASE, "model."),
    distilled(replace(originals.SDXL_UNET, res_blocks=1, depth=(0, 2, 5)), {}),
)
# segmind/tiny-sd, after Nota-NetsPresso/BK-SDM (BK-SDM-Tiny)
kind(
    "tiny-SD",
    "distilled",
    without(originals.SD15, "model."),
    distilled(replace(originals.SD15_UNET, channel_mult=(1, 2, 4), depth=(1, 1, 1), res_blocks=1), {}),
)

_SDXL = originals.shapes(originals.SDXL_BASE).items()
# stabilityai/cosxl and playgroundai/playground-v2.5-1024px-aesthetic; comfyanonymous/ComfyUI: comfy/supported_models.py
kind("CosXL", "EDM", _SDXL, [("edm_vpred.sigma_max", ()), ("edm_vpred.sigma_min", ())])
kind("Playground v2.5", "EDM", _SDXL, [("edm_mean", (1, 4, 1, 1)), ("edm_std", (1, 4, 1, 1))])


def text_block(name: str, channels: int, text: int) -> Named:
    yield from attention_block(name, channels)
    yield f"{name}.encoder_kv.weight", (2 * channels, text, 1)
    yield f"{name}.encoder_kv.bias", (2 * channels,)


# deep-floyd/IF: deepfloyd_if/model/unet.py (IF-I-XL)
kind(
    "DeepFloyd IF",
    "DeepFloyd IF",
    conv("input_blocks.0.0", 3, 704, 3),
    linear("time_embed.0", 704, 2816),
    norm("input_blocks.1.0.in_layers.0", 704),
    conv("input_blocks.1.0.in_layers.2", 704, 704, 3),
    linear("input_blocks.1.0.emb_layers.1", 2816, 1408),
    text_block("input_blocks.5.1", 1408, 2816),
    norm("input_blocks.5.1.norm_encoder", 2816),
    text_block("middle_block.1", 2816, 2816),
    conv("out.2", 704, 6, 3),
    norm("encoder_pooling.0", 4096),
    [("encoder_pooling.1.positional_embedding", (1, 4096))],
    linear("encoder_pooling.2", 4096, 2816),
    linear("encoder_proj", 4096, 2816),
)
# ai-forever/Kandinsky-2: kandinsky2/model/text2im_model2_1.py (Text2ImUNet)
kind(
    "Kandinsky 2",
    "Kandinsky",
    conv("input_blocks.0.0", 4, 384, 3),
    linear("time_embed.0", 384, 1536),
    text_block("input_blocks.5.1", 768, 768),
    text_block("middle_block.1", 1536, 768),
    conv("out.2", 384, 8, 3),
    linear("clip_to_seq", 768, 7680),
    linear("to_model_dim_n", 1024, 768),
    linear("proj_n", 768, 1536),
    norm("ln_model_n", 1536),
    linear("img_layer", 768, 1536),
)

# Transformers.


def mmdit(width: int, patches: int, blocks: int) -> Named:
    """Stability-AI/sd3.5: mmditx.py (MMDiTX)"""
    yield "pos_embed", (1, patches, width)
    yield from conv("x_embedder.proj", 16, width, 2)
    yield from linear("t_embedder.mlp.0", 256, width)
    yield from linear("y_embedder.mlp.0", 2048, width)
    yield from linear("context_embedder", 4096, width)
    for i in (0, blocks - 1):
        block = f"joint_blocks.{i}"
        yield from linear(f"{block}.context_block.attn.qkv", width, 3 * width)
        yield from linear(f"{block}.context_block.adaLN_modulation.1", width, (2 if i else 6) * width)
        yield from linear(f"{block}.x_block.attn.qkv", width, 3 * width)
        yield from linear(f"{block}.x_block.mlp.fc1", width, 4 * width)
        yield from linear(f"{block}.x_block.adaLN_modulation.1", width, 6 * width)
    yield from linear("final_layer.linear", width, 64)


kind("SD 3 transformer", "Stable Diffusion 3", mmdit(1536, 36864, 24))
kind(
    "SD 3 medium",
    "Stable Diffusion 3",
    under("model.diffusion_model.", mmdit(1536, 36864, 24)),
    under("first_stage_model.", originals.vae(latent=16)),
    under("text_encoders.clip_l.transformer.", originals.clip_l()),
    [("text_encoders.clip_l.logit_scale", ()), ("text_encoders.t5xxl.transformer.shared.weight", (32128, 4096))],
)
kind(
    "SD 3.5 large",
    "Stable Diffusion 3",
    under("model.diffusion_model.", mmdit(2432, 36864, 38)),
    [("model.diffusion_model.joint_blocks.0.x_block.attn.ln_q.weight", (64,))],
    under("first_stage_model.", originals.vae(latent=16)),
)


def flux() -> Named:
    """black-forest-labs/flux: src/flux/model.py (FLUX.1)"""
    yield from linear("img_in", 64, 3072)
    yield from linear("txt_in", 4096, 3072)
    yield from linear("time_in.in_layer", 256, 3072)
    yield from linear("guidance_in.in_layer", 256, 3072)
    yield from linear("vector_in.in_layer", 768, 3072)
    yield from linear("double_blocks.0.img_attn.qkv", 3072, 9216)
    yield "double_blocks.0.img_attn.norm.key_norm.scale", (128,)
    yield from linear("double_blocks.0.txt_mlp.0", 3072, 12288)
    yield from linear("double_blocks.0.img_mod.lin", 3072, 18432)
    yield from linear("single_blocks.0.linear1", 3072, 21504)
    yield from linear("single_blocks.0.modulation.lin", 3072, 9216)
    yield from linear("final_layer.linear", 3072, 64)


kind("Flux", "Flux", flux())
kind("Flux with its prefix", "Flux", under("model.diffusion_model.", flux()))
# lodestone-rock/flow: src/models/chroma/model.py
kind(
    "Chroma",
    "Flux",
    linear("distilled_guidance_layer.in_proj", 64, 5120),
    linear("distilled_guidance_layer.layers.0.in_layer", 5120, 5120),
    [("distilled_guidance_layer.norms.0.scale", (5120,)), ("double_blocks.0.img_attn.norm.key_norm.scale", (128,))],
    linear("double_blocks.0.img_attn.qkv", 3072, 9216),
    linear("single_blocks.0.linear1", 3072, 21504),
)
# cloneofsimo/minRF: advanced/mmdit.py (AuraFlow)
kind(
    "AuraFlow",
    "AuraFlow",
    [("positional_encoding", (1, 4096, 3072)), ("register_tokens", (1, 8, 3072))],
    linear("init_x_linear", 16, 3072),
    linear("cond_seq_linear", 2048, 3072, bias=False),
    linear("t_embedder.mlp.0", 256, 3072),
    linear("double_layers.0.attn.w1q", 3072, 3072, bias=False),
    linear("double_layers.0.attn.w2q", 3072, 3072, bias=False),
    linear("double_layers.0.modC.1", 3072, 18432, bias=False),
    linear("single_layers.0.attn.w1q", 3072, 3072, bias=False),
    linear("modF.1", 3072, 6144, bias=False),
    linear("final_linear", 3072, 16, bias=False),
)
# PixArt-alpha/PixArt-alpha: diffusion/model/nets/PixArtMS.py
kind(
    "PixArt",
    "PixArt",
    [("pos_embed", (1, 4096, 1152)), ("y_embedder.y_embedding", (120, 4096))],
    conv("x_embedder.proj", 4, 1152, 2),
    linear("t_embedder.mlp.0", 256, 1152),
    linear("t_block.1", 1152, 6912),
    linear("y_embedder.y_proj.fc1", 4096, 1152),
    linear("csize_embedder.mlp.0", 256, 384),
    [("blocks.0.scale_shift_table", (6, 1152))],
    linear("blocks.0.attn.qkv", 1152, 3456),
    linear("blocks.0.cross_attn.q_linear", 1152, 1152),
    linear("blocks.0.cross_attn.kv_linear", 1152, 2304),
    linear("final_layer.linear", 1152, 32),
)
# NVlabs/Sana: diffusion/model/nets/sana_multi_scale.py
kind(
    "Sana",
    "Sana",
    conv("x_embedder.proj", 32, 2240, 1),
    linear("t_block.1", 2240, 13440),
    linear("y_embedder.y_proj.fc1", 2304, 2240),
    [("attention_y_norm.weight", (2240,)), ("blocks.0.scale_shift_table", (6, 2240))],
    linear("blocks.0.attn.qkv", 2240, 6720, bias=False),
    linear("blocks.0.cross_attn.q_linear", 2240, 2240),
    linear("blocks.0.cross_attn.kv_linear", 2240, 4480),
    conv("blocks.0.mlp.inverted_conv.conv", 2240, 11200, 1),
    linear("final_layer.linear", 2240, 32),
)
# Tencent/HunyuanDiT: hydit/modules/models.py (DiT-g/2)
kind(
    "HunyuanDiT",
    "HunyuanDiT",
    [("text_embedding_padding", (333, 1024)), ("style_embedder.weight", (1, 1408))],
    linear("mlp_t5.0", 2048, 8192),
    linear("mlp_t5.2", 8192, 1024),
    [("pooler.positional_embedding", (257, 2048))],
    linear("pooler.k_proj", 2048, 2048),
    conv("x_embedder.proj", 4, 1408, 2),
    linear("t_embedder.mlp.0", 256, 1408),
    linear("extra_embedder.0", 3968, 5632),
    linear("blocks.0.attn1.Wqkv", 1408, 4224),
    linear("blocks.0.default_modulation.1", 1408, 1408),
    linear("final_layer.linear", 1408, 32),
)
# Stability-AI/StableCascade: modules/stage_c.py, stage_b.py
kind(
    "Stable Cascade, stage C",
    "Stable Cascade",
    linear("clip_txt_mapper", 1280, 2048),
    linear("clip_txt_pooled_mapper", 1280, 8192),
    linear("clip_img_mapper", 768, 8192),
    conv("embedding.1", 16, 2048, 1),
    [("down_blocks.0.0.depthwise.weight", (2048, 1, 3, 3))],
    linear("down_blocks.0.0.channelwise.0", 2048, 8192),
    linear("down_blocks.0.1.mapper_crp", 64, 4096),
    linear("down_blocks.0.2.kv_mapper.1", 2048, 2048),
    conv("clf.1", 2048, 16, 1),
)
kind(
    "Stable Cascade, stage B",
    "Stable Cascade",
    conv("effnet_mapper.0", 16, 1280, 1),
    conv("pixels_mapper.0", 3, 1280, 1),
    linear("clip_mapper", 1280, 5120),
    conv("embedding.1", 16, 320, 1),
    linear("down_blocks.1.0.channelwise.0", 640, 2560),
    linear("down_blocks.0.1.mapper_sca", 64, 640),
    conv("clf.1", 320, 16, 1),
)
# Alpha-VLLM/Lumina-Image-2.0: models/model.py (NextDiT); Tongyi-MAI/Z-Image has the same names with other sizes
kind(
    "Lumina 2",
    "Lumina",
    [("cap_embedder.0.weight", (2304,)), ("norm_final.weight", (2304,))],
    linear("cap_embedder.1", 2304, 2304),
    linear("x_embedder", 64, 2304),
    linear("t_embedder.mlp.0", 256, 1024),
    linear("noise_refiner.0.attention.qkv", 2304, 3840, bias=False),
    linear("context_refiner.0.attention.qkv", 2304, 3840, bias=False),
    linear("layers.0.attention.qkv", 2304, 3840, bias=False),
    linear("layers.0.adaLN_modulation.1", 1024, 9216),
    linear("final_layer.linear", 2304, 64),
)
kind(
    "Z-Image",
    "Z-Image",
    [("cap_embedder.0.weight", (2560,)), ("cap_pad_token", (1, 3840)), ("x_pad_token", (1, 3840))],
    linear("cap_embedder.1", 2560, 3840),
    linear("x_embedder", 64, 3840),
    linear("context_refiner.0.attention.qkv", 3840, 11520, bias=False),
    linear("layers.0.attention.qkv", 3840, 11520, bias=False),
    linear("layers.0.adaLN_modulation.0", 256, 15360),
)
# QwenLM/Qwen-Image, in huggingface/diffusers: models/transformers/transformer_qwenimage.py
kind(
    "Qwen-Image",
    "Qwen-Image",
    [("txt_norm.weight", (3584,))],
    linear("img_in", 64, 3072),
    linear("txt_in", 3584, 3072),
    linear("transformer_blocks.0.img_mod.1", 3072, 18432),
    linear("transformer_blocks.0.attn.add_q_proj", 3072, 3072),
    linear("transformer_blocks.0.txt_mlp.net.0.proj", 3072, 12288),
)
# Wan-Video/Wan2.1: wan/modules/model.py (1.3B)
kind(
    "Wan",
    "video",
    [("patch_embedding.weight", (1536, 16, 1, 2, 2)), ("head.modulation", (1, 2, 1536))],
    linear("text_embedding.0", 4096, 1536),
    linear("time_projection.1", 1536, 9216),
    linear("blocks.0.self_attn.q", 1536, 1536),
    [("blocks.0.self_attn.norm_q.weight", (1536,)), ("blocks.0.modulation", (1, 6, 1536))],
    linear("blocks.0.cross_attn.k", 1536, 1536),
    [("blocks.0.cross_attn.norm_k.weight", (1536,))],
    linear("head.head", 1536, 64),
)
# Lightricks/LTX-Video: ltx_video/models/transformers/transformer3d.py
kind(
    "LTX-Video",
    "video",
    under(
        "model.diffusion_model.",
        linear("patchify_proj", 128, 2048),
        linear("adaln_single.emb.timestep_embedder.linear_1", 256, 2048),
        linear("caption_projection.linear_1", 4096, 2048),
        linear("transformer_blocks.0.attn1.to_q", 2048, 2048),
        [("transformer_blocks.27.scale_shift_table", (6, 2048)), ("scale_shift_table", (2, 2048))],
        linear("proj_out", 2048, 128),
    ),
    [("vae.decoder.up_blocks.9.res_blocks.0.conv1.conv.weight", (128, 128, 3, 3, 3))],
)
# Tencent/HunyuanVideo: hyvideo/modules/models.py
kind(
    "HunyuanVideo",
    "video",
    [("img_in.proj.weight", (3072, 16, 1, 2, 2))],
    linear("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1", 3072, 6144),
    linear("vector_in.in_layer", 768, 3072),
    linear("double_blocks.0.img_attn_qkv", 3072, 9216),
    linear("single_blocks.0.linear1", 3072, 21504),
)

# Not about making pictures from words at all.

# xinntao/Real-ESRGAN: basicsr/archs/rrdbnet_arch.py; xinntao/ESRGAN: the old names of RRDBNet
kind(
    "ESRGAN",
    "upscaler",
    under(
        "params_ema.",
        conv("conv_first", 3, 64, 3),
        conv("body.0.rdb1.conv1", 64, 32, 3),
        conv("body.22.rdb3.conv5", 192, 64, 3),
        conv("conv_up1", 64, 64, 3),
        conv("conv_last", 64, 3, 3),
    ),
)
kind("old ESRGAN", "upscaler", conv("model.0", 3, 64, 3), conv("model.1.sub.0.RDB1.conv1.0", 64, 32, 3))
# TencentARC/GFPGAN: gfpgan/archs/gfpganv1_clean_arch.py
kind(
    "GFPGAN",
    "faces",
    under(
        "params_ema.",
        conv("conv_body_first", 3, 32, 1),
        conv("conv_body_down.0.conv1", 32, 32, 3),
        linear("stylegan_decoder.style_mlp.1", 512, 512),
        [("stylegan_decoder.style_conv1.modulated_conv.weight", (1, 512, 512, 3, 3))],
    ),
)
# huggingface/transformers: models/llama/modeling_llama.py, models/gpt2/modeling_gpt2.py
kind(
    "Llama",
    "language model",
    [("model.embed_tokens.weight", (32000, 4096)), ("model.norm.weight", (4096,)), ("lm_head.weight", (32000, 4096))],
    linear("model.layers.0.self_attn.q_proj", 4096, 4096, bias=False),
    linear("model.layers.0.mlp.gate_proj", 4096, 11008, bias=False),
)
kind(
    "GPT-2",
    "language model",
    [("wte.weight", (50257, 768)), ("wpe.weight", (1024, 768)), ("h.0.attn.c_attn.weight", (768, 2304))],
    norm("h.0.ln_1", 768),
    norm("ln_f", 768),
)
# pytorch/vision: torchvision/models/resnet.py (resnet50)
kind(
    "ResNet",
    "image classifier",
    [("conv1.weight", (64, 3, 7, 7)), ("bn1.running_mean", (64,)), ("layer1.0.conv1.weight", (64, 64, 1, 1))],
    norm("layer1.0.bn1", 64),
    [("layer1.0.downsample.0.weight", (256, 64, 1, 1)), ("layer4.2.conv3.weight", (2048, 512, 1, 1))],
    linear("fc", 2048, 1000),
)
