"""The tensors of Stable Diffusion checkpoints as they were published: names, shapes, dtypes.

Written after the original module definitions, each named below, with the names that their constructors register. It
knows neither fastldm nor diffusers, so that it can judge what either makes of these names. CHECKPOINTS has all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]
Shapes = dict[str, Shape]
Tensors = dict[str, tuple[Shape, str]]  # the dtype as a safetensors header spells it

VOCABULARY, TOKENS = 49408, 77


def linear(name: str, c_in: int, c_out: int, *, bias: bool = True) -> Named:
    yield f"{name}.weight", (c_out, c_in)
    if bias:
        yield f"{name}.bias", (c_out,)


def conv(name: str, c_in: int, c_out: int, kernel: int) -> Named:
    yield f"{name}.weight", (c_out, c_in, kernel, kernel)
    yield f"{name}.bias", (c_out,)


def norm(name: str, channels: int) -> Named:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


# The U-Net. CompVis/stable-diffusion: ldm/modules/diffusionmodules/openaimodel.py (UNetModel) and
# ldm/modules/attention.py; the linear projections and the vector of conditions as in Stability-AI/generative-models:
# sgm/modules/diffusionmodules/openaimodel.py (use_linear_in_transformer, num_classes "sequential").


@dataclass(frozen=True)
class UNet:
    """depth: transformer blocks on each level, 0 for none. linear: whether the projections around them are linear
    layers, not convolutions. vector: the width of what `label_emb` reads, None without it."""

    in_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    depth: tuple[int, ...]
    middle_depth: int
    context: int
    linear: bool
    vector: int | None = None
    res_blocks: int = 2


def unet(model: UNet) -> Named:
    width = model.model_channels
    time = 4 * width
    yield from linear("time_embed.0", width, time)
    yield from linear("time_embed.2", time, time)
    if model.vector is not None:
        yield from linear("label_emb.0.0", model.vector, time)
        yield from linear("label_emb.0.2", time, time)
    yield from conv("input_blocks.0.0", model.in_channels, width, 3)

    skips, channels = [width], width
    levels = list(enumerate(zip(model.channel_mult, model.depth, strict=True)))
    for level, (mult, depth) in levels:
        for _ in range(model.res_blocks):
            name = f"input_blocks.{len(skips)}"
            yield from res_block(f"{name}.0", channels, mult * width, time)
            channels = mult * width
            yield from spatial_transformer(f"{name}.1", channels, depth, model)
            skips.append(channels)
        if level < len(levels) - 1:
            yield from conv(f"input_blocks.{len(skips)}.0.op", channels, channels, 3)
            skips.append(channels)

    yield from res_block("middle_block.0", channels, channels, time)
    yield from spatial_transformer("middle_block.1", channels, model.middle_depth, model)
    yield from res_block("middle_block.2", channels, channels, time)

    block = 0
    for level, (mult, depth) in reversed(levels):
        for i in range(model.res_blocks + 1):
            name = f"output_blocks.{block}"
            yield from res_block(f"{name}.0", channels + skips.pop(), mult * width, time)
            channels = mult * width
            yield from spatial_transformer(f"{name}.1", channels, depth, model)
            if level and i == model.res_blocks:
                yield from conv(f"{name}.{2 if depth else 1}.conv", channels, channels, 3)
            block += 1

    yield from norm("out.0", channels)
    yield from conv("out.2", channels, 4, 3)


def res_block(name: str, c_in: int, c_out: int, time: int) -> Named:
    yield from norm(f"{name}.in_layers.0", c_in)
    yield from conv(f"{name}.in_layers.2", c_in, c_out, 3)
    yield from linear(f"{name}.emb_layers.1", time, c_out)
    yield from norm(f"{name}.out_layers.0", c_out)
    yield from conv(f"{name}.out_layers.3", c_out, c_out, 3)
    if c_in != c_out:
        yield from conv(f"{name}.skip_connection", c_in, c_out, 1)


def spatial_transformer(name: str, channels: int, depth: int, model: UNet) -> Named:
    if not depth:
        return
    yield from norm(f"{name}.norm", channels)
    for side in ("proj_in", "proj_out"):
        if model.linear:
            yield from linear(f"{name}.{side}", channels, channels)
        else:
            yield from conv(f"{name}.{side}", channels, channels, 1)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        yield from cross_attention(f"{block}.attn1", channels, channels)
        yield from cross_attention(f"{block}.attn2", channels, model.context)
        yield from linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
        yield from linear(f"{block}.ff.net.2", 4 * channels, channels)
        for n in (1, 2, 3):
            yield from norm(f"{block}.norm{n}", channels)


def cross_attention(name: str, channels: int, context: int) -> Named:
    yield from linear(f"{name}.to_q", channels, channels, bias=False)
    yield from linear(f"{name}.to_k", context, channels, bias=False)
    yield from linear(f"{name}.to_v", context, channels, bias=False)
    yield from linear(f"{name}.to_out.0", channels, channels)


# The autoencoder. CompVis/stable-diffusion: ldm/models/autoencoder.py (AutoencoderKL) and
# ldm/modules/diffusionmodules/model.py (Encoder, Decoder); the same ddconfig in every yaml below.


def vae(width: int = 128, channel_mult: tuple[int, ...] = (1, 2, 4, 4), res_blocks: int = 2, latent: int = 4) -> Named:
    widths = [mult * width for mult in channel_mult]
    last = len(widths) - 1

    yield from conv("encoder.conv_in", 3, width, 3)
    channels = width
    for level, c_out in enumerate(widths):
        for i in range(res_blocks):
            yield from resnet_block(f"encoder.down.{level}.block.{i}", channels, c_out)
            channels = c_out
        if level < last:
            yield from conv(f"encoder.down.{level}.downsample.conv", channels, channels, 3)
    yield from vae_middle("encoder", channels)
    yield from norm("encoder.norm_out", channels)
    yield from conv("encoder.conv_out", channels, 2 * latent, 3)

    yield from conv("decoder.conv_in", latent, channels, 3)
    yield from vae_middle("decoder", channels)
    for level, c_out in reversed(list(enumerate(widths))):
        for i in range(res_blocks + 1):
            yield from resnet_block(f"decoder.up.{level}.block.{i}", channels, c_out)
            channels = c_out
        if level:
            yield from conv(f"decoder.up.{level}.upsample.conv", channels, channels, 3)
    yield from norm("decoder.norm_out", channels)
    yield from conv("decoder.conv_out", channels, 3, 3)

    yield from conv("quant_conv", 2 * latent, 2 * latent, 1)
    yield from conv("post_quant_conv", latent, latent, 1)


def vae_middle(side: str, channels: int) -> Named:
    yield from resnet_block(f"{side}.mid.block_1", channels, channels)
    yield from norm(f"{side}.mid.attn_1.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        yield from conv(f"{side}.mid.attn_1.{part}", channels, channels, 1)
    yield from resnet_block(f"{side}.mid.block_2", channels, channels)


def resnet_block(name: str, c_in: int, c_out: int) -> Named:
    yield from norm(f"{name}.norm1", c_in)
    yield from conv(f"{name}.conv1", c_in, c_out, 3)
    yield from norm(f"{name}.norm2", c_out)
    yield from conv(f"{name}.conv2", c_out, c_out, 3)
    if c_in != c_out:
        yield from conv(f"{name}.nin_shortcut", c_in, c_out, 1)


# The text encoders.


def clip_l() -> Named:
    """ldm/modules/encoders/modules.py (FrozenCLIPEmbedder) holds CLIPTextModel of transformers 4:
    src/transformers/models/clip/modeling_clip.py. Its position_ids stand in POSITIONS."""
    width = 768
    yield "text_model.embeddings.token_embedding.weight", (VOCABULARY, width)
    yield "text_model.embeddings.position_embedding.weight", (TOKENS, width)
    for i in range(12):
        layer = f"text_model.encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{part}", width, width)
        yield from norm(f"{layer}.layer_norm1", width)
        yield from linear(f"{layer}.mlp.fc1", width, 4 * width)
        yield from linear(f"{layer}.mlp.fc2", 4 * width, width)
        yield from norm(f"{layer}.layer_norm2", width)
    yield from norm("text_model.final_layer_norm", width)


def open_clip(width: int, layers: int) -> Named:
    """FrozenOpenCLIPEmbedder (ldm) and FrozenOpenCLIPEmbedder2 (sgm) hold mlfoundations/open_clip: src/open_clip/
    model.py (CLIP) without its `visual`; ResidualAttentionBlock has torch's MultiheadAttention. Sizes: src/open_clip/
    model_configs/ViT-H-14.json and ViT-bigG-14.json. The causal mask is a buffer that is not saved."""
    yield "positional_embedding", (TOKENS, width)
    yield "text_projection", (width, width)
    yield "logit_scale", ()
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        yield from norm(f"{block}.ln_1", width)
        yield f"{block}.attn.in_proj_weight", (3 * width, width)
        yield f"{block}.attn.in_proj_bias", (3 * width,)
        yield from linear(f"{block}.attn.out_proj", width, width)
        yield from norm(f"{block}.ln_2", width)
        yield from linear(f"{block}.mlp.c_fc", width, 4 * width)
        yield from linear(f"{block}.mlp.c_proj", 4 * width, width)
    yield "token_embedding.weight", (VOCABULARY, width)
    yield from norm("ln_final", width)


def vit_h() -> Named:
    return open_clip(1024, 24)


def vit_bigg() -> Named:
    return open_clip(1280, 32)


# The configurations: what the yaml of each says.

SD15_UNET = UNet(4, 320, (1, 2, 4, 4), depth=(1, 1, 1, 0), middle_depth=1, context=768, linear=False)
SD21_UNET = replace(SD15_UNET, context=1024, linear=True)
SDXL_UNET = UNet(4, 320, (1, 2, 4), depth=(0, 2, 10), middle_depth=10, context=2048, linear=True, vector=2816)
REFINER_UNET = UNet(4, 384, (1, 2, 4, 4), depth=(0, 4, 4, 0), middle_depth=4, context=1280, linear=True, vector=2560)

# DDPM.register_schedule of ldm/models/diffusion/ddpm.py; `lvlb_weights` is not saved, `logvar` is no buffer.
SCHEDULE: Tensors = dict.fromkeys(
    (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ),
    ((1000,), "F32"),
)
# LitEma of ldm/modules/ema.py; what is pruned of it leaves these two behind.
EMA_COUNTERS: Tensors = {"model_ema.decay": ((), "F32"), "model_ema.num_updates": ((), "I32")}


def positions(prefix: str) -> Tensors:
    """A buffer of CLIPTextEmbeddings, saved until transformers 4.31."""
    return {f"{prefix}text_model.embeddings.position_ids": ((1, TOKENS), "I64")}


def ema(model: UNet) -> Tensors:
    """LitEma copies the parameters of DiffusionWrapper and leaves the dots out of their names."""
    return {f"model_ema.diffusion_model{name.replace('.', '')}": (shape, "F32") for name, shape in unet(model)}


def under(prefix: str, named: Iterable[tuple[str, Shape]], dtype: str) -> Tensors:
    return {prefix + name: (shape, dtype) for name, shape in named}


def latent_diffusion(model: UNet, text: Tensors) -> Tensors:
    """LatentDiffusion of ldm/models/diffusion/ddpm.py: what SD 1 and SD 2 are."""
    return {
        **SCHEDULE,
        **EMA_COUNTERS,
        **under("model.diffusion_model.", unet(model), "F32"),
        **under("first_stage_model.", vae(), "F32"),
        **text,
    }


def diffusion_engine(model: UNet, text: Tensors) -> Tensors:
    """DiffusionEngine of sgm/models/diffusion.py: what SDXL is, published in half precision."""
    return {
        **under("model.diffusion_model.", unet(model), "F16"),
        **under("first_stage_model.", vae(), "F16"),
        **text,
    }


_CLIP_L = {
    **under("cond_stage_model.transformer.", clip_l(), "F32"),
    **positions("cond_stage_model.transformer."),
}
_VIT_H = under("cond_stage_model.model.", vit_h(), "F32")
_SDXL_TEXT = {
    **under("conditioner.embedders.0.transformer.", clip_l(), "F16"),
    **positions("conditioner.embedders.0.transformer."),
    **under("conditioner.embedders.1.model.", vit_bigg(), "F16"),
}

SD15 = latent_diffusion(SD15_UNET, _CLIP_L)
"""v1-5-pruned-emaonly. CompVis/stable-diffusion: configs/stable-diffusion/v1-inference.yaml."""

SD15_EMA = {**SD15, **ema(SD15_UNET)}
"""v1-5-pruned, which has the averaged U-Net beside the trained one. The same yaml."""

SD15_INPAINTING = latent_diffusion(replace(SD15_UNET, in_channels=9), _CLIP_L)
"""sd-v1-5-inpainting, which sees latents, mask and masked picture. runwayml/stable-diffusion:
configs/stable-diffusion/v1-inpainting-inference.yaml."""

PIX2PIX = latent_diffusion(replace(SD15_UNET, in_channels=8), _CLIP_L)
"""instruct-pix2pix-00-22000. timothybrooks/instruct-pix2pix: configs/generate.yaml."""

SD15_WITHOUT_TEXT_MODEL = {
    name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): tensor
    for name, tensor in SD15.items()
}
"""Files from tools that leave "text_model." out. AUTOMATIC1111/stable-diffusion-webui: modules/sd_models.py
(checkpoint_dict_replacements)."""

SD15_PRUNED = {
    name: (shape, "F16" if dtype == "F32" else dtype)
    for name, (shape, dtype) in SD15.items()
    if name.startswith(("model.", "first_stage_model.", "cond_stage_model."))
}
"""DreamShaper 8, as most files of fine-tuned models: nothing of the training, in half precision."""

SD21 = latent_diffusion(SD21_UNET, _VIT_H)
"""v2-1_768-ema-pruned. Stability-AI/stablediffusion: configs/stable-diffusion/v2-inference-v.yaml."""

SD21_BASE = latent_diffusion(SD21_UNET, _VIT_H)
"""v2-1_512-ema-pruned: differs in what the output means alone. Stability-AI/stablediffusion:
configs/stable-diffusion/v2-inference.yaml."""

SD20_INPAINTING = latent_diffusion(replace(SD21_UNET, in_channels=9), _VIT_H)
"""512-inpainting-ema. Stability-AI/stablediffusion: configs/stable-diffusion/v2-inpainting-inference.yaml."""

SD21_PRUNED_TEXT = {
    name: tensor
    for name, tensor in SD21.items()
    if not name.endswith((".logit_scale", ".text_projection")) and ".resblocks.23." not in name
}
"""Waifu Diffusion 1.4: without what Stable Diffusion 2 has and never computes."""

SDXL_BASE = diffusion_engine(SDXL_UNET, _SDXL_TEXT)
"""sd_xl_base_1.0. Stability-AI/generative-models: configs/inference/sd_xl_base.yaml."""

SDXL_MERGED = {name: (shape, "F16") for name, (shape, _) in SDXL_BASE.items()}
"""bluePencil-XL 0.5.0, as files of tools that make everything half precision, the positions too."""

SDXL_TRAINED = {**SDXL_BASE, "denoiser.sigmas": ((1000,), "F32")}
"""What DiffusionEngine saves: DiscreteDenoiser of sgm/modules/diffusionmodules/denoiser.py has a buffer, too."""

SDXL_V_PREDICTION = {**SDXL_MERGED, "v_pred": ((0,), "F32"), "ztsnr": ((0,), "F32")}
"""NoobAI-XL-Vpred: trained for v, which two empty tensors say. comfyanonymous/ComfyUI: comfy/supported_models.py."""

SDXL_REFINER = diffusion_engine(REFINER_UNET, under("conditioner.embedders.0.model.", vit_bigg(), "F16"))
"""sd_xl_refiner_1.0. Stability-AI/generative-models: configs/inference/sd_xl_refiner.yaml."""

SDXL_INPAINTING = diffusion_engine(replace(SDXL_UNET, in_channels=9), _SDXL_TEXT)
"""sd_xl_base_1.0_inpainting_0.1. AUTOMATIC1111/stable-diffusion-webui: configs/sd_xl_inpaint.yaml."""

CHECKPOINTS: dict[str, Tensors] = {
    "SD 1.5": SD15,
    "SD 1.5 with averages": SD15_EMA,
    "SD 1.5 inpainting": SD15_INPAINTING,
    "instruct-pix2pix": PIX2PIX,
    "SD 1.5 without text_model": SD15_WITHOUT_TEXT_MODEL,
    "SD 1.5 pruned": SD15_PRUNED,
    "SD 2.1": SD21,
    "SD 2.1 base": SD21_BASE,
    "SD 2.1 with a pruned text encoder": SD21_PRUNED_TEXT,
    "SD 2 inpainting": SD20_INPAINTING,
    "SDXL base": SDXL_BASE,
    "SDXL merged": SDXL_MERGED,
    "SDXL base as trained": SDXL_TRAINED,
    "SDXL v-prediction": SDXL_V_PREDICTION,
    "SDXL refiner": SDXL_REFINER,
    "SDXL inpainting": SDXL_INPAINTING,
}


def shapes(tensors: Tensors) -> Shapes:
    return {name: shape for name, (shape, _) in tensors.items()}
