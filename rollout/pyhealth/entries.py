"""The entries of a text and of an image: what a model makes of a sample before it attends, one row of a cohort each."""

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Entries", "Patches", "Tokens"]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, those that the tokenizer adds or calls special left out; an unknown one is a token.

    Attributes:
        tokenizer: A tokenizer of transformers.
        most: Tokens that the model takes, added ones included.
        words: Whether the model cuts the text into words at its blanks first.
    """

    tokenizer: Any
    most: int
    words: bool

    def __call__(self, text: str) -> Tensor:
        """Their ids, int64 [S]."""
        given = text.split(" ") if self.words else text
        read = self.tokenizer(given, is_split_into_words=self.words, truncation=True, max_length=self.most)
        ids = torch.tensor(read["input_ids"], dtype=torch.int64)
        return ids[~self.is_special(ids)]

    def is_special(self, ids: Tensor) -> Tensor:
        """Which of some ids are no tokens of a text."""
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        return torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token → id."""
        found: dict[str, int] = self.tokenizer.get_vocab()
        return found

    @property
    def described(self) -> list[Any]:
        """How texts are cut."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        said = {} if backend is None else json.loads(backend.to_str())
        rules = {key: value for key, value in said.items() if key not in ("padding", "truncation")}
        return [rules, self.vocabulary, sorted(self.tokenizer.all_special_ids), self.most, self.words]

    def apart(self) -> "Tokens":
        """The same with a tokenizer of its own, for another thread: transformers' cannot be shared by two."""
        own = Tokens(copy.deepcopy(self.tokenizer), self.most, self.words)
        own("")  # it keeps from now on how it truncates
        return own


@dataclass(frozen=True)
class Patches:
    """The patches of an image, row by row.

    Attributes:
        across: How many there are side by side, and one below the other.
    """

    across: int

    def __call__(self, image: Any) -> Tensor:
        """Their numbers, int64 [N]."""
        return torch.arange(self.across**2)

    @property
    def vocabulary(self) -> dict[str, int]:
        """`patch row,column` → number."""
        return {f"patch {i // self.across},{i % self.across}": i for i in range(self.across**2)}

    @property
    def described(self) -> list[Any]:
        """How images are cut."""
        return [self.across]

    def apart(self) -> "Patches":
        return self


Entries = Tokens | Patches
