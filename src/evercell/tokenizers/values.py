"""`values`: one token an expressed gene, its value the log-normalised count. The default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evercell.tokenizers.base import TokenBatch, Tokenizer, View, padded

if TYPE_CHECKING:
    from typing import ClassVar


class ValuesTokenizer(Tokenizer):
    """Tokens of the expressed genes with ``log(1 + 10^4 count / total)`` as their value.

    The total is taken over the genes that the study measured and the model knows, so a panel and a whole transcriptome
    are each normalised over what was measured.
    """

    name: ClassVar[str] = "values"

    def tokenize(self, view: View) -> TokenBatch:
        """Tokens (B, L), L the largest number of expressed genes of a cell in the batch."""
        return padded(view.counts.indptr, view.counts.indices, view.log_normalised(), view.totals)
