"""Tokenizers: counts of a cell -> tokens of its expressed genes.

A tokenizer turns counts (B, G), sparse, into a `TokenBatch`: gene codes (B, L), values (B, L) and a mask (B, L).
Unmeasured genes and genes with no count have no token, so nothing is imputed. To add one: a new file here with a
subclass of `Tokenizer`, and its line in `TOKENIZERS`.
"""

from evercell.plugins import Registry
from evercell.tokenizers.base import TokenBatch, Tokenizer, View

TOKENIZERS: Registry[Tokenizer] = Registry(
    "tokenizer",
    {
        "values": "evercell.tokenizers.values:ValuesTokenizer",
        "bins": "evercell.tokenizers.bins:BinsTokenizer",
    },
)

__all__ = ["TOKENIZERS", "TokenBatch", "Tokenizer", "View"]
