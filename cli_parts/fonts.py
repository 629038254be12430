"""Fonts for names in any letters: Pillow's own where it has them, else one of the system's."""

import logging
import shutil
import subprocess
import unicodedata
from functools import cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Files that Pillow looks for in the font folders of Linux, macOS and Windows; the Latin ones first
FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "segoeui.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
    "msyh.ttc",
    "YuGothR.ttc",
    "malgun.ttf",
)
FC_MATCH_SECONDS = 10  # after which fontconfig is not waited for: a first call builds its cache
NO_LETTER = "\U0010ffff"  # for which no font has a letter: how it looks is how a missing one looks
PROBE_EM = 16  # pixels: size at which letters are compared

log = logging.getLogger("stego")
builtin = cache(ImageFont.load_default)


def font(em: int, text: str = "") -> Font:
    """A font `em` pixels high that has the letters of a text: the built-in one, or else one of the system's."""
    source = _source_of(text)
    return _of_system(*source, em) if source else builtin(em)


def readable(text: str, instead: str = "") -> str:
    """A text as it can be written: with composed letters; `instead` where no font has all of them, said once.

    Without anything to write instead each missing letter becomes a question mark.
    """
    composed = unicodedata.normalize("NFC", text)
    if _has_letters(builtin(PROBE_EM), composed) or _source_of(composed):
        return composed
    if instead:
        _say_missing(composed, instead)
        return instead
    return "".join(letter if _has_letters(builtin(PROBE_EM), letter) else "?" for letter in composed)


@cache
def _say_missing(text: str, instead: str) -> None:
    log.warning(
        "No font here has all letters of %r; pictures say %s in its place. Install one, such as Noto Sans CJK.",
        text,
        instead,
    )


@cache
def _source_of(text: str) -> tuple[str, int] | None:
    """The file and index of a font of the system that has a text's letters; None if there is none, or needs none."""
    if _has_letters(builtin(PROBE_EM), text):
        return None
    for name in FONTS:
        if _file_has_letters(name, 0, text):
            return name, 0
    matched = _fontconfig_match(text)
    if matched and _file_has_letters(*matched, text):
        return matched
    return None


@cache
def _has_letters(letters: Font, text: str) -> bool:
    """Whether a font has all letters of a text; spaces and marks of format need none."""
    missing = _look(letters, NO_LETTER)
    for letter in set(text):
        if (
            not letter.isspace()
            and unicodedata.category(letter) != "Cf"
            and _look(letters, letter) == missing
        ):
            return False
    return True


def _look(letters: Font, text: str) -> tuple[tuple[int, int], bytes]:
    """The size and pixels of a text."""
    mask = letters.getmask(text)
    return mask.size, bytes(mask)


def _file_has_letters(name: str, index: int, text: str) -> bool:
    try:
        return _has_letters(_of_system(name, index, PROBE_EM), text)
    except OSError:  # no such file, no font, or one of pictures in a fixed size
        return False


@cache
def _of_system(name: str, index: int, em: int) -> Font:
    """A font by the name of its file, with or without a folder; OSError if there is none."""
    return ImageFont.truetype(name, em, index=index)


def _fontconfig_match(text: str) -> tuple[str, int] | None:
    """The font that fontconfig, if it is there, finds for the letters of a text: file and index in it."""
    program = shutil.which("fc-match")
    if program is None:
        return None
    codes = " ".join(f"{ord(letter):x}" for letter in sorted(set(text)) if not letter.isspace())
    command = [program, "-f", "%{index} %{file}", f":charset={codes}"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=FC_MATCH_SECONDS)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    index, _, file = done.stdout.partition(" ")
    return (file, int(index)) if index.isdecimal() and file else None
