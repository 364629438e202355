"""Tokenizers: every option of open_clip's means here what it means there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlprompt.backbones import Backbone
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.tokenizer import irregularity, wrap_tokenizer
from vlprompt.core.errors import BackboneError

TEXTS = [
    "",
    "a dog",
    "A photo of  a &amp; DOG!",
    "a [SEP] dog",
    "hummingbird " * 30,
    "the_red, red cat's hat",
]
WORDS = ["a", "dog", "photo", "of", "the", "red", "cat", "hat", "!", "&", ",", "_", "'", "s", "hummingbird"]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[EN]", "[FR]"]
OFFLINE = [
    n
    for n in open_clip.list_models()
    if not open_clip.get_model_config(n)["text_cfg"].get("hf_tokenizer_name")
]


def build_folder(folder: Path, style: str) -> Path:
    """Save a small tokenizer of transformers.

    Args:
        folder: Where.
        style: ``bert`` ([CLS] words [SEP]), ``t5`` (words [SEP]) or ``language`` (words [SEP] [EN], as NLLB did).
    """
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    template = {"bert": "[CLS] $A [SEP]", "t5": "$A [SEP]", "language": "$A [SEP] [EN]"}[style]
    specials = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]", "[EN]") if name in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        bos_token="[CLS]", eos_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def sentence_rows(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Return rows as a text tower makes them: start, words, end, padding."""
    room = length - len(tokenizer.start) - len(tokenizer.end)
    rows = [[*tokenizer.start, *tokenizer.encode(t)[:room], *tokenizer.end] for t in texts]
    return torch.tensor([row + [tokenizer.pad] * (length - len(row)) for row in rows])


def test_byte_pairs_of_every_architecture_equal_open_clips() -> None:
    assert len(OFFLINE) > 80  # open_clip 3.0 has 89
    theirs: dict[str, SimpleTokenizer] = {}
    for name in OFFLINE:
        text = open_clip.get_model_config(name)["text_cfg"]
        key = str((text.get("context_length"), text.get("tokenizer_kwargs")))
        if key not in theirs:
            theirs[key] = open_clip.get_tokenizer(name)
        tokenizer = theirs[key]
        ours = wrap_tokenizer(tokenizer)
        assert torch.equal(sentence_rows(ours, TEXTS, tokenizer.context_length), tokenizer(TEXTS)), name


@pytest.mark.parametrize("options", [
    {"clean": "lower"}, {"clean": "whitespace"}, {"clean": "canonicalize"}, {"context_length": 16},
    {"additional_special_tokens": ["<mask>"]},
])  # fmt: skip
def test_options_of_byte_pairs(options: dict[str, Any]) -> None:
    tokenizer = SimpleTokenizer(**options)
    ours = wrap_tokenizer(tokenizer)
    length = options.get("context_length", 77)
    assert torch.equal(sentence_rows(ours, TEXTS, length), tokenizer(TEXTS))
    assert torch.equal(ours.rows(TEXTS, 20), tokenizer(TEXTS, 20))


@pytest.mark.parametrize("style", ["bert", "t5", "language"])
@pytest.mark.parametrize("options", [
    {}, {"clean": "canonicalize"}, {"clean": "lower"}, {"strip_sep_token": True}, {"context_length": 9},
    {"pad_token": "[FR]"}, {"strip_sep_token": True, "clean": "whitespace", "context_length": 12},
])  # fmt: skip
def test_options_of_tokenizers_of_transformers(tmp_path: Path, style: str, options: dict[str, Any]) -> None:
    tokenizer = HFTokenizer(str(build_folder(tmp_path, style)), **{"context_length": 24, **options})
    ours = wrap_tokenizer(tokenizer)
    assert irregularity(ours) == ""
    assert torch.equal(ours.rows(TEXTS, tokenizer.context_length), tokenizer(TEXTS))
    assert torch.equal(sentence_rows(ours, TEXTS, tokenizer.context_length), tokenizer(TEXTS))


def test_a_tokenizer_of_transformers_by_itself(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(build_folder(tmp_path, "bert"))
    ours = wrap_tokenizer(tokenizer)
    expected = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=14, return_tensors="pt"
    ).input_ids
    assert torch.equal(sentence_rows(ours, TEXTS, 14), expected)
    assert torch.equal(ours.rows(TEXTS, 14), expected)


def test_siglips_own_wrapper_cleans_in_its_own_way(tmp_path: Path) -> None:
    tokenizer = SigLipTokenizer.__new__(SigLipTokenizer)  # its constructor fetches a vocabulary
    tokenizer.tokenizer = PreTrainedTokenizerFast.from_pretrained(build_folder(tmp_path, "t5"))
    tokenizer.context_length = 16
    ours = wrap_tokenizer(tokenizer)
    assert torch.equal(sentence_rows(ours, TEXTS, 16), tokenizer(TEXTS))


def _features(make_backbone: Callable[..., Backbone], tokenizer: Any, **text: Any) -> tuple[Backbone, Tensor]:
    """Return a backbone with a tokenizer, and the features that open_clip gives its rows."""
    plain = make_backbone({"vocab_size": 49408, **text}, custom=True)
    backbone = wrap_open_clip(
        plain.model, {"size": 32}, wrap_tokenizer(tokenizer), {"architecture": "x", "pretrained": None}
    )
    random.seed(1)
    torch.manual_seed(1)
    with torch.no_grad():
        return backbone, plain.model.encode_text(tokenizer(TEXTS))


def test_clipas_text_features_equal_open_clips(
    tmp_path: Path, make_backbone: Callable[..., Backbone]
) -> None:
    tokenizer = HFTokenizer(str(build_folder(tmp_path, "bert")), context_length=32, strip_sep_token=True)
    clipa = {"pool_type": "last", "no_causal_mask": True, "context_length": 32}
    backbone, expected = _features(make_backbone, tokenizer, **clipa)
    torch.testing.assert_close(backbone.text.encode_strings(TEXTS), expected, rtol=0, atol=1e-5)
    assert backbone.text.refusal is None

    kept = HFTokenizer(str(tmp_path), context_length=32)
    _, other = _features(make_backbone, kept, **clipa)
    assert float((other - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["clips", "left", "simple", "random", "shuffle"])
def test_rows_that_are_no_plain_sentences_are_encoded_as_they_are(
    tmp_path: Path, make_backbone: Callable[..., Backbone], kind: str
) -> None:
    if kind in ("simple", "random", "shuffle"):
        tokenizer: Any = SimpleTokenizer(reduction_mask=kind)
        tokenizer.context_length = 20
    else:
        folder = str(build_folder(tmp_path, "bert"))
        options = {"tokenizer_mode": "clips"} if kind == "clips" else {"padding_side": "left"}
        tokenizer = HFTokenizer(folder, context_length=20, **options)

    backbone, expected = _features(make_backbone, tokenizer, context_length=20)
    random.seed(1)
    torch.manual_seed(1)
    torch.testing.assert_close(backbone.text.encode_strings(TEXTS), expected, rtol=0, atol=1e-5)
    with pytest.raises(BackboneError, match="its tokenizer"):
        backbone.text.require_prompts()


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration and the tokenizer of a small text tower of transformers."""
    from transformers import RobertaConfig

    folder = build_folder(tmp_path_factory.mktemp("roberta"), "bert")
    RobertaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=514, pad_token_id=0,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize(("length", "expected"), [(None, 77), (24, 24)])
def test_towers_of_transformers_are_padded_to_open_clips_length(
    roberta: Path, tmp_path: Path, length: int | None, expected: int
) -> None:
    from tests.backbones.architectures import SMALL_CONFIG, architecture
    from vlprompt.backbones import create_backbone

    text = {"hf_model_name": str(roberta), "hf_tokenizer_name": str(roberta), "hf_proj_type": "linear"}
    if length is not None:
        text["context_length"] = length
    with architecture(tmp_path, "hf-text-of-vlprompt", {**SMALL_CONFIG, "text_cfg": text}) as name:
        backbone = create_backbone(name, seed=1)
        tokenizer = open_clip.get_tokenizer(name)
        torch.save(backbone.model.state_dict(), tmp_path / "w.pt")
        loaded = create_backbone(name, str(tmp_path / "w.pt"))

    assert isinstance(backbone.model, CustomTextCLIP)
    assert backbone.text.context_length == loaded.text.context_length == expected
    with torch.no_grad():
        features = backbone.model.encode_text(tokenizer(TEXTS))
    torch.testing.assert_close(backbone.text.encode_strings(TEXTS), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.text.encode_strings(TEXTS), features, rtol=0, atol=1e-5)
