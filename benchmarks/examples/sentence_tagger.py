"""A tagger that reads sentences both ways, with ``lengths=`` in the place of packing.

The sentences are made by a small grammar in which many words have several tags: in "the light
walk" light is an adjective, in "the light opens" a noun. Only the words around one tell.

With ``lengths`` [B] the batch stays padded: nothing is sorted, packed or sent to the host. The
backward direction starts at the last word of each sentence, and outputs past it are zero.

Prints the share of right tags on sentences that were not trained on, beside that of a tagger that
gives every word its most frequent tag.

    python -m benchmarks.examples.sentence_tagger --steps 200
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastlstm

TAGS = {
    "determiner": ("the", "a", "every", "her"),
    "adjective": ("light", "open", "walking", "old", "clear", "quiet"),
    "noun": ("light", "walk", "open", "old", "clear", "dog", "house"),
    "verb": ("light", "walk", "open", "clear", "sees", "walking"),
}
NAMES = tuple(TAGS)
WORDS = ("", *sorted({word for words in TAGS.values() for word in words}))  # 0 is padding
IGNORE = -100  # the tag of padding, which cross_entropy leaves out

Sentence = list[tuple[int, int]]  # a word and its tag, as indices


class Tagger(nn.Module):
    """Words [B, T] and lengths [B] to logits of the tags, [B, T, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 16)
        self.lstm = fastlstm.LSTM(16, 32, bidirectional=True, batch_first=True)
        self.head = nn.Linear(64, len(TAGS))

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.lstm(self.embedding(words), lengths=lengths)
        return self.head(y)


def sentence() -> Sentence:
    """A subject, a verb and perhaps an object, with any number of adjectives."""

    def noun_phrase() -> list[str]:
        adjectives = random.choices((0, 1, 2, 3), (4, 4, 2, 1))[0]
        return ["determiner", *["adjective"] * adjectives, "noun"]

    tags = [*noun_phrase(), "verb", *(noun_phrase() if random.random() < 0.7 else ())]
    return [(WORDS.index(random.choice(TAGS[tag])), NAMES.index(tag)) for tag in tags]


def batch(sentences: list[Sentence]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded words [B, T], tags [B, T], and lengths [B]."""
    lengths = torch.tensor([len(each) for each in sentences])
    words = torch.zeros(len(sentences), int(lengths.max()), dtype=torch.int64)
    tags = torch.full_like(words, IGNORE)
    for row, each in enumerate(sentences):
        words[row, : len(each)], tags[row, : len(each)] = torch.tensor(each).t()
    return words, tags, lengths


def most_frequent(sentences: list[Sentence]) -> Tensor:
    """The most frequent tag of each word, [words]."""
    counts = [Counter[int]() for _ in WORDS]
    for each in sentences:
        for word, tag in each:
            counts[word][tag] += 1
    return torch.tensor([max(count, key=count.get, default=0) for count in counts])


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Trains; returns the shares of right tags of the LSTM and of the most frequent tags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of training (default: 200)")
    parser.add_argument("--batch", type=int, default=64, help="sentences (default: 64)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    random.seed(0)
    training, unseen = ([sentence() for _ in range(n)] for n in (4000, 1000))
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(1, args.steps + 1):
        words, tags, lengths = batch(random.sample(training, args.batch))
        logits = model(words, lengths)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tags.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, args.steps // 5) == 0:
            print(f"step {step:4}: loss {loss.item():.4f}")
    model.eval()
    words, tags, lengths = batch(unseen)
    with torch.no_grad():
        answers = model(words, lengths).argmax(-1)
    real = tags != IGNORE
    share = (answers == tags)[real].float().mean().item()
    simple = (most_frequent(training)[words] == tags)[real].float().mean().item()
    print(f"right tags on {len(unseen)} unseen sentences: {share:.1%}")
    print(f"with the most frequent tag of each word: {simple:.1%}")
    return share, simple


if __name__ == "__main__":
    main()
