"""What a disk says when it takes no more."""

import errno
import os
import shutil
from pathlib import Path

FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


def refusal(error: Exception, folder: Path) -> str:
    """Return why nothing could be written under `folder`, on one line, and how much room is left if that is why.

    Libraries wrap the system's words in many of their own, or raise another kind of error.
    """
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    known = [words for words in map(os.strerror, errno.errorcode) if words in text]
    words = max(known, key=len, default=text)
    if known and words not in FULL:
        return words
    return f"{words}, with {shutil.disk_usage(existing(folder)).free / 1e6:,.1f} MB free"


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that there is."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())
