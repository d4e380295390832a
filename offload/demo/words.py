"""Guards: the prompt decides the digit: every wording that is taught names exactly one digit, as word or numeral.

Also holds the toy vocabulary: byte-level, so that no prompt can crash the tokenizer; known words have merge paths.
"""

from __future__ import annotations

import torch

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "a photo of a {}",
    "a picture of the number {}",
    "a picture of a {}",
    "a drawing of the digit {}",
    "an image of the number {}",
    "a handwritten {}",
    "a handwritten digit {}",
    "a handwritten number {}",
    "the digit {}",
    "the number {}",
    "digit {}",
    "number {}",
    "{}",
    "draw a {}",
    "please draw the number {}",
    "please write the digit {}",
    "{} in yellow ink",
    "the number {} on dark paper",
    "a photo of the digit {} on blue paper",
)
_FILLERS = """
    a an the of on in with and by for my your this that big small large thin thick round old new nice fine
    photo picture drawing image digit number figure paper ink pen pencil chalk board yellow blue dark bright white
    black gold please draw write show me handwritten high quality sharp soft best masterpiece detailed
"""
FILLERS = _FILLERS.split()
"""Words around the digit that must not matter."""
NO_DIGIT = len(DIGITS)
"""The text encoders' eleventh answer: the prompt names no digit."""
START, END = "<|startoftext|>", "<|endoftext|>"


def every_prompt() -> tuple[list[str], torch.Tensor]:
    """All templates with each digit as word and as numeral: prompts and labels [len(TEMPLATES) * 20]."""
    prompts, labels = [], []
    for template in TEMPLATES:
        for value, word in enumerate(DIGITS):
            for form in (word, str(value)):
                prompts.append(template.format(form))
                labels.append(value)
    return prompts, torch.tensor(labels)


def random_prompts(count: int, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
    """Prompts in random wordings, one in ten without a digit, and their labels [count] (NO_DIGIT for none).

    Short enough (under 32 tokens) that truncation never cuts the digit off.
    """

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    def noise() -> str:
        # Unknown words fall apart into letters: the encoders have to learn to look past those, too.
        if below(4) == 0:
            return "".join(chr(ord("a") + below(26)) for _ in range(3 + below(3)))
        return FILLERS[below(len(FILLERS))]

    prompts, labels = [], []
    for _ in range(count):
        label = NO_DIGIT if below(10) == 0 else below(len(DIGITS))
        if label == NO_DIGIT:
            form = ""
        else:
            form = DIGITS[label] if below(2) == 0 else str(label)
        core = TEMPLATES[below(len(TEMPLATES))].format(form)
        before = " ".join(noise() for _ in range(below(3)))
        after = " ".join(noise() for _ in range(below(3)))
        prompts.append(f"{before} {core} {after}".strip())
        labels.append(label)
    return prompts, torch.tensor(labels)


def _byte_symbols() -> list[str]:
    """One printable symbol per byte value, in the order that byte-level BPE vocabularies use."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [value for value in range(256) if value not in kept]
    return [chr(value) for value in kept] + [chr(256 + index) for index in range(len(moved))]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The BPE vocabulary and its merges: all bytes, all bytes at a word's end, known words built left to right."""
    symbols = _byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    merges: list[tuple[str, str]] = []
    known = sorted({word for text in (*TEMPLATES, *FILLERS) for word in text.replace("{}", "").split()})
    # Digits first: of two merges that compete for a letter, the earlier wins, and the digit words must stay whole.
    for word in (*DIGITS, *known):
        left = word[0]
        for index in range(1, len(word)):
            right = word[index] + ("</w>" if index == len(word) - 1 else "")
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += [START, END]
    return {token: index for index, token in enumerate(tokens)}, merges
