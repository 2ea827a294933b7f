"""Names of Mask2Former's weights: ours, the original code's, and transformers'.

Ours are transformers' modules under the original's two rooms, ``backbone`` and ``sem_seg_head``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_PIXEL = "sem_seg_head.pixel_decoder."
_PREDICTOR = "sem_seg_head.predictor."
_ENCODER_LAYER = ("encoder.layers.{}.", "transformer.encoder.layers.{}.")
_DECODER_LAYER = "decoder.layers.{}."
_SWIN = "backbone.model.swin."
_BLOCK = (f"{_SWIN}encoder.layers.{{}}.blocks.{{}}.", "backbone.layers.{}.blocks.{}.")

# Ours and the original's; what follows these beginnings is the same. {} is a number.
_RENAMED = [
    (f"{_PIXEL}level_embed", f"{_PIXEL}transformer.level_embed"),
    (f"{_PIXEL}input_projections.", f"{_PIXEL}input_proj."),
    (f"{_PIXEL}mask_projection.", f"{_PIXEL}mask_features."),
    *(
        (f"{_PIXEL}{kind}_{{}}.{ours}.", f"{_PIXEL}{kind}_{{}}.{theirs}")
        for kind in ("adapter", "layer")
        for ours, theirs in (("1", "norm."), ("0", ""))
    ),
    *(
        (f"{_PIXEL}{_ENCODER_LAYER[0]}{ours}.", f"{_PIXEL}{_ENCODER_LAYER[1]}{theirs}.")
        for ours, theirs in (
            ("self_attn_layer_norm", "norm1"),
            ("self_attn", "self_attn"),
            ("fc1", "linear1"),
            ("fc2", "linear2"),
            ("final_layer_norm", "norm2"),
        )
    ),
    ("sem_seg_head.class_predictor.", f"{_PREDICTOR}class_embed."),
    (f"{_PREDICTOR}queries_embedder.", f"{_PREDICTOR}query_embed."),
    (f"{_PREDICTOR}queries_features.", f"{_PREDICTOR}query_feat."),
    (f"{_PREDICTOR}input_projections.", f"{_PREDICTOR}input_proj."),
    (f"{_PREDICTOR}decoder.layernorm.", f"{_PREDICTOR}decoder_norm."),
    (
        f"{_PREDICTOR}decoder.mask_predictor.mask_embedder.{{}}.0.",
        f"{_PREDICTOR}mask_embed.layers.{{}}.",
    ),
    *(
        (f"{_PREDICTOR}{_DECODER_LAYER}{ours}.", f"{_PREDICTOR}transformer_{theirs}.")
        for ours, theirs in (
            ("self_attn.out_proj", "self_attention_layers.{}.self_attn.out_proj"),
            ("self_attn_layer_norm", "self_attention_layers.{}.norm"),
            ("cross_attn_layer_norm", "cross_attention_layers.{}.norm"),
            ("cross_attn", "cross_attention_layers.{}.multihead_attn"),
            ("fc1", "ffn_layers.{}.linear1"),
            ("fc2", "ffn_layers.{}.linear2"),
            ("final_layer_norm", "ffn_layers.{}.norm"),
        )
    ),
    (f"{_SWIN}embeddings.patch_embeddings.projection.", "backbone.patch_embed.proj."),
    (f"{_SWIN}embeddings.norm.", "backbone.patch_embed.norm."),
    (f"{_SWIN}encoder.layers.{{}}.downsample.", "backbone.layers.{}.downsample."),
    *(
        (f"{_BLOCK[0]}{ours}", f"{_BLOCK[1]}{theirs}")
        for ours, theirs in (
            ("attention.o_proj.", "attn.proj."),
            (
                "attention.relative_position_bias.relative_position_bias_table",
                "attn.relative_position_bias_table",
            ),
            (
                "attention.relative_position_bias.relative_position_index",
                "attn.relative_position_index",
            ),
            ("layernorm_before.", "norm1."),
            ("layernorm_after.", "norm2."),
            ("mlp.", "mlp."),
        )
    ),
    *(
        (f"backbone.model.hidden_states_norms.stage{i + 1}.", f"backbone.norm{i}.")
        for i in range(4)
    ),
]
# Queries, keys and values: three tensors here, one there. The last number is q, k or v.
_FUSED = [
    (
        f"{_PREDICTOR}{_DECODER_LAYER}self_attn.{{qkv}}_proj.{kind}",
        f"{_PREDICTOR}transformer_self_attention_layers.{{}}.self_attn.in_proj_{kind}",
    )
    for kind in ("weight", "bias")
] + [
    (f"{_BLOCK[0]}attention.{{qkv}}_proj.{kind}", f"{_BLOCK[1]}attn.qkv.{kind}")
    for kind in ("weight", "bias")
]
# The norm after the last stage is there in transformers alone, and nothing uses it.
UNUSED = f"{_SWIN}layernorm."
_TRANSFORMERS = [
    ("model.pixel_level_module.encoder.", "backbone.model."),
    ("model.pixel_level_module.decoder.", _PIXEL),
    ("model.transformer_module.", _PREDICTOR),
    ("class_predictor.", "sem_seg_head.class_predictor."),
]


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights as the original code does, and fuse queries, keys and values."""
    renamed: dict[str, Tensor] = {}
    for name, x in state.items():
        if name.startswith(UNUSED):
            continue
        found = _match(name, _FUSED_OURS)
        if found is None:
            renamed[_translated(name, _TO_ORIGINAL)] = x
        elif "q_proj" in name:
            parts = [state[re.sub("q_proj", f"{part}_proj", name)] for part in "qkv"]
            renamed[found] = torch.cat(parts)
    return renamed


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``to_original``; released files in older spellings are understood too."""
    renamed: dict[str, Tensor] = {}
    for name, x in state.items():
        name = name.replace(f"{_PREDICTOR}static_query.", f"{_PREDICTOR}query_feat.")
        name = re.sub(r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", _PIXEL, name)
        found = _match(name, _FUSED_ORIGINAL)
        if found is None:
            renamed[_translated(name, _FROM_ORIGINAL)] = x
        else:
            for part, piece in zip("qkv", x.chunk(3), strict=True):
                renamed[found.replace("{qkv}", part)] = piece
    return renamed


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of ``Mask2FormerForUniversalSegmentation`` as ours."""
    return {_moved(name, _TRANSFORMERS): x for name, x in state.items()}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``from_transformers``."""
    back = [(ours, theirs) for theirs, ours in _TRANSFORMERS]
    return {_moved(name, back): x for name, x in state.items()}


def _moved(name: str, rooms: Iterable[tuple[str, str]]) -> str:
    for old, new in rooms:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _pattern(template: str) -> re.Pattern[str]:
    literal = re.escape(template).replace(r"\{\}", r"(\d+)")
    return re.compile(literal.replace(r"\{qkv\}", "[qkv]"))


def _template(template: str) -> str:
    """Turn a name with {} into what ``re.sub`` inserts."""
    count = iter(range(1, 9))
    return re.sub(r"\{\}", lambda _: f"\\{next(count)}", template)


_TO_ORIGINAL = [(_pattern(ours), _template(theirs)) for ours, theirs in _RENAMED]
_FROM_ORIGINAL = [(_pattern(theirs), _template(ours)) for ours, theirs in _RENAMED]
_FUSED_OURS = [(_pattern(ours), _template(theirs)) for ours, theirs in _FUSED]
_FUSED_ORIGINAL = [(_pattern(theirs), _template(ours)) for ours, theirs in _FUSED]


def _match(name: str, table: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, new in table:
        found = pattern.fullmatch(name)
        if found:
            return found.expand(new)
    return None


def _translated(name: str, table: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, new in table:
        found = pattern.match(name)
        if found:
            return found.expand(new) + name[found.end() :]
    return name
