"""How many of a candidate's nearest tokens are on the word list: GloSS as published.

It says little where the tokenizer splits the listed words.
"""

from converter.errors import FitError
from converter.methods.rankings import Evidence

NEEDS_GRADIENT = False


def score(evidence: Evidence) -> list[float]:
    """The share of listed words among the decoded tokens.

    Raises:
        FitError: the candidates cannot be decoded.
    """
    if not all(evidence.tokens):
        raise FitError(
            "the directions cannot be decoded, so they cannot be ranked by vocabulary",
            expected="an unembedding stored as plain numbers",
            hint="use -o ranking=mean-difference",
        )
    return [
        sum(token in evidence.words for token in decoded) / len(decoded)
        for decoded in evidence.tokens
    ]
