"""Write docs/backbones.md, which learner works on which family of backbones: ``python docs/families.py``.

Every family has one small member here, built of the same classes as the real ones, with random weights. The tests
compare each with open_clip, and train every learner on each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from timm.layers import HybridEmbed
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vitamin import MbConvStages, VitCfg
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.tokenizer import wrap_tokenizer
from vlprompt.core.errors import ConfigError, VLPromptError
from vlprompt.core.files import write_text
from vlprompt.learners import LEARNERS, create_learner
from vlprompt.learners.vpt import VPT

INTRODUCTION = """# Backbones

Which learner works on which family of backbones. This page is made by `python docs/families.py`, which builds one small
member of each family and trains every learner on it; learners with the same answers share a column. *Works as pixels*:
no token can enter the image tower, so a learned frame around the image takes its place.
"""
NOTES = """## Visual prompts of pixels

`vpt` learns tokens where they can enter, else pixels (Bahng et al., arXiv 2203.17274): a frame around the image, with
`patch` also a patch in its corner. They are added to the preprocessed image, so they work on every tower.

| Option of `vpt` | Meaning |
|---|---|
| `where` | `auto` (tokens where they can enter, else pixels), `tokens`, `pixels` |
| `frame` | width of the frame in pixels; by default the paper's share, 30 of 224; 0 is none |
| `patch` | side of the patch in pixels; 0 is none |

Pixels start at 0, so training starts as zero-shot classification. They need far larger steps than tokens: the paper
trains with SGD at `train.lr: 40`.

In Python, `backbone.encode_image(images, PixelPrompts(pixels))` takes any (3, H, W) tensor.

## Text towers

Context is learned in the token embeddings of every text tower. In CLIP's own causal towers sentences are packed without
padding and share their beginnings; the others run each sentence padded to the longest, or to the full length where
padding counts (SigLIP, MobileCLIP-B). If a tower looks causal but can't be packed, a warning names the versions of
open_clip that were tested.

## Precision and device

`create_backbone(..., precision="bf16", device="cuda")`, `backbone.precision=bf16` in a configuration,
`--backbone precision=bf16` on the command line: what the frozen towers are stored and run in, and where.

| | |
| --- | --- |
| `fp32` | the default on every device, so that one configuration is one run on a laptop, a login node and any card |
| `bf16` | half the memory, about twice as fast on processors with AVX512-BF16 or AMX and on cards from Ampere on |
| `fp16` | for cards without bf16; the trainer scales the loss, so that small gradients don't vanish |
| `cpu`, `cuda`, `cuda:1`, `mps` | without a device: a GPU if there is one, as soon as something is trained or run |

- What is learned, normalised features, logits and losses are float32 in any precision. Whoever trains the towers
  themselves (`end_to_end`) needs fp32.
- Features are cached for each precision by itself. A saved prompt fits any: it is loaded in fp32 unless
  `--backbone precision=...` says otherwise, and a warning says if it was learned in another one.
- The precision is part of what a run is, the device is not: a run that was begun on a GPU can be continued on a CPU,
  where sums differ in their last bits.
"""

PAGE = Path(__file__).parent / "backbones.md"
CLASSES = ("dog", "red circle", "humming bird")
DIM = 24
SIZE = 32

_VISION = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
_TEXT = {"layers": 2, "width": 32, "heads": 2, "context_length": 40}
_VIT: dict[str, Any] = {
    "img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0,
    "num_classes": DIM,
}  # fmt: skip
_WORDS = (
    "a photo of the with and type an image picture x y z dog cat red circle humming bird bad good small large many "
    "one my it this is clean"
)


@dataclass(frozen=True)
class Family:
    """Backbones that are built alike.

    Attributes:
        name: As in the table.
        members: Architectures of open_clip's (or what people load with ``hf-hub:``) that belong to it.
        build: Makes the small member, with random weights.
    """

    name: str
    members: str
    build: Callable[[], nn.Module]
    text: str = ""


def _clip(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> nn.Module:
    return CLIP(DIM, {**_VISION, **(vision or {})}, {**_TEXT, **(text or {})})


def _custom(text: dict[str, Any], **model: Any) -> nn.Module:
    return CustomTextCLIP(DIM, _VISION, {**_TEXT, **text}, **model)


def _timm(trunk: Callable[[], nn.Module], text: dict[str, Any] | None = None) -> nn.Module:
    """A CLIP whose image tower is a trunk of timm's that projects into the joint space by itself."""
    visual = TimmModel("test_vit", DIM, image_size=SIZE, pool="token", proj="none")
    visual.trunk = trunk()
    model: Any = CustomTextCLIP(DIM, _VISION, {**_TEXT, **(text or {})})
    model.visual = visual
    return model


def _coca(text: dict[str, Any] | None = None) -> nn.Module:
    return open_clip.CoCa(
        DIM,
        multimodal_cfg={"context_length": 40, "width": 32, "heads": 2, "layers": 1},
        text_cfg=text or {**_TEXT, "embed_cls": True, "output_tokens": True},
        vision_cfg={**_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    )


def _eva(**options: Any) -> nn.Module:
    return Eva(**{**_VIT, "global_pool": "token", **options})


def _eva02(**options: Any) -> nn.Module:
    return _eva(
        qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True,
        ref_feat_shape=(2, 2), **options,
    )  # fmt: skip


def _pe_core() -> nn.Module:
    return _eva(
        global_pool="map", attn_type="rope", use_pre_transformer_norm=True, use_rot_pos_emb=True, ref_feat_shape=(4, 4),
        rope_grid_offset=1.0, rope_grid_indexing="xy", attn_pool_num_heads=2, attn_pool_mlp_ratio=2.0,
    )  # fmt: skip


def _naflex(**options: Any) -> nn.Module:
    wanted = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, **options}
    return NaFlexVit(NaFlexVitCfg(pos_embed_grid_size=(4, 4), **wanted), num_classes=DIM, img_size=SIZE)


def _mobileclip_b() -> nn.Module:
    stem = ConvStem(
        channels=(8, 8, 32), stride=(2, 2, 2), kernel_size=(2, 2, 2), padding=0, act_layer=nn.GELU
    )
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    return VisionTransformer(**{**_VIT, "patch_size": 1, "no_embed_class": True, "embed_layer": embed})


def _vitamin() -> nn.Module:
    stages = MbConvStages(VitCfg(embed_dim=(8, 16, 32), depths=(1, 1, 1), stem_width=8))
    embed = partial(HybridEmbed, backbone=stages, proj=False)
    without = {"class_token": False, "pos_embed": "none", "global_pool": "avg"}
    return VisionTransformer(**{**_VIT, "patch_size": 1, "embed_layer": embed, **without})


def _fastvit() -> nn.Module:
    mixers = ("repmixer", "repmixer", "repmixer", "attention")
    return FastVit(
        layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 64), mlp_ratios=(2,) * 4, token_mixers=mixers, num_classes=DIM
    )  # fmt: skip


def _swin() -> nn.Module:
    return SwinTransformer(
        img_size=SIZE, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=DIM
    )  # fmt: skip


def _convnext() -> nn.Module:
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=DIM)


def _relpos() -> nn.Module:
    return VisionTransformerRelPos(**{**_VIT, "class_token": True, "global_pool": "token", "fc_norm": False})


def _hugging_face(kind: str, pooler: str, proj: str | None = "linear") -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        _config(kind).save_pretrained(folder)
        text = {
            "hf_model_name": folder, "hf_tokenizer_name": folder, "hf_model_pretrained": False,
            "hf_pooler_type": pooler, "hf_proj_type": proj,
        }  # fmt: skip
        if kind == "coca":
            return _coca({**text, "output_tokens": True})
        return CustomTextCLIP(DIM, _VISION, text)


def _config(kind: str) -> Any:
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 48, "max_position_embeddings": 48}
    if kind == "bert":
        return transformers.BertConfig(**shape, pad_token_id=0)
    if kind in ("roberta", "coca"):
        return transformers.RobertaConfig(**shape, pad_token_id=0)
    if kind == "xlm-roberta":
        return transformers.XLMRobertaConfig(**shape, pad_token_id=0)
    if kind == "mt5":
        return transformers.MT5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, pad_token_id=0
        )
    return transformers.M2M100Config(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48,
        decoder_attention_heads=2, decoder_ffn_dim=48, max_position_embeddings=48, pad_token_id=0,
    )  # fmt: skip


def word_tokenizer(start: bool = True) -> Any:
    """Return open_clip's wrapper around a small tokenizer of words, made here.

    Args:
        start: Whether sentences begin with a token of their own (BERT's do, mT5's don't).
    """
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", ",", *_WORDS.split()]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if start else "$A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)

    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        return HFTokenizer(folder, context_length=24)


_SIGLIP_TEXT = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}

FAMILIES = (
    Family("CLIP", "ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14", _clip),
    Family(
        "CLIP ResNet",
        "RN50, RN101, RN50x4",
        lambda: _clip({"layers": [1, 1, 1, 1], "width": 16, "head_width": 32}),
    ),
    Family("CoCa", "coca_ViT-B-32, coca_ViT-L-14", _coca),
    Family(
        "SigLIP, SigLIP 2",
        "ViT-B-16-SigLIP, ViT-B-16-SigLIP2",
        lambda: _timm(
            lambda: VisionTransformer(**{**_VIT, "class_token": False, "global_pool": "map"}), _SIGLIP_TEXT
        ),
    ),
    Family("EVA-01", "EVA01-g-14", lambda: _timm(_eva)),
    Family("EVA-02-E", "EVA02-E-14", lambda: _timm(lambda: _eva(use_post_norm=True))),
    Family("EVA-02", "EVA02-B-16, EVA02-L-14", lambda: _timm(_eva02)),
    Family("PE-Core", "PE-Core-B-16, PE-Core-L-14-336", lambda: _timm(_pe_core)),
    Family("NaFlex ViT", "timm's naflexvit_*", lambda: _timm(_naflex)),
    Family(
        "NaFlex ViT, rotary",
        "timm's naflexvit_* with rotary positions",
        lambda: _timm(
            lambda: _naflex(rope_type="axial", attn_type="rope", class_token=True, pos_embed="none")
        ),
    ),
    Family(
        "MobileCLIP-B", "MobileCLIP-B, MobileCLIP2-B", lambda: _timm(_mobileclip_b, {"no_causal_mask": True})
    ),
    Family("MobileCLIP-S", "MobileCLIP-S2, MobileCLIP2-S4", lambda: _timm(_fastvit)),
    Family("ViTamin", "ViTamin-B, ViTamin-L", lambda: _timm(_vitamin)),
    Family("ConvNeXt", "convnext_base_w, convnext_large_d", lambda: _timm(_convnext)),
    Family("Swin", "swin_base_patch4_window7_224", lambda: _timm(_swin)),
    Family("ViT with relative positions", "vit_relpos_medium_patch16_cls_224", lambda: _timm(_relpos)),
    Family(
        "ViT with registers",
        "timm's vit_*_reg4_*",
        lambda: _timm(lambda: VisionTransformer(**{**_VIT, "reg_tokens": 2, "global_pool": "avg"})),
    ),
    Family(
        "MetaCLIP worldwide", "ViT-H-14-worldwide", lambda: _custom({"pool_type": "eos", "eos_id": 49407})
    ),
    Family("BERT text", "BiomedCLIP", lambda: _hugging_face("bert", "cls_pooler", "mlp"), "words"),
    Family("RoBERTa text", "roberta-ViT-B-32", lambda: _hugging_face("roberta", "mean_pooler"), "words"),
    Family(
        "CoCa, RoBERTa text", "coca_roberta-ViT-B-32", lambda: _hugging_face("coca", "mean_pooler"), "words"
    ),
    Family(
        "XLM-RoBERTa text",
        "xlm-roberta-base-ViT-B-32",
        lambda: _hugging_face("xlm-roberta", "mean_pooler"),
        "words",
    ),
    Family(
        "mT5 text", "mt5-base-ViT-B-32", lambda: _hugging_face("mt5", "mean_pooler"), "words without start"
    ),
    Family("NLLB text", "nllb-clip-base", lambda: _hugging_face("m2m_100", "cls_pooler"), "words"),
)


def build(family: Family, seed: int = 0) -> Backbone:
    """Build the small member of a family; values are spread so that words and blocks count."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family.build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gamma"):  # scales of layers, which start near 0
                    parameter.fill_(0.5)
                elif parameter.dim() > 1 and "logit" not in name:
                    parameter.normal_(std=0.3 if "embed" in name else 1.2 * parameter[0].numel() ** -0.5)

    tokenizer: Any = open_clip.SimpleTokenizer()
    if family.text:
        tokenizer = word_tokenizer(start=family.text == "words")
    facts = {"architecture": family.name, "pretrained": None}
    return wrap_open_clip(model, {"size": SIZE}, wrap_tokenizer(tokenizer), facts)


def train_one_step(backbone: Backbone, name: str, **options: Any) -> Any:
    """Build a learner and change what it learns once, in the way it learns; return it.

    Raises:
        VLPromptError: If it refuses the backbone.
    """
    learner: Any = create_learner(name, backbone, CLASSES, **options)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, SIZE, SIZE, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    embeddings = learner.embed_images(images).detach()
    if learner.prepares:
        learner.prepare(embeddings[None], labels)
    if learner.solves:
        learner.solve((embeddings, labels), None)
        return learner

    parameters = list(learner.learned_parameters().values())
    if parameters:
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        losses = learner.train().loss({"image": images, "label": labels})
        sum(losses.values()).backward()
        optimizer.step()
    return learner


def answer(backbone: Backbone, name: str) -> str:
    """Return ``works``, ``pixels``, or why a learner is refused."""
    try:
        learner = train_one_step(backbone, name)
    except ConfigError as error:
        return " ".join(error.problems)
    except VLPromptError as error:
        return str(error)
    return "pixels" if isinstance(learner, VPT) and learner.visual is None else "works"


def answers() -> dict[str, dict[str, str]]:
    """Return family to learner to :func:`answer`."""
    table: dict[str, dict[str, str]] = {}
    for family in FAMILIES:
        backbone = build(family)
        table[family.name] = {entry.name: answer(backbone, entry.name) for entry in LEARNERS}
    return table


def page() -> str:
    """Return the page's text."""
    table = answers()

    columns: dict[tuple[str, ...], list[str]] = {}  # learners that get the same answers stand together
    for entry in LEARNERS:
        column = tuple(table[family.name][entry.name] for family in FAMILIES)
        columns.setdefault(column, []).append(entry.name)
    ordered = sorted(columns.items(), key=lambda item: -len(item[1]))

    notes: list[str] = []
    lines = [
        "| Family | Members | "
        + " | ".join(", ".join(f"`{name}`" for name in names) for _, names in ordered)
        + " |",
        "|---" * (2 + len(ordered)) + "|",
    ]
    for row, family in enumerate(FAMILIES):
        cells = [_cell(column[row], notes) for column, _ in ordered]
        lines.append(f"| {family.name} | {family.members} | " + " | ".join(cells) + " |")

    reasons = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([INTRODUCTION, *lines, "", "Refused because:", "", *reasons, "", NOTES])


def _cell(text: str, notes: list[str]) -> str:
    if text in ("works", "pixels"):
        return {"works": "works", "pixels": "works as pixels"}[text]
    note = " ".join(text.split())
    if note not in notes:
        notes.append(note)
    return f"refused ({notes.index(note) + 1})"


if __name__ == "__main__":
    write_text(PAGE, page())
