"""A checkpoint in one file, in the original layout, as the parts of a pipeline under the hub's names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastldm.config import TextConfig
from fastldm.errors import FileError, WeightsError
from fastldm.weights import ldm
from fastldm.weights.detect import IGNORED, Found, found, lone_text, under, vae_prefix, wrapper
from fastldm.weights.families import SD1, SD2, Family
from fastldm.weights.header import TensorInfo
from fastldm.weights.ldm import Place, Places
from fastldm.weights.load import Tensors, refuse
from fastldm.weights.original import Original
from fastldm.weights.shapes import Shapes, text_json, unet_json, vae_json

V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_SPREAD = 0.09  # the standard deviation of that bias is above in the v-models of SD 2, below in the others
SPEC = "modelspec.prediction_type"  # of a file's metadata (https://github.com/Stability-AI/ModelSpec)
V_WORDS, EPSILON_WORDS = ("v", "v_prediction"), ("epsilon", "eps")
EMA_COPIES = 100  # fewer are the remains of a pruning


@dataclass(frozen=True)
class Part:
    """A component that is not read yet. json: its configuration in the hub's keys, from `where`.

    open: (its parsed configuration, the hub's names of its tensors) -> the tensors under these names.
    """

    json: Mapping[str, Any]
    where: str
    open: Callable[[Any, Collection[str]], Tensors]


class Renamed:
    """The tensors of one section of a file in the original layout, under the hub's names.

    Raises `WeightsError` naming, as the file does, what is missing in the section and what does not belong there.
    """

    def __init__(self, source: Tensors, places: Mapping[str, Place], rest: Collection[str]) -> None:
        self.where = source.where
        self._source, self._places = source, places
        needed = {place.name for place in places.values()}
        refuse(self.where, "are missing", needed - source.infos.keys(), len(needed))
        refuse(self.where, "do not belong to this model", set(rest) - needed, len(rest))
        self.infos = {hub: self._info(hub, place) for hub, place in places.items()}

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        return place.here(self._source.read(place.name))

    def _info(self, hub: str, place: Place) -> TensorInfo:
        info = self._source.infos[place.name]
        if place.part is not None and (not info.shape or info.shape[0] % 3):
            raise WeightsError(f"{self.where}: {place.name} has shape {info.shape}: no thirds", field=place.name)
        return replace(info, shape=place.shape_here(info.shape))


class Unwrapped:
    """The tensors of a file without the beginning that all their names have; messages name them as the file does."""

    def __init__(self, source: Tensors, beginning: str) -> None:
        self.where, self._source, self._beginning = source.where, source, beginning
        self.infos = {name.removeprefix(beginning): info for name, info in source.infos.items()}

    def read(self, name: str) -> Tensor:
        return self._source.read(self._beginning + name)


def unwrapped(tensors: Tensors) -> Tensors:
    beginning = wrapper(tensors.infos.keys())
    return Unwrapped(tensors, beginning) if beginning else tensors


class Checkpoint:
    """One file with a Stable Diffusion in the original layout. `tensors` stays open for as long as it is read.

    original: what a yaml file beside it says. configured: whether the caller has the configurations, so that the
    dimensions need not be those of a known family. ema: take the U-Net's averaged weights.
    prediction_type: in place of what the file shows.
    Raises `FileError` if the file is something else, `WeightsError` if it has no averaged weights.
    """

    def __init__(
        self,
        tensors: Tensors,
        *,
        original: Original | None = None,
        configured: bool = False,
        ema: bool = False,
        prediction_type: str | None = None,
    ) -> None:
        self.where, self.tensors, self._original, self._ema = tensors.where, unwrapped(tensors), original, ema
        self._metadata: Mapping[str, str] = getattr(tensors, "metadata", {})
        self.shapes: Shapes = {name: info.shape for name, info in self.tensors.infos.items()}
        family = original.family if original else None
        self.found: Found = found(self.shapes, self.where, family=family, configured=configured)
        self.family = self.found.family
        if ema and not self.has_ema:
            raise WeightsError(f"{self.where}: has no averaged weights (model_ema.*)", field="extract_ema")
        self._check_rest()
        self.prediction_type = prediction_type or self._prediction_type()

    @property
    def has_ema(self) -> bool:
        return sum(name.startswith("model_ema.diffusion_model") for name in self.shapes) >= EMA_COPIES

    def json(self, component: str) -> dict[str, Any]:
        """The hub's configuration of "unet", "vae", "text_encoder", "text_encoder_2" or "scheduler"."""
        if component == "scheduler":
            said = self._original.scheduler if self._original else {}
            zero_snr = "ztsnr" in self.shapes
            family = SD2 if zero_snr and self.family is SD1 else self.family  # SD 1's PNDM has no such betas
            data = {**family.scheduler, **said, "prediction_type": self.prediction_type}
            return data | {"rescale_betas_zero_snr": True} if zero_snr else data
        prefix = self.found.sections[component]
        section = under(self.shapes, prefix)
        if component == "unet":
            data = unet_json(section, self._sized(), self.where, prefix)
        elif component == "vae":
            data = vae_json(section, self._sized(), self.where, prefix)
        else:
            data = text_json(section, self.family.texts[component], self.where, prefix)
        return self._original.applied(component, data) if self._original else data

    def part(self, component: str, json: Mapping[str, Any] | None = None, where: str | None = None) -> Part:
        """A component of the file; `json` of `where` in place of what is told from the file."""
        prefix = self.found.sections[component]

        def opened(config: Any, names: Collection[str]) -> Tensors:
            place = self._places(component, config)
            return Renamed(self.tensors, self._in_file(component, prefix, place, names), self._rest(prefix, config))

        return Part(self.json(component) if json is None else json, where or self.where, opened)

    def _places(self, component: str, config: Any) -> Places:
        if component == "unet":
            return ldm.unet_places(config)
        if component == "vae":
            return ldm.vae_places(config)
        layouts = {"clip": ldm.clip_places, "open_clip": ldm.open_clip_places}
        return layouts[self.family.texts[component].layout](config)

    def _in_file(self, component: str, prefix: str, place: Places, names: Collection[str]) -> dict[str, Place]:
        places = {name: place(name) for name in names}
        if component == "unet" and self._ema:
            return {name: replace(p, name=ldm.ema_name(p.name)) for name, p in places.items()}
        return {name: replace(p, name=prefix + p.name) for name, p in places.items()}

    def _rest(self, prefix: str, config: Any) -> list[str]:
        """The names of a section that must be needed."""
        others = tuple(p for p in self.found.sections.values() if p != prefix and p.startswith(prefix))
        if prefix == self.found.sections["unet"] and self._ema:
            return []
        # SD 2 reads the last layer but one of its text encoder.
        unread = f"{prefix}transformer.resblocks.{config.layers}." if isinstance(config, TextConfig) else None
        mine = (name for name in self.shapes if name.startswith(prefix) and not name.startswith(others))
        return [n for n in mine if not IGNORED.fullmatch(n) and not (unread and n.startswith(unread))]

    def _check_rest(self) -> None:
        """What is in no section must be known to be needless."""
        sections = tuple(self.found.sections.values())
        rest = [name for name in self.shapes if not name.startswith(sections) and not IGNORED.fullmatch(name)]
        refuse(self.where, "do not belong to this model", rest, len(self.shapes))

    def _sized(self) -> Family:
        """SD 2's v-models paint 768 × 768."""
        larger = self.family is SD2 and self.prediction_type == "v_prediction"
        return replace(self.family, pixels=768) if larger else self.family

    def _prediction_type(self) -> str:
        said = self._original.scheduler.get("prediction_type") if self._original else None
        if said is not None:
            return str(said)
        if "v_pred" in self.shapes or self._metadata.get(SPEC) in V_WORDS:
            return "v_prediction"
        if self._metadata.get(SPEC) in EPSILON_WORDS:
            return "epsilon"
        if self.family is not SD2:
            return "epsilon"
        name = self.found.sections["unet"] + V_BIAS
        if name not in self.shapes:
            reason = "does not show whether it predicts the noise or v: pass prediction_type="
            raise FileError(f"{self.where}: {reason}", field="prediction_type")
        return "v_prediction" if self.tensors.read(name).float().std() > V_SPREAD else "epsilon"


def lone_text_encoder(tensors: Tensors) -> Part:
    """The text encoder of a file that holds nothing else, or of a whole checkpoint of SD 1 or 2."""
    tensors = unwrapped(tensors)
    shapes = {name: info.shape for name, info in tensors.infos.items()}
    text = lone_text(shapes, tensors.where)

    def opened(config: Any, names: Collection[str]) -> Tensors:
        place = (ldm.clip_places if text.layout == "clip" else ldm.open_clip_places)(config)
        places = {name: replace(place(name), name=text.prefix + place(name).name) for name in names}
        unread = f"{text.prefix}transformer.resblocks.{config.layers}."
        mine = (name for name in shapes if name.startswith(text.prefix) and not name.startswith(unread))
        return Renamed(
            tensors, places, [n for n in mine if not IGNORED.fullmatch(n) and not n.endswith("text_projection")]
        )

    return Part(text_json(under(shapes, text.prefix), text, tensors.where, text.prefix), tensors.where, opened)


def lone_vae(tensors: Tensors, family: Family) -> Part:
    """The autoencoder of a file that holds nothing else, or of a whole checkpoint, in the original layout."""
    tensors = unwrapped(tensors)
    shapes = {name: info.shape for name, info in tensors.infos.items()}
    prefix = vae_prefix(shapes, tensors.where)

    def opened(config: Any, names: Collection[str]) -> Tensors:
        place = ldm.vae_places(config)
        places = {name: replace(place(name), name=prefix + place(name).name) for name in names}
        rest = [n for n in shapes if n.startswith(prefix) and not IGNORED.fullmatch(n)]
        return Renamed(tensors, places, rest)

    return Part(vae_json(under(shapes, prefix), family, tensors.where, prefix), tensors.where, opened)
