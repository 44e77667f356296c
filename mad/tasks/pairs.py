"""What the recall tasks have in common: keys, values, noise and the way in which they are asked."""

from abc import abstractmethod
from dataclasses import dataclass

from mad.tasks.task import Task


@dataclass(frozen=True)
class PairTask(Task):
    """Tokens in this order: keys, values, noise, special tokens."""

    multi_query: bool = True
    """Score every repeated key; otherwise only the last one, announced by a copy token."""
    noise_vocab_size: int = 0
    """Number of tokens N that only serve as noise."""
    frac_noise: float = 0.0
    """Probability that a pair is replaced by as many noise tokens."""

    @property
    @abstractmethod
    def n_special(self) -> int:
        """Tokens behind the noise tokens."""

    @property
    def content_size(self) -> int:
        """Keys and values together: V − N, less the special tokens."""
        return self.vocab_size - self.noise_vocab_size - self.n_special

    @property
    def n_keys(self) -> int:
        """Key tokens are 0 … n_keys − 1."""
        return self.content_size // 2

    @property
    def n_values(self) -> int:
        """Value tokens are n_keys … content_size − 1."""
        return self.content_size - self.n_keys

    @property
    def noise(self) -> range:
        """The noise tokens."""
        return range(self.content_size, self.content_size + self.noise_vocab_size)

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part."""
        return {
            "key": range(self.n_keys),
            "value": range(self.n_keys, self.content_size),
            "noise": self.noise,
        }

    def chance(self) -> float:
        """1 / number of values."""
        return 1 / self.n_values
